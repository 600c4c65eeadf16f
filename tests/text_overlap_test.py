#!/usr/bin/env python3
"""tools/text_overlap.py counts words of shared runs, whatever their case, marks and packing.

Environment: RABIT_SOURCE_DIR the checkout.
"""

import lzma
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(os.environ.get("RABIT_SOURCE_DIR", Path(__file__).resolve().parent.parent))


class TextOverlapTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.test = [f"word{i}" for i in range(40)]
        (self.folder / "test.txt").write_text(" ".join(self.test))

    def overlap(self, *arguments, code=0):
        done = subprocess.run([sys.executable, ROOT / "tools/text_overlap.py", "--test", "test.txt", *arguments],
                              cwd=self.folder, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, code, done.stderr)
        return done.stdout if code == 0 else done.stderr

    def test_counts_each_word_of_a_shared_run_once(self):
        shared = " , ".join(self.test[5:20]).upper()  # 15 words: three runs of 13
        with lzma.open(self.folder / "a.txt.xz", "wt") as file:
            file.write(f"before {shared} after {shared}")
        (self.folder / "b.txt").write_text(" ".join(self.test[:12]))  # one word too few
        self.assertEqual(self.overlap("a.txt.xz", "b.txt"),
                         "a.txt.xz: 15 of 40 words (37.500%)\nb.txt: 0 of 40 words (0.000%)\n")
        self.assertIn("12 of 40", self.overlap("b.txt", "--words", "12"))
        (self.folder / "c.txt").write_text(" ".join(reversed(self.test)))
        self.assertIn(" 0 of 40", self.overlap("c.txt"))

    def test_wikitext_marks_join(self):
        (self.folder / "test.txt").write_text("a well @-@ known 1 @,@ 000")
        (self.folder / "a.txt").write_text("a well-known 1,000")
        self.assertIn("5 of 5 words", self.overlap("a.txt", "--words", "5"))

    def test_errors_are_one_line(self):
        (self.folder / "bad.txt.xz").write_bytes(b"no xz")
        for arguments, says, code in ((["missing.txt"], "missing.txt: No such file", 1),
                                      (["bad.txt.xz"], "bad.txt.xz: ", 1), (["--words", "0", "test.txt"], "--words 0", 2),
                                      (["--words", "99", "test.txt"], "test.txt: fewer than 99 words", 1)):
            error = self.overlap(*arguments, code=code)
            self.assertIn(says, error.splitlines()[-1])
            self.assertNotIn("Traceback", error)


if __name__ == "__main__":
    unittest.main()
