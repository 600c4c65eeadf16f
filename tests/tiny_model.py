"""What tests of the program share: a tiny model, a text, and a case that runs the program on them.

Environment: RABIT_BINARY the program.
"""

import math
import os
import random
import re
import struct
import subprocess
import tempfile
import unittest
from pathlib import Path

RABIT = os.path.abspath(os.environ.get("RABIT_BINARY", "build/release/bin/rabit"))
SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN, CONTEXT = 3, 64, 4, 2, 96, 128
MERGES = ["t h", "th e", "i n", "a n", "e r"]
TEXT = (
    "The lighthouse stood at the end of a long spit of sand, and the keeper walked out to it every "
    "evening before the sun went down. He carried a lamp, a loaf of bread and a book. In winter "
    "the waves broke over the path, and then he waited for the tide.\n<|endoftext|>\nNobody had "
    "told him that the light was no longer needed, for nobody remembered that he was there.\n"
)
# Small enough for a test; an example's own values give way to them.
SMALL = {
    "--seq-len": "32", "--calib-tokens": "512", "--warm-epochs": "1", "--batch": "2",
    "--tokens": "128", "-t": "1",
}
LEFTOVERS = ("", ".json", ".html", ".lock", ".partial", ".unverified", ".unverified.partial", ".test-write",
             ".test-write.partial", ".ckpt.partial")


def byte_alphabet():
    """The characters that stand for the bytes 0 to 255 in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b if b in plain else next(others)) for b in range(256)]


def text_of(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def meta(key, kind, value):
    """One GGUF metadata entry."""
    numbers = {"u32": (4, "<I"), "f32": (6, "<f"), "bool": (7, "<?")}
    if kind in numbers:
        number, form = numbers[kind]
        return text_of(key) + struct.pack("<I", number) + struct.pack(form, value)
    if kind == "string":
        return text_of(key) + struct.pack("<I", 8) + text_of(value)
    if kind == "strings":
        head = struct.pack("<IIQ", 9, 8, len(value))
        return text_of(key) + head + b"".join(map(text_of, value))
    head = struct.pack("<IIQ", 9, 5, len(value))  # i32s
    return text_of(key) + head + struct.pack(f"<{len(value)}i", *value)


def tiny_model(path):
    """Writes a random "llama" with a complete byte-level tokenizer."""
    draw = random.Random(1)
    tokens = byte_alphabet() + [merge.replace(" ", "") for merge in MERGES] + ["<|endoftext|>"]
    end, vocab = len(tokens) - 1, len(tokens)
    entries = [
        meta("general.architecture", "string", "llama"),
        meta("general.name", "string", "tiny"),
        meta("llama.block_count", "u32", LAYERS),
        meta("llama.embedding_length", "u32", WIDTH),
        meta("llama.feed_forward_length", "u32", HIDDEN),
        meta("llama.attention.head_count", "u32", HEADS),
        meta("llama.attention.head_count_kv", "u32", KV_HEADS),
        meta("llama.context_length", "u32", CONTEXT),
        meta("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5),
        meta("llama.rope.freq_base", "f32", 10000.0),
        meta("llama.vocab_size", "u32", vocab),
        meta("tokenizer.ggml.model", "string", "gpt2"),
        meta("tokenizer.ggml.pre", "string", "smollm"),
        meta("tokenizer.ggml.tokens", "strings", tokens),
        meta("tokenizer.ggml.token_type", "i32s", [1] * end + [3]),
        meta("tokenizer.ggml.merges", "strings", MERGES),
        meta("tokenizer.ggml.bos_token_id", "u32", end),
        meta("tokenizer.ggml.eos_token_id", "u32", end),
        meta("tokenizer.ggml.add_bos_token", "bool", False),
    ]
    kv_width = KV_HEADS * WIDTH // HEADS
    shapes = [("token_embd.weight", (WIDTH, vocab), 0.5), ("output_norm.weight", (WIDTH,), None)]
    for layer in range(LAYERS):
        for name, shape, size in (
            ("attn_norm", (WIDTH,), None), ("attn_q", (WIDTH, WIDTH), 0.12),
            ("attn_k", (WIDTH, kv_width), 0.12), ("attn_v", (WIDTH, kv_width), 0.12),
            ("attn_output", (WIDTH, WIDTH), 0.12), ("ffn_norm", (WIDTH,), None),
            ("ffn_gate", (WIDTH, HIDDEN), 0.12), ("ffn_up", (WIDTH, HIDDEN), 0.12),
            ("ffn_down", (HIDDEN, WIDTH), 0.12),
        ):
            shapes.append((f"blk.{layer}.{name}.weight", shape, size))
    infos, data = b"", b""
    for name, shape, size in shapes:
        infos += text_of(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        values = [1.0 if size is None else draw.gauss(0, size) for _ in range(math.prod(shape))]
        data += struct.pack(f"<{len(values)}f", *values)
        data += bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(entries)) + b"".join(entries) + infos
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def words(options):
    return [str(word) for pair in options.items() for word in pair]


class QuantizeCase(unittest.TestCase):
    """A tiny model, a text, and runs on them in a folder of their own."""

    @classmethod
    def setUpClass(cls):
        cls.shared = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.shared.cleanup)
        cls.model = Path(cls.shared.name) / "model.gguf"
        tiny_model(cls.model)

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.text = self.file("text.txt", TEXT * 12)
        self.out = self.folder / "out.gguf"
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache")}

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def run_rabit(self, *arguments, **more):
        more = {"stdout": subprocess.PIPE, **more}
        return subprocess.run(
            [RABIT, *map(str, arguments)], cwd=self.folder, stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE, timeout=120, check=False, env=self.environment, **more
        )

    def succeeds(self, *arguments):
        done = self.run_rabit(*arguments)
        self.assertEqual(done.returncode, SUCCESS, (arguments, done.stderr.decode()))
        return done.stdout.decode()

    def start(self, *arguments):
        """The command line of a small run; a repeated option replaces the small value."""
        small = {k: v for k, v in SMALL.items() if k not in map(str, arguments)}
        return ("quantize", self.model, "-o", self.out, "--data", self.text, *words(small),
                *arguments)

    def one_line(self, done, arguments):
        """The one line that says what went wrong: the last, and the only one of its kind."""
        lines = done.stderr.decode().splitlines()
        errors = [line for line in lines if line.startswith("rabit:")]
        self.assertEqual(len(errors), 1, (arguments, lines))
        self.assertEqual(lines[-1], errors[0], arguments)
        return errors[0]

    def fails(self, *arguments, code=FAILURE, says="", out=None, **more):
        done = self.run_rabit(*arguments, **more)
        self.assertEqual(done.returncode, code, (arguments, done.stderr.decode()))
        line = self.one_line(done, arguments)
        self.assertRegex(line, re.compile(says, re.IGNORECASE), arguments)
        if done.stdout is not None:
            self.assertEqual(done.stdout, b"", arguments)
        for end in LEFTOVERS:
            path = Path(str(out or self.out) + end)
            self.assertFalse(path.is_file(), (arguments, path))
        return line
