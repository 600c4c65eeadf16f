#!/usr/bin/env python3
"""scripts/headline.py on a tiny model: a row for each run, runs that are there, an interrupt.

Environment: RABIT_BINARY the program, RABIT_SOURCE_DIR the checkout.
"""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from tiny_model import RABIT, TEXT, tiny_model

ROOT = Path(os.environ.get("RABIT_SOURCE_DIR", Path(__file__).resolve().parent.parent))


class HeadlineTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache")}
        tiny_model(self.folder / "model.gguf")
        (self.folder / "a.txt").write_text(TEXT * 12)
        (self.folder / "b.txt").write_text(TEXT * 6)

    def start(self, *more, tokens=512):
        small = "--seq-len 32 --batch 2 --calib-tokens 256 --threads 1 --diagnose-tokens 0 --sample-tokens 0"
        return subprocess.Popen(
            [sys.executable, ROOT / "scripts/headline.py", "--model", "model.gguf", "--data", "a.txt", "b.txt",
             "--data-weights", "1,2", "--test", "a.txt", "--device", "cpu", "--rabit", RABIT, "--out", "out", "--page",
             "page.md", "--eval-ctx", "32", "--tokens", str(tokens), f"--extra={small}", *more],
            cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True)

    def done(self, process, code=0):
        out, error = process.communicate(timeout=200)
        self.assertEqual(process.returncode, code, out + error)
        return out, error

    def test_a_row_for_each_number_of_bits(self):
        self.done(self.start("--bits", "1,2"))
        page = (self.folder / "page.md").read_text()
        rows = [line.split(" | ") for line in page.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
        self.assertEqual(len(rows), 2)
        for bits, row in zip((1, 2), rows):
            packed = self.folder / f"out/model.{bits}bit.gguf"
            self.assertEqual(row[-1].strip(" |"), hashlib.sha256(packed.read_bytes()).hexdigest())
            self.assertEqual(row[4], "512")
            self.assertRegex(row[2], r"^[\d.]+ ± [\d.]+$")
        self.assertIn("- `b.txt` (", page)
        self.assertEqual(page.count("    rabit quantize model.gguf"), 2)
        self.assertIn("--data-weights 1,2", page)
        out, _ = self.done(self.start("--bits", "1,2"))
        self.assertEqual(out, "headline: wrote page.md\n")  # nothing runs again
        out, _ = self.done(self.start("--bits", "2", tokens=768))
        self.assertIn("headline: ", out.splitlines()[0])
        self.assertIn("| 768 |", (self.folder / "page.md").read_text())
        (self.folder / "b.txt").write_text(TEXT * 7)  # another text under the same name
        out, _ = self.done(self.start("--bits", "2", tokens=768))
        self.assertIn("quantize", out.splitlines()[0])
        self.done(self.start("--bits", "2", tokens=0))
        self.assertIn("| 0 |", (self.folder / "page.md").read_text())

    def test_interrupted_it_goes_on(self):
        self.done(self.start("--bits", "2"))  # its results must not pass for those of the next
        (self.folder / "page.md").unlink()
        process = self.start("--bits", "2", tokens=65536)
        checkpoint = self.folder / "out/model.2bit.gguf.ckpt"
        while not checkpoint.exists():  # the phases before distillation are done
            self.assertIsNone(process.poll())
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, _ = self.done(process, code=130)
        self.assertIn("the same command goes on", out)
        self.assertFalse((self.folder / "page.md").exists())
        _, error = self.done(self.start("--bits", "2", tokens=32768), code=1)
        self.assertIn("other settings", error)
        out, _ = self.done(self.start("--bits", "2", tokens=65536))
        self.assertIn("--resume", out)
        self.assertIn("| 65,536 |", (self.folder / "page.md").read_text())
        self.assertFalse(checkpoint.exists())

    def test_errors_are_one_line(self):
        for more, says in ((("--test", "missing.txt"), "missing.txt: no such file"),
                           (("--rabit", "nothing"), "--rabit nothing: no program"),
                           (("--extra=--nonsense",), "2 bits: rabit ended with")):
            code = 1 if "nonsense" in more[0] else 2
            _, error = self.done(self.start("--bits", "2", *more), code=code)
            self.assertIn(says, error.splitlines()[-1])
            self.assertNotIn("Traceback", error)


if __name__ == "__main__":
    unittest.main()
