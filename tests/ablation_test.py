#!/usr/bin/env python3
"""scripts/ablation.py on a tiny model: what it runs, goes on with, and writes.

Environment: RABIT_BINARY the program, RABIT_SOURCE_DIR the checkout.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import xml.dom.minidom
from pathlib import Path

from tiny_model import RABIT, TEXT, tiny_model

ROOT = Path(os.environ.get("RABIT_SOURCE_DIR", Path(__file__).resolve().parent.parent))


class AblationTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.model, self.text = self.folder / "model.gguf", self.folder / "text.txt"
        tiny_model(self.model)
        self.text.write_text(TEXT * 12)

    def run_script(self, *arguments, code=0):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts/ablation.py", *map(str, arguments)], cwd=self.folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            timeout=300, check=False)
        self.assertEqual(done.returncode, code, done.stderr)
        return done

    def small(self, *more, tokens=1024):
        return ("--model", self.model, "--train", self.text, "--test", self.text, "--rabit", RABIT,
                "--out", "results", "--docs", "page.md", "--tokens", tokens, "--seeds", "1,2",
                "--eval-ctx", 32, "--extra=--seq-len 32 --threads 1", *more)

    def test_runs_once_and_writes_the_page(self):
        chosen = self.small("--groups", "method", "--only", "rabit-greedy,standard-greedy,mbok-s", "--machine", "A test.")
        done = self.run_script(*chosen)
        self.assertIn("0 of 6 runs are there already", done.stderr)
        names = {f"{name}-s{seed}.json" for name in ("standard-greedy", "rabit-greedy", "mbok")
                 for seed in (1, 2)}
        self.assertEqual({path.name for path in (self.folder / "results").glob("*.json")}, names)
        self.assertEqual(list((self.folder / "results").glob("*.gguf*")), [])
        page = (self.folder / "page.md").read_text()
        self.assertRegex(page, r"\| greedy SVID \| [\d.e+]+ ± [\d.]+ \| [\d.e+]+ ± [\d.]+ \| - \|")
        self.assertRegex(page, r"\| `rabit-greedy-s1` \| -?\d\.\d\d \| ")
        self.assertIn("A test.", page)
        self.assertRegex(page, r"6 of the \d+ runs")
        xml.dom.minidom.parse(str(self.folder / "page-method.svg"))
        settings = json.loads((self.folder / "results/standard-greedy-s2.json").read_text())["settings"]
        self.assertEqual((settings["method"], settings["init_sweeps"], settings["seed"]),
                         ("standard", 1, 2))
        before = {path: path.stat().st_mtime_ns for path in (self.folder / "results").glob("*.json")}
        (self.folder / "page.md").unlink()
        self.assertIn("6 of 6 runs are there already", self.run_script(*chosen).stderr)
        self.assertEqual(before, {path: path.stat().st_mtime_ns for path in before})
        self.assertEqual((self.folder / "page.md").read_text(), page)
        # The page can be made without the logs, from what is kept beside it.
        self.run_script(*chosen, "--write-only", "--out", "none", "--machine", "Another.")
        self.assertEqual((self.folder / "page.md").read_text(), page)
        # What was measured with another text is no result either.
        other = self.folder / "other.txt"
        other.write_text(TEXT * 13)
        for option in ("--train", "--test"):
            again = [*self.small("--groups", "method", "--only", "rabit-greedy-s1"), "--rabit", "/bin/false"]
            again[again.index(option) + 1] = other
            self.assertIn("0 of 1 runs are there already", self.run_script(*again, code=1).stderr)
        # What was measured with other options is no result of this run.
        self.assertIn("holds no results", self.run_script(*self.small("--write-only", "--eval-ctx", 64), code=1).stderr)
        self.assertIn("rabit-greedy-s1: ", self.run_script(
            *self.small("--groups", "method", "--only", "rabit-greedy-s1", tokens=512)).stderr)

    def test_goes_on_where_it_stopped(self):
        chosen = self.small("--groups", "method", "--only", "rabit-full-s1", tokens=400000)
        script = subprocess.Popen([sys.executable, ROOT / "scripts/ablation.py", *map(str, chosen)], cwd=self.folder,
                                  stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        err = self.folder / "results/rabit-full-s1.err"
        while script.poll() is None and not (err.exists() and "checkpoint: " in err.read_text()):
            time.sleep(0.05)  # until distillation begins
        script.send_signal(signal.SIGINT)
        _, told = script.communicate(timeout=300)
        self.assertEqual(script.returncode, 130, told)
        self.assertIn("rabit-full-s1: interrupted", told)
        self.assertIn("1 runs are left", told)
        checkpoint = self.folder / "results/rabit-full-s1.gguf.ckpt"
        self.assertTrue(checkpoint.exists())
        self.assertFalse((self.folder / "page.md").exists())
        self.run_script(*chosen)
        log = json.loads((self.folder / "results/rabit-full-s1.json").read_text())
        self.assertTrue(log["resumed"])
        self.assertFalse(checkpoint.exists())

    def test_wrong_input(self):
        self.assertIn("no such file", self.run_script(*self.small("--model", "none"), code=1).stderr)
        self.assertIn("no group x", self.run_script(*self.small("--groups", "x"), code=1).stderr)
        self.assertIn("not numbers", self.run_script(*self.small("--seeds", "1,x"), code=1).stderr)
        self.assertIn("holds no results", self.run_script("--write-only", "--out", "none", "--docs", "page.md", code=1).stderr)
        done = self.run_script(*self.small("--only", "rabit-full-s1", "--groups", "method", "--rabit", "/bin/false"),
                               code=1)
        self.assertIn("failed: rabit-full-s1", done.stderr)
        for more, says in ((("--rabit", "none"), "no program"), (("--only", "zzz"), "no such run"),
                           (("--out", self.text), "File exists")):
            self.assertIn(says, self.run_script(*self.small(*more), code=1).stderr)
        for more, says in ((("--jobs", 0), "1 or more"), (("--extra='",), "--extra"), (("--tokens", -8), "1 or more")):
            self.assertIn(says, self.run_script(*self.small(*more), code=2).stderr)
        self.assertIn("name its page", self.run_script("--tokens", 1000, "--write-only", code=2).stderr)
        (self.folder / "page.json").write_text("{")
        self.assertIn("not JSON", self.run_script(*self.small(), code=1).stderr)

    def test_list(self):
        lines = self.run_script("--list", "--device", "cuda").stdout.splitlines()
        self.assertGreater(len(lines), 60)
        keys = [line.split()[1] for line in lines]
        self.assertEqual(len(keys), len(set(keys)))
        # What the grid asks for, the program takes.
        for line in lines[::4]:
            options = line.split("--seed ")[1].split()[1:]
            done = subprocess.run([RABIT, "quantize", "none", "-o", "x", "--data", "none", *options],
                                  stderr=subprocess.PIPE, text=True, check=False)
            self.assertEqual(done.returncode, 1, (line, done.stderr))
            self.assertIn("none", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=1)
