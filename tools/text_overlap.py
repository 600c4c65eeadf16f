#!/usr/bin/env python3
"""How much of a test text occurs in training texts: the share of its words that stand in a run of 13 words (--words)
which a training text has, too. Words are what letters and digits make, in lower case; xz and gzip are read as they are.

    tools/text_overlap.py --test wiki.test.raw wikipedia.txt.xz novels.txt.xz

A share of a tenth of a percent is names, quotations and phrases; whole articles show as percents. Of Python's standard
library alone.
"""

import argparse
import gzip
import lzma
import re
import sys

OPEN = {".xz": lzma.open, ".gz": gzip.open}


def words(path):
    opened = OPEN.get(path[-3:], open)
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            # WikiText marks what joins words and numbers.
            return re.findall(r"[^\W_]+", re.sub(r" @(.)@ ", r"\1", file.read()).lower())
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise SystemExit(f"text_overlap: {path}: {getattr(error, 'strerror', None) or error}")


def runs(text, length):
    return (" ".join(text[i:i + length]) for i in range(len(text) - length + 1))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("texts", nargs="+", help="training texts")
    parser.add_argument("--test", required=True, help="test text")
    parser.add_argument("--words", type=int, default=13, help="words of a run (default: 13)")
    arguments = parser.parse_args(argv)
    if arguments.words < 1:
        parser.error(f"--words {arguments.words}: must be 1 or more")
    test = words(arguments.test)
    if len(test) < arguments.words:
        raise SystemExit(f"text_overlap: {arguments.test}: fewer than {arguments.words} words")
    places = {}
    for i, run in enumerate(runs(test, arguments.words)):
        places.setdefault(run, []).append(i)
    for path in arguments.texts:
        found = set()
        for run in runs(words(path), arguments.words):
            for i in places.get(run, ()):
                found.update(range(i, i + arguments.words))
        print(f"{path}: {len(found)} of {len(test)} words ({len(found) / len(test):.3%})", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
