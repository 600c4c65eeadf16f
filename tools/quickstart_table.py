#!/usr/bin/env python3
"""Prints the quickstart's table from what `rabit eval --json` and `rabit bench -o json` said."""

import argparse
import json
import sys
from pathlib import Path

HEAD = (
    "model",
    "perplexity, held out",
    "file, MB",
    "bits per weight, quantized layers",
    "bits per weight, file",
    "tokens/s, generating",
    "tokens/s, reading",
)


def load(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"quickstart_table: cannot read {path}: {error}") from error


def speed(bench, kind):
    """"mean ± deviation" of the bench row that starts with `kind` ("tg" or "pp"), "-" without."""
    for row in bench["rows"]:
        if row["test"].startswith(kind):
            return f"{row['tokens_per_second']:.1f} ± {row['stddev']:.1f}"
    return "-"


def row_of(name, result, bench):
    return (
        name,
        f"{result['perplexity']:.2f} ± {result['perplexity_stderr']:.2f}",
        f"{result['file_bytes'] / 1e6:.1f}",
        f"{result['bits_per_weight']:.3f}",
        f"{result['file_bits_per_weight']:.3f}",
        speed(bench, "tg"),
        speed(bench, "pp"),
    )


def markdown(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return lines


def notes(evals, benches):
    """What the figures mean; says so when the two models were not measured alike."""
    teacher, student = evals
    for key in ("text_sha256", "ctx", "windows", "tokens_scored", "protocol"):
        if teacher[key] != student[key]:
            raise SystemExit(f"quickstart_table: the two evals differ in {key}: run with --force")
    tests = ", ".join(row["test"] for row in benches[1]["rows"])
    return [
        f"Perplexity: {teacher['tokens_scored']} tokens in {teacher['windows']} windows; "
        f"{teacher['protocol']}.",
        f"Text SHA-256 {teacher['text_sha256'][:16]}, 2-bit model SHA-256 "
        f"{student['model_sha256'][:16]}.",
        f"Speed: {tests} on {benches[1]['rows'][0]['threads']} threads, kernels "
        f"{benches[1]['kernels']}, mean ± deviation of {benches[1]['repetitions']} runs.",
    ]


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eval", nargs=2, required=True, metavar=("TEACHER", "STUDENT"),
                        help="JSON files that `rabit eval --json` printed")
    parser.add_argument("--bench", nargs=2, required=True, metavar=("TEACHER", "STUDENT"),
                        help="JSON files that `rabit bench -o json` printed")
    parser.add_argument("--names", nargs=2, default=("teacher", "2-bit"), metavar="NAME")
    arguments = parser.parse_args(argv)
    evals = [load(path) for path in arguments.eval]
    benches = [load(path) for path in arguments.bench]
    rows = [HEAD]
    try:
        rows += [row_of(*parts) for parts in zip(arguments.names, evals, benches)]
        lines = markdown(rows) + [""] + notes(evals, benches)
    except (KeyError, IndexError) as missing:
        raise SystemExit(f"quickstart_table: the JSON files lack {missing}: run with --force") from missing
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
