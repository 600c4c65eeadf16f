#!/usr/bin/env python3
"""`rabit quantize` interrupted, ended and killed: it goes on, and nothing is lost.

Environment: RABIT_BINARY the program.
"""

import os
import random
import signal
import struct
import subprocess
import time
import unittest
from pathlib import Path

from tiny_model import FAILURE, INTERRUPTED, LEFTOVERS, QuantizeCase, RABIT, SUCCESS


class QuantizeStopTest(QuantizeCase):
    def begin(self, *more):
        """A run of some seconds a block that saves after each."""
        process = subprocess.Popen(
            [RABIT, *map(str, self.start("--warm-epochs", 150, "--checkpoint-minutes", 0.01,
                                         "--tokens", 0, *more))],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.environment
        )
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def stopped(self, process, says):
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, INTERRUPTED, error)
        done = subprocess.CompletedProcess((), INTERRUPTED, out, error)
        self.assertRegex(self.one_line(done, "SIGINT"), says)
        self.assertEqual(out, b"")
        for end in LEFTOVERS:
            self.assertFalse(Path(f"{self.out}{end}").exists(), end)

    def test_interrupt_and_resume(self):
        checkpoint = Path(f"{self.out}.ckpt")
        process = self.begin("--compute", "f32")
        until = time.monotonic() + 60
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        self.stopped(process, "interrupted; .*out.gguf.ckpt holds what was done.*--resume")
        self.assertTrue(checkpoint.exists())
        process = self.begin("--compute", "f32", "--resume", "--bits", "3")
        _, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, FAILURE)
        self.assertIn(b'made with --bits "2" ("3" here)', error)
        process = self.begin("--compute", "f32", "--resume")
        _, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, SUCCESS, error)
        self.assertRegex(error, rb"resuming: [12] of 3 blocks")
        self.assertFalse(checkpoint.exists())
        resumed = self.out.read_bytes()
        process = self.begin("--compute", "f32")
        _, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, SUCCESS, error)
        self.assertTrue(self.out.read_bytes() == resumed, "not the file of a run in one piece")

    def test_sigterm_saves_and_is_no_failure(self):
        checkpoint = Path(f"{self.out}.ckpt")
        process = self.begin("--compute", "f32")
        until = time.monotonic() + 60
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, SUCCESS, error)
        self.assertIn(b"stopped by SIGTERM", error)
        self.assertFalse(self.out.exists())
        process = self.begin("--compute", "f32", "--resume")
        _, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, SUCCESS, error)
        self.assertTrue(self.out.exists())

    def test_killed_at_any_time_a_run_ends_with_the_very_same_file(self):
        options = ("--compute", "f32", "--tokens", "8192", "--checkpoint-steps", "1", "--checkpoint-minutes", "1000")
        self.succeeds(*self.start(*options))
        whole = self.out.read_bytes()
        self.out.unlink()
        checkpoint, older = Path(f"{self.out}.ckpt"), Path(f"{self.out}.ckpt.2")

        def step(path):
            try:
                data, key = path.read_bytes(), b"rabit.checkpoint.distill_step"
            except FileNotFoundError:
                return 0
            at = data.find(key)
            return 0 if at < 0 else struct.unpack_from("<Q", data, at + len(key) + 4)[0]

        draw = random.Random(5)
        in_order = 0
        for kill in range(10):
            until = step(checkpoint) + draw.randint(1, 8)  # of 128 steps
            more = ("--keep-checkpoints", 2 + kill % 2, *(("--resume",) if checkpoint.exists() else ()))
            began = checkpoint.exists()
            process = subprocess.Popen([RABIT, *map(str, self.start(*options, *more))], cwd=self.folder,
                                       env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
            while (reached := step(checkpoint)) < until:
                self.assertTrue(reached > 0 or not began, "there was no checkpoint for a while")
                began = began or reached > 0
                self.assertIsNone(process.poll(), f"ended before kill {kill}")
                time.sleep(0.002)
            time.sleep(draw.uniform(0.0, 0.02))
            process.kill()
            self.assertEqual(process.wait(), -signal.SIGKILL, "ended before it was killed")
            kept = [path for path in (checkpoint, Path(f"{checkpoint}.1"), older) if path.exists()]
            steps = [step(path) for path in kept]
            if kill % 2 == 1 and len(steps) == 3 and not os.path.samefile(*kept[:2]):
                self.assertEqual(steps, [steps[0], steps[0] - 1, steps[0] - 2])
                in_order += 1
        self.assertGreater(in_order, 0)
        Path(f"{checkpoint}.partial").touch()  # as a kill may leave it
        self.succeeds(*self.start(*options, "--resume"))
        self.assertTrue(self.out.read_bytes() == whole, "another file than without the kills")
        self.assertFalse(checkpoint.exists())
        self.assertEqual([path.name for path in self.folder.glob(f"{checkpoint.name}*")], [])

    def test_two_runs_on_one_output(self):
        process = self.begin()
        process.stderr.readline()
        until = time.monotonic() + 60
        while not Path(f"{self.out}.lock").exists() and time.monotonic() < until:
            time.sleep(0.02)
        done = self.run_rabit(*self.start())
        self.assertEqual(done.returncode, FAILURE)
        self.assertIn("another process is writing it", self.one_line(done, "twice"))
        self.stopped(process, "interrupted")
        self.assertFalse(Path(f"{self.out}.lock").exists())

    def test_interrupt_at_the_start(self):
        process = self.begin()
        process.stderr.readline()  # "N tokens of training text"
        self.stopped(process, "interrupted before anything was finished; nothing was written")
        self.assertFalse(Path(f"{self.out}.ckpt").exists())


if __name__ == "__main__":
    unittest.main(verbosity=1)
