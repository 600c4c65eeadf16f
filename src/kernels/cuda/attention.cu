// Attention by tiles of 64 rows and of some positions, on tensor cores, with the running maximum
// and sum of each row's softmax. A row is a query of one token and of one of the heads that share
// keys and values, rows of a token beside each other, so that a tile of positions is read once for
// all of them. A warp takes 16 rows; its queries, scores, and sums stay in registers as the
// products of tensor cores have them (multiply_tile), and the weights go from one product into the
// next without leaving them.

#include "kernels/api/gpu.h"
#include "kernels/cuda/cache.h"

namespace rabit::gpu {
namespace {

constexpr int kWarps = 4;
constexpr int kWarpRows = 16;
constexpr int kBlockRows = kWarps * kWarpRows;
constexpr int kThreads = kWarps * 32;

struct Shape {
  int32_t heads, kv_heads, head_dim;
  int64_t tokens;
  float scale;  // log2(e) / sqrt(head_dim)
};

__device__ __forceinline__ uint32_t load_pair(const uint16_t* at) {
  return *reinterpret_cast<const uint32_t*>(at);
}

/// The larger, or sum, over the four lanes of a row.
__device__ __forceinline__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}
__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

/// Rows [first, first + kRows) of (end, d) into shared rows of kStride halves; zeros beyond the end
/// and beyond d, up to kWidth.
template <int kRows, int kWidth, int kStride, bool kBytes>
__device__ __forceinline__ void load_eights(const CacheRows& from, int64_t first, int64_t end,
                                            int d, uint16_t* shared) {
  for (int item = static_cast<int>(threadIdx.x); item < kRows * (kWidth / 8); item += kThreads) {
    const int row = item / (kWidth / 8), column = item % (kWidth / 8) * 8;
    CachedEight<kBytes> eight;
    if (first + row < end && column < d) {
      eight.read(from, (first + row) * d + column);
    }
    *reinterpret_cast<uint4*>(shared + row * kStride + column) = eight.halves();
  }
}
template <int kRows, int kWidth, int kStride>
__device__ __forceinline__ void load_rows(const CacheRows& from, int64_t first, int64_t end, int d,
                                          uint16_t* shared) {
  if (from.scales != nullptr) {
    load_eights<kRows, kWidth, kStride, true>(from, first, end, d, shared);
    return;
  }
  if (d % 8 == 0) {
    load_eights<kRows, kWidth, kStride, false>(from, first, end, d, shared);
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  for (int item = thread; item < kRows * (kWidth / 2); item += kThreads) {
    const int row = item / (kWidth / 2), column = item % (kWidth / 2) * 2;
    const bool inside = first + row < end && column < d;
    *reinterpret_cast<uint32_t*>(shared + row * kStride + column) =
        inside ? load_pair(static_cast<const uint16_t*>(from.rows) + (first + row) * d + column)
               : 0U;
  }
}

/// kWidth: head_dim, filled up with zeros. kPositions: of a tile.
template <int kWidth, int kPositions>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(Shape shape, const uint16_t* __restrict__ q, CacheView cache,
                     uint16_t* __restrict__ out) {
  // Rows eight halves longer: those that a warp reads at once lie in different banks.
  constexpr int kStride = kWidth + 8;
  alignas(16) __shared__ uint16_t keys[kPositions * kStride];
  alignas(16) __shared__ uint16_t values[kPositions * kStride];

  const int d = shape.head_dim, group = shape.heads / shape.kv_heads;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int g = lane / 4, t = lane % 4;
  const int kv = static_cast<int>(blockIdx.y);
  const int64_t all_rows = shape.tokens * group;
  // The last blocks see the most positions: they come first.
  const int64_t block = static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x;
  const int64_t first_row = block * kBlockRows;
  const int64_t last_row =
      (first_row + kBlockRows < all_rows ? first_row + kBlockRows : all_rows) - 1;
  const int64_t positions = cache.first_position + last_row / group + 1;  // that the block sees

  // The two rows of this lane: where their queries lie (-1: no such row), and how far they see.
  int64_t at[2], last[2];
  uint32_t query[kWidth / 16][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = first_row + warp * kWarpRows + g + 8 * i;
    const int64_t token = row / group;
    at[i] = row < all_rows ? (token * shape.heads + kv * group + row % group) * d : -1;
    last[i] = cache.first_position + token;
#pragma unroll
    for (int step = 0; step < kWidth / 16; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = step * 16 + half * 8 + 2 * t;
        query[step][2 * half + i] = at[i] >= 0 && column < d ? load_pair(q + at[i] + column) : 0U;
      }
    }
  }

  float sums[kWidth / 8][4];
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n) {
    sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0F;
  }
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0F, 0.0F};

  const int64_t plane = static_cast<int64_t>(kv) * cache.capacity * d;
  for (int64_t first = 0; first < positions; first += kPositions) {
    __syncthreads();  // nobody reads the last tile any more
    load_rows<kPositions, kWidth, kStride>(cache.k.from(plane), first, positions, d, keys);
    load_rows<kPositions, kWidth, kStride>(cache.v.from(plane), first, positions, d, values);
    __syncthreads();

    float scores[kPositions / 8][4];
#pragma unroll
    for (int n = 0; n < kPositions / 8; ++n) {
      scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0F;
#pragma unroll
      for (int step = 0; step < kWidth / 16; ++step) {
        const uint16_t* const key = keys + (n * 8 + g) * kStride + step * 16 + 2 * t;
        const uint32_t b[2] = {load_pair(key), load_pair(key + 8)};
        multiply_tile(scores[n], query[step], b);
      }
    }

    float high[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < kPositions / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t position = first + n * 8 + 2 * t + j % 2;
        scores[n][j] = position <= last[j / 2] ? scores[n][j] * shape.scale : -INFINITY;
        high[j / 2] = fmaxf(high[j / 2], scores[n][j]);
      }
    }
    // The first tile holds position 0, which all rows see: from it on no maximum is infinite.
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = row_max(high[i]);
      shrink[i] = exp2f(largest[i] - high[i]);
      largest[i] = high[i];
      total[i] *= shrink[i];
    }
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums[n][j] *= shrink[j / 2];
      }
    }
#pragma unroll
    for (int n = 0; n < kPositions / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[n][j] = exp2f(scores[n][j] - largest[j / 2]);
        total[j / 2] += scores[n][j];
      }
    }

#pragma unroll
    for (int step = 0; step < kPositions / 16; ++step) {
      uint32_t weights[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&of)[4] = scores[2 * step + half];
        weights[2 * half] = pack_halves(of[0], of[1]);
        weights[2 * half + 1] = pack_halves(of[2], of[3]);
      }
#pragma unroll
      for (int n = 0; n < kWidth / 8; n += 2) {
        // Matrices: positions 0 to 7 and 8 to 15 of the step, at eight columns and the next eight.
        uint32_t b[4];
        load_turned(b, values + (step * 16 + lane % 16) * kStride + (n + lane / 16) * 8);
        const uint32_t low[2] = {b[0], b[1]}, next[2] = {b[2], b[3]};
        multiply_tile(sums[n], weights, low);
        multiply_tile(sums[n + 1], weights, next);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float inverse = 1.0F / row_sum(total[i]);
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      const int column = n * 8 + 2 * t;
      if (at[i] >= 0 && column < d) {
        *reinterpret_cast<uint32_t*>(out + at[i] + column) =
            pack_saturated(sums[n][2 * i] * inverse, sums[n][2 * i + 1] * inverse);
      }
    }
  }
}

}  // namespace

Status attention(const Sizes& sizes, const uint16_t* q, int64_t tokens, const CacheView& cache,
                 uint16_t* out, Stream stream) {
  const Shape shape = {sizes.heads, sizes.kv_heads, sizes.head_dim, tokens,
                       1.44269504F / sqrtf(static_cast<float>(sizes.head_dim))};
  const auto kernel = sizes.head_dim <= 32    ? &attention_kernel<32, 64>
                      : sizes.head_dim <= 64  ? &attention_kernel<64, 64>
                      : sizes.head_dim <= 96  ? &attention_kernel<96, 64>
                      : sizes.head_dim <= 128 ? &attention_kernel<128, 64>
                                              : &attention_kernel<256, 32>;
  const int64_t blocks = ceil_divide(tokens * (sizes.heads / sizes.kv_heads), kBlockRows);
  RABIT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(sizes.kv_heads)),
               dim3(kThreads), stream, shape, q, cache, out);
  return launched("attention");
}

}  // namespace rabit::gpu
