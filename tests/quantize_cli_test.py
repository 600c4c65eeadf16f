#!/usr/bin/env python3
"""`rabit quantize` from outside, on a tiny model: what comes out works with every other subcommand, bad input ends in
one line and no file.

Environment: RABIT_BINARY the program.
"""

import json
import math
import os
import re
import resource
import shlex
import signal
import struct
import unittest
from pathlib import Path

from tiny_model import CONTEXT, FAILURE, LAYERS, QuantizeCase, SMALL, SUCCESS, TEXT, USAGE, words


class QuantizeTest(QuantizeCase):
    def test_what_comes_out_works(self):
        told = json.loads(self.succeeds(*self.start(
            "--json", "--eval", self.text, "--eval-ctx", 32, "--embedding", "f16",
            "--compute", "f32"
        )))
        seen = json.loads(self.succeeds("inspect", self.out, "--json"))
        self.assertTrue(seen["runnable"])
        self.assertAlmostEqual(seen["bits_per_weight"], told["bits_per_weight"], places=6)
        self.assertEqual(seen["metadata"]["rabit.paths"], 2)
        self.assertRegex(self.succeeds("inspect", self.out), r"attn_q .* packed +2 +3\.0")
        scored = json.loads(self.succeeds(
            "eval", "-m", self.out, "--ppl", self.text, "--ctx", 32, "--json", "--dense-f32"
        ))
        student = told["perplexity"]["student"]
        self.assertEqual(scored["tokens_scored"], student["tokens_scored"])
        self.assertAlmostEqual(
            scored["perplexity"] / student["perplexity"], 1, delta=0.003
        )
        text = json.loads(self.succeeds(
            "run", "-m", self.out, "-p", "The light", "-n", 6, "--temp", 0, "--json",
            "--ignore-eos"
        ))
        self.assertEqual(text["generated_tokens"], 6)
        rows = json.loads(self.succeeds(
            "bench", "-m", self.out, "-p", 8, "-n", 2, "-r", 1, "-t", 1, "-o", "json"
        ))["rows"]
        self.assertEqual([row["test"] for row in rows], ["pp8", "tg2"])

    def test_diagnose(self):
        told = json.loads(self.succeeds(*self.start("--json", "--diagnose-tokens", 64)))
        arguments = ("diagnose", self.out, "--teacher", self.model, "--data", self.text,
                     "--tokens", 64, "--seq-len", 32, "-t", 1)
        table = self.succeeds(*arguments)
        self.assertRegex(table, r"(?m)^blk\.2\.ffn_down +2 +-?0\.\d{3} +-?0\.\d{3} ")
        self.assertRegex(table, r"(?m)^median ")
        found = json.loads(self.succeeds(*arguments, "--json"))
        for line, layer in zip(table.splitlines()[1:], found["layers"]):
            own, parts = line.split()[5:7]
            left, last, cancelled = map(float, re.fullmatch(r"([\d.]+)\+([\d.]+)-(-?[\d.]+)", parts).groups())
            self.assertAlmostEqual(left + last - cancelled, float(own), delta=0.21)
            self.assertAlmostEqual(left / 100, layer["on_own_inputs"]["decomposition"]["residual"], delta=1e-3)
        self.assertEqual(len(found["layers"]), 7 * LAYERS)
        self.assertEqual((found["tokens"], found["seq_len"]), (64, 32))
        self.assertEqual(set(found["layers"][0]), set(told["diagnostics"]["layers"][0]))
        for path in (self.folder / "none", self.text):
            for place in (1, 3, 5):
                wrong = [*arguments]
                wrong[place] = path
                if (path, place) != (self.text, 5):
                    self.fails(*wrong, says=path.name, out=self.folder / "no")
        self.fails("diagnose", self.model, *arguments[2:], says="not packed", out=self.folder / "no")
        self.fails(*arguments[:-4], "--seq-len", 4096, says=f"at most {CONTEXT} positions", out=self.folder / "no")
        self.fails(*arguments, "--device", "tpu", says="not a device", out=self.folder / "no")
        other = self.folder / "other.gguf"
        other.write_bytes(self.model.read_bytes()[:-4] + b"abcd")
        wrong = [*arguments]
        wrong[3] = other
        self.fails(*wrong, says="another model", out=self.folder / "no")

    def test_report(self):
        self.succeeds(*self.start("--sample-tokens", 4))
        page = Path(f"{self.out}.html").read_text()
        for part in ("out.gguf", "Corr(y1, y2)", "perplexity", "The capital of France is",
                     "rabit quantize model.gguf -o out.gguf --data text.txt"):
            self.assertIn(part, page)
        self.assertNotIn(str(self.folder), page)
        for part in ("http", "<script", " src="):
            self.assertNotIn(part, page)
        again = self.folder / "again.html"
        self.succeeds("report", f"{self.out}.json", "-o", again)
        self.assertEqual(again.read_text(), page)
        self.succeeds("report", f"{self.out}.json")
        self.assertEqual(Path(f"{self.out}.json.html").read_text(), page)
        no = self.folder / "no"
        self.fails("report", self.text, says="not JSON", out=no)
        self.fails("report", self.file("list.json", "[1, 2]"), says="not the log", out=no)
        deep = '{"source": {}, "settings": ' + "[" * 200000 + "]" * 200000 + "}"
        self.fails("report", self.file("deep.json", deep), says="nested deeper", out=no)
        self.fails("report", self.folder / "missing", says="missing", out=no)
        kept = Path(f"{self.out}.json").read_bytes()
        done = self.run_rabit("report", f"{self.out}.json", "-o", f"{self.out}.json")
        self.assertEqual(done.returncode, FAILURE)
        self.assertIn("would overwrite the input", self.one_line(done, "-o LOG"))
        self.assertEqual(Path(f"{self.out}.json").read_bytes(), kept)

    def test_a_report_that_cannot_be_written_loses_no_model(self):
        (self.folder / "link").symlink_to(".")
        self.fails(*self.start("--report", self.folder / "link" / self.out.name), says="is what -o writes")
        block = Path(f"{self.out}.html.partial")  # in the way when training is done
        (block / "full").mkdir(parents=True)
        done = self.run_rabit(*self.start())
        self.assertEqual(done.returncode, FAILURE)
        self.assertRegex(self.one_line(done, "no page"), "no report: .*the model is whole")
        self.assertTrue(json.loads(self.succeeds("inspect", self.out, "--json"))["runnable"])
        (block / "full").rmdir()
        block.rmdir()
        self.succeeds("report", f"{self.out}.json")
        for path in self.folder.glob("out.gguf*"):
            path.unlink()
        for report in (self.folder / "none" / "page.html", self.model, self.text, self.out):
            before = {path: path.read_bytes() for path in (self.model, self.text)}
            self.fails(*self.start("--report", report), says="--report|no such folder")
            self.assertEqual(before, {path: path.read_bytes() for path in before})

    def test_json_is_all_of_stdout(self):
        done = self.run_rabit(*self.start("--json"))
        self.assertEqual(done.returncode, SUCCESS, done.stderr)
        told = json.loads(done.stdout)  # refuses anything before or after the object
        self.assertEqual(told, json.loads(Path(f"{self.out}.json").read_text()))
        self.assertEqual(told["settings"]["seq_len"], 32)
        self.assertEqual(told["data"]["files"][0]["name"], "text.txt")
        self.assertEqual(self.succeeds(*self.start()), "")
        with open("/dev/full", "wb") as full:
            done = self.run_rabit(*self.start("--json"), stdout=full)
        self.assertEqual(done.returncode, FAILURE)
        self.assertIn("cannot write to standard output", self.one_line(done, "--json"))

    def test_every_option(self):
        values = {
            "--data": self.text, "--method": "standard", "--bits": "3,ffn=2", "--minutes": 5, "--tokens": 64,
            "--calib-tokens": 256, "--warm-epochs": 0.5, "--warm-blocks": 1, "--device": "cpu", "--threads": 2,
            "--compute": "bf16", "--checkpoint-minutes": 0.5, "--checkpoint-steps": 1, "--keep-checkpoints": 2,
            "--data-field": "body", "--data-weights": "2", "--token-cache": self.folder / "tokens",
            "--metrics": self.folder / "metrics.jsonl", "--momentum": "bf16", "--micro-batch": 1, "--ef-damp": 0.05,
            "--ef-order": "diagonal", "--ef-inputs": "student", "--ef-target": "output",
            "--ef-rounds": 1, "--ef-sweeps": 2,
            "--alpha-in": 0.5, "--alpha-out": 0.25, "--init-sweeps": 2, "--als-steps": 3,
            "--seq-len": 24, "--seed": 7, "--optimizer": "adamw", "--warm-batch": 2, "--warm-latent-lr": 0.003,
            "--warm-scale-lr": 0.002, "--batch": 1, "--latent-lr": 0.0004, "--scale-lr": 0.0003,
            "--target-bpw": 5.5, "--gamma-on": "blocks", "--diagnose-tokens": 48,
            "--report": self.folder / "page.html", "--sample-prompt": "The sea", "--sample-tokens": 3,
            "--warmup": 0.1, "--ema": 0.5, "--gamma": 0.2, "--reverse-kl": 0.25, "--temperature": 2, "--cross-entropy": 0.1,
            "--clip": 0.9, "--embedding": "f16",
            "--eval": self.text, "--eval-ctx": 24,
        }
        flags = ["--json", "--no-error-feedback", "--train-norms", "--alpha-search", "--recompute", "--share-original"]
        help_text = self.succeeds("quantize", "--help")
        options = set(re.findall(r"^ +(?:-\w, ?)?(--[a-z-]+)", help_text, re.MULTILINE))
        self.assertGreater(len(options), 30)
        self.assertEqual(options - {"--help", "--resume", "--dry-run", "--output"}, {*values, *flags})
        told = json.loads(
            self.succeeds("quantize", self.model, "--output", self.out, *words(values), *flags)
        )
        for option, value in values.items():
            key = option[2:].replace("-", "_")
            if key not in ("data", "eval", "eval_ctx", "report", "sample_prompt", "sample_tokens", "token_cache",
                           "metrics"):
                self.assertEqual(told["settings"][key], value, option)
        self.assertFalse(told["settings"]["error_feedback"])
        self.assertTrue(told["settings"]["train_norms"])
        self.assertLessEqual(told["bits_per_weight"], 5.5)
        self.assertEqual(told["diagnostics"]["tokens"], 48)
        self.assertEqual([sample["prompt"] for sample in told["samples"]], ["The sea"])
        page = (self.folder / "page.html").read_text()
        self.assertIn("The sea", page)
        self.assertIn("--train-norms", page)
        self.assertFalse(Path(f"{self.out}.html").exists())
        self.assertEqual(told["perplexity"]["student"]["ctx"], 24)
        self.assertEqual(told["compute"], "bf16")

    def test_documents_end_at_markers_and_with_the_file(self):
        def tokens(*contents):
            files = [self.file(f"part{i}.txt", content) for i, content in enumerate(contents)]
            done = self.run_rabit("quantize", self.model, "-o", self.out, "--data", *files,
                                  "--seq-len", 16, "--calib-tokens", 16, "--dry-run", "--tokens", 0)
            return int(re.search(rb"(\d+) tokens of training text", done.stderr).group(1))

        word = b"zq" * 20  # 40 tokens: no merge applies
        self.assertEqual(tokens(word), 41)
        self.assertEqual(tokens(word + b"\n<|endoftext|>\n" + word), 41 + 42)
        self.assertEqual(tokens(word + b"\r\n<|endoftext|>\r\n" + word), 42 + 42 - 1 + 1)
        self.assertEqual(tokens(word + b"\n<|endoftext|>"), 42)
        self.assertEqual(tokens(word, word), 82)
        self.assertEqual(tokens(word + b" <|endoftext|>\n"), 41 + 14 + 1)

    def test_texts_of_every_form(self):
        import gzip
        import lzma
        folder = self.folder / "texts"
        (folder / "more").mkdir(parents=True)
        words_of = lambda letter: letter * 40  # as many tokens: no merge applies
        (folder / "a.txt.gz").write_bytes(gzip.compress(words_of("z").encode()))
        (folder / "more" / "b.jsonl.xz").write_bytes(lzma.compress(
            "".join(json.dumps({"body": words_of(letter)}) + "\n" for letter in "qx").encode()))
        (folder / "picture.png").write_bytes(b"\x89PNG")
        small = {**SMALL, "--seq-len": 16, "--calib-tokens": 16, "--tokens": 0}
        command = ("quantize", self.model, "-o", self.out, *words(small), "--data", folder, self.text,
                   "--data-field", "body")
        said = self.run_rabit(*command, "--dry-run").stderr.decode()
        self.assertIn("tokens of training text", said)
        tokens = int(re.search(r"(\d+) tokens of training text", said).group(1))
        alone = self.run_rabit("quantize", self.model, "-o", self.out, "--data", self.text, "--dry-run").stderr.decode()
        self.assertEqual(tokens - int(re.search(r"(\d+) tokens of training text", alone).group(1)), 3 * 41)
        self.assertIn("tokenize", said)
        again = self.run_rabit(*command, "--dry-run").stderr.decode()
        self.assertNotIn("tokenize", again)
        self.assertEqual(len(list((self.folder / "cache" / "rabit" / "tokens").glob("*.tokens"))), 2)
        told = json.loads(self.succeeds(*command, "--data-weights", "3,0.5", "--json"))
        self.assertEqual([file["name"] for file in told["data"]["files"]], ["texts", "text.txt"])
        self.assertEqual(told["data"]["files"][0]["documents"], 3)
        self.assertEqual(told["data"]["files"][0]["tokens"], 3 * 41)
        for end in ("", ".json", ".html"):
            Path(f"{self.out}{end}").unlink()
        self.fails(*command, "--data-weights", "1", says="1 weights for 2 sources")
        self.fails(*command[:-1], "text", says="b.jsonl.xz: line 1: has no string \"text\"")
        self.fails(*command, "--data-weights", "1,x", code=USAGE, says="'x' is not a number")
        (self.folder / "none").mkdir()
        self.fails("quantize", self.model, "-o", self.out, "--data", self.folder / "none", says="holds no text")
        self.fails(*self.start("--token-cache", self.text), says="--token-cache")

    def test_metrics(self):
        path = self.folder / "metrics.jsonl"
        self.succeeds(*self.start("--metrics", path, "--tokens", "256"))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.assertEqual([line["phase"] for line in lines], ["block"] * LAYERS + ["distill"] * 4)
        steps = lines[LAYERS:]
        self.assertEqual([line["step"] for line in steps], [1, 2, 3, 4])
        self.assertEqual([line["tokens"] for line in steps], [64, 128, 192, 256])
        for line in steps:
            for name in ("loss", "text_nll", "text_nll_teacher", "scale_grad_norm", "latent_grad_norm",
                         "tokens_per_second", "seconds", "host_bytes"):
                self.assertGreater(line[name], 0, name)
            self.assertTrue(0 <= line["signs_turned"] < 0.5)
        self.assertGreater(sum(line["signs_turned"] for line in steps), 0)
        kept = self.file("notes.txt", "not metrics\n")
        self.out = self.folder / "other.gguf"
        self.fails(*self.start("--metrics", kept), says="holds no metrics")
        self.assertEqual(kept.read_text(), "not metrics\n")
        self.fails(*self.start("--metrics", self.text), says="would overwrite the input")
        for end, option in (("", "-o"), (".json", "-o"), (".ckpt", "-o"), (".html", "--report")):
            self.fails(*self.start("--metrics", f"{self.out}{end}"), says=f"is what {option} writes")
        before = path.read_text()
        self.run_rabit(*self.start("--metrics", path, "--dry-run"))
        self.assertEqual(path.read_text(), before)
        self.fails(*self.start("--metrics", self.folder / "no" / "x"), says="no such folder")

    def test_several_texts(self):
        other = self.file("other.txt", TEXT)
        told = json.loads(self.succeeds(*self.start("--json", "--data", other)[:6], other,
                                        *words(SMALL), "--json"))
        self.assertEqual([file["name"] for file in told["data"]["files"]],
                         ["text.txt", "other.txt"])

    def test_examples_of_the_help(self):
        (self.folder / "model.gguf").symlink_to(self.model)
        ran = 0
        help_text = self.succeeds("quantize", "--help")
        for line in help_text[help_text.index("Examples:"):].splitlines():
            if not line.startswith("  rabit "):
                continue
            arguments = shlex.split(line)[1:]
            out = self.folder / arguments[arguments.index("-o") + 1]
            for option, value in SMALL.items():
                if option in arguments and arguments[arguments.index(option) + 1] != "0":
                    arguments[arguments.index(option) + 1] = value
                elif option not in arguments and option != "--tokens":
                    arguments += [option, value]
            if not any(option in arguments for option in ("--tokens", "--minutes")):
                arguments += ["--tokens", "128"]
            if "--resume" in arguments:
                # Something that is in the way when training is done leaves a checkpoint.
                block = Path(f"{out}.json.partial")
                (block / "full").mkdir(parents=True)
                first = [word for word in arguments if word != "--resume"]
                self.assertEqual(self.run_rabit(*first).returncode, FAILURE)
                (block / "full").rmdir()
                block.rmdir()
                self.assertTrue(Path(f"{out}.ckpt").exists())
            done = self.run_rabit(*arguments)
            if "cuda" in arguments and done.returncode == FAILURE:
                self.assertRegex(self.one_line(done, line), "no GPU can be used")
                self.assertFalse(out.exists())
            else:
                self.assertEqual(done.returncode, SUCCESS, (line, done.stderr.decode()))
                if "--dry-run" in arguments:
                    said = done.stderr.decode()
                    self.assertRegex(said, r"measured: distillation from 128 tokens takes \d+ s")
                    self.assertRegex(said, r"measured: .* plan: 3 blocks")
                    self.assertFalse(out.exists())
                    ran += 1
                    continue
                self.assertTrue(json.loads(self.succeeds("inspect", out, "--json"))["runnable"])
                out.unlink()
            ran += 1
        self.assertGreaterEqual(ran, 4)

    def test_bad_files(self):
        missing = self.folder / "missing"
        cases = (
            ((missing, self.text), "missing"),
            ((self.text, self.text), "not a GGUF"),
            ((self.folder, self.text), "not a regular file"),
            ((self.model, missing), "missing"),
            ((self.model, Path("/dev/null")), "not a regular file"),
            ((self.model, self.file("empty.txt", b"")), "holds no text"),
            ((self.model, self.file("latin.txt", b"caf\xe9 " * 99)), "not UTF-8 at byte 3"),
            ((self.model, self.file("short.txt", "Ten words")), "less than one window of 32"),
            ((self.file("cut.gguf", self.model.read_bytes()[:-9]), self.text), "cut.gguf"),
        )
        for (model, data), says in cases:
            self.fails("quantize", model, "-o", self.out, "--data", data, *words(SMALL), says=says)
        self.fails(*self.start("--eval", self.file("few.txt", "Ten words"), "--eval-ctx", 32),
                   says="9 tokens for windows of 32")
        self.fails(*self.start("--eval", missing), says="missing")
        self.fails(*self.start("--seq-len", CONTEXT + 1, "--tokens", 0), says=f"at most {CONTEXT} positions")
        self.fails(*self.start("--device", "tpu"), code=USAGE, says="tpu: not a device")
        self.fails(*self.start("--json", "--dry-run"), code=USAGE, says="--dry-run makes none")
        self.fails(*self.start("--resume"), says="no checkpoint to resume from")
        checkpoint = self.file(f"{self.out.name}.ckpt", self.model.read_bytes()[:-9])
        self.fails(*self.start("--resume"), says="cannot resume: .*ckpt.*to start anew, remove the checkpoint")
        self.fails(*self.start(), says="add --resume to go on from it, or remove it")
        Path(checkpoint).unlink()
        self.fails("quantize", self.model, "-o", self.folder / ("x" * 300) / "out.gguf", "--data",
                   self.text, says="no such folder: .*too long")
        self.fails("quantize", self.model, "-o", self.out, "--data", "--dry-run", code=USAGE,
                   says="--data: needs a value before --dry-run")
        self.fails(*self.start("--sample-prompt", "--batch", 3), code=USAGE,
                   says="--sample-prompt: needs a value before --batch")
        self.fails(*self.start("--calib-tokens", 31), code=USAGE, says="less than one window of 32")
        self.fails(*self.start("--minutes", 0.1), code=USAGE, says="too short")
        self.fails(*self.start("--method", "onebit"), code=USAGE, says="give --bits 1")
        self.fails(*self.start("--target-bpw", 1), says=r"takes 2\.9667")
        self.fails(*self.start("--target-bpw", 16), says=r"at most, it would be 5\.9333")

    def test_packed_models_are_refused(self):
        self.succeeds(*self.start("--tokens", 0, "--warm-epochs", 0))
        self.fails("quantize", self.out, "-o", self.folder / "again.gguf", "--data", self.text,
                   *words(SMALL), says="packed already", out=self.folder / "again.gguf")

    def test_bad_outputs(self):
        def to(out, says, **more):
            self.fails("quantize", self.model, "-o", out, "--data", self.text, *words(SMALL),
                       says=says, out=out, **more)

        to(self.folder / "none" / "out.gguf", "no such folder")
        to(self.folder, "folder|directory")
        pipe = self.folder / "pipe"  # as /dev/null: there, and no file to be replaced
        os.mkfifo(pipe)
        to(pipe, "not a regular file")
        self.assertTrue(pipe.is_fifo())
        to("/proc/out.gguf", "cannot create")
        to(self.text / "out.gguf", "no such folder")
        before = self.model.read_bytes()
        done = self.run_rabit("quantize", self.model, "-o", self.model, "--data", self.text,
                              *words(SMALL))
        self.assertEqual(done.returncode, FAILURE)
        self.assertIn("would overwrite the input", self.one_line(done, "-o MODEL"))
        kept = Path(self.text).read_bytes()
        done = self.run_rabit("quantize", self.model, "-o", self.text, "--data", self.text)
        self.assertEqual(done.returncode, FAILURE)
        self.assertIn("would overwrite the input", self.one_line(done, "-o TEXT"))
        self.assertEqual(Path(self.text).read_bytes(), kept)
        self.assertEqual(self.model.read_bytes(), before)

    def test_what_is_there_is_kept(self):
        def refuses(arguments, says, *kept):
            before = {path: Path(path).read_bytes() for path in kept}
            done = self.run_rabit(*arguments)
            self.assertEqual(done.returncode, FAILURE, arguments)
            self.assertRegex(self.one_line(done, arguments), says)
            self.assertEqual({path: Path(path).read_bytes() for path in kept}, before)

        # Inputs with the names of our own temporary files.
        for ending in ("", ".json", ".ckpt", ".unverified", ".unverified.partial", ".partial", ".ckpt.partial",
                       ".test-write.partial"):
            mine = self.folder / f"x{ending}"
            mine.write_bytes(self.model.read_bytes())
            refuses(("quantize", mine, "-o", self.folder / "x", "--data", self.text, *words(SMALL)),
                    "would overwrite the input", mine)
            mine.unlink()
        page = self.file("p.html.partial", "{}")
        refuses(("report", page, "-o", self.folder / "p.html"), "would overwrite the input", page)
        # Files of others.
        other = self.file("other.gguf", self.model.read_bytes())
        refuses(("quantize", self.model, "-o", other, "--data", self.text, *words(SMALL)),
                "no file that rabit quantize wrote", other)
        refuses(self.start("--report", other), "is there and no page", other)
        self.succeeds(*self.start("--tokens", 0, "--warm-epochs", 0))
        refuses(("report", f"{self.out}.json", "-o", other), "is there and no page", other)
        self.succeeds(*self.start("--tokens", 0, "--warm-epochs", 0))  # its own kind it replaces
        # A link stays one, and what it points to is written.
        target, link = self.folder / "target.html", self.folder / "link.html"
        link.symlink_to(target)
        self.succeeds("report", f"{self.out}.json", "-o", link)
        self.assertTrue(link.is_symlink())
        self.assertIn("<!doctype html", target.read_text())

    def test_damaged_weights_and_checkpoints(self):
        values = bytearray(self.model.read_bytes())
        values[-4:] = struct.pack("<f", math.nan)
        self.fails("quantize", self.file("nan.gguf", bytes(values)), "-o", self.out, "--data", self.text,
                   *words(SMALL), says="ffn_down.weight holds values that are not finite")
        checkpoint = Path(f"{self.out}.ckpt")
        block = Path(f"{self.out}.json.partial")
        (block / "full").mkdir(parents=True)
        self.assertEqual(self.run_rabit(*self.start()).returncode, FAILURE)
        (block / "full").rmdir()
        block.rmdir()
        self.out.unlink()  # it was packed before what was in the way
        whole = checkpoint.read_bytes()
        self.fails("quantize", checkpoint, "-o", self.folder / "no.gguf", "--data", self.text, *words(SMALL),
                   says="is the checkpoint of a run", out=self.folder / "no.gguf")
        diagnose = ("diagnose", checkpoint, "--teacher", self.model, "--data", self.text)
        source = rb'("source":{"name":"model.gguf","sha256":)"[0-9a-f]{64}"'
        for old, new, says in (  # of the same lengths, so that the file stays well formed
            (source, rb"\g<1>" + b"9" * 66, "damaged: what it says of its run"),
            (rb'"bits":"2"', b'"bits":222', "damaged: the setting bits is 222"),
        ):
            changed, count = re.subn(old, new, whole)
            self.assertGreater(count, 0, old)
            checkpoint.write_bytes(changed)
            self.fails(*diagnose, says=says)
            self.fails(*self.start("--resume"), says="cannot resume: .*ckpt: (damaged|made with --bits 222)")
        checkpoint.write_bytes(whole[:-64] + struct.pack("<f", math.nan) * 16)
        self.fails(*self.start("--resume"), says="cannot resume: .*not finite")
        checkpoint.write_bytes(whole)
        self.succeeds(*self.start("--resume"))

    def test_settings_without_effect_are_named(self):
        def told(*arguments):
            done = self.run_rabit(*self.start(*arguments, "--dry-run"))
            self.assertEqual(done.returncode, SUCCESS, done.stderr)
            return re.findall("^note: without effect in this run: (.*)$", done.stderr.decode(), re.MULTILINE)

        distilled = ("--gamma", 0.5, "--ema", 0.9, "--temperature", 2)
        self.assertEqual(told(*distilled), [])
        self.assertEqual(told(*distilled, "--tokens", 0), ["--batch, --ema, --gamma"])
        self.assertEqual(told(*distilled, "--tokens", 0, "--warm-epochs", 0),
                         ["--temperature, --batch, --ema, --gamma"])
        self.assertEqual(told("--no-error-feedback", "--ef-rounds", 3, "--gamma-on", "layers"),
                         ["--ef-rounds, --gamma-on"])

    def test_full_disk(self):
        def small_files():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

        self.fails(*self.start(), says="cannot write .*out.gguf", preexec_fn=small_files)
        self.assertFalse(Path(f"{self.out}.ckpt").exists())
        self.assertEqual({path.name for path in self.folder.iterdir()}, {"text.txt", "cache"})  # of tokens

    def test_wrong_usage(self):
        self.fails("quantize", code=USAGE, says="see rabit quantize --help")
        self.fails("quantize", self.model, "--data", self.text, code=USAGE, says="-o")
        self.fails("quantize", self.model, "-o", self.out, code=USAGE, says="--data")
        self.fails(*self.start("--frobnicate"), code=USAGE, says="frobnicate")
        self.fails(*self.start("--embedding", "q4"), code=USAGE, says="--embedding")
        self.fails(*self.start("--compute", "f64"), code=USAGE, says="--compute")
        self.fails(*self.start("--seed", 1, "--seed", 2), code=USAGE, says="--seed")
        for option, bad in {
            "--method": ("x",), "--bits": (0, 5, "x", 1.5, "2,head=3", "3-1=2"), "--tokens": (-2, "1e3"), "--calib-tokens": (0, "x"),
            "-t": (-1, "x"), "--init-sweeps": (0,), "--als-steps": (-1,),
            "--seq-len": (15, "0x20"), "--seed": (-1, "99999999999999999999"),
            "--warm-batch": (0,), "--batch": (0, ""), "--eval-ctx": (1,),
            "--minutes": (-1, "nan", "inf", "x"), "--warm-epochs": (-0.1,),
            "--checkpoint-minutes": (0,), "--ef-damp": (0, "nan"), "--alpha-in": (-1,),
            "--alpha-out": (5,), "--warm-latent-lr": (11,), "--warm-scale-lr": (-1,),
            "--latent-lr": ("1,5",), "--scale-lr": ("nan",), "--warmup": (1,), "--ema": (1,), "--gamma": (-1,),
            "--target-bpw": (-1, "x"), "--gamma-on": ("heads",), "--diagnose-tokens": (-1,),
            "--sample-tokens": (-1, "x"), "--reverse-kl": (1.1,), "--temperature": (0,), "--cross-entropy": (-0.1,),
            "--clip": (0,), "--checkpoint-steps": (-1,), "--keep-checkpoints": (0,), "--micro-batch": (-1,),
            "--momentum": ("f16",), "--data-weights": ("0", "x", "1,,2"), "--data-field": ("",),
        }.items():
            for value in bad:
                start = ("quantize", self.model, "-o", self.out, "--data", self.text)
                self.fails(*start, option, value, code=USAGE, says=option)


if __name__ == "__main__":
    unittest.main(verbosity=1)
