// What kernels of products with packed weights share: what they are told, weights in registers, and
// the sum over blocks that share rows.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "kernels/api/gpu.h"
#include "kernels/cuda/warp.h"

namespace rabit::gpu {

constexpr int kMostLinears = 3;

struct PackedArgs {
  Linear linears[kMostLinears];
  int32_t first_block[kMostLinears];  // of rows, of each; beyond the last: more than there are
  int32_t first_row[kMostLinears];    // of each in y
  const uint16_t* x;                  // F16 (tokens, d_in)
  float* y;                           // (tokens, y_stride)
  int64_t y_stride;
  int32_t tokens, splits;
  bool add;
  float* partial;      // (blocks that share no rows and tokens, splits, values / 4, threads, 4)
  uint32_t* counters;  // of such blocks, zero before and after
};

/// Says which layer's rows a block takes, `row_tiles` of them a block.
inline void place_layers(PackedArgs& args, std::initializer_list<const Linear*> linears,
                         int64_t row_tiles) {
  int32_t blocks = 0, rows = 0;
  size_t i = 0;
  for (const Linear* w : linears) {
    args.linears[i] = *w;
    args.first_block[i] = blocks;
    args.first_row[i] = rows;
    blocks += static_cast<int32_t>(ceil_divide(ceil_divide(w->d_out, kTileRows), row_tiles));
    rows += w->d_out;
    ++i;
  }
  for (; i < kMostLinears; ++i) {
    args.first_block[i] = blocks;
  }
  args.y_stride = rows;
}

/// call(std::integral_constant<int, paths>).
template <typename Call>
auto with_paths(const Linear& w, const Call& call) {
  switch (w.paths) {
    case 1:
      return call(std::integral_constant<int, 1>());
    case 2:
      return call(std::integral_constant<int, 2>());
    case 3:
      return call(std::integral_constant<int, 3>());
    default:
      return call(std::integral_constant<int, 4>());
  }
}

__device__ __forceinline__ int layer_of(const PackedArgs& args, int row_block) {
  int which = 0;
#pragma unroll
  for (int i = 1; i < kMostLinears; ++i) {
    which = row_block >= args.first_block[i] ? i : which;
  }
  return which;
}

/// Where no other thread adds.
__device__ __forceinline__ void put(float* to, float value, bool add) {
  if (add) {
    atomicAdd(to, value);  // which waits for nothing
  } else {
    *to = value;
  }
}

/// The largest of a row's scales, and all in units of it, negative, each as a pair of halves.
template <int kPaths>
struct RowScale {
  float unit = 0;
  uint32_t ratios[kPaths];

  __device__ __forceinline__ void read(const Linear& w, int row) {
    float scales[kPaths];
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      scales[path] =
          row < w.d_out ? half_to_float(w.row_scale[path * int64_t{w.d_out} + row]) : 0.0F;
      unit = fmaxf(unit, fabsf(scales[path]));
    }
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      const float ratio = unit > 0 ? scales[path] / unit : 0.0F;
      ratios[path] = pack_halves(-ratio, -ratio);
    }
  }
};

/// Two neighbouring weights of a row, in units of its scale: bits `shift` and `shift` + 16 from the
/// top of each word of signs.
template <int kPaths>
__device__ __forceinline__ uint32_t weights_of(const uint32_t (&signs)[kPaths],
                                               const uint32_t (&scales)[kPaths],
                                               const RowScale<kPaths>& row, int shift) {
  uint32_t sum = 0;
#pragma unroll
  for (int path = 0; path < kPaths; ++path) {
    const uint32_t turned = scales[path] ^ (signs[path] << shift & 0x80008000U);
    sum = multiply_add_pair(turned, row.ratios[path], sum);
  }
  return sum;
}

/// Adds up, in order, what the `args.splits` blocks that share rows and tokens have summed over
/// their columns, in the last of them to come; false in the others. place: of those that share.
template <int kThreads, int kQuads>
__device__ __forceinline__ bool sum_of_splits(const PackedArgs& args, int64_t place, int split,
                                              float (&sums)[kQuads][4]) {
  constexpr int64_t kValues = int64_t{kQuads} * kThreads;
  auto* const partial =
      reinterpret_cast<float4*>(args.partial) + place * args.splits * kValues + threadIdx.x;
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    const float(&s)[4] = sums[quad];
    partial[split * kValues + quad * kThreads] = make_float4(s[0], s[1], s[2], s[3]);
  }
  if (!last_to_come(args.counters + place, args.splits)) {
    return false;
  }
#pragma unroll 1
  for (int from = 0; from < args.splits; ++from) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      float(&s)[4] = sums[quad];
      const float4 part = __ldcg(partial + from * kValues + quad * kThreads);
      s[0] = from == 0 ? part.x : s[0] + part.x;
      s[1] = from == 0 ? part.y : s[1] + part.y;
      s[2] = from == 0 ? part.z : s[2] + part.z;
      s[3] = from == 0 ? part.w : s[3] + part.w;
    }
  }
  return true;
}

#ifdef RABIT_CUDA_EMULATOR
template <typename Kernel>
Status give_shared(Kernel, int) {
  return {};
}
#else
/// Lets blocks of a kernel have so much shared memory.
template <typename Kernel>
Status give_shared(Kernel kernel, int bytes) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) {
    return Error{std::string("the GPU has too little shared memory for a product: ") +
                 cudaGetErrorString(status)};
  }
  return {};
}
#endif

/// By the kernel for up to kFewTokens tokens, and by the one for GPUs whose tensor cores take
/// products of warpgroups. `args`: all but what place_layers() says, and the splits.
PackedNeeds few_needs(std::initializer_list<const Linear*> linears, int32_t multiprocessors);
PackedNeeds warpgroup_needs(std::initializer_list<const Linear*> linears, int32_t multiprocessors);
Status multiply_few(std::initializer_list<const Linear*> linears, PackedArgs args,
                    int32_t multiprocessors, Stream stream);
Status multiply_warpgroups(std::initializer_list<const Linear*> linears, PackedArgs args,
                           int32_t multiprocessors, Stream stream);

}  // namespace rabit::gpu
