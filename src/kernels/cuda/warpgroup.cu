// Products of packed weights on GPUs whose tensor cores take the products of a warpgroup (compute
// capability 9.0): any number of tokens, weights as they lie. Four warps make halves of signs in
// registers, 64 rows of them, each the sum of its paths in units of the row's largest scale, and
// multiply them with tokens in shared memory, while they make the next. Where there are fewer rows
// and tokens than multiprocessors take, several blocks share them by columns.
#include <algorithm>
#include <limits>

#include "kernels/cuda/device.h"
#include "kernels/cuda/packed.h"

namespace rabit::gpu {
namespace {

constexpr int kSlab = 64;                     // columns of 128 bytes, as the tensor cores read them
constexpr int kSlabs = kTileColumns / kSlab;  // of a column tile
constexpr int kChunks = kSlab / 8;            // of 16 bytes, in a slab's row
constexpr int kAlignment = 1024;              // of slabs: eight tokens
constexpr int kSharedBytes = 224 << 10;       // of a multiprocessor
constexpr int64_t kGroupRows = 64;            // of a warpgroup
constexpr int kMostTokens = 128;              // of a block

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define RABIT_WARPGROUPS 1
#elif defined(RABIT_CUDA_EMULATOR)
#define RABIT_WARPGROUPS 1
#else
#define RABIT_WARPGROUPS 0
#endif

/// Of the machine code that was loaded.
[[maybe_unused]] __device__ int warpgroups_there = RABIT_WARPGROUPS;

#if RABIT_WARPGROUPS
#ifdef RABIT_CUDA_EMULATOR
__device__ __forceinline__ void begin_products() {}
__device__ __forceinline__ void end_products() {}
template <int kPending>
__device__ __forceinline__ void await_products() {}
__device__ __forceinline__ void show_to_products() {}
__device__ __forceinline__ uint64_t describe(const uint4* slabs) {
  return reinterpret_cast<uint64_t>(slabs);
}
template <int kQuads>
__device__ __forceinline__ void multiply_group(float (&d)[kQuads][4], const uint32_t (&a)[4],
                                               uint64_t slabs, int slab, int step) {
  emulator::multiply_group(
      d, a,
      reinterpret_cast<const uint4*>(slabs + static_cast<uint64_t>(slab) * kQuads * kAlignment),
      step);
}
#else
/// Before the products that read what was written to registers.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;"); }
/// Until at most kPending of the groups that end_products() closed are under way.
template <int kPending>
__device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending));
}
/// Lets products see what this thread has put into shared memory.
__device__ __forceinline__ void show_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#define RABIT_D_1 "%0, %1, %2, %3"
#define RABIT_D_2 RABIT_D_1 ", %4, %5, %6, %7"
#define RABIT_D_4 RABIT_D_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define RABIT_D_8 \
  RABIT_D_4       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RABIT_D_16                                                                               \
  RABIT_D_8                                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RABIT_Q_1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define RABIT_Q_2(i) RABIT_Q_1(i), RABIT_Q_1(i + 1)
#define RABIT_Q_4(i) RABIT_Q_2(i), RABIT_Q_2(i + 2)
#define RABIT_Q_8(i) RABIT_Q_4(i), RABIT_Q_4(i + 4)
#define RABIT_Q_16(i) RABIT_Q_8(i), RABIT_Q_8(i + 8)
#define RABIT_MULTIPLY(n, quads, a0, a1, a2, a3, b)                                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n" #n   \
               "k16.f32.f16.f16 {" RABIT_D_##quads "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 \
                                                   "}, %" #b ", p, 1, 1, 0; }"               \
               : RABIT_Q_##quads(0)                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_slab))

/// Slabs in shared memory for multiply_group(), kAlignment-byte aligned.
__device__ __forceinline__ uint64_t describe(const uint4* slabs) {
  // Eight tokens lie 1,024 bytes apart; swizzled by 128 bytes.
  const uint64_t at = static_cast<uint32_t>(__cvta_generic_to_shared(slabs));
  return (at & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{kAlignment >> 4} << 32 |
         uint64_t{1} << 62;
}

/// d += a b, of a warpgroup: a (64, 16) and b (16, 8 kQuads) in F16, sums in F32; a and d of a
/// warp, its 16 rows, as multiply_tile() has them. A slab: (8 kQuads tokens, kSlab columns), chunk
/// c of token n in place c ^ (n % 8); the step's 16 columns of it.
template <int kQuads>
__device__ __forceinline__ void multiply_group(float (&d)[kQuads][4], const uint32_t (&a)[4],
                                               uint64_t slabs, int slab, int step) {
  const uint64_t b_slab =
      slabs + static_cast<uint64_t>((slab * kQuads * kAlignment + step * 32) >> 4);
  if constexpr (kQuads == 1) {
    RABIT_MULTIPLY(8, 1, 4, 5, 6, 7, 8);
  } else if constexpr (kQuads == 2) {
    RABIT_MULTIPLY(16, 2, 8, 9, 10, 11, 12);
  } else if constexpr (kQuads == 4) {
    RABIT_MULTIPLY(32, 4, 16, 17, 18, 19, 20);
  } else if constexpr (kQuads == 8) {
    RABIT_MULTIPLY(64, 8, 32, 33, 34, 35, 36);
  } else {
    RABIT_MULTIPLY(128, 16, 64, 65, 66, 67, 68);
  }
}
#endif  // RABIT_CUDA_EMULATOR
#endif  // RABIT_WARPGROUPS

/// Blocks of a multiprocessor.
constexpr int blocks_at_once(int tokens, int groups) { return groups * tokens <= 128 ? 2 : 1; }

/// Of a block of kGroups warpgroups, 64 rows each. A stage in shared memory, in 16 bytes: the
/// tokens' columns in slabs, the columns' scales, the warps' weights.
template <int kPaths, int kTokens, int kGroups>
struct Stage {
  static constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps;
  static constexpr int kInput = kSlabs * kTokens * kChunks;
  static constexpr int kScales = kPaths * kTileColumns / 8;
  static constexpr int kWeights = kWarps * kPaths * 32;
  static constexpr int kSize =
      (kInput + kScales + kWeights + kAlignment / 16 - 1) / (kAlignment / 16) * (kAlignment / 16);
  /// Blocks of a multiprocessor, by their registers, and stages of each.
  static constexpr int kBlocks = blocks_at_once(kTokens, kGroups);
  static constexpr int kStages =
      std::clamp((kSharedBytes / kBlocks - 2 * kAlignment) / (kSize * 16), 2, 4);
  static constexpr int kBytes = kStages * kSize * 16 + kAlignment;
};

/// What a thread copies of each stage. Rows and tokens beyond the last are read as the last, and
/// what comes of them is not written.
template <int kPaths, int kTokens, int kGroups>
class Loads {
 public:
  using S = Stage<kPaths, kTokens, kGroups>;

  __device__ __forceinline__ Loads(const PackedArgs& args, const Linear& w, int row_tile,
                                   int first_token)
      : args_(args), w_(w), first_(first_token + static_cast<int>(threadIdx.x) / 32) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int column_tiles = (w.d_in + kTileColumns - 1) / kTileColumns;
    const int row_tiles = (w.d_out + kTileRows - 1) / kTileRows;
    const int row = row_tile < row_tiles ? row_tile : row_tiles - 1;
    weights_ = static_cast<uint32_t>(row * column_tiles * kPaths * 32 + lane);
    place_ = lane / kChunks * kTokens * kChunks + warp * kChunks + (lane % kChunks ^ warp % 8);
  }

  __device__ __forceinline__ void start(int column_tile, uint4* stage) const {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int chunks = w_.d_in / 8, chunk = column_tile * 32 + lane;
    const bool inside = chunk < chunks;
    const auto* const x = reinterpret_cast<const uint4*>(args_.x);
#pragma unroll
    for (int i = 0; i < (kTokens + S::kWarps - 1) / S::kWarps; ++i) {
      if (kTokens % S::kWarps == 0 || warp + i * S::kWarps < kTokens) {
        const int token = first_ + i * S::kWarps;
        const int row = token < args_.tokens ? token : args_.tokens - 1;
        copy_16_or_zeros(stage + place_ + i * S::kWarps * kChunks,
                         x + static_cast<uint32_t>(row * chunks + (inside ? chunk : 0)), inside);
      }
    }
    if (thread < S::kScales) {
      const auto* const scales = reinterpret_cast<const uint4*>(w_.col_scale);
      copy_16_or_zeros(stage + S::kInput + thread,
                       scales + static_cast<uint32_t>(warp * chunks + (inside ? chunk : 0)),
                       inside);
    }
    uint4* const own = stage + S::kInput + S::kScales + warp * kPaths * 32 + lane;
    const auto* const from = static_cast<const uint4*>(w_.weights) + weights_ +
                             static_cast<uint32_t>(column_tile * kPaths * 32);
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      copy_16(own + path * 32, from + path * 32);
    }
  }

 private:
  const PackedArgs& args_;
  const Linear& w_;
  int first_;
  int place_;         // of the first token's chunk in a stage
  uint32_t weights_;  // the lane's in the first column tile of its warp's row tile
};

__device__ __forceinline__ int until_aligned(const unsigned char* memory) {
#ifdef RABIT_CUDA_EMULATOR
  const auto at = reinterpret_cast<uintptr_t>(memory);
#else
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
#endif
  return static_cast<int>((kAlignment - at % kAlignment) % kAlignment);
}

/// kTokens: of a block, 8 to 128. A warp takes a row tile.
template <int kPaths, int kTokens, int kGroups>
__global__ void __launch_bounds__(Stage<kPaths, kTokens, kGroups>::kThreads,
                                  Stage<kPaths, kTokens, kGroups>::kBlocks)
    warpgroup_kernel(const __grid_constant__ PackedArgs args) {
#if RABIT_WARPGROUPS
  using S = Stage<kPaths, kTokens, kGroups>;
  RABIT_DYNAMIC_SHARED(memory);
  auto* const stages = reinterpret_cast<uint4*>(memory + until_aligned(memory));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int block = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.z);
  const int first_token = static_cast<int>(blockIdx.y) * kTokens;
  const int which = layer_of(args, block);
  const Linear& w = args.linears[which];
  const int row_tile = (block - args.first_block[which]) * S::kWarps + warp;
  const int column_tiles = (w.d_in + kTileColumns - 1) / kTileColumns;
  const int begin = column_tiles * split / args.splits;
  const int end = column_tiles * (split + 1) / args.splits;

  RowScale<kPaths> rows[2];
  rows[0].read(w, row_tile * kTileRows + g);
  rows[1].read(w, row_tile * kTileRows + g + 8);
  float sums[kTokens / 8][4] = {};

  const Loads<kPaths, kTokens, kGroups> loads(args, w, row_tile, first_token);
  const auto load = [&](int column) {
    if (column < end) {
      loads.start(column, stages + (column - begin) % S::kStages * S::kSize);
    }
    end_copies();
  };
  for (int i = 0; i < S::kStages - 1; ++i) {
    load(begin + i);
  }
  // Words of rows g and g + 8, and the scales of the lane's pairs of columns in 16: read a step
  // before halves are made of them.
  uint2 words[2][kPaths];
  uint32_t column_scales[2][2][kPaths];
  const auto read_words = [&](const uint4* stage, int word) {
    const uint4* const own = stage + S::kInput + S::kScales + warp * kPaths * 32 + g * 4;
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      words[word % 2][path] = reinterpret_cast<const uint2*>(own + path * 32 + word % 4)[word / 4];
    }
  };
  const auto read_scales = [&](const uint4* stage, int step) {
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      const auto* const pairs =
          reinterpret_cast<const uint32_t*>(stage + S::kInput + path * 32) + step * 8;
      column_scales[step % 2][0][path] = pairs[t];
      column_scales[step % 2][1][path] = pairs[t + 4];
    }
  };
  uint32_t a[2][4];
  uint32_t signs[2][kPaths];
  const auto make = [&](int step) {
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
    for (int i = 0; i < 4; ++i) {
      a[step % 2][i] = weights_of<kPaths>(signs[i % 2], column_scales[step % 2][i / 2], rows[i % 2],
                                          12 - 8 * (step % 2) - 4 * (i / 2));
    }
  };
  const auto await_stage = [&] {
    await_copies<S::kStages - 2>();
    show_to_products();
    __syncthreads();
  };

  constexpr int kSteps = kTileColumns / 16;
  const uint4* stage = stages;
  await_stage();
  read_words(stage, 0);
  read_scales(stage, 0);
  make(0);
#pragma unroll 1
  for (int column = begin; column < end; ++column) {
    const uint64_t slabs = describe(stage);
    const uint4* const next = stages + (column + 1 - begin) % S::kStages * S::kSize;
    read_scales(stage, 1);
    read_words(stage, 1);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      begin_products();
      multiply_group(sums, a[step % 2], slabs, step / 4, step % 4);
      end_products();
      await_products<1>();  // then the other half of `a` can be written
      if (step == 1) {
        __syncthreads();  // all products of the stage before are done
        load(column + S::kStages - 1);
      }
      if (step + 1 == kSteps) {
        await_stage();
        read_words(next, 0);
        read_scales(next, 0);
      }
      make((step + 1) % kSteps);
      if (step + 2 < kSteps) {
        read_scales(stage, step + 2);
        if (step % 2 == 1) {
          read_words(stage, (step + 3) / 2);
        }
      }
    }
    await_products<0>();
    stage = next;
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
      const int token = first_token + 2 * t;
      float* const to = args.y + token * args.y_stride + args.first_row[which] + row;
#pragma unroll
      for (int quad = 0; quad < kTokens / 8; ++quad) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (token + quad * 8 + j < args.tokens) {
            put(to + (quad * 8 + j) * args.y_stride, again.unit * sums[quad][2 * i + j], args.add);
          }
        }
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

/// Estimated cycles of a product, and whether it is worth trying: what a multiprocessor's tensor
/// cores, its instructions, and its share of memory take for a column tile.
double estimate(const Sharing& s, int64_t column_tiles, int64_t paths, int32_t multiprocessors) {
  constexpr double kMemory = 18, kCache = 30;  // bytes a cycle
  const double rows = s.groups * kGroupRows;
  const double tensor = 8.0 * s.groups * std::max(s.tokens, 24);
  const double issue = 16.0 * s.groups * (12.0 * static_cast<double>(paths) + 20);
  const double bytes = rows * static_cast<double>(paths) * kTileColumns / 8 / kMemory +
                       static_cast<double>(s.tokens * kTileColumns * 2) / kCache;
  const double tile = std::max({tensor, issue, bytes}) + 100;
  const double together = blocks_at_once(s.tokens, s.groups);
  const double blocks = static_cast<double>(s.places() * s.splits);
  const double per = std::ceil(blocks / multiprocessors);  // of the busiest multiprocessor
  const double rounds = std::ceil(per / together);
  const double sum =
      s.splits == 1 ? 0 : 2000 + static_cast<double>(s.splits) * rows * s.tokens * 4 / kCache;
  const double columns = std::ceil(static_cast<double>(column_tiles) / s.splits);
  // Few warps leave gaps that more would fill.
  const double alone = s.groups * std::min(per, together) <= 2 ? 1.5 : 1.0;
  return per * columns * tile * alone + rounds * 3000 + sum;
}

Sharing share(std::initializer_list<const Linear*> linears, int64_t tokens,
              int32_t multiprocessors) {
  const int64_t paths = (*linears.begin())->paths;
  const int64_t column_tiles = ceil_divide((*linears.begin())->d_in, kTileColumns);
  Sharing best;
  for (int32_t of_block = 8; of_block <= kMostTokens; of_block *= 2) {
    if (of_block < kMostTokens && of_block < tokens) {
      continue;
    }
    for (const int32_t groups : {2, 4}) {
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

template <int kPaths, int kTokens, int kGroups>
Status start(const PackedArgs& args, const Sharing& sharing, Stream stream) {
  const auto kernel = warpgroup_kernel<kPaths, kTokens, kGroups>;
  using S = Stage<kPaths, kTokens, kGroups>;
  const dim3 grid(static_cast<unsigned>(sharing.row_blocks),
                  static_cast<unsigned>(sharing.token_blocks),
                  static_cast<unsigned>(sharing.splits));
  RABIT_CHECK(give_shared(kernel, S::kBytes));
  RABIT_LAUNCH_SHARED(kernel, grid, dim3(S::kThreads), S::kBytes, stream, args);
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
    default:
      return start<kPaths, kMostTokens, kGroups>(args, sharing, stream);
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
  return known && there != 0;
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
