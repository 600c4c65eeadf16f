// Weights on their way from a file to products: signs into tiles, and packed or quantized weights
// as F16 matrices. All go through memory once and are bounded by it.

#include "kernels/api/gpu.h"
#include "kernels/cuda/device_code.h"

namespace rabit::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kTileLanes = 32, kLaneWords = 4;
constexpr int kUnpackWarps = 4;
constexpr int kHalfRows = kTileRows / 2;
constexpr int kMostPaths = 4;

struct Words {
  uint32_t v[4];
};

__device__ __forceinline__ void store(void* at, const Words& words) {
  uint4 out;
  out.x = words.v[0], out.y = words.v[1], out.z = words.v[2], out.w = words.v[3];
  *reinterpret_cast<uint4*>(at) = out;
}

/// Bit 2 j + i to bit j + 16 i.
__device__ __forceinline__ uint32_t even_before_odd(uint32_t x) {
  constexpr uint32_t kMoved[4] = {0x22222222U, 0x0C0C0C0CU, 0x00F000F0U, 0x0000FF00U};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t swapped = (x ^ (x >> (1 << i))) & kMoved[i];
    x ^= swapped ^ (swapped << (1 << i));
  }
  return x;
}

/// A thread makes the four words of a lane.
__global__ void __launch_bounds__(kThreads)
    tile_signs_kernel(int64_t d_out, int64_t d_in, int64_t paths, const uint32_t* __restrict__ rows,
                      uint32_t* __restrict__ tiles) {
  const int64_t words = (d_in + 31) / 32, column_tiles = (d_in + kTileColumns - 1) / kTileColumns;
  const int64_t row_tiles = (d_out + kTileRows - 1) / kTileRows;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= row_tiles * column_tiles * paths * kTileLanes) {
    return;
  }
  const int64_t lane = item % kTileLanes, tile = item / kTileLanes;
  const int64_t path = tile % paths, place = tile / paths;
  const int64_t first_row = place / column_tiles * kTileRows;
  const int64_t first_word = place % column_tiles * (kTileColumns / 32);
  const uint32_t last_mask = d_in % 32 == 0 ? 0xFFFFFFFFU : (1U << (d_in % 32)) - 1U;
  Words out;
#pragma unroll
  for (int i = 0; i < kLaneWords; ++i) {
    const int64_t row = first_row + lane / 4 + 8 * (i % 2);
    const int64_t word = first_word + lane % 4 + 4 * (i / 2);
    out.v[i] = 0;
    if (row < d_out && word < words) {
      out.v[i] = even_before_odd(rows[(path * d_out + row) * words + word] &
                                 (word + 1 == words ? last_mask : 0xFFFFFFFFU));
    }
  }
  store(tiles + item * kLaneWords, out);
}

/// A warp makes eight rows and 256 columns, a lane eight columns, whose scales it keeps; what a
/// warp writes at a time are 512 bytes of a row.
template <int kPaths>
__global__ void __launch_bounds__(32 * kUnpackWarps)
    unpack_kernel(int64_t d_out, int64_t d_in, const uint32_t* __restrict__ tiles,
                  const uint16_t* __restrict__ row_scale, const uint16_t* __restrict__ col_scale,
                  uint16_t* __restrict__ out, int64_t stride) {
  const int64_t column_tiles = (d_in + kTileColumns - 1) / kTileColumns;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kUnpackWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t column_tile = item % column_tiles;
  const int64_t row_tile = item / column_tiles / 2;
  const int half = static_cast<int>(item / column_tiles % 2);
  const int64_t column = column_tile * kTileColumns + lane * 8;
  if (row_tile * kTileRows >= d_out || column >= stride) {
    return;
  }
  float h[kPaths][8];
#pragma unroll
  for (int path = 0; path < kPaths; ++path) {
    if (d_in % 8 == 0) {
      const uint4 eight = *reinterpret_cast<const uint4*>(col_scale + path * d_in + column);
      const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        h[path][j] = half_to_float(static_cast<uint16_t>(pairs[j / 2] >> 16 * (j % 2)));
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const bool inside = column + j < d_in;
        h[path][j] = inside ? half_to_float(col_scale[path * d_in + column + j]) : 0.0F;
      }
    }
  }
  const int word = lane / 4;       // of the tile's eight in a row
  const int shift = lane % 4 * 4;  // the first of four even columns
  const uint32_t* const tile =
      tiles + ((row_tile * column_tiles + column_tile) * kPaths) * kTileWords;
#pragma unroll
  for (int r = 0; r < kHalfRows; ++r) {
    const int64_t row = row_tile * kTileRows + half * kHalfRows + r;
    if (row >= d_out) {
      return;
    }
    float sum[8];
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      const float g = half_to_float(row_scale[path * d_out + row]);
      const uint32_t minus =
          ~tile[path * kTileWords + (r * 4 + word % 4) * kLaneWords + half + 2 * (word / 4)] >>
          shift;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t sign = (minus << (31 - j / 2 - 16 * (j % 2))) & 0x80000000U;
        const float scale = bits_to_float(float_to_bits(h[path][j]) ^ sign);
        // A product of two halves has no more digits than a float.
        sum[j] = path == 0 ? g * scale : fmaf(g, scale, sum[j]);
      }
    }
    Words packed;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      packed.v[j] = pack_saturated(sum[2 * j], sum[2 * j + 1]);
    }
    store(out + row * stride + column, packed);
  }
}

/// Eight values of a block of Q8_0 or Q4_0.
__device__ __forceinline__ void eight_of_block(bool bytes, const uint8_t* block, int first,
                                               int (&out)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int i = first + j;
    out[j] = bytes ? static_cast<int8_t>(block[2 + i])
                   : (i < 16 ? block[2 + i] & 15 : block[2 + i - 16] >> 4) - 8;
  }
}

/// Where eight values of Format::kQ8_0 lie, number `part` of a block of 32.
__device__ __forceinline__ int64_t place_of_eight(int64_t block, int64_t part) {
  return block / 2 * 64 + part * 16 + block % 2 * 8;
}

/// A thread takes eight values.
__global__ void __launch_bounds__(kThreads)
    arrange_blocks_kernel(bool bytes, int64_t eights, const uint8_t* __restrict__ blocks,
                          int8_t* __restrict__ out, uint16_t* __restrict__ scales) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= eights) {
    return;
  }
  const int64_t block = item / 4, part = item % 4;
  const uint8_t* const from = blocks + block * (bytes ? 34 : 18);
  int values[8];
  eight_of_block(bytes, from, static_cast<int>(part) * 8, values);
  uint2 packed;
  packed.x = packed.y = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    packed.x |= (static_cast<uint32_t>(values[j]) & 0xFFU) << 8 * j;
    packed.y |= (static_cast<uint32_t>(values[4 + j]) & 0xFFU) << 8 * j;
  }
  *reinterpret_cast<uint2*>(out + place_of_eight(block, part)) = packed;
  if (part == 0) {
    scales[block] = static_cast<uint16_t>(from[0] | from[1] << 8);
  }
}

/// A thread takes eight values.
__global__ void __launch_bounds__(kThreads)
    widen_kernel(int64_t eights, const int8_t* __restrict__ bytes,
                 const uint16_t* __restrict__ scales, uint16_t* __restrict__ out) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= eights) {
    return;
  }
  const int64_t block = item / 4;
  const uint2 packed = *reinterpret_cast<const uint2*>(bytes + place_of_eight(block, item % 4));
  const float scale = half_to_float(scales[block]);
  const uint32_t words[2] = {packed.x, packed.y};
  Words all;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t two = words[j / 2] >> 16 * (j % 2);
    all.v[j] = pack_saturated(__fmul_rn(static_cast<float>(static_cast<int8_t>(two)), scale),
                              __fmul_rn(static_cast<float>(static_cast<int8_t>(two >> 8)), scale));
  }
  store(out + item * 8, all);
}

/// A thread makes two neighbouring values: in Q8_0 those of two bytes; in Q4_0 the lower half of a
/// block are low nibbles.
__global__ void __launch_bounds__(kThreads)
    unpack_blocks_kernel(bool bytes, int64_t pairs, const uint8_t* __restrict__ blocks,
                         uint32_t* __restrict__ out) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= pairs) {
    return;
  }
  const int at = static_cast<int>(item % 16) * 2;
  const uint8_t* const block = blocks + item / 16 * (bytes ? 34 : 18);
  const float scale = half_to_float(static_cast<uint16_t>(block[0] | block[1] << 8));
  float value[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int i = at + j;
    value[j] =
        static_cast<float>(bytes ? static_cast<int8_t>(block[2 + i])
                                 : (i < 16 ? block[2 + i] & 15 : block[2 + i - 16] >> 4) - 8);
  }
  out[item] = pack_saturated(__fmul_rn(value[0], scale), __fmul_rn(value[1], scale));
}

dim3 grid_for(int64_t items, int64_t of_block) {
  return dim3(static_cast<unsigned>(ceil_divide(items, of_block)));
}

}  // namespace

int64_t sign_words(int64_t d_out, int64_t d_in, int64_t paths) {
  return ceil_divide(d_out, kTileRows) * ceil_divide(d_in, kTileColumns) * paths * kTileWords;
}

Status tile_signs(int64_t d_out, int64_t d_in, int64_t paths, const uint32_t* rows, uint32_t* tiles,
                  Stream stream) {
  RABIT_LAUNCH(tile_signs_kernel, grid_for(sign_words(d_out, d_in, paths) / kLaneWords, kThreads),
               dim3(kThreads), stream, d_out, d_in, paths, rows, tiles);
  return launched("the arrangement of signs");
}

Status unpack(const Linear& w, uint16_t* out, int64_t stride, Stream stream) {
  const int64_t warps = ceil_divide(w.d_out, kTileRows) * 2 * ceil_divide(w.d_in, kTileColumns);
  const auto kernel = w.paths == 1   ? &unpack_kernel<1>
                      : w.paths == 2 ? &unpack_kernel<2>
                      : w.paths == 3 ? &unpack_kernel<3>
                                     : &unpack_kernel<kMostPaths>;
  RABIT_LAUNCH(kernel, grid_for(warps, kUnpackWarps), dim3(32 * kUnpackWarps), stream,
               int64_t{w.d_out}, int64_t{w.d_in}, static_cast<const uint32_t*>(w.weights),
               w.row_scale, w.col_scale, out, stride);
  return launched("the unpacking of weights");
}

Status unpack_blocks(WeightFormat format, const void* blocks, int64_t count, uint16_t* out,
                     Stream stream) {
  RABIT_LAUNCH(unpack_blocks_kernel, grid_for(count / 2, kThreads), dim3(kThreads), stream,
               format == WeightFormat::kQ8_0, count / 2, static_cast<const uint8_t*>(blocks),
               reinterpret_cast<uint32_t*>(out));
  return launched("the unpacking of blocks");
}

Status arrange_blocks(WeightFormat format, const void* blocks, int64_t count, int8_t* bytes,
                      uint16_t* scales, Stream stream) {
  RABIT_LAUNCH(arrange_blocks_kernel, grid_for(count / 8, kThreads), dim3(kThreads), stream,
               format == WeightFormat::kQ8_0, count / 8, static_cast<const uint8_t*>(blocks), bytes,
               scales);
  return launched("the arrangement of blocks");
}

Status widen(const Linear& w, int64_t first, int64_t rows, uint16_t* out, Stream stream) {
  const int64_t begin = first * w.d_in, eights = rows * w.d_in / 8;
  RABIT_LAUNCH(widen_kernel, grid_for(eights, kThreads), dim3(kThreads), stream, eights,
               static_cast<const int8_t*>(w.weights) + begin, w.row_scale + begin / 32, out);
  return launched("the unpacking of bytes");
}

}  // namespace rabit::gpu
