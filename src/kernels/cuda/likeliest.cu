// The likeliest tokens of each slice of a vocabulary, so that a few of its logits leave the GPU. A
// block keeps a slice in registers, as numbers in the order of their logits, finds the number that
// as many as are wanted reach, bit by bit, and hands out those.
#include "kernels/api/gpu.h"
#include "kernels/cuda/warp.h"

namespace rabit::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kEach = kSlice / kThreads;  // logits of a thread
constexpr int kSliceBits = 12;
static_assert(kSlice == 1 << kSliceBits && kMostLikeliest <= kSlice);

/// Numbers in the order of logits; 0: never drawn.
__device__ __forceinline__ uint32_t rank_of(float logit) {
  if (!(logit > -INFINITY)) {
    return 0;
  }
  const uint32_t bits = float_to_bits(logit + 0.0F);  // there is one zero
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

/// Sums over the block, one after the other.
class BlockSum {
 public:
  __device__ __forceinline__ explicit BlockSum(int (*parts)[kWarps]) : parts_(parts) {}

  __device__ __forceinline__ int operator()(int own) {
    int* const parts = parts_[turn_];  // in turns: who is ahead does not write what others read
    turn_ ^= 1;
    own = warp_sum(own);
    if (threadIdx.x % 32 == 0) {
      parts[threadIdx.x / 32] = own;
    }
    __syncthreads();
    int sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += parts[warp];
    }
    return sum;
  }

 private:
  int (*parts_)[kWarps];
  int turn_ = 0;
};

__global__ void __launch_bounds__(kThreads)
    likeliest_kernel(const float* __restrict__ logits, int64_t vocab, int count,
                     float* __restrict__ out, int32_t* __restrict__ tokens) {
  __shared__ int parts[2][kWarps];
  __shared__ int found;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSlice;
  uint32_t ranks[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t token = begin + i * kThreads + thread;
    ranks[i] = token < vocab ? rank_of(logits[token]) : 0;
  }
  if (thread == 0) {
    found = 0;
  }
  BlockSum sum(parts);
  const auto number_of = [&](const auto& counts) {
    int own = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      own += counts(ranks[i], i * kThreads + thread) ? 1 : 0;
    }
    return sum(own);
  };

  // The largest rank that `count` reach, 0 where there are no more; then, of those of just that
  // rank who are first, the last that still is one of `count`.
  uint32_t least = 0;
#pragma unroll 1
  for (uint32_t bit = 0x80000000U; bit != 0; bit >>= 1) {
    const uint32_t next = least | bit;
    if (number_of([&](uint32_t rank, int) { return rank >= next; }) >= count) {
      least = next;
    }
  }
  const int wanted = count - number_of([&](uint32_t rank, int) { return rank > least; });
  int last = 0;
#pragma unroll 1
  for (int bit = 1 << (kSliceBits - 1); bit != 0; bit >>= 1) {
    const int next = last | bit;
    if (number_of([&](uint32_t rank, int at) { return rank == least && at < next; }) < wanted) {
      last = next;
    }
  }
  float* const own_out = out + static_cast<int64_t>(blockIdx.x) * count;
  int32_t* const own_tokens = tokens + static_cast<int64_t>(blockIdx.x) * count;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * kThreads + thread;
    if (ranks[i] > least || (least > 0 && ranks[i] == least && at <= last)) {
      const int place = atomicAdd(&found, 1);
      own_out[place] = logits[begin + at];
      own_tokens[place] = static_cast<int32_t>(begin + at);
    }
  }
  __syncthreads();
  for (int place = found + thread; place < count; place += kThreads) {
    own_out[place] = -INFINITY;
    own_tokens[place] = -1;
  }
}

}  // namespace

Status likeliest(const float* logits, int64_t vocab, int32_t count, float* out, int32_t* tokens,
                 Stream stream) {
  RABIT_LAUNCH(likeliest_kernel, dim3(static_cast<unsigned>(ceil_divide(vocab, kSlice))),
               dim3(kThreads), stream, logits, vocab, count, out, tokens);
  return launched("the choice of tokens");
}

}  // namespace rabit::gpu
