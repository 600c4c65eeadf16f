#!/usr/bin/env python3
"""Includes below src/ keep to the table in CONTRIBUTING.md ("Who may include whom")."""

import os
import re
import sys
import unittest
from pathlib import Path

ROOT = Path(os.environ.get("RABIT_SOURCE_DIR", Path(__file__).resolve().parent.parent))
HEADING = "### Who may include whom"
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
TORCH = ("torch/", "ATen/", "c10/")
SOURCES = {".cpp", ".h", ".cu", ".cuh", ".inc"}


def read_table(text):
    """{folder: set of folders it may include, or None for anything} of the markdown text."""
    table = {}
    for line in text[text.index(HEADING):].splitlines()[1:]:
        if line.startswith("#"):
            break
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 2 or cells[0] in ("folder", "---"):
            continue
        folder, allowed = cells
        names = {name.strip() for name in allowed.split(",")}
        table[folder] = None if names == {"anything"} else names - {"-"}
    return table


def folder_of(path, table):
    """The table's folder that holds `path` (relative to src/): the longest that matches."""
    matches = [folder for folder in table if path.startswith(folder + "/")]
    return max(matches, key=len, default=None)


def breaches(path, text, table):
    """What is wrong with the includes of one file, `path` relative to src/."""
    home = folder_of(path, table)
    if home is None:
        return [f"{path}: its folder is not in the table"]
    allowed = table[home]
    found = []
    for match in INCLUDE.finditer(text):
        quoted, angled = match.groups()
        name = quoted or angled
        if allowed is None:
            continue
        if name.startswith(TORCH):
            if "torch" not in allowed:
                found.append(f"{path}: {home} may not include {name}")
            continue
        if angled or name.startswith("rabit/"):
            continue
        target = folder_of(name, table)
        if target is None:
            found.append(f'{path}: "{name}" is not written from src/ or include/ on')
        elif target != home and target not in allowed:
            found.append(f"{path}: {home} may not include {name}")
    return found


class LayoutTest(unittest.TestCase):
    table = read_table((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))

    def test_table_is_read_whole(self):
        self.assertGreaterEqual(len(self.table), 12)
        self.assertEqual(self.table["base"], set())
        self.assertEqual(self.table["model"], {"base", "io"})
        self.assertIsNone(self.table["cli"])
        for folder, allowed in self.table.items():
            for name in (allowed or set()) - {"torch"}:
                self.assertIn(name, self.table, f"{folder} may include an unknown folder")

    def test_sources_keep_to_the_table(self):
        files = [p for p in sorted((ROOT / "src").rglob("*")) if p.suffix in SOURCES]
        self.assertGreater(len(files), 30)
        found = []
        for file in files:
            text = file.read_text(encoding="utf-8")
            found += breaches(file.relative_to(ROOT / "src").as_posix(), text, self.table)
        self.assertEqual(found, [])

    def test_public_headers_include_the_standard_library_and_each_other_only(self):
        for file in sorted((ROOT / "include").rglob("*.h")):
            for quoted, angled in INCLUDE.findall(file.read_text(encoding="utf-8")):
                name = quoted or angled
                fine = name.startswith("rabit/") if quoted else "/" not in name and "." not in name
                self.assertTrue(fine, f"{file.name} includes {name}")

    def test_what_the_table_forbids_is_caught(self):
        forbidden = {
            "base/a.h": '#include "io/gguf.h"',
            "io/a.cpp": '#  include   "model/config.h"',
            "engine/a.cpp": '#include "kernels/cpu/vec.h"',
            "kernels/ref/a.cpp": '#include "kernels/cpu/vec.h"',
            "train/a.cpp": '#include <vector>\n#include "engine/model.h"\n',
            "quant/a.h": "#include <torch/torch.h>",
            "eval/a.cpp": '#include "config.h"',
            "unknown/a.cpp": "",
        }
        for path, text in forbidden.items():
            self.assertEqual(len(breaches(path, text, self.table)), 1, path)

    def test_what_the_table_allows_passes(self):
        allowed = {
            "base/a.cpp": '#include "base/a.h"\n#include "rabit/result.h"\n#include <fmt/core.h>',
            "engine/a.cpp": '#include "kernels/api/kernels.h"\n#include "engine/model.h"',
            "train/a.cpp": '#include <torch/torch.h>\n#include "quant/residual_binary.h"',
            "cli/a.cpp": '#include "train/trainer.h"\n#include "engine/model.h"',
            "base/b.cpp": '// #include "io/gguf.h" would not do',
        }
        for path, text in allowed.items():
            self.assertEqual(breaches(path, text, self.table), [], path)


if __name__ == "__main__":
    unittest.main(argv=sys.argv, verbosity=1)
