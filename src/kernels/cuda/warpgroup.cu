// Products of packed weights on GPUs whose tensor cores take the products of a warpgroup (compute
// capability 9.0): any number of tokens, weights as they lie. Four warps make halves of signs in
// registers, 64 rows of them, each the sum of its paths in units of the row's largest scale, and
// multiply them with tokens in shared memory, while they make the next; one of them has the copy
// engine fill the stages of shared memory. Where there are fewer rows and tokens than
// multiprocessors take, several blocks share them by columns.
#include <algorithm>
#include <limits>

#include "kernels/cuda/device.h"
#include "kernels/cuda/packed.h"
#include "kernels/cuda/warpgroup.h"

namespace rabit::gpu {
namespace {

constexpr int kHalf = kTileColumns / 2;  // columns of a stage
constexpr int kSlabs = kHalf / kSlab;    // of a stage
constexpr int kChunks = kSlab / 8;       // of 16 bytes, in a slab's row
constexpr int kSharedBytes = 224 << 10;  // of a multiprocessor
constexpr int kGroups = 2;               // warpgroups of a block
constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps;
constexpr int kBlockRows = 64 * kGroups;  // of a block, 64 of a warpgroup
constexpr int kMostTokens = 256;          // of a block

/// Of the machine code that was loaded.
[[maybe_unused]] __device__ int warpgroups_there = RABIT_WARPGROUPS;

/// Blocks of a multiprocessor.
constexpr int blocks_at_once(int tokens) { return tokens <= 16 ? 3 : tokens <= 64 ? 2 : 1; }

/// Of a block of kGroups warpgroups, 64 rows each. In shared memory, in 16 bytes: stages, half a
/// column tile of the tokens each, in slabs; places for column tiles of weights, each the columns'
/// scales and the warps' signs; barriers.
template <int kPaths, int kTokens>
struct Shared {
  static constexpr int kStage = kSlabs * kTokens * kChunks;
  static constexpr int kScales = kPaths * kTileColumns / 8, kSigns = kWarps * kPaths * 32;
  static constexpr int kPlace = kScales + kSigns;
  static constexpr int kBlocks = blocks_at_once(kTokens);
  /// With a place for weights for every two, and one.
  static constexpr int kStages = std::clamp(
      (kSharedBytes / kBlocks - 2 * kSlabAlignment - kPlace * 16) / (kStage * 16 + kPlace * 8), 3,
      8);
  static constexpr int kPlaces = (kStages + 2) / 2;
  static constexpr int kBarriers = kStages * kStage + kPlaces * kPlace;  // where they begin
  static constexpr int kBytes = kBarriers * 16 + 2 * kStages * 8 + kSlabAlignment;

  static __device__ __forceinline__ uint4* stage(uint4* memory, int slot) {
    return memory + slot * kStage;
  }
  static __device__ __forceinline__ uint4* weights(uint4* memory, int column_tile) {
    return memory + kStages * kStage + column_tile % kPlaces * kPlace;
  }
  static __device__ __forceinline__ Barrier* full(uint4* memory, int slot) {
    return reinterpret_cast<Barrier*>(memory + kBarriers) + slot;
  }
  static __device__ __forceinline__ Barrier* empty(uint4* memory, int slot) {
    return full(memory, kStages + slot);
  }
};

/// How the blocks of a launch share a product: they go through its places, 64 kGroups rows and
/// kTokens tokens each, rows first, and through the column tiles of each, every block as many of
/// these as the next. And where the copy engine finds them.
struct Work {
  int32_t row_blocks, places;
  BoxMap x;                     // slabs of a block's tokens
  BoxMap signs[kMostLinears];   // a column tile of a block's row tiles, of all paths
  BoxMap scales[kMostLinears];  // of a column tile's columns, of all paths
};

#if RABIT_WARPGROUPS
/// Fills one slot after the other with halves of column tiles of tokens, and with the first of each
/// a place for weights.
template <int kPaths, int kTokens>
struct Filler {
  using S = Shared<kPaths, kTokens>;
  const PackedArgs& args;
  const Work& work;
  uint4* memory;
  int column_tiles, column, row_block, token_block;  // of a place, and of the next to come

  /// By one thread.
  __device__ __forceinline__ void fill(int stage, int slot) {
    const bool with_weights = stage % 2 == 0;
    Barrier* const full = S::full(memory, slot);
    expect(full, (S::kStage + (with_weights ? S::kPlace : 0)) * 16);
    if (with_weights) {
      uint4* const weights = S::weights(memory, stage / 2);
      const int which = layer_of(args, row_block);
      copy_box(weights + S::kScales, work.signs[which], 0, column,
               (row_block - args.first_block[which]) * kWarps, full);
      copy_box(weights, work.scales[which], column * kTileColumns, 0, 0, full);
    }
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      copy_box(S::stage(memory, slot) + slab * kTokens * kChunks, work.x,
               (column * 2 + stage % 2) * kHalf + slab * kSlab, token_block * kTokens, 0, full);
    }
    if (!with_weights && ++column == column_tiles) {
      column = 0;
      if (++row_block == work.row_blocks) {
        row_block = 0;
        ++token_block;
      }
    }
  }
};

__device__ __forceinline__ int until_aligned(const unsigned char* memory) {
#ifdef RABIT_CUDA_EMULATOR
  const auto at = reinterpret_cast<uintptr_t>(memory);
#else
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
#endif
  return static_cast<int>((kSlabAlignment - at % kSlabAlignment) % kSlabAlignment);
}

#endif  // RABIT_WARPGROUPS

/// kTokens: of a block, 8 to 256. A warp takes a row tile.
template <int kPaths, int kTokens>
__global__ void __launch_bounds__(kThreads, Shared<kPaths, kTokens>::kBlocks)
    warpgroup_kernel(const __grid_constant__ PackedArgs args, const __grid_constant__ Work work) {
#if RABIT_WARPGROUPS
  using S = Shared<kPaths, kTokens>;
  RABIT_DYNAMIC_SHARED(memory);
  auto* const shared = reinterpret_cast<uint4*>(memory + until_aligned(memory));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int column_tiles = (args.linears[0].d_in + kTileColumns - 1) / kTileColumns;
  const int64_t tiles = int64_t{work.places} * column_tiles;
  // The first of a block's, counted over all places.
  const auto first_of = [&](int block) { return static_cast<int>(tiles * block / gridDim.x); };
  const int begin = first_of(static_cast<int>(blockIdx.x));
  const int end = first_of(static_cast<int>(blockIdx.x) + 1);
  if (thread < S::kStages) {
    start_barrier(S::full(shared, thread), 1);
    start_barrier(S::empty(shared, thread), kWarps);
  }
  show_to_engines();
  __syncthreads();
  Filler<kPaths, kTokens> filler = {args,
                                    work,
                                    shared,
                                    column_tiles,
                                    begin % column_tiles,
                                    begin / column_tiles % work.row_blocks,
                                    begin / column_tiles / work.row_blocks};
  if (thread == 0) {
    for (int i = 0; i < S::kStages - 1 && begin * 2 + i < end * 2; ++i) {
      filler.fill(begin * 2 + i, i);
    }
  }

  float sums[kTokens / 8][4];
  RowScale<kPaths> rows[2];
  // Steps of 16 columns, kTogether of them between waits. Words of rows g and
  // g + 8, and the scales of the lane's pairs of columns, are read one part before halves are made
  // of them.
  constexpr int kTogether = 2;
  constexpr int kParts = kTileColumns / 16 / kTogether;
  uint2 words[2][kPaths];
  uint32_t column_scales[2][kTogether][2][kPaths];
  const auto read = [&](int tile, int part) {
    const uint4* const weights = S::weights(shared, tile);
    const int first = part * kTogether;
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      const auto* const scales = reinterpret_cast<const uint32_t*>(weights + path * 32) + first * 8;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        column_scales[part % 2][i][0][path] = scales[i * 8 + t];
        column_scales[part % 2][i][1][path] = scales[i * 8 + t + 4];
      }
      if (first % 2 == 0) {
        const int word = first / 2;
        const uint4* const own = weights + S::kScales + (warp * kPaths + path) * 32 + g * 4;
        words[word % 2][path] = reinterpret_cast<const uint2*>(own + word % 4)[word / 4];
      }
    }
  };
  uint32_t a[2][kTogether][4];
  uint32_t signs[2][kPaths];
  const auto make = [&](int part) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int step = part * kTogether + i;
      if (step % 2 == 0) {
        // The lane's pairs of columns, t and each fourth from there, to bits 3, 7, 11, 15 of each
        // half.
#pragma unroll
        for (int path = 0; path < kPaths; ++path) {
          signs[0][path] = words[step / 2 % 2][path].x << (3 - t);
          signs[1][path] = words[step / 2 % 2][path].y << (3 - t);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[part % 2][i][j] = weights_of<kPaths>(signs[j % 2], column_scales[part % 2][i][j / 2],
                                               rows[j % 2], 12 - 8 * (step % 2) - 4 * (j / 2));
      }
    }
  };

  // The stage that products read, and how often its slot was used before, modulo 2.
  struct Slot {
    int index = 0, phase = 0;
    __device__ __forceinline__ Slot next() const {
      return index + 1 < S::kStages ? Slot{index + 1, phase} : Slot{0, phase ^ 1};
    }
    __device__ __forceinline__ Slot before() const {
      return index > 0 ? Slot{index - 1, phase} : Slot{S::kStages - 1, phase ^ 1};
    }
  } slot;
  const auto refill =
      [&](int stage) {  // in place of the one before it, when all are done with that
        const Slot before = slot.before();
        if (thread == 0 && stage + S::kStages - 1 < end * 2) {
          if (stage > begin * 2) {
            await(S::empty(shared, before.index), before.phase);
          }
          filler.fill(stage + S::kStages - 1, before.index);
        }
      };
  const auto leave = [&](int index) {
    __syncwarp();
    if (lane == 0) {
      arrive(S::empty(shared, index));
    }
  };
#pragma unroll 1
  for (int tile = begin; tile < end;) {
    const int place = tile / column_tiles;
    const int row_block = place % work.row_blocks, which = layer_of(args, row_block);
    const int row_tile = (row_block - args.first_block[which]) * kWarps + warp;
    const Linear& w = args.linears[which];
    rows[0].read(w, row_tile * kTileRows + g);
    rows[1].read(w, row_tile * kTileRows + g + 8);
    const int place_end = (place + 1) * column_tiles < end ? (place + 1) * column_tiles : end;
    await(S::full(shared, slot.index), slot.phase);
    read(tile, 0);
    make(0);
#pragma unroll 1
    for (const int first = tile; tile < place_end; ++tile) {
      uint64_t slabs = describe(S::stage(shared, slot.index));
      read(tile, 1);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (part == kParts / 2) {
          slot = slot.next();
          slabs = describe(S::stage(shared, slot.index));
          await(S::full(shared, slot.index), slot.phase);
        }
        begin_products();
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int step = part * kTogether + i;
          multiply_group(sums, a[part % 2][i], slabs, step / 4 % kSlabs, step % 4,
                         step > 0 || tile > first);
        }
        end_products();
        await_products<1>();  // then the other half of `a` can be written
        if (part == kParts / 2) {
          leave(slot.before().index);
        }
        if (part % (kParts / 2) == 1) {
          refill(tile * 2 + part / (kParts / 2));
        }
        if (part + 1 == kParts) {
          if (tile + 1 < place_end) {
            const Slot next = slot.next();
            await(S::full(shared, next.index), next.phase);
          }
          read(tile + 1, 0);
        }
        make((part + 1) % kParts);
        if (part + 2 < kParts) {
          read(tile, part + 2);
        }
      }
      await_products<0>();
      leave(slot.index);
      slot = slot.next();
    }
    // What other blocks have summed of this place. A block shares at most its first and its last.
    const auto block_of = [&](int64_t of) {
      return static_cast<int>(((of + 1) * gridDim.x - 1) / tiles);
    };
    const int first_block = block_of(int64_t{place} * column_tiles);
    const int last_block = block_of(int64_t{place + 1} * column_tiles - 1);
    const auto part_of = [&](int block) {
      return int64_t{block} * 2 + (first_of(block) / column_tiles == place ? 0 : 1);
    };
    RowScale<kPaths> units[2];  // not kept meanwhile, for want of registers
    units[0].read(w, row_tile * kTileRows + g);
    units[1].read(w, row_tile * kTileRows + g + 8);
    const int first_token = place / work.row_blocks * kTokens + 2 * t;
    const int64_t stride = as_if_new(args.y_stride);
    float* const y = args.y + first_token * stride + args.first_row[which];
    const auto put_quad = [&](int quad, const float(&values)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row_tile * kTileRows + g + 8 * (i / 2), token = quad * 8 + i % 2;
        if (row < w.d_out && first_token + token < args.tokens) {
          put(y + token * stride + row, units[i / 2].unit * values[i], args.add);
        }
      }
    };
    if (last_block > first_block) {
      put_sum_of_blocks<kThreads>(args, first_block, last_block, part_of, sums, put_quad);
    } else {
#pragma unroll
      for (int quad = 0; quad < kTokens / 8; ++quad) {
        put_quad(quad, sums[quad]);
      }
    }
  }
#else
  __trap();  // the caller has asked has_warpgroups()
#endif
}

/// How a product is shared out.
struct Sharing {
  int32_t tokens = 8;  // of a block
  int64_t row_blocks = 1, token_blocks = 1;
  int64_t blocks = 1;
  double cycles = std::numeric_limits<double>::max();

  int64_t places() const { return row_blocks * token_blocks; }
  /// Whether blocks share places.
  bool parts() const { return places() % blocks != 0; }
};

/// Estimated cycles of a product. The numbers are those of an H200: what a block takes for a column
/// tile by itself, and beside others; around its places; and to hand sums over.
double estimate(const Sharing& s, int64_t column_tiles, int64_t paths, int32_t multiprocessors) {
  const auto tokens = static_cast<double>(s.tokens);
  const double alone = 300 + 825 * static_cast<double>(paths) + 10.5 * tokens;
  const int64_t tiles = ceil_divide(s.places() * column_tiles, s.blocks);
  const auto beside = static_cast<double>(ceil_divide(s.blocks, multiprocessors));
  const int64_t places =
      ceil_divide(tiles, column_tiles) + (s.parts() && s.blocks % s.places() != 0 ? 1 : 0);
  const double around = 2000 + 8 * tokens;
  const double sum =
      s.parts() ? 1500 + kBlockRows * tokens * 4 *
                             (2 + static_cast<double>(ceil_divide(column_tiles, tiles))) / 40
                : 0;
  return static_cast<double>(tiles) * alone * (beside == 1 ? 1 : 0.8 * beside) +
         static_cast<double>(places) * around + sum;
}

Sharing share(std::initializer_list<const Linear*> linears, int64_t tokens,
              int32_t multiprocessors) {
  const int64_t paths = (*linears.begin())->paths;
  const int64_t column_tiles = ceil_divide((*linears.begin())->d_in, kTileColumns);
  Sharing best;
  for (int32_t of_block = 8; of_block <= kMostTokens; of_block *= 2) {
    if (of_block < kMostTokens / 2 && of_block < tokens) {
      continue;
    }

    if (of_block == kMostTokens && paths == 4) {
      continue;  // for want of shared memory
    }
    Sharing s;
    s.tokens = of_block;
    s.token_blocks = ceil_divide(tokens, of_block);
    s.row_blocks = 0;
    for (const Linear* w : linears) {
      s.row_blocks += ceil_divide(w->d_out, kBlockRows);
    }
    const int64_t together = blocks_at_once(of_block);
    const int64_t most = std::min(multiprocessors * together, s.places() * column_tiles);
    const auto consider = [&](int64_t blocks) {
      s.blocks = blocks;
      s.cycles = estimate(s, column_tiles, paths, multiprocessors);
      best = s.cycles < best.cycles ? s : best;
    };
    for (int64_t of_place = 1; of_place * s.places() <= most; ++of_place) {
      consider(of_place * s.places());
    }
    for (int64_t beside = 1; beside <= together; ++beside) {
      consider(std::min(multiprocessors * beside, most));
    }
    if (of_block >= tokens) {
      break;
    }
  }
  return best;
}

/// A tensor of three dimensions, the first of neighbours, and a box of it, in elements of 2 or 8
/// bytes; strides of the others in bytes.
struct Boxes {
  const void* data;
  int bytes;
  int64_t sizes[3], strides[2];
  int box[3];
  bool swizzled;  // chunk c of 16 bytes of row n in place c ^ (n % 8)
};

#ifdef RABIT_CUDA_EMULATOR
Status map_boxes(const Boxes& boxes, BoxMap& map) {
  std::memcpy(&map, &boxes, sizeof map);
  static_assert(sizeof(BoxMap) == sizeof(Boxes));
  return {};
}
bool can_map_boxes() { return true; }
#else
using MapFunction = decltype(&cuTensorMapEncodeTiled);

/// Of the driver, which this program is not linked with; nullptr where it has none.
MapFunction map_function() {
  static const MapFunction function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const bool asked = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                        cudaEnableDefault, &result) == cudaSuccess;
    cudaGetLastError();
    return asked && result == cudaDriverEntryPointSuccess ? reinterpret_cast<MapFunction>(found)
                                                          : nullptr;
  }();
  return function;
}

Status map_boxes(const Boxes& boxes, BoxMap& map) {
  cuuint64_t sizes[3], strides[2];
  cuuint32_t box[3];
  constexpr cuuint32_t kSteps[3] = {1, 1, 1};
  std::copy(boxes.sizes, boxes.sizes + 3, sizes);
  std::copy(boxes.strides, boxes.strides + 2, strides);
  std::copy(boxes.box, boxes.box + 3, box);
  const CUresult result = map_function()(
      &map, boxes.bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 3,
      const_cast<void*>(boxes.data), sizes, strides, box, kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      boxes.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return Error{"the GPU's driver refused the inputs of a product: error " +
                 std::to_string(static_cast<int>(result))};
  }
  return {};
}
bool can_map_boxes() { return map_function() != nullptr; }
#endif

Status describe_work(const PackedArgs& args, const Sharing& sharing, Work& work) {
  work.row_blocks = static_cast<int32_t>(sharing.row_blocks);
  work.places = static_cast<int32_t>(sharing.places());
  const int64_t d_in = args.linears[0].d_in;
  RABIT_CHECK(map_boxes({.data = args.x,
                         .bytes = 2,
                         .sizes = {d_in, args.tokens, 1},
                         .strides = {d_in * 2, d_in * 2 * args.tokens},
                         .box = {kSlab, sharing.tokens, 1},
                         .swizzled = true},
                        work.x));
  for (int i = 0; i < kMostLinears && args.linears[i].paths > 0; ++i) {
    const Linear& w = args.linears[i];
    const int64_t row_tiles = ceil_divide(w.d_out, kTileRows);
    const int64_t column_tiles = ceil_divide(d_in, kTileColumns);
    const int64_t tile_bytes = int64_t{w.paths} * kTileWords * 4;
    RABIT_CHECK(map_boxes({.data = w.weights,
                           .bytes = 8,
                           .sizes = {tile_bytes / 8, column_tiles, row_tiles},
                           .strides = {tile_bytes, column_tiles * tile_bytes},
                           .box = {static_cast<int>(tile_bytes / 8), 1, kWarps}},
                          work.signs[i]));
    RABIT_CHECK(map_boxes({.data = w.col_scale,
                           .bytes = 2,
                           .sizes = {d_in, w.paths, 1},
                           .strides = {d_in * 2, d_in * 2 * w.paths},
                           .box = {kTileColumns, w.paths, 1}},
                          work.scales[i]));
  }
  return {};
}

template <int kPaths, int kTokens>
Status start(const PackedArgs& args, const Sharing& sharing, Stream stream) {
  using S = Shared<kPaths, kTokens>;
  const auto kernel = warpgroup_kernel<kPaths, kTokens>;
  Work work = {};
  RABIT_CHECK(describe_work(args, sharing, work));
  const dim3 grid(static_cast<unsigned>(sharing.blocks));
  RABIT_CHECK(give_shared(kernel, S::kBytes));
  RABIT_LAUNCH_SHARED(kernel, grid, dim3(kThreads), S::kBytes, stream, args, work);
  return launched("a product of packed weights");
}

template <int kPaths>
Status start_tokens(const PackedArgs& args, const Sharing& sharing, Stream stream) {
  switch (sharing.tokens) {
    case 8:
      return start<kPaths, 8>(args, sharing, stream);
    case 16:
      return start<kPaths, 16>(args, sharing, stream);
    case 32:
      return start<kPaths, 32>(args, sharing, stream);
    case 64:
      return start<kPaths, 64>(args, sharing, stream);
    case 128:
      return start<kPaths, 128>(args, sharing, stream);
    default:
      if constexpr (kPaths < 4) {
        return start<kPaths, kMostTokens>(args, sharing, stream);
      }
      return Error{"no kernel for so many tokens"};
  }
}

}  // namespace

bool has_warpgroups() {
#ifdef RABIT_CUDA_EMULATOR
  return true;
#else
  int there = 0;
  const bool known = cudaMemcpyFromSymbol(&there, warpgroups_there, sizeof there) == cudaSuccess;
  cudaGetLastError();
  return known && there != 0 && can_map_boxes();
#endif
}

PackedNeeds warpgroup_needs(std::initializer_list<const Linear*> linears, int32_t multiprocessors) {
  PackedNeeds needs;
  const int64_t most = int64_t{multiprocessors} * kMostTokens;  // with more, no more blocks
  for (int64_t tokens = 8; tokens <= most; tokens += std::min<int64_t>(tokens, kMostTokens / 2)) {
    const Sharing s = share(linears, tokens, multiprocessors);
    if (s.parts()) {
      needs.floats = std::max(needs.floats, 2 * s.blocks * kBlockRows * s.tokens);
      needs.counters = std::max(needs.counters, s.blocks);
    }
  }
  return needs;
}

Status multiply_warpgroups(std::initializer_list<const Linear*> linears, PackedArgs args,
                           int32_t multiprocessors, Stream stream) {
  const Sharing sharing = share(linears, args.tokens, multiprocessors);
  place_layers(args, linears, kWarps);
  return with_paths(**linears.begin(), [&](auto paths) {
    return start_tokens<decltype(paths)::value>(args, sharing, stream);
  });
}

}  // namespace rabit::gpu
