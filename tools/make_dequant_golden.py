"""Makes tests/golden/dequant.gguf and dequant.f32: blocks of every format that src/io/dequant.cpp
reads and, in the same order, the floats that the independent package `gguf` decodes them to.

    pip install gguf==0.19.0 numpy     (in an environment of its own)
    python tools/make_dequant_golden.py tests/golden

Scales take extreme values (largest, subnormal, zeros of both signs, infinities, NaN), codes are all
ones, all zeros and random bytes. The output is the same on every run.
"""

import pathlib
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

# Format -> (bytes of a block, where its half-precision scales lie)
BLOCKS = {
    T.Q8_0: (34, [0]),
    T.Q4_0: (18, [0]),
    T.Q4_1: (20, [0, 2]),
    T.Q5_0: (22, [0]),
    T.Q5_1: (24, [0, 2]),
    T.Q4_K: (144, [0, 2]),
    T.Q5_K: (176, [0, 2]),
    T.Q6_K: (210, [208]),
}
SCALES = [0x3C00, 0x2E66, 0xB266, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E01]


def blocks_of(kind, rng):
    size, places = BLOCKS[kind]
    few = size > 100
    rows = []
    for i, scale in enumerate(SCALES[::2] if few else SCALES):
        block = rng.integers(0, 256, size, dtype=np.uint8)
        if i == 1:
            block[:] = 0xFF
        if i == 2:
            block[:] = 0
        for n, place in enumerate(places):
            # The second scale comes from a different end of the list, so both vary independently.
            half = scale if n == 0 else SCALES[(5 * i + 1) % len(SCALES)]
            block[place : place + 2] = [half & 255, half >> 8]
        rows.append(block)
    return np.stack(rows)


def main():
    folder = pathlib.Path(sys.argv[1])
    rng = np.random.default_rng(20240229)
    writer = gguf.GGUFWriter(folder / "dequant.gguf", "llama")
    expected = []
    for kind, dtype in ((T.F32, np.uint32), (T.F16, np.uint16), (T.BF16, np.uint16)):
        bits = rng.integers(0, 1 << (32 if kind == T.F32 else 16), 64, dtype=np.uint64).astype(dtype)
        raw = bits.view(np.uint8).reshape(1, -1)
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
        expected.append(gguf.quants.dequantize(raw, kind))
    for kind in BLOCKS:
        raw = blocks_of(kind, rng)
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
        with np.errstate(invalid="ignore", over="ignore"):
            expected.append(gguf.quants.dequantize(raw, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    floats = np.concatenate([e.astype(np.float32).ravel() for e in expected])
    floats.astype("<f4").tofile(folder / "dequant.f32")


if __name__ == "__main__":
    main()
