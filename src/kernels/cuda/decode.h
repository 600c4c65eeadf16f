// A block of the kernel for whole tokens: its threads, its shared memory.
#pragma once

#include "kernels/api/gpu_decode.h"
#include "kernels/cuda/warp.h"

namespace rabit::gpu {

constexpr int kWarps = kDecodeWarps, kThreads = 32 * kWarps, kMostPaths = 4, kKept = 8;
constexpr int kRun = 128;  // columns whose values a warp reads at once
constexpr int kMostRuns = kMostJobColumns / kRun;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / 32); }

/// A block's shared memory. `input` is, for a product: values (tokens, paths, columns) in F32, then
/// bits (tokens, column tiles, paths, 32 lanes) of 16 bytes, or halves, columns + 32 of them for
/// each column of the fragment.
class Shared {
 public:
  __device__ __forceinline__ Shared(unsigned char* memory, int stages, int most_jobs, int products)
      : memory_(memory),
        jobs_(kDecodeSmall + kWarps * stages * 1024),
        first_(jobs_ + most_jobs * static_cast<int>(sizeof(Job))),
        input_(first_ + (products / 4 + 1) * 16) {}

  /// Bits of floats, (tokens, kMostPaths); infinities and NaN are the largest. Zero when values are
  /// read, as `totals` when they become bits.
  __device__ __forceinline__ uint32_t* maxima() const { return at<uint32_t>(0); }
  /// (tokens, kMostRuns)
  __device__ __forceinline__ float* squares() const { return at<float>(kSquares); }
  /// (tokens, kMostPaths), as the totals.
  __device__ __forceinline__ float* scales() const { return at<float>(kScales); }
  __device__ __forceinline__ int* totals() const { return at<int>(kTotals); }
  __device__ __forceinline__ int* tokens() const {
    return at<int>(kIds);
  }  // (tokens), as the next two
  __device__ __forceinline__ int* positions() const { return tokens() + kMostDecodeTokens; }
  __device__ __forceinline__ int* sequences() const { return positions() + kMostDecodeTokens; }
  /// Parts of each token's positions, and the length of each.
  __device__ __forceinline__ int* parts() const { return sequences() + kMostDecodeTokens; }
  __device__ __forceinline__ int* lengths() const { return parts() + kMostDecodeTokens; }
  /// (warps, kKept): where each warp is in its weights.
  __device__ __forceinline__ int* kept() const { return at<int>(kPlaces); }
  __device__ __forceinline__ uint4* ring() const {
    return at<uint4>(kDecodeSmall);
  }  // (warps, stages, 2, 32)
  /// Those of this block, and (products + 1) where each product's begin.
  __device__ __forceinline__ Job* jobs() const { return at<Job>(jobs_); }
  __device__ __forceinline__ int* first() const { return at<int>(first_); }
  __device__ __forceinline__ float* input() const { return at<float>(input_); }

  template <int kTokens>
  __device__ __forceinline__ uint4* bits(const Job& job) const {
    return reinterpret_cast<uint4*>(
        input() + kTokens * job.paths * (job.column_end - job.column_begin) * kTileColumns);
  }
  template <int kTokens>
  __device__ __forceinline__ uint16_t* halves(const Job& job) const {
    return reinterpret_cast<uint16_t*>(bits<kTokens>(job));
  }

 private:
  static constexpr int kSquares = kMostDecodeTokens * kMostPaths * 4;
  static constexpr int kScales = kSquares + kMostDecodeTokens * kMostRuns * 4;
  static constexpr int kTotals = kScales + kMostDecodeTokens * kMostPaths * 4;
  static constexpr int kIds = kTotals + kMostDecodeTokens * kMostPaths * 4;
  static constexpr int kPlaces = kIds + 5 * kMostDecodeTokens * 4;
  static_assert(kPlaces + kWarps * kKept * 4 <= kDecodeSmall);

  template <typename T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(memory_ + offset);
  }

  unsigned char* memory_;
  int jobs_, first_, input_;
};

/// 1 / x to some 22 bits, of 2^-126 to 2^126.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0F / x;
#endif
}

/// 1 / sqrt(mean + epsilon) of the stream.
__device__ __forceinline__ float reciprocal_root(float squares, const DecodeArgs& args) {
  return rsqrtf(squares * args.mean_factor + args.sizes.norm_epsilon);
}

/// A division takes as long as a read of memory nearby: these are without. `value` is below 2^16.
__device__ __forceinline__ int over_head_dim(const DecodeArgs& args, int value) {
  return static_cast<int>(__umulhi(static_cast<uint32_t>(value), args.head_dim_inverse));
}
/// Which token an item of `each` is of, and its number there.
template <int kTokens>
__device__ __forceinline__ int token_of(int& item, int each) {
  int token = 0;
#pragma unroll
  for (int i = 1; i < kTokens; ++i) {
    if (item >= each) {
      item -= each;
      ++token;
    }
  }
  return token;
}

/// The sum over the columns of a job, once read_values() has run.
__device__ __forceinline__ float block_squares(const Shared& shared, int token, int runs) {
  float sum = 0;
#pragma unroll 4
  for (int run = 0; run < runs; ++run) {
    sum += shared.squares()[token * kMostRuns + run];
  }
  return sum;
}

/// Where in the buffers what a layer's blocks hand each other lies, and its tag. Neighbouring
/// layers use the two halves of each buffer in turn.
struct Exchange {
  int64_t place;  // floats from the first half
  uint32_t tag;

  __device__ __forceinline__ Exchange(const DecodeArgs& args, int layer) {
    const uint32_t half = static_cast<uint32_t>(layer) & 1U;
    const uint32_t uses = (static_cast<uint32_t>(args.sizes.layers) + 1 - half) / 2;  // of a pass
    place = half != 0 ? args.half : 0;
    tag = (args.pass * uses + (static_cast<uint32_t>(layer) >> 1) + 1) & 1U;
  }
};

/// The factor of a norm, from the sums of squares that the leading jobs of a product hand over.
struct GridRoot {
  float part = 0;

  /// `which`: 0 of q, k, v, 1 of gate and up. All lanes of a warp.
  __device__ __forceinline__ void ask(const DecodeArgs& args, const Exchange& exchange, int which,
                                      int token, Arrivals& arrivals) {
    const float* const squares =
        args.squares + exchange.place + which * kMostSplits * kMostDecodeTokens + token;
    part = arrivals.read(squares + lane() % kMostSplits * kMostDecodeTokens, lane(),
                         args.splits[which == 0 ? kQkv : kGateUp]);
  }
  __device__ __forceinline__ float value(const DecodeArgs& args) const {
    return reciprocal_root(warp_sum(part), args);
  }
};

/// Parts that the positions of a KV head may be cut into.
struct MostParts {
  int count;
  uint32_t inverse;  // as head_dim_inverse

  __device__ __forceinline__ MostParts(const Sizes& sizes, int tokens) {
    const int most = static_cast<int>(gridDim.x) / (sizes.kv_heads * tokens);
    count = most < 1 ? 1 : most < kMostParts ? most : kMostParts;
    inverse = 0xFFFFFFFFU / static_cast<uint32_t>(count) + 1;  // 0 of a single part
  }
  /// index / count
  __device__ __forceinline__ int over(int index) const {
    return count == 1 ? index : static_cast<int>(__umulhi(static_cast<uint32_t>(index), inverse));
  }
};

/// Parts that the positions up to `position` are cut into, and how many positions each has.
struct Parts {
  int count, length;
  __device__ __forceinline__ Parts(int most, int position) {
    constexpr int kFewest = 64;
    const int wanted = (position + kFewest) / kFewest;
    count = wanted < most ? wanted : most;
    length = (position + count) / count;  // ceil((position + 1) / count)
  }
};

}  // namespace rabit::gpu
