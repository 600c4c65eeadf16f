#!/usr/bin/env python3
"""`rabit quantize` as several processes of one run: what one alone computes, checkpoints for any number of them, ends.

Environment: RABIT_BINARY the program.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

from tiny_model import RABIT, TEXT, tiny_model

BASE = ("--compute", "f32", "-t", "1", "--seq-len", "32", "--calib-tokens", "576", "--warm-epochs", "2", "--warm-batch", "6",
        "--batch", "6", "--sample-tokens", "0", "--diagnose-tokens", "64")
STEP = 6 * 32


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class ProcessesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.shared = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.shared.cleanup)
        cls.model = Path(cls.shared.name) / "model.gguf"
        tiny_model(cls.model)
        cls.text = Path(cls.shared.name) / "text.txt"
        cls.text.write_text(TEXT * 12)

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def start(self, processes, *options, out="out.gguf", each=None, **more):
        """Popen objects, the process of rank 0 first. each: more options, by rank; more: for Popen."""
        port = free_port()
        started = []
        base = list(BASE)
        for option in {word for word in map(str, options) if word.startswith("--")} & set(base):
            del base[base.index(option):base.index(option) + 2]
        for rank in range(processes):
            environment = {**os.environ, "XDG_CACHE_HOME": str(Path(self.shared.name) / "cache")}
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            started.append(subprocess.Popen(
                [RABIT, "quantize", self.model, "-o", out, "--data", self.text, *base, *map(str, options),
                 *map(str, each[rank] if each else ())],
                cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, **more))

        def end():
            for process in started:
                process.kill()
                process.wait()
                process.stdout.close()
                process.stderr.close()

        self.addCleanup(end)
        return started

    def ended(self, processes, code=0):
        errors = []
        for process in processes:
            _, error = process.communicate(timeout=120)
            errors.append(error)
        for rank, process in enumerate(processes):
            self.assertEqual(process.returncode, code, f"process {rank}: {''.join(errors)}")
        return errors

    def lines(self, out):
        """What the run measured: by block, and by step."""
        lines = [json.loads(line) for line in (self.folder / f"{out}.jsonl").read_text().splitlines()]
        return [[line for line in lines if line["phase"] == phase] for phase in ("block", "distill")]

    def run_all(self, processes, *options, out="out.gguf"):
        """What the run measured, and what its processes printed."""
        errors = self.ended(self.start(processes, *options, "--metrics", f"{out}.jsonl", out=out))
        return self.lines(out), errors

    def close(self, one, several, keys, tolerance=1e-5):
        for a, b in zip(one, several, strict=True):
            for key in keys:
                self.assertAlmostEqual(a[key], b[key], delta=tolerance * max(1.0, abs(a[key])), msg=f"{key} {a} {b}")

    def test_distillation(self):
        """From one checkpoint, made by any number of processes, any number computes the same."""
        for made_by, options in ((1, ()), (2, ("--optimizer", "muon", "--train-norms")), (3, ("--share-original",)),
                                 (1, ("--method", "standard", "--optimizer", "muon", "--momentum", "bf16")),
                                 (2, ("--recompute", "--micro-batch", "1", "--ema", "0.9", "--gamma", "0.3")),
                                 (3, ("--recompute", "--share-original", "--momentum", "bf16"))):
            options = ("--tokens", 4000 * STEP, *options)
            processes = self.start(made_by, *options, "--metrics", "out.jsonl")
            self.wait_for_step("out.jsonl", 3, processes)
            for process in processes if made_by == 3 else processes[:1]:  # some launchers tell all
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            errors = self.ended(processes)
            self.assertIn("stopped by SIGTERM", errors[0])
            self.assertEqual(errors[1:], [""] * (made_by - 1), "only the first process tells")
            self.assertEqual([path.name for path in self.folder.glob("*.gguf*")], ["out.gguf.ckpt"])
            done = len(self.lines("out")[1])
            several = {}
            for number in (1, 2, 3):
                shutil.copy(self.folder / "out.gguf.ckpt", self.folder / f"{number}.gguf.ckpt")
                processes = self.start(number, *options, "--resume", "--metrics", f"{number}.jsonl", out=f"{number}.gguf")
                self.wait_for_step(f"{number}.jsonl", done + 8, processes)
                processes[-1].send_signal(signal.SIGINT)
                errors = self.ended(processes, code=130)
                self.assertIn("interrupted; ", errors[0])
                self.assertEqual(errors[1:], [""] * (number - 1), "only the first process tells")
                _, several[number] = self.lines(number)
                self.assertEqual([line["step"] for line in several[number][:8]], list(range(done + 1, done + 9)))
                # Later a sign that turns tells roundings apart, and all that follows from it.
                self.close(several[1][:8], several[number][:8], ("loss", "text_nll", "text_nll_teacher",
                                                                 "scale_grad_norm", "latent_grad_norm"))
            for path in self.folder.iterdir():
                path.unlink()

    def test_blocks(self):
        """Training of blocks, with rates that turn few signs."""
        for options in ((), ("--train-norms",), ("--method", "standard"), ("--share-original", "--alpha-out", "0.5")):
            options = ("--no-error-feedback", "--warm-latent-lr", "1e-4", "--warm-scale-lr", "1e-4", "--tokens", 0, *options)
            (one, _), _ = self.run_all(1, *options, out="one.gguf")
            self.assertEqual(len(one), 3)
            for processes in (2, 3):
                (several, _), _ = self.run_all(processes, *options, out=f"{processes}.gguf")
                self.close(one, several, ("block", "windows", "steps", "loss_first", "loss_last", "output_error"))

    def test_stopped_between_blocks(self):
        options = ("--warm-epochs", 60, "--tokens", 0)
        processes = self.start(2, *options, "--metrics", "out.gguf.jsonl")
        self.wait_for('"block":0,', "out.gguf.jsonl", processes)
        processes[1].send_signal(signal.SIGTERM)
        self.assertIn("stopped by SIGTERM", self.ended(processes)[0])
        for number in (3, 2):
            shutil.copy(self.folder / "out.gguf.ckpt", self.folder / f"{number}.gguf.ckpt")
            (blocks, _), errors = self.run_all(number, *options, "--resume", out=f"{number}.gguf")
            self.assertIn("resuming: ", errors[0])
            self.assertEqual(blocks[-1]["block"], 2)
            self.assertLess(len(blocks), 3)

    def test_error_feedback(self):
        """Rounding decides some signs, and what follows from them: only the first layers' fits are the same."""
        def run(processes):
            (blocks, _), _ = self.run_all(processes, "--tokens", 0, "--warm-epochs", 0, "--eval", self.text,
                                          "--eval-ctx", 32, out=f"{processes}.gguf")
            log = json.loads((self.folder / f"{processes}.gguf.json").read_text())
            return blocks[0]["fit_errors"], log["perplexity"]["student"]["perplexity"]

        errors, perplexity = run(1)
        for processes in (2, 3):
            others, other = run(processes)
            for a, b in zip(errors[:4], others[:4], strict=True):
                self.assertAlmostEqual(a / b, 1.0, delta=1e-5)
            self.assertAlmostEqual(other / perplexity, 1.0, delta=0.01)

    def test_the_packed_file_is_what_was_trained(self):
        self.run_all(2, "--tokens", 4 * STEP, "--eval", self.text, "--eval-ctx", 32)
        log = json.loads((self.folder / "out.gguf.json").read_text())
        self.assertEqual(log["processes"], 2)
        done = subprocess.run([RABIT, "eval", "-m", "out.gguf", "--ppl", self.text, "--ctx", "32", "--json"],
                              cwd=self.folder, capture_output=True, check=True, text=True)
        packed = json.loads(done.stdout)["perplexity"]
        self.assertAlmostEqual(packed / log["perplexity"]["student"]["perplexity"], 1.0, delta=2e-2)

    def wait_for_step(self, metrics, step, processes):
        self.wait_for(f'"step":{step},', metrics, processes)

    def wait_for(self, text, metrics, processes):
        until = time.monotonic() + 60
        while time.monotonic() < until:
            path = self.folder / metrics
            if path.exists() and text in path.read_text().replace(" ", ""):
                return
            for process in processes:
                if process.poll() is not None:
                    self.fail(f"ended early: {process.communicate()[1]}")
            time.sleep(0.01)
        self.fail("no such line")

    def test_a_process_that_dies_ends_the_others(self):
        for victim in (0, 1):
            processes = self.start(2, "--tokens", 100000 * STEP, "--metrics", f"{victim}.jsonl", out=f"{victim}.gguf")
            self.wait_for_step(f"{victim}.jsonl", 2, processes)
            processes[victim].kill()
            began = time.monotonic()
            _, error = processes[1 - victim].communicate(timeout=60)
            self.assertLess(time.monotonic() - began, 60)
            self.assertNotIn(processes[1 - victim].returncode, (0, -signal.SIGABRT))
            last = error.strip().splitlines()[-1]
            self.assertTrue(last.startswith(f"rabit: process {1 - victim} of 2: "), error)
            self.assertIn("process", last.split(": ", 2)[2])
            self.assertEqual(error.count("rabit: "), 1)

    def test_a_process_that_hangs_ends_the_others(self):
        for victim in (0, 1):
            processes = self.start(3, "--tokens", 100000 * STEP, "--metrics", f"{victim}.jsonl", out=f"{victim}.gguf")
            self.wait_for_step(f"{victim}.jsonl", 2, processes)
            processes[victim].send_signal(signal.SIGSTOP)
            began = time.monotonic()
            for rank in sorted({0, 1, 2} - {victim}):
                _, error = processes[rank].communicate(timeout=60)
                self.assertLess(time.monotonic() - began, 60)
                self.assertEqual(processes[rank].returncode, 1)
                self.assertIn(f"rabit: process {rank} of 3: process", error.strip().splitlines()[-1])
                self.assertEqual(error.count("rabit: "), 1)

    def test_a_process_that_cannot_begin_ends_the_others(self):
        for victim in (0, 1):
            more = [("--eval", "nowhere.txt") if rank == victim else () for rank in range(3)]
            began = time.monotonic()
            errors = self.ended(self.start(3, each=more), code=1)
            self.assertLess(time.monotonic() - began, 60)
            for rank, error in enumerate(errors):
                self.assertIn("nowhere.txt", error)
                if rank != victim:
                    self.assertIn(f"rabit: process {rank} of 3: process {victim} has ended: ", error)

    def test_by_torchrun(self):
        torchrun = Path(os.environ["RABIT_SOURCE_DIR"]) / ".venv/bin/torchrun"
        if not torchrun.exists() or subprocess.run([torchrun, "--help"], capture_output=True, check=False).returncode:
            self.skipTest("no torchrun that runs: it needs all that torch's Python package needs")
        command = [torchrun, "--no-python", "--nproc-per-node", "2", "--master-port", str(free_port()), RABIT, "quantize",
                   self.model, "-o", "out.gguf", "--data", self.text, *BASE, "--tokens", str(4 * STEP)]
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(self.shared.name) / "cache")}
        done = subprocess.run([str(word) for word in command], cwd=self.folder, env=environment, capture_output=True,
                              text=True, check=False, timeout=300)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads((self.folder / "out.gguf.json").read_text())["processes"], 2)

    def test_a_checkpoint_that_cannot_be_written(self):
        """One process has no room for its part: all go on without, and the last checkpoint stays."""
        ready = self.start(2, "--tokens", 40 * STEP, "--metrics", "out.jsonl", "--checkpoint-steps", 10,
                           restore_signals=False)  # a file too large is then an error, not an end
        self.wait_for_step("out.jsonl", 12, ready)
        resource.prlimit(ready[1].pid, resource.RLIMIT_FSIZE, (1000, 1000))
        errors = self.ended(ready)
        says = "no checkpoint: another process could not write its part of out.gguf.ckpt; going on without"
        self.assertGreaterEqual(errors[0].count(says), 2, errors[0])
        self.assertTrue((self.folder / "out.gguf").exists())
        self.assertEqual(list(self.folder.glob("*.ckpt*")), [])

    def test_waiting_for_others(self):
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(free_port())}
        process = subprocess.Popen([RABIT, "quantize", self.model, "-o", "out.gguf", "--data", self.text],
                                   cwd=self.folder, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.kill)
        self.assertIn("process 0 of 2 waits for the others at 127.0.0.1:", process.stderr.readline())
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 130)
        self.assertIn("interrupted", error)

    def test_refusals(self):
        for processes, options, says in ((2, ("--minutes", "5"), "--minutes: of one process alone, here are 2"),
                                         (2, ("--target-bpw", "3.5"), "--target-bpw: of one process alone"),
                                         (4, (), "--batch 6: 4 processes cannot share it"),
                                         (2, ("--warm-batch", "3"), "--warm-batch 3: 2 processes cannot share it"),
                                         (2, ("--calib-tokens", "128"), "4 windows are too few for 2 processes"),
                                         (2, ("--device", "cuda:0"), "--device cuda:0: ")):
            for error in self.ended(self.start(processes, *options), code=1):
                self.assertIn(says, error.strip().splitlines()[-1])
        errors = self.ended(self.start(2, each=(("--seed", 1), ("--seed", 2))), code=1)
        self.assertIn("process 1 of 2: another model, other texts or other settings than process 0 has", errors[1])
        for changed, says in (({"WORLD_SIZE": "x"}, "WORLD_SIZE=x is not a number"),
                              ({"RANK": "1", "MASTER_ADDR": "localhost"}, "WORLD_SIZE is not"),
                              ({"WORLD_SIZE": "2"}, "RANK is not"), ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 is not"),
                              ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "99999"},
                               "MASTER_PORT=99999"),
                              ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "2000"},
                               "MASTER_ADDR is not set")):
            done = subprocess.run([RABIT, "quantize", self.model, "-o", "out.gguf", "--data", self.text], cwd=self.folder,
                                  env={**os.environ, **changed}, capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn(says, done.stderr)
            self.assertEqual(len(done.stderr.strip().splitlines()), 1)


if __name__ == "__main__":
    unittest.main(verbosity=1)
