#!/usr/bin/env python3
"""The best that the program has reached: one long run for each number of bits, and a page with a row for each.

    scripts/headline.py --model MODEL.gguf --data wikipedia.txt.xz wikitext2_train.txt.xz --data-weights 1,4 \\
        --test wiki.test.raw --device cuda

Interrupted (Ctrl-C, SIGTERM), the same command goes on; a run whose result is there is not repeated. The packed files
stay in the folder of --out. Of Python's standard library alone.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from digests import digest

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"--calib-tokens": "2097152", "--warm-epochs": "1"}
FLAGS = ["--train-norms"]
DONE = "done"


def device_name(device):
    if device == "cpu":
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
        return f"{len(names)} CPUs, {names[0]}" if names else "a CPU"
    index = device.partition(":")[2] or "0"
    told = subprocess.run(["nvidia-smi", "-i", index, "--query-gpu=name", "--format=csv,noheader"],
                          capture_output=True, text=True, check=False)
    return told.stdout.strip() or "a GPU"


def command_of(arguments, bits):
    out = Path(arguments.out) / f"{Path(arguments.model).stem}.{bits}bit.gguf"
    extra = shlex.split(arguments.extra)
    settings = [part for pair in SETTINGS.items() if pair[0] not in extra for part in pair]
    command = [arguments.rabit, "quantize", arguments.model, "-o", out, "--data", *arguments.data, "--bits", bits,
               "--tokens", arguments.tokens, "--device", arguments.device, "--eval", arguments.test, "--eval-ctx",
               arguments.eval_ctx, "--metrics", f"{out}.jsonl", *FLAGS, *settings]
    if arguments.data_weights:
        command += ["--data-weights", arguments.data_weights]
    return [str(part) for part in [*command, *extra]], out


def run(arguments, bits):
    """The run's log, or None where it was interrupted."""
    command, out = command_of(arguments, bits)
    asked, log = Path(f"{out}.asked"), Path(f"{out}.json")
    made_by = shlex.join(command) + "".join(f" {digest(path)}" for path in
                                            (arguments.model, arguments.test, *arguments.data))
    begun_by, _, state = asked.read_text().partition("\n") if asked.exists() else ("", "", "")
    if begun_by == made_by and state == DONE and out.exists() and log.exists():
        return json.loads(log.read_text())
    if Path(f"{out}.ckpt").exists():
        if begun_by != made_by:
            raise SystemExit(f"headline: {out}.ckpt is what a run with other settings left: remove it, or name another "
                             "folder with --out")
        command.append("--resume")
    asked.write_text(made_by)  # what lies under the names of the results is another run's until this one is done
    print(f"headline: {shlex.join(command)}", flush=True)
    child = subprocess.Popen(command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: child.send_signal(received))
    code = child.wait()
    if code in (0, 130) and Path(f"{out}.ckpt").exists():
        return None
    if code == 0 and out.exists():
        asked.write_text(f"{made_by}\n{DONE}")
        return json.loads(log.read_text())
    raise SystemExit(f"headline: {bits} bits: rabit ended with {code}")


def row(arguments, bits, log, out):
    student, teacher = (log["perplexity"][name]["perplexity"] for name in ("student", "teacher"))
    memory = log["memory"].get("device_bytes", log["memory"]["host_bytes"])
    return {"bits": bits, "bits_per_weight": log["bits_per_weight"], "perplexity": student, "teacher": teacher,
            "stderr": log["perplexity"]["student"]["perplexity_stderr"], "tokens": log.get("distill_tokens", 0),
            "hours": log["seconds"] / 3600, "memory": memory, "machine": device_name(arguments.device),
            "sha256": digest(out), "bytes": out.stat().st_size, "protocol": log["perplexity"]["student"]["protocol"],
            "source": log["source"], "data": log["data"], "command": log["command"]}


def write_page(page, rows):
    first = rows[0]
    text = ["# The headline run", "",
            f"`{first['source']['name']}` (SHA-256 {first['source']['sha256'][:12]}); perplexity by torch, "
            f"{first['protocol']}; the original has {first['teacher']:.2f}.", "",
            "| bits | bits a weight | perplexity | of the original's | tokens end to end | hours | memory, GB | packed file, MB "
            "| SHA-256 |", "|---|---|---|---|---|---|---|---|---|"]
    text += [f"| {r['bits']} | {r['bits_per_weight']:.4f} | {r['perplexity']:.2f} ± {r['stderr']:.2f} | "
             f"{r['perplexity'] / r['teacher']:.3f} | {r['tokens']:,} | {r['hours']:.2f} | {r['memory'] / 1e9:.1f} | "
             f"{r['bytes'] / 1e6:.1f} | {r['sha256']} |" for r in rows]
    text += ["", "± is the standard error over the test's tokens; hours and memory are of the whole run, on "
             f"{'; '.join(sorted({r['machine'] for r in rows}))}. The texts (SHA-256, tokens):", ""]
    text += [f"- `{file['name']}` ({file['sha256'][:12]}, {file['tokens']:,})" for file in first["data"]["files"]]
    text += ["", "The commands, which `scripts/headline.py` runs:", "", *(f"    {r['command']}" for r in rows)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(text) + "\n")
    print(f"headline: wrote {page}", flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="GGUF file of the original")
    parser.add_argument("--data", required=True, nargs="+", help="training texts, as rabit quantize takes them")
    parser.add_argument("--data-weights", default="", help="their weights")
    parser.add_argument("--test", required=True, help="text to measure perplexity on")
    parser.add_argument("--bits", default="2,3", help="runs to make, comma-separated")
    parser.add_argument("--tokens", type=int, default=150_000_000, help="of distillation")
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N")
    parser.add_argument("--eval-ctx", type=int, default=2048, help="window of the perplexity")
    parser.add_argument("--rabit", default=str(ROOT / "build/cuda/bin/rabit"), help="the program")
    parser.add_argument("--out", default=str(ROOT / "out/headline"), help="folder of packed files and logs")
    parser.add_argument("--page", default=str(ROOT / "docs/results/headline.md"), help="page to write")
    parser.add_argument("--extra", default="", help="options added to every run")
    arguments = parser.parse_args(argv)
    for path in [arguments.model, arguments.test, *arguments.data]:
        if not os.path.exists(path):
            parser.error(f"{path}: no such file")
    if not os.access(arguments.rabit, os.X_OK):
        parser.error(f"--rabit {arguments.rabit}: no program; build it first, or name it")
    return arguments


def main(argv):
    arguments = parse(argv)
    os.makedirs(arguments.out, exist_ok=True)
    rows = []
    for bits in arguments.bits.split(","):
        log = run(arguments, bits)
        if log is None:
            print("headline: interrupted; the same command goes on", flush=True)
            return 130
        rows.append(row(arguments, bits, log, command_of(arguments, bits)[1]))
    write_page(Path(arguments.page), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
