// Products of a few tokens with packed weights as they lie. A block takes row tiles, a warp one or
// two of them, and some column tiles; signs become halves in registers, each the sum of its paths
// in units of the row's largest scale, and go to the tensor cores with the tokens as columns. Where
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

/// Of a stage in shared memory: the tokens' columns, the columns' scales, the warps' weights.
template <int kPaths, int kEights, int kTiles>
struct Stage {
  static constexpr int kInput = kEights * 8 * kChunks, kScales = kPaths * kChunks;
  static constexpr int kWeights = kWarps * kTiles * kPaths * 32;
  static constexpr int kSize = kInput + kScales + kWeights;  // in 16 bytes
};

/// Where a chunk lies among a token's: four lanes that read the same part of neighbouring words, of
/// two tokens, find them in different banks.
__device__ __forceinline__ int place_of(int token, int chunk) {
  return chunk ^ ((chunk >> 3) & 1) ^ ((token & 1) << 1);
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
    copy_16_or_zeros(stage + token * kChunks + place_of(token, chunk),
                     args.x + (there ? int64_t{token} * w.d_in + column : 0), there);
  }
  if (thread < S::kScales) {
    const int path = thread / kChunks, column = first + thread % kChunks * 8;
    const bool there = column < w.d_in;
    copy_16_or_zeros(stage + S::kInput + thread,
                     w.col_scale + (there ? path * int64_t{w.d_in} + column : 0), there);
  }
  const int column_tiles = (w.d_in + kTileColumns - 1) / kTileColumns;
  const int row_tiles = (w.d_out + kTileRows - 1) / kTileRows;
  uint4* const own = stage + S::kInput + S::kScales + thread / 32 * kTiles * kPaths * 32 + lane;
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

/// kEights: tokens, in eights. kTiles: row tiles of a warp.
template <int kPaths, int kEights, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 2 : 1) few_kernel(PackedArgs args) {
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

  RowScale<kPaths> rows[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows[tile][i].read(w, (row_tile + tile) * kTileRows + g + 8 * i);
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
    const uint4* const own = scales + S::kScales + thread / 32 * kTiles * kPaths * 32 + lane;
    uint4 signs[kTiles][kPaths];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int path = 0; path < kPaths; ++path) {
        signs[tile][path] = own[(tile * kPaths + path) * 32];
      }
    }
    // Eight columns of a lane's word at a time: two products of 16 columns, four to a lane.
#pragma unroll
    for (int part = 0; part < 8; ++part) {
      const int chunk = part / 4 * 16 + t * 4 + part % 4;
      uint4 scale[kPaths], x[kEights];
#pragma unroll
      for (int path = 0; path < kPaths; ++path) {
        scale[path] = scales[path * kChunks + chunk];
      }
#pragma unroll
      for (int eight = 0; eight < kEights; ++eight) {
        const int token = eight * 8 + g;
        x[eight] = stage[token * kChunks + place_of(token, chunk)];
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t a[2][4];  // of each product: rows g and g + 8 at a pair of columns, then the next
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          uint32_t column_scales[kPaths];
#pragma unroll
          for (int path = 0; path < kPaths; ++path) {
            column_scales[path] = word_of(scale[path], pair);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t words[kPaths];
#pragma unroll
            for (int path = 0; path < kPaths; ++path) {
              words[path] = word_of(signs[tile][path], part / 4 * 2 + i);
            }
            a[pair / 2][pair % 2 * 2 + i] =
                weights_of<kPaths>(words, column_scales, rows[tile][i], 15 - (part % 4 * 4 + pair));
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
  sharing.tiles = sharing.eights <= 2 ? 1 : 2;
  int64_t columns = std::numeric_limits<int64_t>::max();
  for (const Linear* w : linears) {
    sharing.row_blocks +=
        ceil_divide(ceil_divide(w->d_out, kTileRows), int64_t{kWarps} * sharing.tiles);
    columns = std::min(columns, ceil_divide(w->d_in, kTileColumns));
  }
  // In column tiles: what the rounds of blocks take, each with a beginning and an end.
  constexpr int64_t kAround = 3;
  const int64_t together = int64_t{multiprocessors} * (sharing.tiles == 1 ? 2 : 1);
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
  constexpr int kTiles = kEights <= 2 ? 1 : 2;
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
  return with_paths(**linears.begin(), [&](auto paths) {
    return start_paths<decltype(paths)::value>(args, sharing, stream);
  });
}

}  // namespace rabit::gpu
