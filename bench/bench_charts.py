#!/usr/bin/env python3
"""Draws what `rabit bench -o json` measured as a chart (SVG): tokens a second over threads, or over the positions before.

    rabit bench --shape llama2-7b --layers 4 -p 0 -d 0,1024,4096 -o json > f16.json
    bench/bench_charts.py --x depth -o depth.svg "KV cache in F16"=f16.json

Each file is drawn in a colour of its own, a line for each kind of row (pp, tg); points are means of the repetitions. Of Python's
standard library alone.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from svg_charts import svg_lines  # noqa: E402

LABELS = {"depth": "positions before", "threads": "threads"}


def series_of(label, file, x):
    """Lines of one file: {name: [(x, tokens/s)]}."""
    try:
        rows = json.loads(Path(file).read_text())["rows"]
        lines = {}
        for row in rows:
            kind = re.match("[a-z]+[0-9]+", row["test"]).group()
            lines.setdefault(kind, []).append((row[x], row["tokens_per_second"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"bench_charts: {file} is no output of rabit bench -o json: {error}")
    return {f"{label}, {kind}" if label else kind: points for kind, points in lines.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--x", choices=sorted(LABELS), default="depth", help="what the chart runs over")
    parser.add_argument("--title", default="Tokens a second", help="what stands above it")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the SVG to write")
    parser.add_argument("files", nargs="+", metavar="LABEL=FILE", help="outputs of rabit bench -o json")
    options = parser.parse_args()
    lines = {}
    for given in options.files:
        label, _, file = given.rpartition("=")
        lines.update(series_of(label, file, options.x))
    try:
        Path(options.output).write_text(svg_lines(options.title, LABELS[options.x], lines))
    except OSError as error:
        raise SystemExit(f"bench_charts: {error}")


if __name__ == "__main__":
    main()
