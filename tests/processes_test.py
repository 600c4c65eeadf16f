#!/usr/bin/env python3
"""`rabit quantize` as several processes of one run: what one alone computes, checkpoints for any number of them, ends.

Environment: RABIT_BINARY the program.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

from tiny_model import RABIT, TEXT, tiny_model

BASE = ("--compute", "f32", "-t", "1", "--seq-len", "32", "--calib-tokens", "512", "--warm-epochs", "1", "--batch", "6",
        "--sample-tokens", "0", "--diagnose-tokens", "64")
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

    def start(self, processes, *options, out="out.gguf", each=None):
        """Popen objects, the process of rank 0 first. each: more options, by rank."""
        port = free_port()
        started = []
        for rank in range(processes):
            environment = {**os.environ, "XDG_CACHE_HOME": str(Path(self.shared.name) / "cache")}
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            started.append(subprocess.Popen(
                [RABIT, "quantize", self.model, "-o", out, "--data", self.text, *BASE, *map(str, options),
                 *map(str, each[rank] if each else ())],
                cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True))
        self.addCleanup(lambda: [process.kill() for process in started])
        return started

    def ended(self, processes, code=0):
        errors = []
        for process in processes:
            _, error = process.communicate(timeout=120)
            errors.append(error)
        for rank, process in enumerate(processes):
            self.assertEqual(process.returncode, code, f"process {rank}: {''.join(errors)}")
        return errors

    def run_all(self, processes, *options, out="out.gguf"):
        """What the run measured, and what its processes printed."""
        metrics = self.folder / f"{out}.jsonl"
        errors = self.ended(self.start(processes, *options, "--metrics", metrics, out=out))
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        return [line for line in lines if line["phase"] == "distill"], errors

    def same(self, one, several, tolerance=1e-5):
        self.assertEqual([line["step"] for line in one], [line["step"] for line in several])
        for a, b in zip(one, several):
            for key in ("loss", "text_nll", "text_nll_teacher", "scale_grad_norm", "latent_grad_norm"):
                self.assertAlmostEqual(a[key], b[key], delta=tolerance * max(1.0, abs(a[key])), msg=f"{key} {a} {b}")
            self.assertAlmostEqual(a["signs_turned"], b["signs_turned"], delta=1e-4)

    def test_as_one_process(self):
        for options in ((), ("--optimizer", "muon", "--train-norms"), ("--method", "standard", "--optimizer", "muon"),
                        ("--recompute", "--micro-batch", "1", "--ema", "0.9", "--gamma", "0.3")):
            options = ("--tokens", 10 * STEP, *options)
            one, _ = self.run_all(1, *options, out="one.gguf")
            self.assertEqual(len(one), 10)
            for processes in (2, 3):
                several, errors = self.run_all(processes, *options, out=f"{processes}.gguf")
                self.same(one, several)
                self.assertIn(f"{processes} processes", errors[0])
                self.assertEqual(errors[1:], [""] * (processes - 1), "only the first process tells")
                size = {(self.folder / name).stat().st_size for name in ("one.gguf", f"{processes}.gguf")}
                self.assertEqual(len(size), 1)
                self.assertEqual(list(self.folder.glob("*.ckpt*")), [])

    def test_the_packed_file_is_what_was_trained(self):
        self.run_all(2, "--tokens", 4 * STEP, "--eval", self.text, "--eval-ctx", 32)
        log = json.loads((self.folder / "out.gguf.json").read_text())
        self.assertEqual(log["processes"], 2)
        done = subprocess.run([RABIT, "eval", "-m", "out.gguf", "--ppl", self.text, "--ctx", "32", "--json"],
                              cwd=self.folder, capture_output=True, check=True, text=True)
        packed = json.loads(done.stdout)["perplexity"]
        self.assertAlmostEqual(packed / log["perplexity"]["student"]["perplexity"], 1.0, delta=2e-2)

    def test_a_checkpoint_is_for_any_number_of_processes(self):
        for more, numbers in ((("--ema", "0.9", "--train-norms"), ((2, 1), (1, 2))),
                              (("--optimizer", "muon"), ((2, 3),))):
            whole, _ = self.run_all(1, "--tokens", 60 * STEP, *more, out="whole.gguf")
            for first, then in numbers:
                out = f"{first}-{then}-{more[0]}.gguf"
                options = ("--tokens", 60 * STEP, *more, "--metrics", f"{out}.jsonl")
                processes = self.start(first, *options, out=out)
                self.wait_for_step(f"{out}.jsonl", 3, processes)
                for process in processes[:1]:  # the others are to notice
                    process.send_signal(signal.SIGTERM)
                errors = self.ended(processes)
                self.assertIn("stopped by SIGTERM", errors[0])
                self.assertFalse((self.folder / out).exists())
                processes = self.start(then, *options, "--resume", out=out)
                self.ended(processes)
                lines = [json.loads(line) for line in (self.folder / f"{out}.jsonl").read_text().splitlines()]
                steps = [line for line in lines if line["phase"] == "distill"]
                self.assertEqual([line["step"] for line in steps], list(range(1, 61)))
                self.same(whole[:12], steps[:12])  # in time a turned sign tells roundings apart
                self.assertEqual(list(self.folder.glob(f"{out}.ckpt*")), [])

    def wait_for_step(self, metrics, step, processes):
        until = time.monotonic() + 60
        while time.monotonic() < until:
            path = self.folder / metrics
            if path.exists() and f'"step":{step},' in path.read_text().replace(" ", ""):
                return
            self.assertTrue(all(process.poll() is None for process in processes), "ended early")
            time.sleep(0.01)
        self.fail("no such step")

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
        processes = self.start(3, "--tokens", 100000 * STEP, "--metrics", "out.jsonl")
        self.wait_for_step("out.jsonl", 2, processes)
        processes[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        for rank in (0, 2):
            _, error = processes[rank].communicate(timeout=60)
            self.assertLess(time.monotonic() - began, 60)
            self.assertEqual(processes[rank].returncode, 1)
            self.assertIn(f"rabit: process {rank} of 3: process", error.strip().splitlines()[-1])
            self.assertEqual(error.count("rabit: "), 1)

    def test_refusals(self):
        for processes, options, says in ((2, ("--minutes", "5"), "--minutes: of one process alone, here are 2"),
                                         (2, ("--target-bpw", "3.5"), "--target-bpw: of one process alone"),
                                         (4, (), "--batch 6: 4 processes cannot share it")):
            for error in self.ended(self.start(processes, *options), code=1):
                self.assertIn(says, error.strip().splitlines()[-1])
        errors = self.ended(self.start(2, each=(("--seed", 1), ("--seed", 2))), code=1)
        self.assertIn("process 1 of 2 has another model, other texts or other settings", errors[1])
        for changed, says in (({"WORLD_SIZE": "x"}, "WORLD_SIZE=x is not a number"),
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
