#!/usr/bin/env python3
"""Writes tests/golden/tokenizer.json: what the Python `tokenizers` package makes of a vocabulary.

usage: make_tokenizer_golden.py MODEL.gguf TEXT [-o OUT.json]

The tokenizer is built from the vocabulary, merges and token types that the GGUF file carries:
byte-level BPE without an unknown token, every digit alone, then GPT-2's pattern.

Keys of the result:
  model, model_sha256   base name and digest of the GGUF file
  versions              packages that computed it
  text                  {file, sha256, ids, ids_sha256}: number of ids of the whole text and SHA-256
                        of these ids as little-endian int32
  missing_bytes         bytes that have no token of their own; the package drops them
  strings               list of {text, parse_special, ids}; text is UTF-8
"""

import argparse
import hashlib
import json
import os
import struct

import gguf
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3
USER_DEFINED = 4

# Strings whose special tokens are parsed when the flag says so.
STRINGS = [
    "",
    " ",
    "a",
    "Hello, world!",
    "  leading and trailing  ",
    "one  two   three    four",
    "\ttab\t\ttabs \t mixed",
    "line\nline\r\nline\rline\n\n\nend\n",
    "\n\n \n  \n",
    "it's I'm you're we've they'll he'd don't",
    "IT'S I'M YOU'RE WE'VE THEY'LL HE'D DON'T",
    "'s't're've'm'll'd '' 'x",
    "it\u2019s \u2018quoted\u2019 \u201ctext\u201d",
    "1234567890",
    "  42  1 2  3",
    "a1b22c333 v1.2.3-rc4",
    "3.14159e-10 0xDEADBEEF",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u0e51\u0e52",
    "\u00bd \u00bc\u00be \u2153 x\u00b2 \u2167 \u2460\u2461 \u3007",
    "\u00a0nbsp\u00a0\u00a0nbsp \u00a0x",
    "\u2003em\u2003\u2002en\u3000ideographic\u1680ogham",
    "a\u2028b\u2029c\u0085d\u000be\u000cf",
    "next\u0085\u0085 line \u0085",
    "x\u180ey \u180e\u180e z",
    "zero\u200bwidth\u200c\u200djoin\u2060\ufeffbom",
    "\ufeffstarts with a mark",
    "caf\u00e9 cafe\u0301 na\u00efve \u0301alone",
    "Z\u0351\u036bA\u0489\u0335L\u0321\u0353G\u030aO\u0322",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u3053\u3093\u306b\u3061\u306f \u4e16\u754c \u30ab\u30bf\u30ab\u30ca",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u05e9\u05dc\u05d5\u05dd \u202eright\u202c",
    "\U0001f600 \U0001f44d\U0001f3fd ok",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 flags \u2764\ufe0f",
    "\U0001d54f\U0001d400 \U00020000\U0002a6d6",
    "\U00040000 \U000e0001 \U000f0000 \U0010ffff",
    "\U00050000\U0009ffff x\U00080000y",
    "\u0000nul \u0001\u0002\u0003",
    "a\u0004b\u0006c\u0013d\u0014e\u0016f\u001dg",
    "\u0004",
    "th\u0004e \u0016 \u001d\u001d",
    "".join(map(chr, range(1, 32))),
    "".join(map(chr, range(127, 161))),
    "".join(map(chr, range(32, 127))),
    "".join(map(chr, range(161, 256))),
    "\ufffd\ufffe\uffff",
    "def f(x):\n    if x > 0:\n        return x ** 2\n\treturn None  # done\n",
    "<html>&nbsp;</html> {\"key\": [1, 2.5, null]}",
    "https://example.org/a_b-c?d=%20&e=f#g user@example.org",
    " @-@ = = Heading = = \n",
    "!!!???...---___***///\\\\\\",
    " !! ?? ..  ,,",
    "supercalifragilisticexpialidocious Donaudampfschifffahrt",
    "\u00c4\u00d6\u00dc\u00df \u01c5 \u02b0 \u00aa\u00ba \u0130\u0131",
    "x" * 1000,
    " " * 1000,
    " " * 999 + "x",
    "7" * 300,
    "ab" * 700,
    "-" * 777 + "=" * 333,
    "\n" * 500 + " \n" * 50,
    "\u3000" * 200 + "\U0001f600" * 100,
    "<|im_start|>",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|><|endoftext|> more",
    "a <repo_name>b<reponame>c <file_sep> d",
    "<|im_start|",
    "<|im_start<|im_start|>|>",
    "5<|im_end|>6 <jupyter_code>  <empty_output>",
    "<<|im_end|>> <filename><gh_stars>12",
]


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def byte_alphabet():
    """The printable character that stands for each byte in byte-level vocabularies."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (b for b in range(256) if b not in visible)
    table = {b: chr(b) for b in visible}
    table.update({b: chr(256 + i) for i, b in enumerate(hidden)})
    return table


def build_tokenizer(reader, parse_special=True):
    """The tokenizer of a GGUF file; without `parse_special`, special tokens are plain text."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    if reader.fields["tokenizer.ggml.pre"].contents() != "smollm":
        raise SystemExit("only the pre-tokenizer smollm is written down here")
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if parse_special:
        for token, kind in zip(tokens, types):
            if kind in (CONTROL, USER_DEFINED):
                tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return tokenizer


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("-o", "--output", default=f"{here}/../tests/golden/tokenizer.json")
    args = parser.parse_args()

    reader = gguf.GGUFReader(args.model)
    plain = build_tokenizer(reader, parse_special=False)
    parsing = build_tokenizer(reader, parse_special=True)
    vocab = plain.get_vocab()

    with open(args.text, "rb") as file:
        raw = file.read()
    ids = plain.encode(raw.decode("utf-8"), add_special_tokens=False).ids
    strings = []
    for text in STRINGS:
        for flag, tokenizer in ((False, plain), (True, parsing)):
            if flag and "<" not in text:
                continue
            found = tokenizer.encode(text, add_special_tokens=False).ids
            strings.append({"text": text, "parse_special": flag, "ids": found})
    golden = {
        "model": os.path.basename(args.model),
        "model_sha256": sha256_file(args.model),
        "versions": {"tokenizers": tokenizers.__version__},
        "text": {
            "file": os.path.basename(args.text),
            "sha256": hashlib.sha256(raw).hexdigest(),
            "ids": len(ids),
            "ids_sha256": hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest(),
        },
        "missing_bytes": [b for b, c in byte_alphabet().items() if c not in vocab],
    }
    golden["missing_bytes"].sort()
    lines = [f'"{key}": {json.dumps(value)}' for key, value in golden.items()]
    rows = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in strings)
    lines.append(f'"strings": [\n{rows}]')
    with open(args.output, "w", encoding="utf-8") as file:
        file.write("{" + ",\n".join(lines) + "}\n")
    print(f"{len(ids)} ids, {len(strings)} strings, {len(golden['missing_bytes'])} missing bytes")


if __name__ == "__main__":
    main()
