// Products with Q8_0 in tiles by dot products of integers, for instruction sets that have them;
// included by the files that define them.
//
// Columns become integers q of 16 bits in a unit of their token. A register holds four columns of
// kLanes rows, each row's in a lane of 32 bits, and meets the four q in every lane: sums over a
// block of 32 columns are exact, times its scale they are added as floats.
//
// What the including file defines before:
//   kLanesAtOnce  vectors of kLanes rows whose sums the registers hold
//   kWeightBias   what is added to a weight where Dots take it: 128 as it lies in a tile, or 0
//   pack_four     (q, to): two numbers of 32 bits of four q, as Dots take them
//   Dots          sums of kLanes rows, {} is 0; add(weights, first, second) of four columns: the
//                 weights' 4 kLanes bytes and the two numbers; sums(): a lane a row
#pragma once

#include "kernels/cpu/gemm.h"

namespace rabit::RABIT_ISA {
namespace {

// Of a token: a header with the unit of q; then of every block what is packed and -kWeightBias
// times the sum of its q.
constexpr int64_t kBlocksHeader = 64, kFours = kBlock / 4, kBlockInput = 128;
constexpr float kLargestQ = 32639.0F;  // 127 * 256 + 127: two signed bytes
constexpr int64_t kBlocksAhead = 2;    // of a tile, to ask for

int64_t blocks_bytes(int64_t d_in) { return kBlocksHeader + d_in / kBlock * kBlockInput; }

// Largest |x|; NaN if one is.
float largest_of(const float* x, int64_t count) {
  Vec largest = {}, none = {};  // the second: 0, or NaN where x is not finite
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vec v = load(x + c);
    largest = max_of(v < 0 ? -v : v, largest);
    none += v * 0.0F;
  }
  const float sum = sum_lanes(none);
  return sum == 0 ? max_lane(largest) : sum;
}

/// For blocks [begin, end) of the columns of each token.
void prepare_blocks(const LinearWeights& w, const float* x, int64_t tokens, uint8_t* input,
                    int64_t begin, int64_t end) {
  for (int64_t t = 0; t < tokens; ++t, x += w.d_in, input += blocks_bytes(w.d_in)) {
    const float largest = largest_of(x, w.d_in);
    const bool none = largest <= 1e-30F;
    const float units = largest > 1e-30F ? kLargestQ / largest : 0;  // 0 of what is not finite, too
    if (begin == 0 && end > 0) {
      *reinterpret_cast<float*>(input) = none ? 0 : largest / kLargestQ;
    }
    for (int64_t block = begin; block < end; ++block) {
      auto* out = reinterpret_cast<int32_t*>(input + kBlocksHeader + block * kBlockInput);
      alignas(64) int16_t q[kBlock];
      int32_t sum = 0;
      for (int64_t c = 0; c < kBlock; ++c) {
        q[c] = static_cast<int16_t>(
            static_cast<int32_t>(units > 0 ? __builtin_rintf(x[block * kBlock + c] * units) : 0));
        sum += q[c];
      }
      for (int64_t four = 0; four < kFours; ++four) {
        pack_four(q + 4 * four, out + 2 * four);
      }
      out[2 * kFours] = -kWeightBias * sum;
    }
  }
}

// Rows of a tile, kTokens tokens; only rows in [row_begin, row_end) are written.
template <int kTokens>
[[gnu::noinline]] void block_product(const LinearWeights& w, const uint8_t* input, int64_t tile,
                                     float* y, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kTileVectors = kTileRows / kLanes;
  constexpr int kAtOnce = kLanesAtOnce / kTokens, kRowsAtOnce = kAtOnce * kLanes;
  static_assert(kTileRows % kRowsAtOnce == 0);
  const int64_t blocks = w.d_in / kBlock, next = blocks_bytes(w.d_in) / 4;  // token's numbers
  const auto* weights = static_cast<const uint8_t*>(w.dense) + tile * blocks * kBlockTileBytes;
  Vec totals[kTokens * kTileVectors] = {};
  for (int64_t block = 0; block < blocks; ++block, weights += kBlockTileBytes) {
    const auto* in = reinterpret_cast<const int32_t*>(input + kBlocksHeader + block * kBlockInput);
#pragma GCC unroll 2
    for (int64_t first = 0; first < kTileRows; first += kRowsAtOnce) {
      Dots dots[kAtOnce * kTokens] = {};
#pragma GCC unroll 8
      for (int64_t four = 0; four < kFours; ++four) {
        const uint8_t* from = weights + (2 + 4 * four) * kTileRows + 4 * first;
#pragma GCC unroll 8
        for (int v = 0; v < kAtOnce; ++v) {
          const uint8_t* at = from + v * 4 * kLanes;
          if (v * 4 * kLanes % 64 == 0) {
            __builtin_prefetch(at + kBlocksAhead * kBlockTileBytes);
          }
#pragma GCC unroll 2
          for (int t = 0; t < kTokens; ++t) {
            dots[v * kTokens + t].add(at, in[t * next + 2 * four], in[t * next + 2 * four + 1]);
          }
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < kAtOnce; ++v) {
        const auto* scales = reinterpret_cast<const uint16_t*>(weights) + first + v * kLanes;
        const Vec scale = load_finite_half(scales);
#pragma GCC unroll 2
        for (int t = 0; t < kTokens; ++t) {
          totals[t * kTileVectors + first / kLanes + v] +=
              __builtin_convertvector(dots[v * kTokens + t].sums() + in[t * next + 2 * kFours],
                                      Vec) *
              scale;
        }
      }
    }
  }
  const int64_t first = tile * kTileRows;
  for (int64_t t = 0; t < kTokens; ++t, input += 4 * next, y += w.d_out) {
    const float unit = *reinterpret_cast<const float*>(input);
#pragma GCC unroll 1
    for (int64_t v = 0; v < kTileVectors; ++v) {
      const int64_t row = first + v * kLanes;
      const Vec values = totals[t * kTileVectors + v] * unit;
      if (row >= row_begin && row + kLanes <= row_end) {
        store(y + row, values);
        continue;
      }
      for (int64_t r = larger(row, row_begin); r < smaller(row + kLanes, row_end); ++r) {
        y[r] = values[r - row];
      }
    }
  }
}

void matmul_of_blocks(const LinearWeights& w, const uint8_t* input, int64_t tokens, float* y,
                      int64_t row_begin, int64_t row_end) {
  const int64_t token_bytes = blocks_bytes(w.d_in);
  for (int64_t tile = row_begin / kTileRows; tile * kTileRows < row_end; ++tile) {
    int64_t t = 0;
    for (; t + 2 <= tokens; t += 2) {
      block_product<2>(w, input + t * token_bytes, tile, y + t * w.d_out, row_begin, row_end);
    }
    if (t < tokens) {
      block_product<1>(w, input + t * token_bytes, tile, y + t * w.d_out, row_begin, row_end);
    }
  }
}

}  // namespace
}  // namespace rabit::RABIT_ISA
