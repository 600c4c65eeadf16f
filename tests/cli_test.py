#!/usr/bin/env python3
"""The program `rabit` from outside: results, one-line errors, exit codes.

Environment: RABIT_BINARY the program, RABIT_MODEL the model file. Arguments choose the classes to
run, e.g. `cli_test.py WithoutModel`. Exits with 77 (skipped) when the model is asked for and missing.
"""

import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from tiny_model import tiny_model

RABIT = os.environ.get("RABIT_BINARY", "build/release/bin/rabit")
MODEL = os.environ.get("RABIT_MODEL", ".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
COMMANDS = ("quantize", "diagnose", "report", "eval", "run", "bench", "inspect")
SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130

TEXT = (
    "The lighthouse stood at the end of a long spit of sand, and the keeper walked out to it every "
    "evening before the sun went down. He carried a lamp, a loaf of bread and a book. In winter "
    "the waves broke over the path, and then he waited for the tide. Nobody had told him that the "
    "light was no longer needed, for nobody remembered that he was there. "
)


def run(*arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=300, env=None):
    """The finished process; output as bytes where it may not be text."""
    return subprocess.run(
        [RABIT, *map(os.fspath, map(str, arguments))], stdin=stdin, stdout=stdout,
        stderr=subprocess.PIPE, timeout=timeout, check=False, env=env
    )


class CliTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def fails(self, *arguments, code=FAILURE, says="", stdout=subprocess.PIPE):
        """Runs, and expects one clear line on stderr, nothing on stdout, and the exit code."""
        done = run(*arguments, stdout=stdout)
        error = done.stderr.decode()
        self.assertEqual(done.returncode, code, f"{arguments}: {error}")
        self.assertRegex(error, r"\Arabit: [^\n]{8,}\n\Z", f"{arguments}")
        self.assertRegex(error, re.compile(says, re.IGNORECASE), f"{arguments}")
        if stdout == subprocess.PIPE:
            self.assertEqual(done.stdout, b"", f"{arguments}")
        return error

    def succeeds(self, *arguments):
        done = run(*arguments)
        self.assertEqual(done.returncode, SUCCESS, f"{arguments}: {done.stderr.decode()}")
        return done.stdout.decode()


class WithoutModel(CliTest):
    def test_help_and_version(self):
        self.assertRegex(self.succeeds("--version"), r"\Arabit \d+\.\d+\.\d+\n\Z")
        self.assertIn("Examples:", self.succeeds("--help"))
        for command in COMMANDS:
            done = run(command, "--help")
            self.assertEqual((done.returncode, done.stderr), (SUCCESS, b""), command)
            self.assertIn("Examples:", done.stdout.decode(), command)
            self.assertIn(f"rabit {command} ", done.stdout.decode(), command)

    def test_wrong_usage(self):
        self.fails(code=USAGE, says="say what to do")
        self.fails("frobnicate", code=USAGE, says="frobnicate")
        self.fails("--frobnicate", code=USAGE, says="see rabit --help")
        for command in ("report", "eval", "run", "bench", "inspect"):
            says = f"see rabit {command} --help"
            self.fails(command, code=USAGE, says=says)
            self.fails(command, "--frobnicate", code=USAGE, says="frobnicate.*" + says)
        self.fails("run", "-m", "x", code=USAGE, says="prompt")
        self.fails("run", "-m", "x", "-p", "", code=USAGE, says="prompt")
        self.fails("inspect", "", says="name given is empty")
        self.fails("run", "-m", "x", "-p", "a", "-f", "b", code=USAGE, says="-f|--file")
        self.fails("eval", "-m", "x", code=USAGE, says="--ppl")
        self.fails("bench", "-m", "x", "-p", "0", "-n", "0", code=USAGE, says="nothing to measure")
        self.fails("bench", "-m", "x", "-o", "xml", code=USAGE, says="xml")
        self.fails("run", "-m", "x", "-p", "a", "-n", "1", "-n", "2", code=USAGE)
        # An option without its value does not take the next option for it.
        for arguments, says in ((("run", "-m", "--predict", "5"), "--model: needs a value before --predict"),
                                (("run", "-m", "x", "-p", "-n", "5"), "--prompt: needs a value before -n"),
                                (("run", "-m", "x", "-p", "a", "--temp", "-s", "1"), "--temp: needs a value before -s"),
                                (("run", "-m", "x", "-p", "a", "-n", "--json"), "--predict: needs a value before --json"),
                                (("eval", "-m", "x", "--ppl", "--ctx", "64"), "--ppl: needs a value before --ctx"),
                                (("bench", "-m", "x", "-t", "-o", "json"), "--threads: needs a value before -o")):
            self.fails(*arguments, code=USAGE, says=says)
        for command in (("run", "-p", "a"), ("eval", "--ppl", "y"), ("bench",)):
            for option, value, says in (("--kernels", "foo", "no kernels named 'foo' run here; there are .*reference"),
                                        ("--device", "foo", "no device is called 'foo'"),
                                        ("--kernels", "", "needs a name"), ("--device", "", "needs a name"),
                                        ("--cache-type", "", "'' is none of f16, q8_0"),
                                        ("--cache-type", "q4", "'q4' is none of f16, q8_0")):
                self.fails(*command, "-m", "x", option, value, code=USAGE, says=f"{option}: {says}")
        self.fails("bench", "--shape", "foo", code=USAGE, says="--shape: no shape is called 'foo'")
        # Both names, for either may have been written.
        self.fails("run", "-m", "x", "-p", "a", "--predict", "many", code=USAGE, says="-n,--predict: 'many' is not")

    def test_bad_numbers(self):
        start = {
            "run": ("run", "-m", "x", "-p", "a"),
            "eval": ("eval", "-m", "x", "--ppl", "y"),
            "bench": ("bench", "-m", "x"),
        }
        whole = ("", "x", "1x", "1.5", "0x10", "1e3", "-7", " 1", "99999999999999999999")
        for command, options in {
            "run": ("-n", "-t", "--top-k", "-s", "-c"),
            "eval": ("--ctx", "--windows", "-t"),
            "bench": ("-p", "-n", "-r", "-t"),
        }.items():
            for option in options:
                for value in whole:
                    self.fails(*start[command], option, value, code=USAGE, says=option)
        for option, values in {
            "--temp": ("", "x", "-1", "nan", "inf", "1,5", "101"),
            "--top-p": ("-0.1", "1.1", "nan"),
            "--min-p": ("-0.1", "1.1", "nan"),
        }.items():
            for value in values:
                self.fails(*start["run"], option, value, code=USAGE, says=option)
        self.fails(*start["run"], "-n", "0", code=USAGE, says="nothing to do")
        self.fails(*start["eval"], "--ctx", "1", code=USAGE, says="--ctx")
        self.fails(*start["bench"], "-r", "0", code=USAGE, says="-r")
        for threads in (",", "1,", ",1", "1,,2", "1,x", "1 2"):
            self.fails(*start["bench"], "-t", threads, code=USAGE, says="-t")

    def test_files_that_are_no_model(self):
        text = self.file("text.txt", TEXT)
        paths = {
            self.folder / "missing.gguf": "no such file",
            self.folder: "not a regular file|directory",
            self.file("empty.gguf", b""): "empty|truncated|too short|not a GGUF",
            self.file("short.gguf", b"GGUF"): "truncated|too short|ends",
            self.file("other.gguf", b"PK\x03\x04" + bytes(4000)): "not a GGUF",
            self.file("old.gguf", b"GGUF\x01\0\0\0" + bytes(4000)): "version",
            self.file("huge.gguf", b"GGUF\x03\0\0\0" + b"\xff" * 16 + bytes(64)): "",
        }
        for path, says in paths.items():
            for arguments in (
                ("inspect", path),
                ("inspect", path, "--json"),
                ("run", "-m", path, "-p", "a"),
                ("eval", "-m", path, "--ppl", text),
                ("bench", "-m", path, "-o", "json"),
            ):
                self.assertIn(str(path), self.fails(*arguments, says=says))

    def test_names_with_odd_characters_stay_on_one_line(self):
        self.fails("inspect", str(self.folder / "two\nlines\t.gguf"), says="two lines")

    def test_devices(self):
        bench = ("bench", "--shape", "smollm2-135m", "--layers", 1, "-p", 1, "-n", 0, "-r", 1)
        self.assertIn("pp1", self.succeeds(*bench, "--device", "cpu"))
        for name in ("gpu", "cuda:", "cuda:x", "CUDA"):
            self.fails(*bench, "--device", name, code=USAGE, says=f"no device is called '{name}'; there are cpu, cuda and cuda:N")
        self.fails(*bench, "--device", "cuda:999",
                   says="built without CUDA: build it with|no NVIDIA GPU can be used here|there is no device cuda:999")

    def test_output_that_cannot_be_written(self):
        with open("/dev/full", "wb") as full:
            self.fails("--help", says="cannot write to standard output", stdout=full)
        script = f"{shlex.quote(RABIT)} --version >&-"
        done = subprocess.run(["sh", "-c", script], stderr=subprocess.PIPE, check=False)
        self.assertEqual(done.returncode, FAILURE)
        self.assertRegex(done.stderr, rb"\Arabit: cannot write to standard output[^\n]*\n\Z")


class WithModel(CliTest):
    def fragment(self, name, size):
        with open(MODEL, "rb") as model:
            return self.file(name, model.read(size))

    def test_inspect(self):
        told = json.loads(self.succeeds("inspect", MODEL, "--json"))
        self.assertTrue(told["runnable"])
        self.assertEqual(told["model"]["architecture"], "llama")
        self.assertEqual(told["model"]["layers"], 30)
        self.assertEqual(told["parameters"], 134515008)
        self.assertEqual(told["file_bytes"], os.path.getsize(MODEL))
        self.assertEqual(told["bits_per_weight"], 5.0)
        self.assertAlmostEqual(told["file_bits_per_weight"], 8 * told["file_bytes"] / 134515008)
        self.assertRegex(told["sha256"], r"\A[0-9a-f]{64}\Z")
        self.assertEqual(len(told["roles"]), 7)
        self.assertEqual(len(told["tensors"]), 272)
        self.assertEqual(told["metadata"]["tokenizer.ggml.tokens"]["length"], 49152)
        short, full = self.succeeds("inspect", MODEL), self.succeeds("inspect", MODEL, "--tensors")
        self.assertIn("--tensors lists all", short)
        self.assertIn("blk.29.ffn_up.weight", full)
        self.assertNotIn("blk.29.ffn_up.weight", short)

    def test_truncated_models(self):
        size = os.path.getsize(MODEL)
        for cut in (20, 1000, 1 << 20, size // 2, size - 1):
            path = self.fragment("cut.gguf", cut)
            self.assertIn("cut.gguf", self.fails("inspect", path))
            self.fails("run", "-m", path, "-p", "a")

    def test_run_is_repeatable(self):
        greedy = ("run", "-m", MODEL, "-p", "The capital of France is", "-n", 8, "--temp", 0)
        text = self.succeeds(*greedy)
        self.assertTrue(text.startswith("The capital of France is Paris"), text)
        told = json.loads(self.succeeds(*greedy, "--json"))
        self.assertEqual(told["prompt"] + told["text"] + "\n", text)
        self.assertEqual(told["text"] + "\n", self.succeeds(*greedy, "--no-display-prompt"))
        self.assertEqual((told["prompt_tokens"], told["generated_tokens"]), (5, 8))
        self.assertEqual(told["stop_reason"], "length")
        for key in ("prompt_tokens_per_second", "tokens_per_second"):
            self.assertGreater(told[key], 0)
        drawn = [
            self.succeeds("run", "-m", MODEL, "-p", "Once", "-n", 12, "-s", seed, "--temp", 1.5)
            for seed in (1, 1, 2)
        ]
        self.assertEqual(drawn[0], drawn[1])
        self.assertNotEqual(drawn[0], drawn[2])

    def test_run_reads_prompts_from_files(self):
        prompt = self.file("prompt.txt", "The capital of France is")
        told = json.loads(
            self.succeeds("run", "-m", MODEL, "-f", prompt, "-n", 1, "--temp", 0, "--json")
        )
        self.assertEqual(told["text"], " Paris")
        with open(self.file("marked.txt", b"\xef\xbb\xbf" + prompt.read_bytes()), "rb") as marked:
            done = run("run", "-m", MODEL, "-f", "-", "-n", 1, "--temp", 0, "--json", stdin=marked)
        again = json.loads(done.stdout)
        self.assertEqual((again["text"], again["prompt"]), (" Paris", told["prompt"]))
        self.fails("run", "-m", MODEL, "-f", "-", says="standard input: empty")

    def test_run_reads_special_tokens_when_asked(self):
        chat = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
        plain, special = (
            json.loads(self.succeeds("run", "-m", MODEL, "-p", chat, "-n", 1, "--json", *more))
            for more in ((), ("--special",))
        )
        self.assertLess(special["prompt_tokens"], plain["prompt_tokens"])

    def test_run_writes_whole_characters(self):
        arguments = ("run", "-m", MODEL, "-p", "Emoji: 😀😀😀😀", "-n", 24, "-s", 3, "--temp", 1.2)
        process = subprocess.Popen(
            [RABIT, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, bufsize=0
        )
        chunks = []
        while chunk := os.read(process.stdout.fileno(), 65536):
            chunks.append(chunk.decode("utf-8"))  # one that ends inside a character does not decode
        process.stdout.close()
        self.assertEqual(process.wait(timeout=60), SUCCESS)
        self.assertGreater(len(chunks), 3)

    def test_run_stops_at_a_full_context(self):
        arguments = ("run", "-m", MODEL, "-p", "The capital of France is", "--ignore-eos")
        told = json.loads(self.succeeds(*arguments, "-n", -1, "-c", 9, "--temp", 0, "--json"))
        self.assertEqual((told["stop_reason"], told["ctx"]), ("context", 9))
        # The last token drawn need not fit: nothing is computed from it.
        self.assertEqual(told["prompt_tokens"] + told["generated_tokens"], 9 + 1)
        long = ("run", "-m", MODEL, "-p", "a " * 9000, "-n", 3)
        self.fails(*long, says="the prompt has 9001 tokens and the context holds 8192: shorten it or take a larger -c")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        if memory < 300:
            self.assertIn(f"rabit: a context of 16777216 positions needs 360 GiB for keys and values, this machine has "
                          f"{memory:.0f} GiB of memory; ask", run(*arguments, "-c", 16777216).stderr.decode())
        said = run(*arguments[:-1], "-n", 9000, "--temp", 0).stderr.decode()
        self.assertIn("rabit: warning: generation stops at the 8192 positions that the model was trained for; "
                      "-c 9005 takes all that -n asks for\n", said)

    def test_bad_prompts(self):
        self.fails("run", "-m", MODEL, "-p", b"\xff\xfe".decode("utf-8", "surrogateescape"),
                   says="not UTF-8")
        for name, content, says in (
            ("empty.txt", b"", "empty"),
            ("latin.txt", b"caf\xe9", "UTF-8"),
            ("long.txt", TEXT * 3, "context"),
        ):
            path = self.file(name, content)
            self.fails("run", "-m", MODEL, "-f", path, "-c", 16, says=says)
        self.fails("run", "-m", MODEL, "-f", self.folder / "missing.txt", says="missing.txt")

    def test_kernels_by_environment(self):
        arguments = ("run", "-m", MODEL, "-p", "a", "-n", 1, "--json")
        self.addCleanup(lambda: os.environ.pop("RABIT_ISA", None))
        os.environ["RABIT_ISA"] = "portable"
        self.assertEqual(json.loads(self.succeeds(*arguments))["kernels"], "portable")
        self.assertEqual(json.loads(self.succeeds(*arguments, "--kernels", "reference"))["kernels"], "reference")
        bench = ("bench", "-m", MODEL, "-p", 2, "-n", 0, "-r", 1)
        self.assertEqual(json.loads(self.succeeds(*bench, "-o", "json"))["kernels"], "portable")
        self.assertIn("| portable |", self.succeeds(*bench))
        said = run("run", "-m", MODEL, "-p", "a", "-n", 1, "-t", 2, "--verbose", "--cache-type", "q8_0").stderr.decode()
        self.assertRegex(said, "kernels portable, 2 threads, .*KV cache Q8_0; loaded in [0-9.]+ s")
        self.assertNotIn(b"loaded in", run("run", "-m", MODEL, "-p", "a", "-n", 1).stderr)
        os.environ["RABIT_ISA"] = "none"
        self.fails(*arguments, says="no kernels named 'none' run here")

    def test_eval(self):
        text = self.file("text.txt", TEXT)
        arguments = ("eval", "-m", MODEL, "--ppl", text, "--ctx", 16)
        told = json.loads(self.succeeds(*arguments, "--windows", 3, "--json"))
        self.assertEqual((told["windows"], told["ctx"], told["tokens_scored"]), (3, 16, 45))
        self.assertEqual(told["bits_per_weight"], 5.0)
        self.assertTrue(2 < told["perplexity"] < 200, told)
        self.assertGreater(told["perplexity_stderr"], 0)
        keys = ("protocol", "model_sha256", "text_sha256", "file_bits_per_weight", "seconds",
                "tokens_per_second", "threads", "kernels")
        for key in keys:
            self.assertIn(key, told)
        exact = json.loads(self.succeeds(*arguments, "--windows", 3, "--json", "--dense-f32"))
        self.assertAlmostEqual(exact["perplexity"] / told["perplexity"], 1, delta=0.01)
        self.assertIn("perplexity", self.succeeds(*arguments, "--windows", 1))

    def test_bad_texts(self):
        for name, content, says in (
            ("empty.txt", b"", "empty"),
            ("latin.txt", b"caf\xe9 " * 99, "UTF-8"),
            ("short.txt", TEXT[:200], "ctx|window"),
        ):
            self.fails("eval", "-m", MODEL, "--ppl", self.file(name, content), says=says)
        self.fails("eval", "-m", MODEL, "--ppl", self.folder / "none.txt", says="none.txt")
        self.fails("eval", "-m", MODEL, "--ppl", self.folder, says="directory|regular")

    def test_eval_against_a_teacher(self):
        text = self.file("text.txt", TEXT * 20)
        options = ("--ppl", text, "--ctx", 32, "--windows", 2, "--teacher", MODEL, "--json")
        many, one, some, all_of = (json.loads(self.succeeds("eval", "-m", MODEL, *options, *more))
                                   for more in ((), ("--together", 1), ("--together", 5), ("--together", 64)))
        self.assertEqual([told["together"] for told in (many, one, some, all_of)], [32, 1, 5, 32])
        for told in (many, one, some, all_of):
            self.assertEqual(told["teacher"]["positions"], 62)
            self.assertLess(told["teacher"]["mean_kl"], 1e-4)
            self.assertGreater(told["teacher"]["largest_kl"], 0)
            self.assertGreater(told["teacher"]["same_top"], 0.95)
            self.assertAlmostEqual(told["perplexity"] / many["perplexity"], 1, places=2)
        exact = json.loads(self.succeeds("eval", "-m", MODEL, *options, "--dense-f32"))
        self.assertLess(exact["teacher"]["mean_kl"], 1e-9)
        self.assertEqual(exact["kv_cache"], "F32")
        small = json.loads(self.succeeds("eval", "-m", MODEL, *options, "--cache-type", "q8_0"))
        self.assertEqual((small["kv_cache"], many["kv_cache"]), ("Q8_0", "F16"))
        self.assertLess(small["teacher"]["mean_kl"], 1e-3)
        self.assertNotEqual(small["teacher"]["mean_kl"], many["teacher"]["mean_kl"])
        self.assertAlmostEqual(many["teacher"]["perplexity"] / exact["perplexity"], 1, places=5)
        self.assertIn("KL from the teacher (F32, perplexity ", self.succeeds("eval", "-m", MODEL, *options[:-1]))
        self.fails("eval", "-m", MODEL, *options, "--cache-type", "q8_0", "--dense-f32", code=2, says="excludes")
        self.fails("eval", "-m", MODEL, *options, "--cache-type", "q3", code=2, says="cache-type")
        self.fails("eval", "-m", MODEL, "--ppl", text, "--ctx", 32, "--teacher", text, says="GGUF")

    def test_bench(self):
        arguments = ("bench", "-m", MODEL, "-p", 8, "-n", 2, "-r", 2, "-t", "1,2", "-d", "0,5")
        told = json.loads(self.succeeds(*arguments, "-o", "json"))
        self.assertIs(told["interrupted"], False)
        tests = [(row["test"], row["threads"], row["depth"]) for row in told["rows"]]
        self.assertEqual(tests, [(f"{test}{at}", threads, depth) for threads in (1, 2)
                                 for depth, at in ((0, ""), (5, " @ d5")) for test in ("pp8", "tg2")])
        self.assertGreater(told["weight_bytes_per_token"], 100_000_000)
        position = 30 * 2 * 3 * 64 * 2  # keys and values of all blocks in F16
        self.assertEqual(told["cache_bytes_per_position"], position)
        for row in told["rows"]:
            self.assertEqual(len(row["samples"]), 2)
            self.assertGreater(row["tokens_per_second"], 0)
            self.assertGreaterEqual(row["stddev"], 0)
            self.assertGreater(row["load_seconds"], 0)
            self.assertGreater(row["load_memory_bytes"], told["weight_bytes_per_token"])
            self.assertEqual(len(row["read_bytes_per_second"]), 2)
            self.assertGreater(min(row["read_bytes_per_second"]), 1e8)
            self.assertAlmostEqual(row["tokens_per_second"] / statistics.mean(row["samples"]), 1)
            self.assertAlmostEqual(row["stddev"] / statistics.stdev(row["samples"]), 1)
            if row["n_gen"] == 0:
                self.assertNotIn("bytes_per_token", row)
                continue
            # The first of two tokens reads the positions before it and itself, the second one more.
            read = told["weight_bytes_per_token"] + (row["depth"] + 1.5) * position
            self.assertAlmostEqual(row["bytes_per_token"] / read, 1)
            self.assertAlmostEqual(row["bytes_per_second"] / (statistics.mean(row["samples"]) * read), 1)
            shares = [rate * read / could for rate, could in zip(row["samples"], row["read_bytes_per_second"])]
            self.assertAlmostEqual(row["share_of_read"] / statistics.mean(shares), 1)
        for options, size in ((("--cache-type", "q8_0"), position / 64 * 34), (("--dense-f32",), position * 2)):
            other = json.loads(self.succeeds("bench", "-m", MODEL, "-p", 0, "-n", 1, "-r", 1, *options, "-o", "json"))
            self.assertEqual(other["cache_bytes_per_position"], size)
        several = ("bench", "-m", MODEL, "-p", 4, "-n", 2, "-r", 2, "-s", "1,3", "-d", 3)
        rows = json.loads(self.succeeds(*several, "-o", "json"))["rows"]
        self.assertEqual([(row["test"], row["sequences"]) for row in rows],
                         [("pp4 @ d3", 1), ("tg2 @ d3", 1), ("tg2 x 3 @ d3", 3)])
        weights, cache = told["weight_bytes_per_token"], 4.5 * position
        self.assertEqual([row["bytes_per_token"] for row in rows[1:]], [weights + cache, weights / 3 + cache])
        for wrong in ("0", "1,x", "", "1025"):
            self.fails("bench", "-m", MODEL, "-s", wrong, code=USAGE, says="--sequences")
        lines = self.succeeds(*arguments).splitlines()
        head = [cell.strip() for cell in lines[0].strip("|").split("|")]
        self.assertEqual(head, ["model", "size", "params", "backend", "threads", "test", "t/s", "GB/s", "of read"])
        self.assertEqual(len(lines), 10)
        self.assertEqual(len({len(line) for line in lines}), 1, lines)

    def test_eval_interrupted(self):
        """What was scored by then is said, with the error."""
        options = ("-m", MODEL, "--ppl", self.file("text.txt", TEXT * 2000), "--ctx", 16)
        process = subprocess.Popen([RABIT, "eval", *map(str, options), "--json"], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, INTERRUPTED, error)
        told = json.loads(out)
        self.assertIs(told["interrupted"], True)
        self.assertEqual(told["tokens_scored"], 15 * told["windows"])
        self.assertLess(told["windows"], told["tokens_total"] // 16)
        again = json.loads(self.succeeds("eval", *options, "--json", "--windows", told["windows"]))
        self.assertIs(again["interrupted"], False)
        self.assertEqual(again["perplexity"], told["perplexity"])

    def test_bench_of_a_shape(self):
        environment = {**os.environ, "TMPDIR": str(self.folder)}
        told = json.loads(self.succeeds("bench", "--shape", "smollm2-135m", "--layers", 1, "--bits", 16, "-p", 2, "-n", 1, "-r", 1,
                                        "-o", "json"))
        self.assertEqual(told["bits_per_weight"], 16)
        self.fails("bench", "--shape", "smollm2-135m", "--bits", 5, code=USAGE, says="--bits")
        for paths, bits in ((1, 1.0), (3, 3.0)):
            done = run("bench", "--shape", "smollm2-135m", "--layers", 2, "--bits", paths, "-p", 4, "-n", 2, "-r", 1,
                       "-t", 1, "-o", "json", env=environment)
            self.assertEqual(done.returncode, SUCCESS, done.stderr)
            told = json.loads(done.stdout)
            self.assertEqual(told["model"], "random smollm2-135m")
            self.assertEqual(told["params"], 49152 * 576 + 2 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536) + 5 * 576)
            self.assertAlmostEqual(told["bits_per_weight"], bits * 1.046, places=3)
            table = self.succeeds("bench", "--shape", "smollm2-135m", "--layers", 2, "--bits", paths, "-p", 0, "-n", 1, "-r", 1,
                                  "-t", 1).splitlines()[-1]
            in_cache = told["rows"][-1]["bytes_per_token"] <= told["last_level_cache_bytes"]
            self.assertRegex(table, r"\| in cache \|$" if in_cache else r" \d+ % \|$")
            self.assertRegex(table, r" \d\d\.\d\d MiB \| 35\.39 M \|")
        # What is rearranged is not held twice.
        done = run("bench", "--shape", "smollm2-135m", "--bits", 4, "-p", 0, "-n", 1, "-r", 1, "-t", 2, "-o", "json", env=environment)
        told = json.loads(done.stdout)
        tiny_model(self.folder / "tiny.gguf")
        least = json.loads(self.succeeds("bench", "-m", self.folder / "tiny.gguf", "-p", 0, "-n", 1, "-r", 1, "-t", 2, "-o", "json"))
        program = least["rows"][0]["load_memory_bytes"]  # what a process holds whatever its model
        self.assertLess(told["rows"][0]["load_memory_bytes"], 1.15 * told["file_bytes"] + program)
        self.assertEqual(list(self.folder.glob("*bench*")), [])
        kept = self.folder / "kept.gguf"
        rows = ("-p", 0, "-n", 1, "-r", 1)
        self.succeeds("bench", "--shape", "smollm2-135m", "--layers", 1, "--save", kept, *rows)
        self.assertIn("random smollm2-135m", self.succeeds("inspect", kept))
        self.succeeds("bench", "-m", kept, *rows)
        self.fails("bench", "-m", kept, "--save", kept, *rows, code=USAGE, says="requires --shape")
        environment["TMPDIR"] = "/none"
        done = run("bench", "--shape", "llama2-7b", "--kernels", "fast", env=environment)
        self.assertRegex(done.stderr.decode(), "\\Arabit: --kernels: no kernels named 'fast' run here[^\n]*\n\\Z")
        done = run("bench", "--shape", "smollm2-135m", env=environment)
        self.assertEqual(done.returncode, FAILURE)
        self.assertIn("cannot make a folder /none/rabit-bench-", done.stderr.decode())
        self.fails("bench", "--shape", "gpt", code=USAGE, says="no shape is called 'gpt'; there are smollm2-135m, ")
        for arguments, says in ((("-m", MODEL, "--shape", "llama2-7b"), "excludes"), ((), "-m or --shape is required"),
                                (("-m", MODEL, "--layers", 2), "requires --shape"),
                                (("-m", MODEL, "-d", "1,x"), "-d")):
            self.fails("bench", *arguments, code=USAGE, says=says)

    def test_output_that_cannot_be_written(self):
        text = self.file("text.txt", TEXT)
        with open("/dev/full", "wb") as full:
            for arguments in (
                ("inspect", MODEL),
                ("run", "-m", MODEL, "-p", "a", "-n", 2),
                ("eval", "-m", MODEL, "--ppl", text, "--ctx", 16, "--windows", 1, "--json"),
                ("bench", "-m", MODEL, "-p", 4, "-n", 0, "-r", 1),
            ):
                done = run(*arguments, stdout=full)
                self.assertEqual(done.returncode, FAILURE, arguments)
                last = done.stderr.decode().splitlines()[-1]
                self.assertRegex(last, "^rabit: cannot write to standard output", arguments)

    def test_interrupt(self):
        text = self.file("text.txt", TEXT * 200)
        for arguments in (
            ("run", "-m", MODEL, "-p", "a", "-n", 4000, "--ignore-eos"),
            ("eval", "-m", MODEL, "--ppl", text, "--ctx", 64),
            ("bench", "-m", MODEL, "-p", 0, "-n", 4000),
            ("bench", "--shape", "smollm2-135m", "-p", 0, "-n", 8000),
        ):
            temporary = self.folder / "temporary"
            temporary.mkdir(exist_ok=True)
            process = subprocess.Popen(
                [RABIT, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(temporary)}
            )
            time.sleep(3)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
            self.assertEqual(process.returncode, INTERRUPTED, (arguments, error))
            self.assertRegex(error.decode().splitlines()[-1], "^rabit: .*interrupted", arguments)
            self.assertEqual(list(temporary.iterdir()), [], arguments)

    def test_a_model_that_shrinks_while_it_is_in_use(self):
        model = self.file("shrinks.gguf", Path(MODEL).read_bytes())
        process = subprocess.Popen(
            [RABIT, "run", "-m", model, "-p", "a", "-n", "4000", "--ignore-eos", "--no-display-prompt"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdout.read(1)  # it is loaded
        os.truncate(model, 0)
        _, error = process.communicate(timeout=60)
        self.assertEqual((process.returncode, error.decode()), (FAILURE, f"rabit: {model} changed while it was in use\n"))
        process = subprocess.Popen([RABIT, "bench", "-m", MODEL, "-n", "4000"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(1)
        process.send_signal(signal.SIGBUS)
        self.assertEqual(process.wait(timeout=60), -signal.SIGBUS)

    def test_stderr_that_cannot_be_written(self):
        for to in ("2>/dev/full", "2>&-"):
            script = f"{shlex.quote(RABIT)} inspect /nonexistent {to}"
            done = subprocess.run(["sh", "-c", script], check=False)
            self.assertEqual(done.returncode, FAILURE, to)

    def bench_with_signals(self, between):
        """Two signals to a program at work, the second `between` seconds after the first, or both as one."""
        process = subprocess.Popen(
            [RABIT, "bench", "-m", MODEL, "-p", "512", "-n", "0", "-r", "1000"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

        def wait_until(field, has_interrupt):
            """For a signal set of /proc/PID/status to hold SIGINT, or not."""
            while process.poll() is None:
                status = Path(f"/proc/{process.pid}/status").read_text()
                mask = int(re.search(rf"{field}:\s*([0-9a-f]+)", status).group(1), 16)
                if bool(mask >> (signal.SIGINT - 1) & 1) == has_interrupt:
                    return
                time.sleep(0.01)

        wait_until("SigCgt", True)  # it would take it
        time.sleep(2)
        if between:
            process.send_signal(signal.SIGINT)
            wait_until("ShdPnd", False)  # it has taken it
            process.send_signal(signal.SIGSTOP)
            time.sleep(between)
        else:
            process.send_signal(signal.SIGSTOP)  # both are there when it wakes
            process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=60)
        return process.returncode, error.decode().splitlines()[-1]

    def test_bench_interrupted_or_killed(self):
        """Rows that are done are said with the error; the model of a shape is in no folder while it is measured."""
        for stop in (signal.SIGINT, signal.SIGKILL):
            process = subprocess.Popen(
                [RABIT, "bench", "--shape", "smollm2-135m", "--layers", "2", "-p", "4", "-n", "1000000", "-o", "json"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(self.folder)}
            )
            while "(deleted)" not in Path(f"/proc/{process.pid}/maps").read_text():
                self.assertIsNone(process.poll())
                time.sleep(0.05)
            time.sleep(3)
            process.send_signal(stop)
            out, _ = process.communicate(timeout=60)
            self.assertEqual(process.returncode, INTERRUPTED if stop == signal.SIGINT else -stop)
            if stop == signal.SIGINT:
                told = json.loads(out)
                self.assertIs(told["interrupted"], True)
                self.assertEqual([row["test"] for row in told["rows"]], ["pp4"])
            self.assertEqual(list(self.folder.iterdir()), [])

    def test_second_interrupt(self):
        for _ in range(5):  # the program may have been just between two pieces of its work
            code, line = self.bench_with_signals(0.4)
            if code != INTERRUPTED:
                break
        self.assertEqual((code, line), (-signal.SIGTERM, "rabit: stopped at once, by a second signal"))

    def test_signals_close_together_are_one(self):
        code, line = self.bench_with_signals(0)
        self.assertEqual((code, line), (INTERRUPTED, "rabit: interrupted"))

    def test_examples_of_every_help(self):
        self.file("text.txt", TEXT * 40)
        self.file("prompt.txt", "It was a dark and stormy night")
        for name in ("model.gguf", "model.2bit.gguf"):
            (self.folder / name).symlink_to(os.path.abspath(MODEL))
        binary = os.path.abspath(RABIT)
        ran = 0
        for command in ((), ("eval",), ("run",), ("bench",), ("inspect",)):
            help_text = self.succeeds(*command, "--help")
            for line in help_text[help_text.index("Examples:"):].splitlines():
                words = shlex.split(line) if line.startswith("  rabit ") else []
                # An example that takes all defaults is one of minutes here: it is run smaller.
                small = {
                    "eval": ["--ctx", "64", "--windows", "2"],
                    "bench": ["-p", "8", "-n", "2", "-r", "1", "-t", "2"],
                }
                if len(words) > 1:
                    arguments, given = words[1:], subprocess.DEVNULL
                    if "<" in arguments:
                        given = open(self.folder / arguments.pop(), "rb")
                        self.addCleanup(given.close)
                        arguments.remove("<")
                    for option, value in zip(*[iter(small.get(words[1], []))] * 2):
                        if option in arguments:
                            arguments[arguments.index(option) + 1] = value
                        elif "--help" not in arguments:
                            arguments += [option, value]
                    done = subprocess.run(
                        [binary, *arguments], cwd=self.folder, stdin=given,
                        capture_output=True, timeout=300, check=False
                    )
                    self.assertEqual(done.returncode, SUCCESS, (line, done.stderr))
                    self.assertNotEqual(done.stdout, b"", line)
                    ran += 1
        self.assertGreaterEqual(ran, 12)


if __name__ == "__main__":
    if "WithModel" in sys.argv and not os.path.isfile(MODEL):
        print(f"skipped: {MODEL} is missing, run scripts/setup.sh")
        sys.exit(77)
    unittest.main(argv=sys.argv, verbosity=1)
