#!/usr/bin/env python3
"""Draws what `rabit bench -o json` measured as a chart (SVG): tokens a second over threads, or over the positions before.

    rabit bench --shape llama2-7b --layers 4 -p 0 -d 0,1024,4096 -o json > f16.json
    bench/bench_charts.py --x depth -o depth.svg "KV cache in F16"=f16.json

A line for each file, kind of row (pp, tg) and number of threads (or of positions before); points are means of the repetitions. Of
Python's standard library alone.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from svg_charts import svg_lines  # noqa: E402

LABELS = {"depth": "positions before", "threads": "threads"}
OPTIONS = {"depth": "-d 0,1024", "threads": "-t 1,2"}
# A line for each of these.
OTHERS = {"depth": ("threads", lambda n: f"{n} thread{'s' if n != 1 else ''}"), "threads": ("depth", lambda n: f"after {n}")}


def fail(message):
    raise SystemExit(f"bench_charts: {' '.join(str(message).split())}")


def series_of(label, file, x):
    """Lines of one file: {name: [(x, tokens/s)]}."""
    try:
        told = Path(file).read_bytes()
    except OSError as error:
        fail(f"cannot read {file}: {error.strerror}")
    other, wording = OTHERS[x]
    try:
        rows = [(re.match("[a-z]+[0-9]+", row["test"]).group(), int(row[other]), int(row[x]), float(row["tokens_per_second"]))
                for row in json.loads(told)["rows"]]
        if not rows or not all(0 < rate < math.inf for *_, rate in rows):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        fail(f"{file} is no output of rabit bench -o json")
    lines = {}
    for kind, value, at, rate in rows:
        parts = [label, kind] + ([wording(value)] if len({row[1] for row in rows}) > 1 else [])
        lines.setdefault(", ".join(filter(None, parts)), []).append((at, rate))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--x", choices=sorted(LABELS), default="depth", help="what the chart runs over")
    parser.add_argument("--title", default="Tokens a second", help="what stands above it")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.svg", help="the chart to write")
    parser.add_argument("files", nargs="+", metavar="LABEL=FILE", help="outputs of rabit bench -o json")
    options = parser.parse_args()
    output = Path(options.output)
    if output.suffix != ".svg":
        fail(f"{output}: a chart's name ends in .svg")
    lines = {}
    for given in options.files:
        label, equals, file = given.partition("=")
        for name, points in series_of(label, file, options.x).items() if equals else series_of("", given, options.x).items():
            if name in lines:
                fail(f"two lines are named {name!r}: give the files labels of their own")
            lines[name] = points
    found = {at for points in lines.values() for at, _ in points}
    if len(found) < 2:
        fail(f"a chart over {LABELS[options.x]} needs two of them, all rows have {found.pop()}: measure with rabit bench "
             f"{OPTIONS[options.x]}, or take another --x")
    part = output.with_name(output.name + ".part")
    try:
        part.write_bytes(svg_lines(options.title, LABELS[options.x], lines).encode())
        part.replace(output)
    except OSError as error:
        fail(f"cannot write {output}: {error.strerror}")
    except UnicodeEncodeError:
        fail("a title or a label is not UTF-8")


if __name__ == "__main__":
    main()
