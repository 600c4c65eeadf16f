#!/usr/bin/env python3
"""Measures what each part of the method is worth: runs a grid of `rabit quantize`, several at once,
goes on where it stopped, and writes docs/results/ablation.md with its charts.

    scripts/ablation.py --model MODEL.gguf --train train.txt --test wiki.test.raw --device cuda --gpus 2
    scripts/ablation.py --list
    scripts/ablation.py --write-only

Every run leaves its log in the folder of --out. What the tables need of the logs is kept beside the page
(PAGE.json); a run that is in either is not repeated. Ctrl-C, or --stop-after, interrupts the runs; those that left a checkpoint go on
with the next call. Of Python's standard library alone.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from digests import digest
from svg_charts import svg_bars, svg_lines

ROOT = Path(__file__).resolve().parent.parent

GREEDY = "--no-error-feedback --init-sweeps 1 --als-steps 0 --alpha-in 0 --alpha-out 0"
ITERATIVE = "--no-error-feedback --init-sweeps 8 --als-steps 12 --alpha-in 0 --alpha-out 0"
WEIGHTED = "--no-error-feedback --init-sweeps 1 --als-steps 0 --alpha-in 0.5 --alpha-out 0.5"
FULL = "--no-error-feedback --init-sweeps 8 --als-steps 12 --alpha-in 0.5 --alpha-out 0.5"
COLD = "--warm-epochs 0 --latent-lr 2e-3 --scale-lr 1e-3"  # rates for a start far from the end
WARM = "--calib-tokens 1048576 --warm-epochs 1"
PLAINEST = "--ef-target weight --ef-order natural --ef-rounds 0 --ef-sweeps 0"
NO_TRAINING = "--warm-epochs 0 --tokens 0"
# What groups with `muon` are measured with, where a run says nothing else.
MUON = {"--optimizer": "muon", "--latent-lr": "5e-4", "--scale-lr": "1e-4", "--warm-latent-lr": "4e-3",
        "--warm-scale-lr": "1e-3"}
EDITION = 1  # of the program's defaults and arithmetic: raised, it makes every result stale


@dataclass
class Run:
    """One command of the grid; `label` and `column` place it in its group's table."""
    group: str
    name: str
    label: str
    column: str
    options: str
    seed: int = 1

    @property
    def key(self):
        return f"{self.name}-s{self.seed}"

    def asked(self, arguments):
        """What a result must have been measured with to count as this run's."""
        return " ".join([self.options, *arguments.extra.split(), f"--eval-ctx {arguments.eval_ctx}",
                         f"(edition {EDITION})"])


@dataclass
class Group:
    name: str
    title: str
    text: str
    column_head: str = ""
    device: str = "cuda"  # that its figures are of
    muon: bool = False    # trained with MUON, not the default
    runs: list = field(default_factory=list)

    def add(self, name, label, options, column="perplexity", seeds=(1,)):
        if self.muon and NO_TRAINING not in options:
            given = options.split()
            options += "".join(f" {key} {value}" for key, value in MUON.items() if key not in given)
        for seed in seeds:
            self.runs.append(Run(self.name, name, label, column, options, seed))


def grid(tokens, seeds):
    """All groups. `tokens`: of a full distillation."""
    groups = []

    def group(*args, **kwargs):
        groups.append(Group(*args, **kwargs))
        return groups[-1]

    muon = " ".join(f"{key} {value}" for key, value in MUON.items())
    g = group("method", "Method and start",
              f"Distillation alone, {tokens:,} tokens, two paths, no error feedback and no warm start: "
              "independent latents (`standard`) and the coupled form (`rabit`) from four starts, and the other "
              f"baselines. Greedy SVID is `{GREEDY}`, iterative `{ITERATIVE}`, weighted `{WEIGHTED}`, and both "
              f"`{FULL}`; with each `{COLD}`. With Muon.", muon=True)
    for method in ("standard", "rabit"):
        for label, options in (("greedy SVID", GREEDY), ("iterative SVID", ITERATIVE),
                               ("greedy, weighted by importance", WEIGHTED), ("iterative, weighted", FULL)):
            start = {GREEDY: "greedy", ITERATIVE: "iterative", WEIGHTED: "weighted", FULL: "full"}[options]
            g.add(f"{method}-{start}", label, f"--method {method} {options} {COLD} --tokens {tokens}", method, seeds)
    for name, method, label, options in (("mbok-greedy", "mbok", "greedy SVID", GREEDY),
                                         ("mbok", "mbok", "iterative, weighted", FULL),
                                         ("dbllm", "dbllm", "its own", "--no-error-feedback"),
                                         ("onebit", "onebit", "iterative, weighted", f"--bits 1 {FULL}")):
        g.add(name, label, f"--method {method} {options} {COLD} --tokens {tokens}",
              "onebit, one path" if method == "onebit" else method, seeds)

    g = group("optimizer", "Optimizer and rates",
              f"Error feedback, warm start (`{WARM}`), and distillation or none: the default, and "
              f"with other options. What Muon comes to at the rates that were best for it (`{muon}`): \"as it is\" "
              "under \"Loss and what is trained\", and \"Rates of distillation\".", "")
    for name, options, alone in (
            ("adamw", "", True), ("adamw-bf16", "--momentum bf16", False),
            ("adamw-scale-low", "--scale-lr 1e-5", False), ("adamw-scale", "--scale-lr 1e-4", False),
            ("adamw-l5", "--latent-lr 5e-4 --scale-lr 1e-4", False),
            ("adamw-l8", "--latent-lr 8e-4 --scale-lr 1e-4", False),
            ("adamw-w1", "--warm-latent-lr 1e-3 --scale-lr 1e-4", True),
            ("adamw-l2-w1", "--latent-lr 2e-4 --warm-latent-lr 1e-3 --scale-lr 1e-4", False),
            ("adamw-l5-w1", "--latent-lr 5e-4 --warm-latent-lr 1e-3 --scale-lr 1e-4", False),
            ("adamw-w05", "--warm-latent-lr 5e-4 --scale-lr 1e-4", False),
            ("adamw-l2-w05-s3", "--latent-lr 2e-4 --warm-latent-lr 5e-4 --scale-lr 3e-4", False),
            ("adamw-ws3", "--scale-lr 1e-4 --warm-scale-lr 3e-4", False),
            ("adamw-norms", "--scale-lr 1e-4 --train-norms", False),
            ("adamw-w05-norms-gamma", "--warm-latent-lr 5e-4 --scale-lr 1e-4 --train-norms --gamma 0.3 --gamma-on layers",
             False),
            ("muon-l2-w2", "--optimizer muon --latent-lr 2e-4 --scale-lr 1e-4", False)):
        label = f"`{options}`" if options else "the default"
        g.add(name, label, f"{WARM} --tokens {tokens // 2} {options}".strip(), f"{tokens // 2:,} tokens",
              seeds[:1] if options else seeds)
        if alone:
            warm = " ".join(re.findall(r"--warm-latent-lr \S+", options))
            g.add(f"{name}-0", label, f"{WARM} --tokens 0 {warm}".strip(), "warm start alone")
    g.add("adamw-full", "the default", f"{WARM} --tokens {tokens}", f"{tokens:,} tokens", seeds)
    g.add("adamw-shipped", "and `--calib-tokens 262144 --warm-epochs 4`", f"--tokens {tokens // 2}",
          f"{tokens // 2:,} tokens")

    g = group("warm", "Error feedback, warm start, distillation",
              "The coupled form with two paths from error feedback, with and without the warm start "
              f"(`{WARM}`), then distillation from more and more text; and without error feedback (`{FULL}`).",
              "tokens end to end")
    for count in (0, tokens // 8, tokens // 2, tokens):
        twice = seeds if count in (0, tokens) else seeds[:1]
        warm = {0: "adamw-0", tokens // 2: "adamw", tokens: "adamw-full"}.get(count, f"adamw-{count}")
        g.add(f"adamw-ef-{count}" if count else "ef-0", f"{count:,}",
              f"--calib-tokens 262144 --warm-epochs 0 --tokens {count}", "error feedback", twice)
        g.add(warm, f"{count:,}", f"{WARM} --tokens {count}", "and warm start", seeds if warm == "adamw" else twice)
        g.add(f"adamw-no-ef-{count}", f"{count:,}", f"{FULL} {WARM} --tokens {count}",
              "warm start, no error feedback", twice)
    g.add("adamw-ef-rates", f"{tokens:,}", "--calib-tokens 262144 --warm-epochs 0 --latent-lr 1e-3 --scale-lr 3e-4 "
          f"--tokens {tokens}", "error feedback, `--latent-lr 1e-3 --scale-lr 3e-4`")

    g = group("paths", "Paths",
              f"Error feedback, warm start (`{WARM}`) and {tokens:,} tokens of distillation.", "paths")
    for k in (1, 2, 3, 4):
        name = "adamw-full" if k == 2 else f"adamw-paths-{k}"
        options = f"{WARM} --tokens {tokens}" + ("" if k == 2 else f" --bits {k}")
        g.add(name, str(k), options, seeds=seeds if k == 2 else seeds[:1])
        g.add("ef-0" if k == 2 else f"paths-{k}-ef", str(k),
              "--calib-tokens 262144 --warm-epochs 0 --tokens 0" + ("" if k == 2 else f" --bits {k}"),
              "error feedback alone", seeds if k == 2 else seeds[:1])

    g = group("training", "Loss and what is trained",
              f"Error feedback, warm start (`{WARM}`) and {tokens // 2:,} tokens of distillation with Muon, and one "
              "thing changed.", "", muon=True)
    base = f"{WARM} --tokens {tokens // 2}"
    g.add(f"ef-warm-{tokens // 2}", "as it is", base, seeds=seeds)
    for name, options in (
            ("reverse", "--reverse-kl 0.5"), ("reverse-only", "--reverse-kl 1"),
            ("temperature", "--temperature 2"), ("cross-entropy", "--cross-entropy 0.2"),
            ("gamma-blocks", "--gamma 0.3"), ("gamma-layers", "--gamma 0.3 --gamma-on layers"),
            ("adamw", "--optimizer adamw --latent-lr 2e-5 --warm-latent-lr 2e-4"),
            ("adamw-5e-5", "--optimizer adamw --latent-lr 5e-5 --warm-latent-lr 2e-4"),
            ("adamw-1e-4", "--optimizer adamw --latent-lr 1e-4 --warm-latent-lr 5e-4"), ("ema", "--ema 0.99"),
            ("norms", "--train-norms"), ("coupled-to-standard", "--method standard"),
            ("norms-gamma", "--train-norms --gamma 0.3 --gamma-on layers"),
            ("norms-rates", "--train-norms --latent-lr 1e-3 --scale-lr 3e-4"),
            ("norms-gamma-rates", "--train-norms --gamma 0.3 --gamma-on layers --latent-lr 1e-3 --scale-lr 3e-4")):
        g.add(f"training-{name}", f"`{options}`", f"{base} {options}",
              seeds=seeds if "norms" in name or name == "gamma-layers" else seeds[:1])

    g = group("start", "Parts of the start",
              "No training by gradients; error feedback from 131,072 tokens where no option says else. Importances are "
              "of 32 windows.", "")
    g.add("start-greedy", "greedy SVID", f"{GREEDY} {NO_TRAINING}")
    g.add("start-sweeps", "iterative SVID without least squares, weighted",
          f"{FULL} {NO_TRAINING}".replace("--als-steps 12", "--als-steps 0"))
    g.add("start-full", "iterative SVID, weighted", f"{FULL} {NO_TRAINING}")
    g.add("start-alpha-search", "the same, `--alpha-search`", f"{FULL} {NO_TRAINING} --alpha-search")
    for bits in (2, 3):
        for name, options in (("plain", PLAINEST), ("stream", "--ef-order natural --ef-rounds 0 --ef-sweeps 0"),
                              ("all", ""), ("rounds", "--ef-rounds 8"), ("damp", "--ef-damp 0.01"),
                              ("text", "--calib-tokens 1048576")):
            label = {"plain": "error feedback, plainest", "stream": "target: the stream",
                     "all": "and order, rounds, sweeps (the default)"}.get(name, f"`{options}`")
            calib = "" if "--calib-tokens" in options else "--calib-tokens 131072 "
            g.add(f"start-{bits}-{name}", label, f"--bits {bits} {calib}{options} {NO_TRAINING}".replace("  ", " "),
                  f"{bits} bits")

    g = group("damp", "Damping and the amount of text",
              "Error feedback alone, two paths; a column for each value of `--ef-damp`.", "tokens")
    for calib in (16384, 65536, 262144, 1048576):
        for damp in ("0.003", "0.01", "0.03", "0.1", "0.3"):
            if (calib, damp) == (262144, "0.1"):  # the default
                g.add("ef-0", f"{calib:,}", f"--calib-tokens {calib} {NO_TRAINING}", damp, seeds)
            else:
                g.add(f"damp-{calib}-{damp}", f"{calib:,}", f"--calib-tokens {calib} --ef-damp {damp} {NO_TRAINING}",
                      damp)

    g = group("windows", "Windows, rounds and least squares",
              "What a cheaper start gives up: two paths from 131,072 tokens in windows of 512 to 2,048 (`--seq-len`), "
              "with error feedback alone, and with the warm start of the last block or of all (once over the text); "
              "perplexity in windows of 2,048 throughout. The warm start is with Muon.",
              "windows, `--ef-rounds`, `--als-steps`", muon=True)
    for window in (512, 1024, 2048):
        for rounds, steps in ((1, 4), (1, 12), (2, 4), (2, 12)):
            default = (window, rounds, steps) == (1024, 2, 12)
            options = "" if default else f" --seq-len {window} --ef-rounds {rounds} --als-steps {steps}"
            name = f"{window}-{rounds}-{steps}"
            g.add("start-2-all" if default else f"windows-{name}", f"{window}, {rounds}, {steps}",
                  f"--bits 2 --calib-tokens 131072 {NO_TRAINING}" if default else
                  f"--calib-tokens 131072{options} {NO_TRAINING}", "error feedback")
            if (rounds, steps) in ((1, 4), (2, 12)):
                for column, part, warm in (("and the last block", "last", "--warm-blocks 1 --warm-epochs 1"),
                                           ("and all blocks", "warm", "--warm-epochs 1")):
                    g.add(f"windows-{part}-{name}", f"{window}, {rounds}, {steps}",
                          f"--calib-tokens 131072{options} {warm} --tokens 0", column)

    g = group("mixed", "Paths where they help most",
              "`--target-bpw` against plans by role or block of as many bits; error feedback alone on 262,144 tokens.",
              "")
    for name, bits, bpw in (("down", "2,ffn_down=3", 2.3517), ("attn", "2,attn=3", 2.3594), ("half", "2,0-14=3", 2.6151),
                            ("other-half", "2,15-29=3", None)):
        if bpw:
            g.add(f"mixed-{bpw}", f"`--target-bpw {bpw}`", f"--target-bpw {bpw} --warm-epochs 0 --tokens 0")
        g.add(f"mixed-{name}", f"`--bits {bits}`", f"--bits {bits} --warm-epochs 0 --tokens 0")

    g = group("rates", "Rates of distillation",
              f"{tokens:,} tokens after error feedback, with and without the warm start (`{WARM}`), and without either "
              f"(`{FULL}`). With Muon.", "", muon=True)
    for latent, scale in (("5e-4", "1e-4"), ("1e-3", "3e-4"), ("2e-3", "1e-3")):
        rates = f"--latent-lr {latent} --scale-lr {scale}"
        g.add("rabit-full" if latent == "2e-3" else f"rabit-{latent}", f"`{rates}`",
              f"--method rabit {FULL} {COLD} --tokens {tokens}" if latent == "2e-3" else
              f"--method rabit {FULL} --warm-epochs 0 {rates} --tokens {tokens}", "neither",
              seeds if latent == "2e-3" else seeds[:1])
        g.add(f"ef-{tokens}" if latent == "5e-4" else f"rates-ef-{latent}", f"`{rates}`",
              f"--calib-tokens 262144 --warm-epochs 0 --tokens {tokens}" + ("" if latent == "5e-4" else f" {rates}"),
              "error feedback", seeds if latent == "5e-4" else seeds[:1])
    for latent, scale in (("5e-4", "1e-4"), ("1e-3", "3e-4"), ("2e-3", "1e-3")):
        name = f"ef-warm-{tokens}" if latent == "5e-4" else f"rates-{latent}"
        options = f"{WARM} --tokens {tokens}"
        rates = "" if latent == "5e-4" else f" --latent-lr {latent} --scale-lr {scale}"
        g.add(name, f"`--latent-lr {latent} --scale-lr {scale}`", options + rates, "and warm start",
              seeds if latent == "5e-4" else seeds[:1])
        g.add(f"no-ef-warm-{tokens}" if latent == "5e-4" else f"no-ef-{name}",
              f"`--latent-lr {latent} --scale-lr {scale}`", f"{FULL} {options}{rates}", "warm start alone",
              seeds if latent == "5e-4" else seeds[:1])

    g = group("baseline-rates", "Rates of the baselines",
              f"{tokens:,} tokens of distillation from the start of each method's row above: whether a baseline would "
              "do better at other rates. With Muon.", "", muon=True)
    for method, options in (("standard", FULL), ("rabit", FULL), ("mbok", FULL), ("dbllm", "--no-error-feedback")):
        for latent, scale in (("5e-4", "1e-4"), ("1e-3", "3e-4"), ("2e-3", "1e-3"), ("4e-3", "2e-3")):
            rates = f"--latent-lr {latent} --scale-lr {scale}"
            if latent == "2e-3":
                name = method if method in ("mbok", "dbllm") else f"{method}-full"
                g.add(name, f"`{rates}`", f"--method {method} {options} {COLD} --tokens {tokens}", method, seeds)
            else:
                g.add(f"{method}-{latent}", f"`{rates}`",
                      f"--method {method} {options} --warm-epochs 0 {rates} --tokens {tokens}", method, seeds[:1])

    g = group("block", "The warm start alone",
              "No end-to-end step. More text, more passes over it and other rates, with and without error feedback "
              f"(`{FULL}`). With Muon.", "tokens x epochs", muon=True)
    scale_rates = {"4e-3": "1e-3", "2e-3": "5e-4", "1e-3": "3e-4"}
    for calib, epochs, rate in ((262144, 4, "4e-3"), (1048576, 1, "4e-3"), (1048576, 1, "2e-3"), (1048576, 1, "1e-3"),
                                (1048576, 2, "2e-3")):
        options = f"--warm-latent-lr {rate} --warm-scale-lr {scale_rates[rate]}"
        label = f"{calib:,} x {epochs}, `{options}`"
        for column, start, bits in (("2 bits", "", 2), ("2 bits, no error feedback", f"{FULL} ", 2), ("3 bits", "", 3)):
            name, more = f"block-{bits}-{'no-ef-' if start else ''}{calib}-{epochs}-{rate}", f"{options} --tokens 0"
            if (calib, epochs, rate) == (1048576, 1, "4e-3") and bits == 2:  # the default rates
                name, more = ("no-ef-warm-0" if start else "ef-warm-0"), "--tokens 0"
            if bits == 3:
                more += " --bits 3"
            g.add(name, label, f"{start}--calib-tokens {calib} --warm-epochs {epochs} {more}", column,
                  seeds if bits == 2 and epochs == 1 else seeds[:1])

    g = group("cpu", "What time buys on a CPU",
              "`--minutes` for the whole run but its evaluation, without a GPU. In brackets: of how many tokens the time "
              "allowed, each once; it depends on what else the machine does.", "minutes")
    base = "--ef-rounds 1"
    for column, name, options, times in (("warm start of the last block", "last", "--warm-blocks 1 --warm-epochs 1", (10,)),
                                         ("of all blocks", "warm", "--warm-epochs 1", (10, 30, 60))):
        for minutes in times:
            text = "" if minutes == 10 else " --calib-tokens 2500000"  # more than the time pays for
            g.add(f"cpu-{minutes}-{name}", str(minutes), f"--minutes {minutes}{text} {base} {options}", column)
    g.device = "cpu"
    return groups


class Runner:
    """Runs commands on slots (a GPU each, several slots a GPU), until done or told to stop."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.stopping = threading.Event()
        self.children = {}
        self.tries = defaultdict(int)
        self.lock = threading.Lock()

    def command(self, run, device):
        a = self.arguments
        model = Path(a.out) / f"{run.key}.gguf"
        command = [a.rabit, "quantize", a.model, "-o", str(model), "--data", a.train, "--eval", a.test,
                   "--eval-ctx", str(a.eval_ctx), "--sample-tokens", "0", "--checkpoint-minutes", "1000",
                   "--device", device, "--seed", str(run.seed), *shlex.split(run.options), *shlex.split(a.extra)]
        if a.threads:
            command += ["--threads", str(a.threads)]
        if Path(f"{model}.ckpt").exists():
            command.append("--resume")
        return command

    def one(self, run, device):
        out = Path(self.arguments.out)
        model = out / f"{run.key}.gguf"
        with open(out / f"{run.key}.err", "a") as err:
            child = subprocess.Popen(self.command(run, device), stdout=subprocess.DEVNULL, stderr=err,
                                     stdin=subprocess.DEVNULL, start_new_session=True)
            with self.lock:
                self.children[run.key] = child
                if self.stopping.is_set():
                    child.send_signal(signal.SIGINT)
            code = child.wait()
            with self.lock:
                del self.children[run.key]
        for ending in (".gguf", ".gguf.html"):
            if not self.arguments.keep_models:
                (out / f"{run.key}{ending}").unlink(missing_ok=True)
        log = Path(f"{model}.json")
        if code == 0 and log.exists():
            result = {**json.loads(log.read_text()), "asked": run.asked(self.arguments)}
            log.write_text(json.dumps(result))
            log.rename(out / f"{run.key}.json")
            say(f"{run.key}: {perplexity(result):.2f} in {result['seconds']:.0f} s")
        elif code in (0, 130):  # 0 without a log: after SIGTERM
            say(f"{run.key}: interrupted")
        else:
            say(f"{run.key}: failed with {code}: {self.last_line(run)}")
        return code

    def last_line(self, run):
        lines = (Path(self.arguments.out) / f"{run.key}.err").read_text().strip().splitlines()
        return lines[-1] if lines else ""

    def work(self, queue, device, failures):
        while not self.stopping.is_set():
            with self.lock:
                if not queue:
                    return
                run = queue.pop(0)
            if self.one(run, device) in (0, 130):
                continue
            # Others on the same GPU may have had its memory: again when they are done.
            crowded = any(words in self.last_line(run) for words in ("out of memory", " GB free of "))
            if crowded and self.tries[run.key] < 3:
                self.tries[run.key] += 1
                with self.lock:
                    queue.append(run)
                self.stopping.wait(20)
            else:
                failures.append(run.key)

    def stop(self):
        self.stopping.set()
        with self.lock:
            for child in self.children.values():
                child.send_signal(signal.SIGINT)

    def all(self, runs):
        a = self.arguments
        queue, failures, threads = list(runs), [], []
        for slot in range(a.jobs):
            device = f"cuda:{slot % a.gpus}" if a.device == "cuda" else a.device
            threads.append(threading.Thread(target=self.work, args=(queue, device, failures)))
        started = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.2)
                if a.stop_after and time.monotonic() - started > a.stop_after and not self.stopping.is_set():
                    say("time is up: interrupting")
                    self.stop()
        except KeyboardInterrupt:
            self.stop()
        for thread in threads:
            thread.join()
        return failures


def say(line):
    print(f"ablation: {line}", file=sys.stderr, flush=True)


def perplexity(log):
    return log.get("perplexity", {}).get("student", {}).get("perplexity", math.nan)


def compact(log):
    """What the page is made from."""
    kept = {name: log[name] for name in ("bits_per_weight", "calib_tokens_used", "perplexity", "seconds", "source",
                                         "data", "command", "version", "asked") if name in log}
    layers = [layer for layer in log.get("diagnostics", {}).get("layers", []) if layer["paths"] > 1]
    # In the order of the layers.
    kept["path_correlation"] = [round(layer["path_correlation"], 3) for layer in layers]
    kept["residual_alignment"] = [round(layer["on_own_inputs"]["residual_alignment"][1], 3) for layer in layers]
    return kept


class Results:
    """Results by key: those beside the page, and those of logs that are newer."""

    def __init__(self, arguments):
        self.out, self.store = Path(arguments.out), Path(arguments.docs).with_suffix(".json")
        self.arguments = arguments
        try:
            self.known = json.loads(self.store.read_text()) if self.store.exists() else {}
        except ValueError:
            raise SystemExit(f"ablation: {self.store}: not JSON; restore it, or name another page with --docs")
        # Where files are given, results count that were made from them.
        self.digests = None if arguments.write_only else \
            [digest(arguments.model), digest(arguments.train), digest(arguments.test)]

    def counts(self, log, asked):
        """The log is of a run with these options on these files."""
        if log.get("asked") != asked or self.digests is None:
            return log.get("asked") == asked
        made_from = [log["source"]["sha256"], log["data"]["files"][0]["sha256"]]
        # The log of an early version does not name the text that it was measured on.
        return self.digests == made_from + [log["perplexity"].get("text_sha256", self.digests[2])]

    def get(self, run):
        """The run's result, or None where there is none that was measured with its options."""
        path, asked = self.out / f"{run.key}.json", run.asked(self.arguments)
        if path.exists():
            found = compact(json.loads(path.read_text()))
            before = self.known.get(run.key, {})
            if self.counts(found, asked) and {**before, "machine": ""} != {**found, "machine": ""}:
                self.known[run.key] = {**found, "machine": self.arguments.machine}
        known = self.known.get(run.key, {})
        return known if self.counts(known, asked) else None

    def save(self):
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}"
                           for key, value in sorted(self.known.items()))
        self.store.write_text("{" + lines + "}\n")


def spread(values):
    """Mean and, from two values on, half their range: 31.2 ± 0.3."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    text = f"{mean:.2f}" if mean < 1000 else f"{mean:.3g}"
    return text if len(values) < 2 else f"{text} ± {(max(values) - min(values)) / 2:.2f}"


def table(group, results):
    """The group's markdown table, and its rows as (label, column, values, logs)."""
    columns, labels, cells = [], [], defaultdict(list)
    for run in group.runs:
        if run.column not in columns:
            columns.append(run.column)
        if run.label not in labels:
            labels.append(run.label)
        log = results.get(run)
        if log is not None and perplexity(log) == perplexity(log):
            cells[run.label, run.column].append((perplexity(log), log))
    if not cells:
        return "", []
    labels = [label for label in labels if any(cells[label, column] for column in columns)]
    columns = [column for column in columns if any(cells[label, column] for label in labels)]
    bits = group.name in ("paths", "mixed")
    head = [group.column_head or "", *(["bits a weight"] if bits else []), *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    rows = []
    for label in labels:
        line = [label]
        if bits:
            line.append(next(f"{log['bits_per_weight']:.4f}" for column in columns
                             for _, log in cells[label, column]))
        for column in columns:
            values = [value for value, _ in cells[label, column]]
            line.append(spread(values))
            if not values:
                continue
            logs = [log for _, log in cells[label, column]]
            if group.device == "cpu":  # what the time paid for depends on the machine
                line[-1] += f" ({', '.join(format(log['calib_tokens_used'], ',') for log in logs)} tokens)"
            rows.append((label, column, values, logs))
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines), rows


def diagnostics_table(results, runs):
    lines = ["| run | Corr(y1, y2): median | of 80 % of the layers | Corr(R1, y2): median | of 80 % of the layers | "
             "least | layers above 0.7 |", "|---|---|---|---|---|---|---|"]
    for run in runs:
        result = results.get(run) or {}
        correlation, alignment = sorted(result.get("path_correlation", [])), sorted(result.get("residual_alignment", []))
        if not alignment:
            continue
        tenth = len(alignment) // 10
        above = sum(value > 0.7 for value in alignment)
        lines.append(f"| `{run.key}` | {statistics.median(correlation):.2f} | {correlation[tenth]:.2f} to "
                     f"{correlation[-1 - tenth]:.2f} | {statistics.median(alignment):.2f} | {alignment[tenth]:.2f} to "
                     f"{alignment[-1 - tenth]:.2f} | {alignment[0]:.2f} | {above} of {len(alignment)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def write_docs(arguments, groups, results):
    docs = Path(arguments.docs)
    logs = [log for group in groups for run in group.runs if (log := results.get(run))]
    if not logs:
        raise SystemExit(f"ablation: {arguments.out} holds no results")
    teacher = logs[0]["perplexity"]["teacher"]
    sources = {log["source"]["sha256"] for log in logs}
    texts = {f["sha256"] for log in logs for f in log["data"]["files"]}
    asked = {run.key for group in groups for run in group.runs}
    there = {run.key for group in groups for run in group.runs if results.get(run)}
    page = ["# What each part is worth", "",
            f"{len(there)} of the {len(asked)} runs of the grid are in; groups and rows that have none yet are left out.",
            "",
            f"`{logs[0]['source']['name']}` (SHA-256 {', '.join(s[:12] for s in sorted(sources))}), trained on "
            f"`{logs[0]['data']['files'][0]['name']}` (SHA-256 {', '.join(s[:12] for s in sorted(texts))}); perplexity "
            f"by torch, {teacher['protocol']}; the original has {teacher['perplexity']:.2f}. "
            f"± is half the range over {len(arguments.seeds.split(','))} seeds; where there is none, one run was made. "
            "On a GPU even one seed gives other results again, for its sums are not ordered: differences within the "
            "spreads say nothing. Of what the commands leave open, the program's defaults hold.", "",
            "    scripts/ablation.py --model MODEL.gguf --train TRAIN.txt --test TEST.txt --device cuda", "",
            "makes it on a GPU, `--device cpu` what is measured without one; `--list` prints the command of every "
            "run.", ""]
    for group in groups:
        text, rows = table(group, results)
        if not text:
            continue
        machines = sorted({log["machine"] for _, _, _, logs in rows for log in logs if log["machine"]})
        page += [f"## {group.title}", "", " ".join([group.text, *machines]), "", text, ""]
        stem = docs.with_suffix("").name
        if group.name == "method":
            bars = [(f"{column}, {label}", statistics.fmean(values), (max(values) - min(values)) / 2)
                    for label, column, values, _ in rows]
            bars.sort(key=lambda row: -row[1])
            chart = docs.parent / f"{stem}-{group.name}.svg"
            chart.write_text(svg_bars("perplexity", bars))
            page += [f"![{group.title}]({chart.name})", ""]
            names = ("standard-greedy", "standard-full", "rabit-greedy", "rabit-full", "mbok", "dbllm",
                     "adamw-full")
            runs = {run.key: run for other in groups for run in other.runs if run.name in names}
            found = diagnostics_table(results, [runs[f"{name}-s1"] for name in names if f"{name}-s1" in runs])
            if found:
                page += ["How the paths work together after training, over all linear layers (what is measured: "
                         "[diagnose.md](../diagnose.md)):", "", found, ""]
        if group.name == "warm":
            series = defaultdict(list)
            for label, column, values, _ in rows:
                series[column].append((int(label.replace(",", "")) / 1e6, statistics.fmean(values)))
            chart = docs.parent / f"{stem}-{group.name}.svg"
            chart.write_text(svg_lines("perplexity", "million tokens end to end", dict(series)))
            page += [f"![{group.title}]({chart.name})", ""]
    docs.write_text("\n".join(page).rstrip() + "\n")
    results.save()
    say(f"wrote {docs}")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="GGUF file of the original")
    parser.add_argument("--train", help="training text")
    parser.add_argument("--test", help="text to measure perplexity on")
    parser.add_argument("--rabit", default=str(ROOT / "build/release/bin/rabit"), help="the program")
    parser.add_argument("--out", default=str(ROOT / "out/ablation"), help="folder of the results")
    parser.add_argument("--docs", default=str(ROOT / "docs/results/ablation.md"),
                        help="page to write; runs whose results lie beside it are not repeated")
    parser.add_argument("--machine", default="", help="a sentence about the machine that measures, for the page")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to train")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to spread the runs over")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--threads", type=int, default=0, help="threads of each run; 0: all")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="of a full distillation")
    parser.add_argument("--seeds", default="1,2", help="seeds of the main tables")
    parser.add_argument("--eval-ctx", type=int, default=2048, help="window of the perplexity")
    parser.add_argument("--groups", default="", help="these groups, comma-separated, in this order "
                        "(default: those of --device, longest runs first)")
    parser.add_argument("--only", default="", help="runs whose names contain one of these, comma-separated")
    parser.add_argument("--extra", default="", help="options added to every run")
    parser.add_argument("--stop-after", type=float, default=0, help="seconds after which runs are interrupted")
    parser.add_argument("--keep-models", action="store_true", help="keep the packed files")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument("--write-only", action="store_true", help="write the page from what is there")
    arguments = parser.parse_args(argv)
    for name in ("gpus", "jobs", "tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be 1 or more")
    default = {name: parser.get_default(name) for name in ("tokens", "docs")}
    if arguments.tokens != default["tokens"] and arguments.docs == default["docs"] and not arguments.list:
        parser.error(f"--tokens {arguments.tokens}: a grid of its own; name its page with --docs")
    try:
        shlex.split(arguments.extra)
    except ValueError as error:
        parser.error(f"--extra {arguments.extra}: {error}")
    return arguments


def main(argv):
    arguments = parse(argv)
    try:
        seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    except ValueError:
        raise SystemExit(f"ablation: --seeds {arguments.seeds}: not numbers with commas between")
    groups = grid(arguments.tokens, seeds)
    chosen = [name for name in arguments.groups.split(",") if name]
    unknown = set(chosen) - {group.name for group in groups}
    if unknown:
        raise SystemExit(f"ablation: no group {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(group.name for group in groups)}")
    if arguments.write_only:
        write_docs(arguments, groups, Results(arguments))
        return 0
    parts = [part for part in arguments.only.split(",") if part]
    runs = {}
    wanted = [group for name in chosen for group in groups if group.name == name] if chosen else \
        [group for group in groups if group.device == arguments.device]
    for group in wanted:
        for run in group.runs:
            if not parts or any(part in run.key for part in parts):
                runs.setdefault(run.key, run)
    runner = Runner(arguments)
    if arguments.list:
        for run in runs.values():
            print(f"{run.group:9} {run.key:32} rabit quantize MODEL -o OUT --data TRAIN --eval TEST "
                  f"--seed {run.seed} {run.options}")
        return 0
    for name in ("model", "train", "test"):
        value = getattr(arguments, name)
        if not value or not os.path.isfile(value):
            raise SystemExit(f"ablation: --{name} {value or ''}: no such file")
    if not os.access(arguments.rabit, os.X_OK):
        raise SystemExit(f"ablation: --rabit {arguments.rabit}: no program; build it first, or name it")
    if not runs:
        raise SystemExit(f"ablation: --only {arguments.only}: no such run; --list shows them")
    try:
        os.makedirs(arguments.out, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"ablation: --out {arguments.out}: {error.strerror}")
    results = Results(arguments)
    left = [run for run in runs.values() if results.get(run) is None]
    # In the order of --groups, or those that distil longest first, so that the last do not wait for a late start.
    if not chosen:
        left.sort(key=lambda run: -int((run.options.split("--tokens ")[1:] or ["0"])[-1].split()[0]))
    say(f"{len(runs) - len(left)} of {len(runs)} runs are there already")
    failures = runner.all(left)
    missing = [run.key for run in runs.values() if results.get(run) is None]
    if not missing:
        write_docs(arguments, groups, results)
    if failures:
        raise SystemExit(f"ablation: failed: {', '.join(failures)} (see {arguments.out}/NAME.err)")
    if missing:
        say(f"{len(missing)} runs are left; the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # of --list, by what reads it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
