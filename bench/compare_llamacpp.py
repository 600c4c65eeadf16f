#!/usr/bin/env python3
"""Times rabit's 2-bit layers and llama.cpp's at the same shape, in turn, and prints a page.

    bench/compare_llamacpp.py --llama llama.cpp/build/bin --vocabulary model.gguf

Models of two numbers of blocks are made with random weights; the difference of their times, divided by that of the blocks,
is the time of a block, without embedding and head. Each round measures every program once; what is printed is the median of the
rounds, with the least and the most. Of Python's standard library alone.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # as rabit bench --shape has them
    "smollm2-135m": {"d-model": 576, "heads": 9, "kv-heads": 3, "d-ff": 1536, "context": 8192},
    "llama2-7b": {"d-model": 4096, "heads": 32, "kv-heads": 32, "d-ff": 11008, "context": 4096},
    "llama3-8b": {"d-model": 4096, "heads": 32, "kv-heads": 8, "d-ff": 14336, "context": 8192},
}

TYPES = """F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q2_K_S Q3_K Q3_K_S Q3_K_M Q3_K_L Q4_K Q4_K_S Q4_K_M Q5_K Q5_K_S Q5_K_M Q6_K
IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS TQ1_0 TQ2_0""".split()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"compare_llamacpp: {' '.join(message.split())} (see --help)\n")


def run(*command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise SystemExit(f"compare_llamacpp: {' '.join(map(str, command))}: {lines[-1] if lines else done.returncode}")
    return done.stdout


def stop(number, _):
    say("stopped")
    sys.exit(128 + number)


def say(line):
    print(f"compare_llamacpp: {line}", file=sys.stderr, flush=True)


def make_models(options, folder, blocks):
    """Files of llama.cpp by (type, blocks)."""
    files = {}
    shape = [f"--{name}={value}" for name, value in SHAPES[options.shape].items()]
    for count in blocks:
        first = folder / f"Q4_0-{count}.gguf"
        run(sys.executable, ROOT / "tools/random_model.py", "--like", options.vocabulary, "--layers", count, *shape, "-o",
            first)
        for kind in options.types.split(","):
            files[kind, count] = first if kind == "Q4_0" else folder / f"{kind}-{count}.gguf"
            if kind != "Q4_0":
                say(f"{kind}, {count} blocks")
                run(Path(options.llama) / "llama-quantize", "--allow-requantize", first, files[kind, count], kind,
                    os.cpu_count())
        if "Q4_0" not in options.types.split(","):
            first.unlink()
    return files


def seconds_of_llama(options, file, threads):
    """Seconds a token, by test."""
    told = run(Path(options.llama) / "llama-bench", "-m", file, "-p", options.prompt, "-n", options.generate,
               "-r", options.repetitions, "-t", threads, "-o", "json")
    try:
        return {"pp" if row["n_prompt"] else "tg": 1 / statistics.median(row["samples_ts"]) for row in json.loads(told)}
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise SystemExit(f"compare_llamacpp: {options.llama}/llama-bench wrote no JSON of measurements") from None


def seconds_of_rabit(options, bits, blocks, threads):
    """The same; then bytes of weights a token, and the bytes a second that were read meanwhile."""
    told = json.loads(run(options.rabit, "bench", "--shape", options.shape, "--layers", blocks, "--bits", bits, "-p",
                          options.prompt, "-n", options.generate, "-r", options.repetitions, "-t", threads, "-o", "json"))
    seconds = {"pp" if row["n_prompt"] else "tg": 1 / statistics.median(row["samples"]) for row in told["rows"]}
    reading = [rate for row in told["rows"] for rate in row["read_bytes_per_second"]]
    return seconds, told["weight_bytes_per_token"], statistics.median(reading), told["kernels"]


def measure(options, files, blocks):
    """Seconds of a block and token: {(threads, name, test): a value of each round}; and what reading gave."""
    low, high = blocks
    times, reading, layer_bytes, kernels = {}, {}, {}, ""
    names = [f"rabit, {bits} bit{'s' if bits != '1' else ''}" for bits in options.bits.split(",")]
    for turn in range(options.rounds):
        for threads in options.threads.split(","):
            for name, bits in zip(names, options.bits.split(",")):
                (a, bytes_a, rate_a, kernels), (b, bytes_b, rate_b, _) = (
                    seconds_of_rabit(options, bits, count, threads) for count in (low, high))
                for test in a:
                    times.setdefault((threads, name, test), []).append((b[test] - a[test]) / (high - low))
                reading.setdefault(threads, []).append((rate_a + rate_b) / 2)
                layer_bytes[name] = (bytes_b - bytes_a) / (high - low)
            for kind in options.types.split(","):
                a, b = (seconds_of_llama(options, files[kind, count], threads) for count in (low, high))
                for test in a:
                    times.setdefault((threads, f"llama.cpp, {kind}", test), []).append((b[test] - a[test]) / (high - low))
        say(f"round {turn + 1} of {options.rounds}")
    return times, reading, layer_bytes, kernels


def spread(values, scale, digits):
    middle = f"{statistics.median(values) * scale:.{digits}f}"
    return f"{middle} ({min(values) * scale:.{digits}f} to {max(values) * scale:.{digits}f})"


def page(options, times, reading, layer_bytes, kernels):
    lines = [f"Shape {options.shape}, a block; rabit's kernels: {kernels}; medians of {options.rounds} rounds, least and most in "
             "brackets", ""]
    for threads in options.threads.split(","):
        rate = statistics.median(reading[threads])
        lines += [f"{threads} thread{'s' if threads != '1' else ''}, reading {spread(reading[threads], 1e-9, 1)} GB/s:", "",
                  f"| | ms a token | of the read bandwidth | ms a prompt of {options.prompt} |", "|---|---|---|---|"]
        for name in dict.fromkeys(name for _, name, _ in times):
            generated = times[threads, name, "tg"]
            part = f"{100 * layer_bytes[name] / statistics.median(generated) / rate:.0f} %" if name in layer_bytes else "-"
            lines.append(f"| {name} | {spread(generated, 1e3, 2)} | {part} | "
                         f"{spread(times[threads, name, 'pp'], 1e3 * options.prompt, 1)} |")
        lines.append("")
    return "\n".join(lines)


def parse(argv):
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="compare_llamacpp.sh builds llama.cpp in RABIT_LLAMA_BUILD "
                    "(out/llamacpp) with CC and CXX where --llama is left out, then runs this.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check the options but for --llama, and do no more")
    parser.add_argument("--llama", default="out/llamacpp/build/bin", help="folder of llama-bench and llama-quantize")
    parser.add_argument("--vocabulary", required=True, help="GGUF file that gives llama.cpp's models a vocabulary")
    parser.add_argument("--rabit", default=str(ROOT / "build/release/bin/rabit"), help="the program")
    parser.add_argument("--shape", default="llama2-7b", choices=sorted(SHAPES), help="shape of a block")
    parser.add_argument("--blocks", default="2,6", help="the two numbers of blocks")
    parser.add_argument("--types", default="TQ2_0,Q2_K,F16", help="llama.cpp's, comma-separated")
    parser.add_argument("--bits", default="2", help="rabit's, comma-separated")
    parser.add_argument("--threads", default="1,2", help="comma-separated")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--generate", type=int, default=32, help="tokens")
    parser.add_argument("--repetitions", type=int, default=3, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="in which all are measured in turn")
    options = parser.parse_args(argv)
    try:
        blocks = [int(count) for count in options.blocks.split(",")]
    except ValueError:
        blocks = []
    if len(blocks) != 2 or not 0 < blocks[0] < blocks[1]:
        parser.error(f"--blocks {options.blocks}: two numbers, the second larger")
    for name in ("prompt", "generate", "repetitions", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be 1 or more")
    for name, pattern in (("threads", "[1-9][0-9]*"), ("bits", "[1-4]"), ("types", f"({'|'.join(TYPES)})")):
        if not re.fullmatch(f"{pattern}(,{pattern})*", getattr(options, name)):
            parser.error(f"--{name} {getattr(options, name)!r}: a list such as {parser.get_default(name)}")
    llama = [] if options.check else [Path(options.llama) / "llama-bench", Path(options.llama) / "llama-quantize"]
    for program in (options.rabit, *llama):
        if not os.access(program, os.X_OK):
            parser.error(f"{program}: no program")
    try:
        said = subprocess.run([options.rabit, "--version"], stdin=subprocess.DEVNULL, capture_output=True, check=False).stdout
    except OSError as error:
        said = str(error).encode()
    if not said.startswith(b"rabit "):
        parser.error(f"--rabit {options.rabit}: this is not rabit, by what --version says")
    if not os.path.isfile(options.vocabulary):
        parser.error(f"--vocabulary {options.vocabulary}: no such file")
    return options, blocks


def main(argv):
    options, blocks = parse(argv)
    if options.check:
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory() as folder:
        files = make_models(options, Path(folder), blocks)
        print(page(options, *measure(options, files, blocks)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
