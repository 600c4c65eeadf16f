#!/usr/bin/env python3
"""tools/random_model.py: the sizes asked for, weights of the size meant, and a model that trains.

Environment: RABIT_BINARY the program, RABIT_SOURCE_DIR the checkout.
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tiny_model import RABIT, TEXT, tiny_model

ROOT = Path(os.environ.get("RABIT_SOURCE_DIR", Path(__file__).resolve().parent.parent))
SHAPE = {"--layers": 2, "--d-model": 128, "--heads": 4, "--kv-heads": 2, "--d-ff": 96, "--context": 64}


class RandomModelTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.like, self.out = self.folder / "like.gguf", self.folder / "out.gguf"
        tiny_model(self.like)

    def write(self, like=None, code=0, **other):
        shape = {**SHAPE, **{f"--{name.replace('_', '-')}": value for name, value in other.items()}}
        done = subprocess.run([sys.executable, ROOT / "tools/random_model.py", "--like", like or self.like, "-o", self.out,
                               *(str(part) for pair in shape.items() for part in pair)],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        self.assertEqual(done.returncode, code, done.stderr)
        return done

    def run_rabit(self, *arguments):
        done = subprocess.run([RABIT, *map(str, arguments)], cwd=self.folder, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, timeout=120, check=False,
                              env={**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache")})
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def test_the_shape_asked_for(self):
        self.write()
        told, like = (json.loads(self.run_rabit("inspect", path, "--json").stdout) for path in (self.out, self.like))
        model = told["model"]
        self.assertEqual([model[name] for name in ("layers", "d_model", "heads", "kv_heads", "d_ff", "context_length")],
                         list(SHAPE.values()))
        self.assertEqual(model["vocab_size"], like["model"]["vocab_size"])
        linear = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 96)
        self.assertEqual(told["parameters"], linear + 2 * 128 * model["vocab_size"] + 5 * 128)
        self.assertEqual(told["bits_per_weight"], 4.5)

    def test_it_trains(self):
        (self.folder / "text.txt").write_text(TEXT * 4)
        self.write()
        self.run_rabit("quantize", self.out, "-o", "packed.gguf", "--data", "text.txt", "--seq-len", 32, "--calib-tokens",
                       256, "--tokens", 128, "--batch", 2, "-t", 1)
        log = json.loads((self.folder / "packed.gguf.json").read_text())
        self.assertGreater(log["distill"][0]["loss"], 0)

    def test_errors_are_one_line(self):
        kept = self.folder / "kept.txt"
        kept.write_text("no model")
        for says, code, other in (("no GGUF file", 1, {"like": kept}), ("No such file", 1, {"like": self.folder / "none"}),
                                  ("multiple of --heads", 2, {"heads": 3}), ("multiples of 32", 2, {"d_ff": 40}),
                                  ("must be 1 or more", 2, {"layers": 0})):
            error = self.write(code=code, **other).stderr
            self.assertIn(says, error.splitlines()[-1])
            self.assertNotIn("Traceback", error)
            self.assertFalse(self.out.exists())
        self.out.write_text("kept")
        self.assertIn("File exists", self.write(code=1).stderr)
        self.assertEqual(self.out.read_text(), "kept")


if __name__ == "__main__":
    unittest.main()
