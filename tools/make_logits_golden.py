#!/usr/bin/env python3
"""Writes tests/golden/logits.json: what transformers computes from a GGUF file in float32.

usage: make_logits_golden.py MODEL.gguf TEXT [-o OUT.json] [--threads N]

The model is loaded through transformers' own GGUF reader and every weight is then compared with
the dequantization of the `gguf` package, so that the golden values cannot come from other weights.
The text is tokenized as a whole by the tokenizer of make_tokenizer_golden.py; no BOS is added.

Keys of the result:
  model, model_sha256, text, text_sha256   base names and digests of the inputs
  versions                                 packages that computed it
  vocab_size, tokens                       the first 256 token ids of the text
  probe_ids                                the vocabulary ids whose logits are kept
  logits                                   [256][len(probe_ids)], position by position
  logsumexp, argmax                        [256], over the whole vocabulary, natural logarithm
  norm_positions, l2_norm                  Euclidean norm of whole logit vectors at some positions
  perplexity                               list of {ctx, windows, tokens_scored, nll_sum, value}:
                                           windows do not overlap, all but a window's first token
                                           are scored, value = exp(nll_sum / tokens_scored)
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import os

import gguf
import numpy as np
import torch
import tokenizers
import transformers

from make_tokenizer_golden import build_tokenizer, sha256_file

GOLDEN_TOKENS = 256
PROBES = 64
NORM_POSITIONS = [0, 17, 128, 255]
LONG_CTX = 2048
LONG_WINDOWS = 2

ROLES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name):
    """The transformers name of a GGUF tensor of a llama model."""
    if name.startswith("blk."):
        _, layer, role, _ = name.split(".")
        return f"model.layers.{layer}.{ROLES[role]}.weight"
    return {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }[name]


def half_split_rows(weight, heads):
    """Rows of q or k from GGUF's rotary order (pairs adjacent) to halves apart; (rows, d_in)."""
    rows, d_in = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, d_in)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, d_in)


def check_weights(model, reader):
    """Raises unless each weight of `model` equals the file's, dequantized independently."""
    state = model.state_dict()
    config = model.config
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name:
            weight = half_split_rows(weight, config.num_attention_heads)
        elif ".attn_k." in tensor.name:
            weight = half_split_rows(weight, config.num_key_value_heads)
        loaded = state[hf_name(tensor.name)].numpy()
        if loaded.shape != weight.shape:
            raise SystemExit(f"{tensor.name}: shape {loaded.shape}, the file has {weight.shape}")
        if not np.array_equal(loaded, weight):
            raise SystemExit(f"{tensor.name}: off by {np.abs(loaded - weight).max()}")
    named = {hf_name(t.name) for t in reader.tensors} | {"lm_head.weight"}
    extra = set(state) - named
    if extra:
        raise SystemExit(f"weights that the file does not have: {sorted(extra)}")
    tied = state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    if "output.weight" not in {t.name for t in reader.tensors} and not tied:
        raise SystemExit("the head is neither in the file nor tied to the embedding")
    print(f"{len(reader.tensors)} tensors equal the file's")


def negative_log_likelihoods(logits, ids):
    """-log p of ids[1:] in float64; logits (n, vocab), ids (n)."""
    logp = torch.log_softmax(logits[:-1].double(), dim=-1)
    return -logp.gather(1, ids[1:, None])[:, 0]


def perplexity(model, ids, ctx, windows):
    total = 0.0
    for w in range(windows):
        window = torch.tensor(ids[w * ctx : (w + 1) * ctx])
        logits = model(window[None]).logits[0]
        total += negative_log_likelihoods(logits, window).sum().item()
    scored = windows * (ctx - 1)
    return {
        "ctx": ctx,
        "windows": windows,
        "tokens_scored": scored,
        "nll_sum": total,
        "value": math.exp(total / scored),
    }


def rounded(values, digits=8):
    return [float(f"{v:.{digits}g}") for v in values]


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("-o", "--output", default=f"{here}/../tests/golden/logits.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    reader = gguf.GGUFReader(args.model)
    with open(args.text, "rb") as file:
        text = file.read().decode("utf-8")
    ids = build_tokenizer(reader).encode(text, add_special_tokens=False).ids

    folder, name = os.path.split(os.path.abspath(args.model))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    check_weights(model, reader)

    tokens = torch.tensor(ids[:GOLDEN_TOKENS])
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
        windows = [
            perplexity(model, ids, GOLDEN_TOKENS, 1),
            perplexity(model, ids, LONG_CTX, LONG_WINDOWS),
        ]
    vocab = logits.shape[1]
    probes = [i * (vocab - 1) // (PROBES - 1) for i in range(PROBES)]
    golden = {
        "model": name,
        "model_sha256": sha256_file(args.model),
        "text": os.path.basename(args.text),
        "text_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        "versions": {
            "gguf": importlib.metadata.version("gguf"),
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "vocab_size": vocab,
        "tokens": tokens.tolist(),
        "probe_ids": probes,
        "logits": [rounded(row) for row in logits[:, probes].tolist()],
        "logsumexp": rounded(torch.logsumexp(logits.double(), dim=-1).tolist()),
        "argmax": logits.argmax(dim=-1).tolist(),
        "norm_positions": NORM_POSITIONS,
        "l2_norm": rounded(logits.double()[NORM_POSITIONS].norm(dim=-1).tolist()),
        "perplexity": windows,
    }
    lines = []
    for key, value in golden.items():
        if key == "logits":
            rows = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in value)
            lines.append(f'"{key}": [\n{rows}]')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    with open(args.output, "w", encoding="utf-8") as file:
        file.write("{" + ",\n".join(lines) + "}\n")
    print(json.dumps(windows))


if __name__ == "__main__":
    main()
