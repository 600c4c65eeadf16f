#!/usr/bin/env python3
"""Writes a "llama" of any shape with random weights and the vocabulary of another: to measure time and memory where no such
model is at hand. Its text means nothing.

    tools/random_model.py --like SmolLM2-135M-Instruct.Q4_1.gguf --layers 32 --d-model 4096 --heads 32 --kv-heads 32 \\
        --d-ff 11008 --context 4096 -o llama-7b-shape.gguf

Linear layers and embedding in Q4_0, about 0.02 in size; norms are 1. Of Python's standard library alone.
"""

import argparse
import os
import struct
import sys

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's types
STRING, ARRAY = 8, 9
F32, Q4_0 = 0, 2
BLOCK, BLOCK_BYTES = 32, 18  # of Q4_0: a half-precision scale and 32 nibbles
SIZE = 0.02
NIBBLES = 4.61  # standard deviation of what they stand for
ALIGNMENT = 32


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, form):
        size = struct.calcsize(form)
        if self.at + size > len(self.data):
            raise ValueError("ends too early")
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return value

    def text(self):
        size = self.take("<Q")
        self.at += size
        return self.data[self.at - size:self.at].decode("utf-8")

    def skip(self, kind):
        if kind == STRING:
            self.text()
        elif kind == ARRAY:
            inner, count = self.take("<I"), self.take("<Q")
            for _ in range(count):
                self.skip(inner)
        elif kind in SCALARS:
            self.at += SCALARS[kind]
        else:
            raise ValueError(f"metadata of the unknown type {kind}")


def tokenizer_of(path):
    """The file's metadata under tokenizer., as it stands, the number of entries, and of tokens."""
    with open(path, "rb") as file:
        reader = Reader(file.read(64 << 20))
    if reader.data[:4] != b"GGUF":
        raise ValueError("no GGUF file")
    reader.at = 8
    reader.take("<Q")
    kept, count, tokens = b"", 0, 0
    for _ in range(reader.take("<Q")):
        begin, name = reader.at, reader.text()
        kind, value = reader.take("<I"), reader.at
        reader.skip(kind)
        if name == "tokenizer.ggml.tokens":
            tokens = struct.unpack_from("<Q", reader.data, value + 4)[0]
        if name.startswith("tokenizer."):
            kept += reader.data[begin:reader.at]
            count += 1
    if tokens == 0:
        raise ValueError("no vocabulary")
    return kept, count, tokens


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def metadata(options, tokens):
    entries = [text("general.architecture") + struct.pack("<I", STRING) + text("llama"),
               text("general.name") + struct.pack("<I", STRING) + text("random weights")]
    for name, value in (("block_count", options.layers), ("embedding_length", options.d_model),
                        ("feed_forward_length", options.d_ff), ("attention.head_count", options.heads),
                        ("attention.head_count_kv", options.kv_heads), ("context_length", options.context),
                        ("vocab_size", tokens)):
        entries.append(text(f"llama.{name}") + struct.pack("<II", 4, value))
    for name, value in (("attention.layer_norm_rms_epsilon", 1e-5), ("rope.freq_base", 10000.0)):
        entries.append(text(f"llama.{name}") + struct.pack("<If", 6, value))
    return entries


def tensors(options, tokens):
    """(name, sizes with the innermost first, type)"""
    d, d_kv, d_ff = options.d_model, options.d_model // options.heads * options.kv_heads, options.d_ff
    yield "token_embd.weight", (d, tokens), Q4_0
    yield "output.weight", (d, tokens), Q4_0
    yield "output_norm.weight", (d,), F32
    for layer in range(options.layers):
        for name, sizes, kind in (("attn_norm", (d,), F32), ("attn_q", (d, d), Q4_0), ("attn_k", (d, d_kv), Q4_0),
                                  ("attn_v", (d, d_kv), Q4_0), ("attn_output", (d, d), Q4_0), ("ffn_norm", (d,), F32),
                                  ("ffn_gate", (d, d_ff), Q4_0), ("ffn_up", (d, d_ff), Q4_0),
                                  ("ffn_down", (d_ff, d), Q4_0)):
            yield f"blk.{layer}.{name}.weight", sizes, kind


def data_of(elements, kind):
    if kind == F32:
        return struct.pack("<f", 1.0) * elements
    scale = struct.pack("<e", SIZE / NIBBLES)
    blocks = elements // BLOCK
    data = bytearray(os.urandom(blocks * BLOCK_BYTES))
    data[0::BLOCK_BYTES] = scale[:1] * blocks
    data[1::BLOCK_BYTES] = scale[1:] * blocks
    return data


def product(sizes):
    result = 1
    for size in sizes:
        result *= size
    return result


def write(options):
    kept, count, tokens = tokenizer_of(options.like)
    entries = metadata(options, tokens)
    all_tensors = list(tensors(options, tokens))
    infos, offset = b"", 0
    for name, sizes, kind in all_tensors:
        infos += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
        size = product(sizes) * 4 if kind == F32 else product(sizes) // BLOCK * BLOCK_BYTES
        offset += (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", 3, len(all_tensors), len(entries) + count) + b"".join(entries) + kept + infos
    with open(options.out, "xb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for _, sizes, kind in all_tensors:
            data = data_of(product(sizes), kind)
            file.write(data)
            file.write(bytes(-len(data) % ALIGNMENT))
    weights = sum(product(sizes) for _, sizes, _ in all_tensors)
    print(f"wrote {options.out}: {weights:,} random weights, {os.path.getsize(options.out) / 1e9:.2f} GB")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--like", required=True, help="GGUF file that gives the vocabulary")
    parser.add_argument("-o", dest="out", required=True, help="file to write, which must not be there yet")
    for name, what in (("layers", "blocks"), ("d-model", "width"), ("heads", "heads of queries"),
                       ("kv-heads", "heads of keys and values"), ("d-ff", "width of the feed-forward part"),
                       ("context", "positions")):
        parser.add_argument(f"--{name}", type=int, required=True, help=what)
    options = parser.parse_args(argv)
    for name in ("layers", "d_model", "heads", "kv_heads", "d_ff", "context"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 1 or more")
    if options.d_model % options.heads or options.heads % options.kv_heads:
        parser.error("--d-model must be a multiple of --heads, and that one of --kv-heads")
    head_dim = options.d_model // options.heads
    if head_dim % 2 or any(size % BLOCK for size in (options.d_model, options.d_ff, head_dim * options.kv_heads)):
        parser.error(f"--d-model, --d-ff and the keys' width must be multiples of {BLOCK}, a head's width even")
    try:
        write(options)
    except (OSError, ValueError, struct.error) as error:
        path = getattr(error, "filename", None) or options.like
        raise SystemExit(f"random_model: {path}: {getattr(error, 'strerror', None) or error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
