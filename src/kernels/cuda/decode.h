// A block of the kernel for whole tokens: its threads, its shared memory.
#pragma once

#include "kernels/api/gpu_decode.h"
#include "kernels/cuda/warp.h"

namespace rabit::gpu {

constexpr int kWarps = kDecodeWarps, kThreads = 32 * kWarps, kMostPaths = 4;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }

/// A block's shared memory. `input` is, for a product: values (tokens, columns) in F32, then bits
/// (tokens, column tiles, paths, 32 lanes) of 16 bytes, or halves (columns of the fragment, columns
/// + 32).
struct Shared {
  uint4* ring;       // (warps, stages, 32)
  Job* jobs;         // those of this block
  int* first;        // (products + 1) into them
  uint32_t* maxima;  // (tokens, kMostPaths, warps), the bits of floats
  float* squares;    // (tokens, warps)
  float* scales;     // (tokens, kMostPaths)
  int* totals;       // (tokens, kMostPaths)
  int* tokens;       // (tokens), as the next two
  int* positions;
  int* sequences;
  float* input;

  __device__ __forceinline__ Shared(unsigned char* memory, int stages, int most_jobs,
                                    int products) {
    ring = reinterpret_cast<uint4*>(memory);
    jobs = reinterpret_cast<Job*>(memory + kWarps * stages * 512);
    first = reinterpret_cast<int*>(jobs + most_jobs);
    maxima = reinterpret_cast<uint32_t*>(first + (products / 4 + 1) * 4);
    squares = reinterpret_cast<float*>(maxima + kMostDecodeTokens * kMostPaths * kWarps);
    scales = squares + kMostDecodeTokens * kWarps;
    totals = reinterpret_cast<int*>(scales + kMostDecodeTokens * kMostPaths);
    tokens = totals + kMostDecodeTokens * kMostPaths;
    positions = tokens + kMostDecodeTokens;
    sequences = positions + kMostDecodeTokens;
    input = reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(maxima) + kDecodeSmall);
  }

  template <int kTokens>
  __device__ __forceinline__ uint4* bits(const Job& job) const {
    return reinterpret_cast<uint4*>(input +
                                    kTokens * (job.column_end - job.column_begin) * kTileColumns);
  }
  template <int kTokens>
  __device__ __forceinline__ uint16_t* halves(const Job& job) const {
    return reinterpret_cast<uint16_t*>(bits<kTokens>(job));
  }
};

/// 1 / sqrt(mean + epsilon) of the stream.
__device__ __forceinline__ float reciprocal_root(float squares, const Sizes& sizes) {
  return 1.0F / sqrtf(squares / static_cast<float>(sizes.d_model) + sizes.norm_epsilon);
}

/// The sum over the columns of a job, once prepare() has run.
__device__ __forceinline__ float block_squares(const Shared& shared, int token) {
  float sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    sum += shared.squares[token * kWarps + w];
  }
  return sum;
}

/// The sum of `count` values that other blocks wrote; all are asked for before the first is used.
__device__ __forceinline__ float sum_fresh(const float* at, int count, int64_t stride) {
  constexpr int kAhead = 4;
  float sum = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kAhead) {
    float each[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      each[i] = read_fresh(at + (first + i) * stride, first + i < count);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      sum += each[i];
    }
  }
  return sum;
}

/// The sum of squares over all columns, from what the jobs of the product before wrote; `which`: 0
/// of q, k, v, 1 of gate and up.
__device__ __forceinline__ float grid_squares(const DecodeArgs& args, int which, int token) {
  return sum_fresh(args.squares + which * kMostSplits * kMostDecodeTokens + token,
                   args.splits[which == 0 ? kQkv : kGateUp], kMostDecodeTokens);
}

/// Parts that the positions up to `position` are cut into, and how many positions each has.
struct Parts {
  int count, length;
  __device__ __forceinline__ Parts(const Sizes& sizes, int tokens, int position) {
    constexpr int kFewest = 64;
    const int most = static_cast<int>(gridDim.x) / (sizes.kv_heads * tokens);
    const int wanted = (position + kFewest) / kFewest;
    count = most < 1 ? 1 : most < kMostParts ? most : kMostParts;
    count = wanted < count ? wanted : count;
    length = (position + count) / count;  // ceil((position + 1) / count)
  }
};

}  // namespace rabit::gpu
