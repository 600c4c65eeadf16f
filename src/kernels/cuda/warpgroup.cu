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
constexpr int64_t kGroupRows = 64;       // of a warpgroup
constexpr int kMostTokens = 256;         // of a block

/// Of the machine code that was loaded.
[[maybe_unused]] __device__ int warpgroups_there = RABIT_WARPGROUPS;

/// Blocks of a multiprocessor.
constexpr int blocks_at_once(int tokens, int groups) {
  return groups > 2 ? 1 : tokens <= 16 ? 3 : tokens <= 64 ? 2 : 1;
}

/// Of a block of kGroups warpgroups, 64 rows each. In shared memory, in 16 bytes: stages, half a
/// column tile of the tokens each, in slabs; places for column tiles of weights, each the columns'
/// scales and the warps' signs; barriers.
template <int kPaths, int kTokens, int kGroups>
struct Shared {
  static constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps;
  static constexpr int kStage = kSlabs * kTokens * kChunks;
  static constexpr int kScales = kPaths * kTileColumns / 8, kSigns = kWarps * kPaths * 32;
  static constexpr int kPlace = kScales + kSigns;
  static constexpr int kBlocks = blocks_at_once(kTokens, kGroups);
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

/// Where the copy engine finds what a product reads.
struct Maps {
  BoxMap x;                     // slabs of a block's tokens
  BoxMap signs[kMostLinears];   // a column tile of a block's row tiles, of all paths
  BoxMap scales[kMostLinears];  // of a column tile's columns, of all paths
};

#if RABIT_WARPGROUPS
/// Fills a slot with half a column tile of tokens, and with the first of a tile a place for
/// weights.
template <int kPaths, int kTokens, int kGroups>
struct Filler {
  using S = Shared<kPaths, kTokens, kGroups>;
  const Maps& maps;
  int which, first_row_tile, first_token;
  uint4* memory;

  /// By one thread.
  __device__ __forceinline__ void fill(int stage, int slot) const {
    const bool with_weights = stage % 2 == 0;
    const int column_tile = stage / 2;
    Barrier* const full = S::full(memory, slot);
    expect(full, (S::kStage + (with_weights ? S::kPlace : 0)) * 16);
    if (with_weights) {
      uint4* const weights = S::weights(memory, column_tile);
      copy_box(weights + S::kScales, maps.signs[which], 0, column_tile, first_row_tile, full);
      copy_box(weights, maps.scales[which], column_tile * kTileColumns, 0, 0, full);
    }
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      copy_box(S::stage(memory, slot) + slab * kTokens * kChunks, maps.x,
               stage * kHalf + slab * kSlab, first_token, 0, full);
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
template <int kPaths, int kTokens, int kGroups>
__global__ void __launch_bounds__(Shared<kPaths, kTokens, kGroups>::kThreads,
                                  Shared<kPaths, kTokens, kGroups>::kBlocks)
    warpgroup_kernel(const __grid_constant__ PackedArgs args, const __grid_constant__ Maps maps) {
#if RABIT_WARPGROUPS
  using S = Shared<kPaths, kTokens, kGroups>;
  RABIT_DYNAMIC_SHARED(memory);
  auto* const shared = reinterpret_cast<uint4*>(memory + until_aligned(memory));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int block = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.z);
  const int first_token = static_cast<int>(blockIdx.y) * kTokens;
  const int which = layer_of(args, block);
  const Linear& w = args.linears[which];
  const int first_row_tile = (block - args.first_block[which]) * S::kWarps;
  const int row_tile = first_row_tile + warp;
  const int column_tiles = (w.d_in + kTileColumns - 1) / kTileColumns;
  const int begin = column_tiles * split / args.splits;
  const int end = column_tiles * (split + 1) / args.splits;

  if (thread < S::kStages) {
    start_barrier(S::full(shared, thread), 1);
    start_barrier(S::empty(shared, thread), S::kWarps);
  }
  show_to_engines();
  __syncthreads();
  const Filler<kPaths, kTokens, kGroups> filler = {maps, which, first_row_tile, first_token,
                                                   shared};
  if (thread == 0) {
    for (int i = 0; i < S::kStages - 1 && begin * 2 + i < end * 2; ++i) {
      filler.fill(begin * 2 + i, i);
    }
  }

  float sums[kTokens / 8][4] = {};
  RowScale<kPaths> rows[2];
  rows[0].read(w, row_tile * kTileRows + g);
  rows[1].read(w, row_tile * kTileRows + g + 8);
  // Steps of 16 columns, kTogether of them between waits, as registers allow. Words of rows g and
  // g + 8, and the scales of the lane's pairs of columns, are read one part before halves are made
  // of them.
  constexpr int kTogether = kTokens * kGroups > 256 && kTokens < 256 ? 1 : 2;
  constexpr int kParts = kTileColumns / 16 / kTogether;
  uint2 words[2][kPaths];
  uint32_t column_scales[2][kTogether][2][kPaths];
  const auto read = [&](int column, int part) {
    const uint4* const weights = S::weights(shared, column);
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
  await(S::full(shared, 0), 0);
  read(begin, 0);
  make(0);
#pragma unroll 1
  for (int column = begin; column < end; ++column) {
    uint64_t slabs = describe(S::stage(shared, slot.index));
    read(column, 1);
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
        multiply_group(sums, a[part % 2][i], slabs, step / 4 % kSlabs, step % 4);
      }
      end_products();
      await_products<1>();  // then the other half of `a` can be written
      if (part == kParts / 2) {
        leave(slot.before().index);
      }
      if (part % (kParts / 2) == 1) {
        refill(column * 2 + part / (kParts / 2));
      }
      if (part + 1 == kParts) {
        if (column + 1 < end) {
          const Slot next = slot.next();
          await(S::full(shared, next.index), next.phase);
        }
        read(column + 1, 0);
      }
      make((part + 1) % kParts);
      if (part + 2 < kParts) {
        read(column, part + 2);
      }
    }
    await_products<0>();
    leave(slot.index);
    slot = slot.next();
  }

  const int64_t place = int64_t{blockIdx.y} * gridDim.x + block;
  if (args.splits > 1 && !sum_of_splits<S::kThreads>(args, place, split, sums)) {
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = row_tile * kTileRows + g + 8 * i;
    if (row < w.d_out) {
      RowScale<kPaths> again;  // not kept meanwhile, for want of registers
      again.read(w, row);
      const int first = first_token + 2 * t;
      float* to = args.y + first * args.y_stride + args.first_row[which] + row;
#pragma unroll
      for (int quad = 0; quad < kTokens / 8; ++quad) {
        const float values[2] = {again.unit * sums[quad][2 * i],
                                 again.unit * sums[quad][2 * i + 1]};
        if (first + quad * 8 < args.tokens) {
          put(to, values[0], args.add);
        }
        if (first + quad * 8 + 1 < args.tokens) {
          put(to + args.y_stride, values[1], args.add);
        }
        to += 8 * args.y_stride;
      }
    }
  }
#else
  __trap();  // the caller has asked has_warpgroups()
#endif
}

/// How a product is shared out.
struct Sharing {
  int32_t tokens = 8, groups = 2;  // of a block
  int64_t row_blocks = 1, token_blocks = 1;
  int32_t splits = 1;
  double cycles = std::numeric_limits<double>::max();

  int64_t places() const { return row_blocks * token_blocks; }
  int64_t partial() const {
    return splits == 1 ? 0 : places() * splits * groups * kGroupRows * tokens;
  }
};

/// Estimated cycles of a product. The numbers are those of an H200: what a block takes for a column
/// tile by itself, and beside others; around its column tiles; and to hand its sums over.
double estimate(const Sharing& s, int64_t column_tiles, int64_t paths, int32_t multiprocessors) {
  const auto tokens = static_cast<double>(s.tokens);
  const double rows = static_cast<double>(s.groups * kGroupRows);
  const double of_two_groups = 300 + 825 * static_cast<double>(paths) + 10.5 * tokens;
  const double alone = of_two_groups * (s.groups == 2 ? 1 : 1.65);
  const double columns = std::ceil(static_cast<double>(column_tiles) / s.splits);
  const double around = 3000 + 8 * tokens;
  const double sum = s.splits == 1 ? 0 : 1500 + rows * tokens * 4 * (s.splits + 1) / 40;
  const int64_t together = blocks_at_once(s.tokens, s.groups);
  // Of the busiest multiprocessor.
  const int64_t blocks = ceil_divide(s.places() * s.splits, multiprocessors);
  const int64_t full = blocks / together, left = blocks % together;
  const auto round = [&](int64_t beside) {
    const auto n = static_cast<double>(beside);
    return beside == 0 ? 0 : columns * alone * (beside == 1 ? 1 : 0.8 * n) + around;
  };
  return static_cast<double>(full) * round(together) + round(left) + sum;
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
    for (const int32_t groups : {2, 4}) {
      if (groups * of_block > 2 * kMostTokens || (of_block == kMostTokens && paths == 4)) {
        continue;  // for want of registers, and of shared memory
      }
      Sharing s;
      s.tokens = of_block;
      s.groups = groups;
      s.token_blocks = ceil_divide(tokens, of_block);
      s.row_blocks = 0;
      for (const Linear* w : linears) {
        s.row_blocks += ceil_divide(w->d_out, groups * kGroupRows);
      }
      const int64_t at_once = int64_t{multiprocessors} * blocks_at_once(of_block, groups);
      const int64_t most = std::clamp<int64_t>(at_once / s.places(), 1, column_tiles);
      for (int64_t splits = 1; splits <= most; ++splits) {
        s.splits = static_cast<int32_t>(splits);
        s.cycles = estimate(s, column_tiles, paths, multiprocessors);
        best = s.cycles < best.cycles ? s : best;
      }
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

Status make_maps(const PackedArgs& args, int tokens_of_block, int warps, Maps& maps) {
  const int64_t d_in = args.linears[0].d_in;
  RABIT_CHECK(map_boxes({.data = args.x,
                         .bytes = 2,
                         .sizes = {d_in, args.tokens, 1},
                         .strides = {d_in * 2, d_in * 2 * args.tokens},
                         .box = {kSlab, tokens_of_block, 1},
                         .swizzled = true},
                        maps.x));
  for (int i = 0; i < kMostLinears && args.linears[i].paths > 0; ++i) {
    const Linear& w = args.linears[i];
    const int64_t row_tiles = ceil_divide(w.d_out, kTileRows);
    const int64_t column_tiles = ceil_divide(d_in, kTileColumns);
    const int64_t tile_bytes = int64_t{w.paths} * kTileWords * 4;
    RABIT_CHECK(map_boxes({.data = w.weights,
                           .bytes = 8,
                           .sizes = {tile_bytes / 8, column_tiles, row_tiles},
                           .strides = {tile_bytes, column_tiles * tile_bytes},
                           .box = {static_cast<int>(tile_bytes / 8), 1, warps}},
                          maps.signs[i]));
    RABIT_CHECK(map_boxes({.data = w.col_scale,
                           .bytes = 2,
                           .sizes = {d_in, w.paths, 1},
                           .strides = {d_in * 2, d_in * 2 * w.paths},
                           .box = {kTileColumns, w.paths, 1}},
                          maps.scales[i]));
  }
  return {};
}

template <int kPaths, int kTokens, int kGroups>
Status start(const PackedArgs& args, const Sharing& sharing, Stream stream) {
  using S = Shared<kPaths, kTokens, kGroups>;
  const auto kernel = warpgroup_kernel<kPaths, kTokens, kGroups>;
  Maps maps = {};
  RABIT_CHECK(make_maps(args, kTokens, S::kWarps, maps));
  const dim3 grid(static_cast<unsigned>(sharing.row_blocks),
                  static_cast<unsigned>(sharing.token_blocks),
                  static_cast<unsigned>(sharing.splits));
  RABIT_CHECK(give_shared(kernel, S::kBytes));
  RABIT_LAUNCH_SHARED(kernel, grid, dim3(S::kThreads), S::kBytes, stream, args, maps);
  return launched("a product of packed weights");
}

template <int kPaths, int kGroups>
Status start_tokens(const PackedArgs& args, const Sharing& sharing, Stream stream) {
  switch (sharing.tokens) {
    case 8:
      return start<kPaths, 8, kGroups>(args, sharing, stream);
    case 16:
      return start<kPaths, 16, kGroups>(args, sharing, stream);
    case 32:
      return start<kPaths, 32, kGroups>(args, sharing, stream);
    case 64:
      return start<kPaths, 64, kGroups>(args, sharing, stream);
    case 128:
      return start<kPaths, 128, kGroups>(args, sharing, stream);
    default:
      if constexpr (kGroups == 2 && kPaths < 4) {
        return start<kPaths, kMostTokens, kGroups>(args, sharing, stream);
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
  // From so many on, rows and tokens alone keep all multiprocessors busy.
  const int64_t most = int64_t{multiprocessors} * kMostTokens;
  for (int64_t tokens = 8; tokens <= most; tokens += std::min<int64_t>(tokens, kMostTokens)) {
    const Sharing s = share(linears, tokens, multiprocessors);
    needs.floats = std::max(needs.floats, s.partial());
    needs.counters = std::max(needs.counters, s.splits == 1 ? 0 : s.places());
  }
  return needs;
}

Status multiply_warpgroups(std::initializer_list<const Linear*> linears, PackedArgs args,
                           int32_t multiprocessors, Stream stream) {
  const Sharing sharing = share(linears, args.tokens, multiprocessors);
  args.splits = sharing.splits;
  place_layers(args, linears, int64_t{4} * sharing.groups);
  return with_paths(**linears.begin(), [&](auto paths) {
    constexpr int kPaths = decltype(paths)::value;
    return sharing.groups == 2 ? start_tokens<kPaths, 2>(args, sharing, stream)
                               : start_tokens<kPaths, 4>(args, sharing, stream);
  });
}

}  // namespace rabit::gpu
