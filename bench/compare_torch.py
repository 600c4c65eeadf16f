#!/usr/bin/env python3
"""Times a token of a decoder in PyTorch, in F16 with random weights, to be held against rabit's on the same GPU.

    bench/compare_torch.py --shape llama2-7b --context 512
    build/cuda/bin/gpu_decode_bench --shape llama2-7b --context 512

Each layer is compiled (torch.compile, not with --eager), and the whole token recorded as one CUDA graph: products by
cuBLAS or what the compiler makes of them, attention by scaled_dot_product_attention over the positions there are.
Needs PyTorch with CUDA.
"""

import argparse
import statistics
import sys

# Layers, width, heads, KV heads, hidden, vocabulary; as random_model.cpp has them.
SHAPES = {
    "smollm2-135m": (30, 576, 9, 3, 1536, 49152),
    "llama2-7b": (32, 4096, 32, 32, 11008, 32000),
    "llama2-13b": (40, 5120, 40, 40, 13824, 32000),
    "llama3-8b": (32, 4096, 32, 8, 14336, 128256),
}


def make_token(torch, shape, context):
    """A function of no arguments that runs a token at position `context`, its layers as a list to be compiled."""
    layers, width, heads, kv_heads, hidden, vocabulary = shape
    size = width // heads
    functional = torch.nn.functional

    def weight(rows, columns):
        return torch.randn(rows, columns, device="cuda", dtype=torch.float16) / columns**0.5

    def norm(x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).half()

    def turn(x, cosine, sine):
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)

    def layer(x, qkv, output, gate_up, down, keys, values, cosine, sine):
        joined = functional.linear(norm(x), qkv)
        q, k, v = joined.split((heads * size, kv_heads * size, kv_heads * size), -1)
        q, k = turn(q.view(heads, size), cosine, sine), turn(k.view(kv_heads, size), cosine, sine)
        keys[:, :, context] = k
        values[:, :, context] = v.view(kv_heads, size)
        attended = functional.scaled_dot_product_attention(
            q.view(1, heads, 1, size), keys[:, :, :context + 1], values[:, :, :context + 1],
            enable_gqa=heads != kv_heads)
        x = x + functional.linear(attended.reshape(1, -1), output)
        gate, up = functional.linear(norm(x), gate_up).chunk(2, -1)
        return x + functional.linear(functional.silu(gate) * up, down)

    parameters = []
    for _ in range(layers):
        cache = [torch.randn(1, kv_heads, context + 1, size, device="cuda", dtype=torch.float16) for _ in range(2)]
        parameters.append((weight((heads + 2 * kv_heads) * size, width), weight(width, heads * size),
                           weight(2 * hidden, width), weight(width, hidden), *cache))
    embedding, head = weight(vocabulary, width), weight(vocabulary, width)
    angles = torch.rand(size // 2, device="cuda")
    cosine, sine = angles.cos().half(), angles.sin().half()
    token = torch.tensor([1], device="cuda")

    def run(one_layer):
        x = embedding[token]
        for own in parameters:
            x = one_layer(x, *own, cosine, sine)
        return functional.linear(norm(x), head)

    return run, layer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--context", type=int, default=512, help="position of the token (default 512)")
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--eager", action="store_true", help="without the compiler")
    options = parser.parse_args()
    if options.context < 1 or options.repetitions < 1:
        parser.error("--context and --repetitions are at least 1")
    try:
        import torch
    except ImportError:
        sys.exit("compare_torch.py: PyTorch is not installed")
    if not torch.cuda.is_available():
        sys.exit("compare_torch.py: PyTorch finds no GPU")

    with torch.inference_mode():
        run, layer = make_token(torch, SHAPES[options.shape], options.context)
        one_layer = layer if options.eager else torch.compile(layer, dynamic=False)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(one_layer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run(one_layer)
        times = []
        for i in range(-3, options.repetitions):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 0:
                times.append(begin.elapsed_time(end))
    how = "eager" if options.eager else "compiled"
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {how}; {options.shape}, F16: "
          f"{statistics.median(times):.4f} ms ({min(times):.4f} to {max(times):.4f})")


if __name__ == "__main__":
    main()
