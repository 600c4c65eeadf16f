#!/usr/bin/env python3
"""bench/compare_llamacpp.sh and .py with programs of known speed in llama.cpp's place; bench/bench_charts.py.

Environment: RABIT_BINARY the program, RABIT_SOURCE_DIR the checkout.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree
from pathlib import Path

from tiny_model import RABIT, tiny_model

ROOT = Path(os.environ.get("RABIT_SOURCE_DIR", Path(__file__).resolve().parent.parent))
# 2 ms a token and block, and 7 ms for the rest; a prompt ten times as fast.
BENCH = """#!/usr/bin/env python3
import json, re, sys
blocks = int(re.search(r"-(\\d+)\\.gguf", sys.argv[sys.argv.index("-m") + 1]).group(1))
rate = 1 / (2e-3 * blocks + 7e-3)
print(json.dumps([{"n_prompt": 8, "n_gen": 0, "samples_ts": [10 * rate] * 3},
                  {"n_prompt": 0, "n_gen": 2, "samples_ts": [rate] * 3}]))
"""
# 1 ms a token and path and block, 3 ms for the rest, a prompt 4 times as fast; 5 MB a path and block, 20 GB/s to be had.
RABIT_BENCH = """#!/usr/bin/env python3
import json, sys
if sys.argv[1] == "--version":
    print("rabit 0")
    sys.exit()
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
blocks, bits = int(given["--layers"]), int(given["--bits"])
rate = 1 / (1e-3 * bits * blocks + 3e-3)
row = {"read_bytes_per_second": [20e9] * 3}
print(json.dumps({"weight_bytes_per_token": 5_000_000 * bits * blocks + 1000, "kernels": "fast", "rows": [
    {**row, "n_prompt": 8, "n_gen": 0, "samples": [4 * rate] * 3}, {**row, "n_prompt": 0, "n_gen": 2, "samples": [rate] * 3}]}))
"""
QUANTIZE = """#!/usr/bin/env python3
import shutil, sys
shutil.copy(sys.argv[2], sys.argv[3])
"""


class ShapesTest(unittest.TestCase):
    def test_shapes_are_those_of_the_program(self):
        sys.path.insert(0, str(ROOT / "bench"))
        from compare_llamacpp import SHAPES  # noqa: PLC0415
        from compare_torch import SHAPES as TORCH_SHAPES  # noqa: PLC0415
        rows = re.findall(r'Shape\{"([^"]+)", ([^}]+)\}', (ROOT / "src/model/random_model.cpp").read_text())
        shapes, tuples = {}, {}
        for name, numbers in rows:
            tuples[name] = tuple(map(int, numbers.split(", ")[:6]))
            _, d_model, heads, kv_heads, d_ff, _, context = map(int, numbers.split(", ")[:7])
            shapes[name] = {"d-model": d_model, "heads": heads, "kv-heads": kv_heads, "d-ff": d_ff, "context": context}
        self.assertGreaterEqual(len(shapes), 7)
        self.assertEqual(SHAPES, {name: shapes.get(name) for name in SHAPES})
        self.assertEqual(TORCH_SHAPES, {name: tuples.get(name) for name in TORCH_SHAPES})

    def test_comparison_with_pytorch_says_what_it_lacks(self):
        for arguments, code, says in (((), 1, "PyTorch"), (("--shape", "gpt"), 2, "--shape"), (("--context", "0"), 2, "--context")):
            done = subprocess.run([sys.executable, str(ROOT / "bench/compare_torch.py"), *arguments], stderr=subprocess.PIPE,
                                  env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, text=True, timeout=120, check=False)
            self.assertEqual(done.returncode, code, done.stderr)
            self.assertIn(says, done.stderr.splitlines()[-1])


class ChartsTest(unittest.TestCase):
    def charts(self, *arguments, code=0):
        done = subprocess.run([str(ROOT / "bench/bench_charts.py"), *map(str, arguments)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        self.assertEqual(done.returncode, code, done.stderr)
        return done.stderr

    def test_chart(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tiny_model(folder / "tiny.gguf")
            done = subprocess.run([RABIT, "bench", "-m", folder / "tiny.gguf", "-p", "4", "-n", "2", "-r", "1", "-t", "1,2",
                                   "-d", "0,6", "-o", "json"], stdout=subprocess.PIPE, timeout=120, check=True)
            (folder / "a.json").write_bytes(done.stdout)
            for x, what in (("depth", "positions before"), ("threads", "threads")):
                self.charts("--x", x, "--title", "Speed & size", "-o", folder / "a.svg", f"F16={folder}/a.json")
                chart = xml.etree.ElementTree.parse(folder / "a.svg").getroot()
                texts = ["".join(part.itertext()) for part in chart.iter() if part.tag.endswith("text")]
                others = ("1 thread", "2 threads") if x == "depth" else ("after 0", "after 6")
                for text in ("Speed & size", what, *(f"F16, {test}, {of}" for test in ("pp4", "tg2") for of in others)):
                    self.assertIn(text, texts)
                self.assertEqual(len([part for part in chart.iter() if part.tag.endswith("circle")]), 8)
            self.charts("-o", folder / "a.svg", folder / "a.json")  # no label
            before = (folder / "a.svg").read_bytes()
            row = {"test": "tg2", "threads": 1, "depth": 0}
            for rates in ((64, 68), (64, 64.1), (0.02, 0.021), (3, 3), (1, 50), (123456, 234567)):
                rows = [{**row, "depth": at, "tokens_per_second": rate} for at, rate in enumerate(rates)]
                (folder / "close.json").write_text(json.dumps({"rows": rows}))
                self.charts("-o", folder / "close.svg", folder / "close.json")
                chart = xml.etree.ElementTree.parse(folder / "close.svg").getroot()
                ticks = [float(part.text) for part in chart.iter() if part.get("text-anchor") == "end"]
                self.assertTrue(3 <= len(set(ticks)) <= 16, ticks)
                self.assertTrue(all(0.9 * rates[0] < tick < 1.1 * rates[1] for tick in ticks), ticks)
            error = self.charts("--x", "threads", "-o", folder / "a.svg", f"F16={folder}/close.json", code=1)
            self.assertEqual(error, "bench_charts: a chart over threads needs two of them, all rows have 1: measure with rabit "
                                    "bench -t 1,2, or take another --x\n")
            bad = ["{}", '{"rows": []}', '{"rows": 3}', "[" * 100000, "\0", '{"rows": [["tg2"]]}',
                   *(json.dumps({"rows": [{**row, "tokens_per_second": rate}]}) for rate in (None, 0, -5, math.nan, "x", 10 ** 400))]
            for number, text in enumerate(bad):
                (folder / f"bad{number}.json").write_text(text)
            wrong = [("a.svg", f"F16={folder}/bad{number}.json") for number in range(len(bad))]
            wrong += [("a.svg", f"F16={folder}/none.json"), ("a.svg", "F16="), ("none/b.svg", f"F16={folder}/a.json"),
                      ("a.json", f"F16={folder}/a.json"), ("a.svg", os.fsdecode(b"\xff=") + f"{folder}/a.json")]
            for output, *files in wrong + [("a.svg", f"F16={folder}/a.json", f"F16={folder}/a.json")]:
                error = self.charts("-o", folder / output, *files, code=1)
                self.assertRegex(error, r"\Abench_charts: [^\n]+\n\Z", files)
                self.assertEqual((folder / "a.svg").read_bytes(), before)
                self.assertEqual([path.name for path in folder.iterdir() if path.suffix == ".part"], [])


class CompareTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        for name, text in (("llama-bench", BENCH), ("llama-quantize", QUANTIZE), ("fake-rabit", RABIT_BENCH)):
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        self.vocabulary = self.folder / "tiny.gguf"
        tiny_model(self.vocabulary)

    def compare(self, *more, code=0):
        done = subprocess.run([str(ROOT / "bench/compare_llamacpp.sh"), "--llama", self.folder, "--vocabulary", self.vocabulary,
                               "--rabit", RABIT, "--shape", "smollm2-135m", "--blocks", "1,3", "--types", "Q4_0,Q2_K",
                               "--prompt", "8", "--generate", "2", "--repetitions", "1", "--rounds", "2", *more],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
                              env={**os.environ, "TMPDIR": str(self.folder)})
        self.assertEqual(done.returncode, code, done.stderr)
        return done

    def test_page(self):
        told = self.compare("--threads", "1,2", "--bits", "2,3").stdout
        rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", told, re.MULTILINE)
        names = [row[0] for row in rows if not row[0].startswith("-") and row[0].strip()]
        self.assertEqual(names, 2 * ["rabit, 2 bits", "rabit, 3 bits", "llama.cpp, Q4_0", "llama.cpp, Q2_K"])
        for name, token, part, prompt in rows:
            if name.startswith("llama.cpp"):
                self.assertEqual((token, part, prompt), ("2.00 (2.00 to 2.00)", "-", "1.6 (1.6 to 1.6)"))
            elif name.startswith("rabit"):
                self.assertRegex(part, r"^-?\d+ %$")
        self.assertIn("2 threads, reading ", told)
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["fake-rabit", "llama-bench", "llama-quantize", "tiny.gguf"])

    def test_figures(self):
        told = self.compare("--rabit", self.folder / "fake-rabit", "--threads", "1", "--bits", "2,3").stdout
        self.assertIn("rabit's kernels: fast; medians of 2 rounds", told)
        self.assertIn("1 thread, reading 20.0 (20.0 to 20.0) GB/s:", told)
        self.assertIn("| rabit, 2 bits | 2.00 (2.00 to 2.00) | 25 % | 4.0 (4.0 to 4.0) |", told)
        self.assertIn("| rabit, 3 bits | 3.00 (3.00 to 3.00) | 25 % | 6.0 (6.0 to 6.0) |", told)

    def test_refusals(self):
        for arguments, says in ((("--blocks", "3,1"), "--blocks 3,1: two numbers"), (("--rounds", "0"), "must be 1 or more"),
                                (("--rabit", "none"), "none: no program"),
                                (("--rabit", "/bin/false"), "--rabit /bin/false: this is not rabit"),
                                (("--rabit", self.vocabulary), "no program"), (("--bogus",), "unrecognized arguments: --bogus"),
                                (("--types", "Q4_0,FOO"), "--types 'Q4_0,FOO': a list such as TQ2_0,"),
                                (("--threads", "0"), "--threads '0': a list such as"), (("--bits", "7"), "--bits '7': a list"),
                                (("--types", ""), "--types '': a list"),
                                (("--vocabulary", "none.gguf"), "none.gguf: no such file")):
            error = self.compare(*arguments, code=2).stderr
            self.assertIn(says, error)
            self.assertRegex(error, r"\Acompare_llamacpp: [^\n]+\n\Z")
        (self.folder / "llama-quantize").write_text("#!/bin/sh\necho no such type >&2\nexit 3\n")
        self.assertIn("no such type", self.compare(code=1).stderr)
        (self.folder / "llama-quantize").write_text(QUANTIZE)
        (self.folder / "llama-bench").write_text("#!/bin/sh\necho no JSON\n")
        self.assertRegex(self.compare(code=1).stderr.splitlines()[-1], "llama-bench wrote no JSON")

    def test_stopped(self):
        (self.folder / "llama-quantize").write_text("#!/bin/sh\ntouch \"$(dirname \"$0\")/started\"\nexec sleep 60\n")
        for number in (signal.SIGTERM, signal.SIGINT):
            process = subprocess.Popen([str(ROOT / "bench/compare_llamacpp.sh"), "--llama", self.folder, "--vocabulary",
                                        self.vocabulary, "--rabit", RABIT, "--shape", "smollm2-135m", "--blocks", "1,2", "--types",
                                        "Q2_K"], stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(self.folder)})
            while process.poll() is None and not (self.folder / "started").exists():
                time.sleep(0.1)
            process.send_signal(number)
            _, error = process.communicate(timeout=120)
            self.assertEqual(process.returncode, 128 + number, error)
            self.assertEqual(error.splitlines()[-1], "compare_llamacpp: stopped")
            self.assertEqual([path.name for path in self.folder.iterdir() if path.is_dir()], [])
            (self.folder / "started").unlink()

    def test_options_are_checked_before_anything_is_built(self):
        for arguments in (("--bogus",), (), ("--vocabulary", "none.gguf")):
            done = subprocess.run([str(ROOT / "bench/compare_llamacpp.sh"), *arguments], stderr=subprocess.PIPE, timeout=60,
                                  env={**os.environ, "RABIT_LLAMA_BUILD": str(self.folder / "build")}, check=False)
            self.assertEqual(done.returncode, 2, arguments)
            self.assertFalse((self.folder / "build").exists())


if __name__ == "__main__":
    unittest.main()
