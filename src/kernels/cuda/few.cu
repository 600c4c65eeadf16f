// Products of a few tokens with packed weights, or bytes, as they lie. A block takes row tiles, a
// warp one or two of them, and some column tiles; signs become halves in registers, each the sum of
// its paths in units of the row's largest scale, bytes their products with their scales, and these
// go to the tensor cores with the tokens as columns. Where
// rows are few, several blocks share them by columns, and the last to come adds up what all have
// left, in order.
#include <algorithm>
#include <limits>

#include "kernels/cuda/packed.h"

namespace rabit::gpu {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStages = 3;
constexpr int kMostSplits = 16;
constexpr int kChunks = kTileColumns / 8;  // of 16 bytes, of a token's columns in a column tile
constexpr int kByteChunks = kTileColumns / 16;  // of a row of bytes

/// Of a stage in shared memory: the tokens' columns, the columns' scales, or those of the warps'
/// bytes, the warps' weights. Paths 0: bytes.
template <int kPaths, int kEights, int kTiles>
struct Stage {
  static constexpr bool kBytes = kPaths == 0;
  static constexpr int kInput = kEights * 8 * kChunks;
  static constexpr int kScales = kBytes ? kWarps * kTiles * kTileRows : kPaths * kChunks;
  static constexpr int kOfWarp = kTiles * (kBytes ? kTileRows * kByteChunks : kPaths * 32);
  static constexpr int kWeights = kWarps * kOfWarp;
  static constexpr int kSize = kInput + kScales + kWeights;  // in 16 bytes
};

/// Where a chunk lies among a token's: four lanes that read the same part of neighbouring words, of
/// two tokens, find them in different banks; with bytes, four that read neighbouring chunks.
template <bool kBytes>
__device__ __forceinline__ int place_of(int token, int chunk) {
  return kBytes ? chunk ^ ((token & 1) << 2) : chunk ^ ((chunk >> 3) & 1) ^ ((token & 1) << 1);
}

template <int kPaths, int kEights, int kTiles>
__device__ __forceinline__ void load_stage(const PackedArgs& args, const Linear& w, int row_tile,
                                           int column_tile, uint4* stage) {
  using S = Stage<kPaths, kEights, kTiles>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int first = column_tile * kTileColumns;
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    const int item = thread + i * kThreads, token = item / kChunks, chunk = item % kChunks;
    const int column = first + chunk * 8;
    const bool there = token < args.tokens && column < w.d_in;
    copy_16_or_zeros(stage + token * kChunks + place_of<S::kBytes>(token, chunk),
                     args.x + (there ? int64_t{token} * w.d_in + column : 0), there);
  }
  if constexpr (S::kBytes) {
    uint4* const scales = stage + S::kInput + thread / 32 * kTiles * kTileRows;
    uint4* const own = stage + S::kInput + S::kScales + thread / 32 * S::kOfWarp;
#pragma unroll
    for (int i = 0; i < kTiles * kTileRows / 2; ++i) {
      const int own_row = i * 2 + lane / 16, chunk = lane % 16;
      const int64_t row = int64_t{row_tile} * kTileRows + own_row;
      const bool there = row < w.d_out;
      const int64_t at = (there ? row * w.d_in : 0) + first;
      copy_16_or_zeros(own + own_row * kByteChunks + place_of<true>(own_row, chunk),
                       static_cast<const char*>(w.weights) + at + chunk * 16, there);
      if (chunk == 0) {
        copy_16_or_zeros(scales + own_row, w.row_scale + at / 32, there);
      }
    }
    return;
  }
  if (thread < S::kScales) {
    const int path = thread / kChunks, column = first + thread % kChunks * 8;
    const bool there = column < w.d_in;
    copy_16_or_zeros(stage + S::kInput + thread,
                     w.col_scale + (there ? path * int64_t{w.d_in} + column : 0), there);
  }
  const int column_tiles = (w.d_in + kTileColumns - 1) / kTileColumns;
  const int row_tiles = (w.d_out + kTileRows - 1) / kTileRows;
  uint4* const own = stage + S::kInput + S::kScales + thread / 32 * S::kOfWarp + lane;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const bool there = row_tile + tile < row_tiles;
    const auto* const from =
        static_cast<const uint4*>(w.weights) +
        (there ? (int64_t{row_tile + tile} * column_tiles + column_tile) * kPaths * 32 : 0) + lane;
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      copy_16_or_zeros(own + (tile * kPaths + path) * 32, from + (there ? path * 32 : 0), there);
    }
  }
}

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

/// Of a row, at 32 columns: products of the lane's eight bytes with their scale, in pairs. row: of
/// the warp's; part: the 32 columns of 256.
__device__ __forceinline__ void weights_of_bytes(const uint4* scales, const uint4* bytes, int row,
                                                 int part, uint32_t (&out)[4]) {
  const int chunk = part / 2 * 4 + static_cast<int>(threadIdx.x) % 4;
  const auto* const eight =
      reinterpret_cast<const uint2*>(bytes + row * kByteChunks + place_of<true>(row, chunk)) +
      part % 2;
  const uint32_t scale = reinterpret_cast<const uint16_t*>(scales + row)[part];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = multiply_add_pair(halves_of_bytes(i < 2 ? eight->x : eight->y, i % 2),
                               scale | scale << 16, 0);
  }
}

/// kEights: tokens, in eights. kTiles: row tiles of a warp.
template <int kPaths, int kEights, int kTiles>
__global__ void __launch_bounds__(kThreads, kEights <= 2 ? 2 : 1) few_kernel(PackedArgs args) {
  RABIT_DYNAMIC_SHARED(memory);
  auto* const stages = reinterpret_cast<uint4*>(memory);
  using S = Stage<kPaths, kEights, kTiles>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int block = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.y);
  const int which = layer_of(args, block);
  const Linear& w = args.linears[which];
  const int row_tile = ((block - args.first_block[which]) * kWarps + thread / 32) * kTiles;
  const int column_tiles = (w.d_in + kTileColumns - 1) / kTileColumns;
  const int begin = column_tiles * split / args.splits;
  const int end = column_tiles * (split + 1) / args.splits;

  constexpr int kWords = S::kBytes ? 1 : kPaths;
  RowScale<kWords> rows[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (S::kBytes) {
        rows[tile][i].unit = 1;
      } else {
        rows[tile][i].read(w, (row_tile + tile) * kTileRows + g + 8 * i);
      }
    }
  }
  float sums[kTiles * kEights][4] = {};

  for (int i = 0; i < kStages - 1; ++i) {
    if (begin + i < end) {
      load_stage<kPaths, kEights, kTiles>(args, w, row_tile, begin + i, stages + i * S::kSize);
    }
    end_copies();
  }
#pragma unroll 1
  for (int column = begin; column < end; ++column) {
    await_copies<kStages - 2>();
    __syncthreads();
    const int ahead = column + kStages - 1;
    if (ahead < end) {
      load_stage<kPaths, kEights, kTiles>(args, w, row_tile, ahead,
                                          stages + (ahead - begin) % kStages * S::kSize);
    }
    end_copies();
    const uint4* const stage = stages + (column - begin) % kStages * S::kSize;
    const uint4* const scales = stage + S::kInput;
    const uint4* const own = scales + S::kScales + thread / 32 * S::kOfWarp;
    uint4 signs[kTiles][kWords];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int path = 0; path < kPaths; ++path) {
        signs[tile][path] = own[(tile * kPaths + path) * 32 + lane];
      }
    }
    // Eight columns of a lane at a time, of its word or its bytes: two products of 16 columns, four
    // to a lane.
#pragma unroll
    for (int part = 0; part < 8; ++part) {
      const int chunk = S::kBytes ? part * 4 + t : part / 4 * 16 + t * 4 + part % 4;
      uint4 scale[kWords], x[kEights];
#pragma unroll
      for (int path = 0; path < kPaths; ++path) {
        scale[path] = scales[path * kChunks + chunk];
      }
#pragma unroll
      for (int eight = 0; eight < kEights; ++eight) {
        const int token = eight * 8 + g;
        x[eight] = stage[token * kChunks + place_of<S::kBytes>(token, chunk)];
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t a[2][4];  // of each product: rows g and g + 8 at a pair of columns, then the next
        if constexpr (S::kBytes) {
          const uint4* const of_warp = scales + thread / 32 * kTiles * kTileRows;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t pairs[4];
            weights_of_bytes(of_warp, own, tile * kTileRows + g + 8 * i, part, pairs);
            a[0][i] = pairs[0], a[0][2 + i] = pairs[1];
            a[1][i] = pairs[2], a[1][2 + i] = pairs[3];
          }
        }
#pragma unroll
        for (int pair = 0; pair < (S::kBytes ? 0 : 4); ++pair) {
          uint32_t column_scales[kWords];
#pragma unroll
          for (int path = 0; path < kPaths; ++path) {
            column_scales[path] = word_of(scale[path], pair);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t words[kWords];
#pragma unroll
            for (int path = 0; path < kPaths; ++path) {
              words[path] = word_of(signs[tile][path], part / 4 * 2 + i);
            }
            a[pair / 2][pair % 2 * 2 + i] =
                weights_of<kWords>(words, column_scales, rows[tile][i], 15 - (part % 4 * 4 + pair));
          }
        }
#pragma unroll
        for (int eight = 0; eight < kEights; ++eight) {
          const uint32_t low[2] = {x[eight].x, x[eight].y}, high[2] = {x[eight].z, x[eight].w};
          multiply_tile(sums[tile * kEights + eight], a[0], low);
          multiply_tile(sums[tile * kEights + eight], a[1], high);
        }
      }
    }
  }

  if (args.splits > 1 && !sum_of_splits<kThreads>(args, block, split, sums)) {
    return;
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (row_tile + tile) * kTileRows + g + 8 * (i / 2);
        const int token = eight * 8 + 2 * t + i % 2;
        if (row < w.d_out && token < args.tokens) {
          put(args.y + token * args.y_stride + args.first_row[which] + row,
              rows[tile][i / 2].unit * sums[tile * kEights + eight][i], args.add);
        }
      }
    }
  }
}

/// Row tiles of a warp; paths 0: bytes.
constexpr int tiles_of(int paths, int eights) { return paths == 0 || eights <= 2 ? 1 : 2; }

/// How a product is shared out.
struct Sharing {
  int64_t row_blocks = 0;
  int32_t splits = 1;
  int32_t eights = 1, tiles = 1;
};

Sharing share(std::initializer_list<const Linear*> linears, int64_t tokens,
              int32_t multiprocessors) {
  Sharing sharing;
  sharing.eights = tokens <= 8 ? 1 : tokens <= 16 ? 2 : tokens <= 32 ? 4 : 8;
  const bool bytes = (*linears.begin())->format == Format::kQ8_0;
  sharing.tiles = tiles_of(bytes ? 0 : 1, sharing.eights);
  int64_t columns = std::numeric_limits<int64_t>::max();
  for (const Linear* w : linears) {
    sharing.row_blocks +=
        ceil_divide(ceil_divide(w->d_out, kTileRows), int64_t{kWarps} * sharing.tiles);
    columns = std::min(columns, ceil_divide(w->d_in, kTileColumns));
  }
  // In column tiles: what the rounds of blocks take, each with a beginning and an end.
  constexpr int64_t kAround = 3;
  const int64_t together = int64_t{multiprocessors} * (sharing.eights <= 2 ? 2 : 1);
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int64_t splits = 1; splits <= std::min<int64_t>(columns, kMostSplits); ++splits) {
    const int64_t time = ceil_divide(sharing.row_blocks * splits, together) *
                         (ceil_divide(columns, splits) + kAround);
    if (time < best) {
      best = time;
      sharing.splits = static_cast<int32_t>(splits);
    }
  }
  return sharing;
}

template <int kPaths, int kEights>
Status start(const PackedArgs& args, const Sharing& sharing, Stream stream) {
  constexpr int kTiles = tiles_of(kPaths, kEights);
  constexpr int kBytes = kStages * Stage<kPaths, kEights, kTiles>::kSize * 16;
  const auto kernel = few_kernel<kPaths, kEights, kTiles>;
  const dim3 grid(static_cast<unsigned>(sharing.row_blocks), static_cast<unsigned>(sharing.splits));
  RABIT_CHECK(give_shared(kernel, kBytes));
  RABIT_LAUNCH_SHARED(kernel, grid, dim3(kThreads), kBytes, stream, args);
  return launched("a product of a few tokens");
}

template <int kPaths>
Status start_paths(const PackedArgs& args, const Sharing& sharing, Stream stream) {
  return sharing.eights == 1   ? start<kPaths, 1>(args, sharing, stream)
         : sharing.eights == 2 ? start<kPaths, 2>(args, sharing, stream)
         : sharing.eights == 4 ? start<kPaths, 4>(args, sharing, stream)
                               : start<kPaths, 8>(args, sharing, stream);
}

}  // namespace

PackedNeeds few_needs(std::initializer_list<const Linear*> linears, int32_t multiprocessors) {
  PackedNeeds needs;
  for (const int64_t tokens : {8, 16, 32, 64}) {
    const Sharing s = share(linears, tokens, multiprocessors);
    const int64_t partial =
        s.splits == 1 ? 0 : s.row_blocks * s.splits * kThreads * 4 * int64_t{s.tiles} * s.eights;
    needs.floats = std::max(needs.floats, partial);
    needs.counters = std::max(needs.counters, s.row_blocks);
  }
  return needs;
}

Status multiply_few(std::initializer_list<const Linear*> linears, PackedArgs args,
                    int32_t multiprocessors, Stream stream) {
  const Sharing sharing = share(linears, args.tokens, multiprocessors);
  args.splits = sharing.splits;
  place_layers(args, linears, int64_t{kWarps} * sharing.tiles);
  if ((*linears.begin())->format == Format::kQ8_0) {
    return start_paths<0>(args, sharing, stream);
  }
  return with_paths(**linears.begin(), [&](auto paths) {
    return start_paths<decltype(paths)::value>(args, sharing, stream);
  });
}

}  // namespace rabit::gpu
