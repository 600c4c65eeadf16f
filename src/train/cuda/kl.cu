// A block of threads takes a row and goes over it two times, three with the reverse divergence; the
// later ones find in the cache what other blocks have left there of the first.

#include "train/cuda/device.h"
#include "train/cuda/kl.h"

namespace rabit::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// Over the block, in every thread. `shared` is free again when the next call begins its second
// half.
template <int kValues>
__device__ __forceinline__ void block_sums(float (&values)[kValues]) {
  __shared__ float shared[kWarps][kValues];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float sum = warp_sum(values[i]);
    if (lane == 0) {
      shared[warp][i] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = 0.0F;
    for (int w = 0; w < kWarps; ++w) {
      values[i] += shared[w][i];
    }
  }
}

template <int kValues>
__device__ __forceinline__ void block_maxima(float (&values)[kValues]) {
  __shared__ float shared[kWarps][kValues];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float largest = warp_max(values[i]);
    if (lane == 0) {
      shared[warp][i] = largest;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = shared[0][i];
    for (int w = 1; w < kWarps; ++w) {
      values[i] = fmaxf(values[i], shared[w][i]);
    }
  }
}

// Largest logit so far, and the sums of exp relative to it, at the temperature and at 1.
struct Running {
  float largest, sum, plain;
};

template <int kWidth, bool kTempered>
__device__ __forceinline__ void add(Running& running, const Vector<kWidth>& z, float inverse) {
  float largest = running.largest;
#pragma unroll
  for (int l = 0; l < kWidth; ++l) {
    largest = fmaxf(largest, z.v[l]);
  }
  if (largest > running.largest) {
    running.sum *= __expf((running.largest - largest) * inverse);
    if (kTempered) {
      running.plain *= __expf(running.largest - largest);
    }
    running.largest = largest;
  }
#pragma unroll
  for (int l = 0; l < kWidth; ++l) {
    running.sum += __expf((z.v[l] - largest) * inverse);
    if (kTempered) {
      running.plain += __expf(z.v[l] - largest);
    }
  }
}

template <int kWidth, bool kReverse, bool kTempered>
__global__ void __launch_bounds__(kThreads)
    kl_kernel(int64_t vocab, KlShares shares, Bf16* student, const Bf16* __restrict__ teacher,
              const int64_t* __restrict__ next, float* __restrict__ sums) {
  constexpr float kLeast = -1e30F;  // below every logit, and no infinity to subtract
  const int64_t row = blockIdx.x;
  Bf16* s_row = student + row * vocab;
  const Bf16* t_row = teacher + row * vocab;
  const float t = shares.temperature, inverse = 1.0F / t;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kWidth;
  constexpr int64_t kStep = static_cast<int64_t>(kThreads) * kWidth;

  Running s{kLeast, 0.0F, 0.0F}, r{kLeast, 0.0F, 0.0F};
  for (int64_t c = begin; c < vocab; c += kStep) {
    add<kWidth, kTempered>(s, load<kWidth>(s_row + c), inverse);
    add<kWidth, kTempered>(r, load<kWidth>(t_row + c), inverse);
  }
  float largest[2] = {s.largest, r.largest};
  block_maxima(largest);
  const float s_turn = s.largest - largest[0], r_turn = r.largest - largest[1];
  float totals[4] = {s.sum * __expf(s_turn * inverse), r.sum * __expf(r_turn * inverse),
                     s.plain * __expf(s_turn), r.plain * __expf(r_turn)};
  block_sums(totals);
  // log p = (z - largest) / t - log_sum
  const float s_log = logf(totals[0]), r_log = logf(totals[1]);
  const float s_plain = kTempered ? logf(totals[2]) : s_log;
  const float r_plain = kTempered ? logf(totals[3]) : r_log;
  const int64_t target = next[row];
  const bool known = target >= 0;
  // Before anything is written over it.
  float s_target = 0.0F, r_target = 0.0F;
  if (known) {
    s_target = load<1>(s_row + target).v[0] - largest[0] - s_plain;
    r_target = load<1>(t_row + target).v[0] - largest[1] - r_plain;
  }

  const auto log_s = [&](float z) { return (z - largest[0]) * inverse - s_log; };
  const auto log_t = [&](float z) { return (z - largest[1]) * inverse - r_log; };
  float divergences[2] = {0.0F, 0.0F};  // forward, reverse
  if (kReverse) {
    for (int64_t c = begin; c < vocab; c += kStep) {
      const Vector<kWidth> zs = load<kWidth>(s_row + c), zt = load<kWidth>(t_row + c);
#pragma unroll
      for (int l = 0; l < kWidth; ++l) {
        const float ls = log_s(zs.v[l]), lt = log_t(zt.v[l]);
        divergences[0] += __expf(lt) * (lt - ls);
        divergences[1] += __expf(ls) * (ls - lt);
      }
    }
  }
  block_sums(divergences);  // also: everybody has read the target before anybody writes
  const float reverse = divergences[1];
  const float weight = shares.divergence_weight * t;  // T^2 / T
  const float entropy = known ? shares.entropy_weight : 0.0F;
  float forward[1] = {0.0F};
  for (int64_t c = begin; c < vocab; c += kStep) {
    const Vector<kWidth> zs = load<kWidth>(s_row + c), zt = load<kWidth>(t_row + c);
    Vector<kWidth> d;
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
      const float ls = log_s(zs.v[l]), lt = log_t(zt.v[l]);
      const float ps = __expf(ls), pt = __expf(lt);
      float slope = ps - pt;
      if (kReverse) {
        slope = (1.0F - shares.reverse) * slope + shares.reverse * ps * (ls - lt - reverse);
      } else {
        forward[0] += pt * (lt - ls);
      }
      const float plain = kTempered ? __expf(zs.v[l] - largest[0] - s_plain) : ps;
      d.v[l] = weight * slope + entropy * (plain - (c + l == target ? 1.0F : 0.0F));
    }
    store<kWidth>(s_row + c, d);
  }
  if (!kReverse) {
    block_sums(forward);
  }
  if (threadIdx.x == 0) {
    sums[row * 3] =
        kReverse ? (1.0F - shares.reverse) * divergences[0] + shares.reverse * reverse : forward[0];
    sums[row * 3 + 1] = -s_target;
    sums[row * 3 + 2] = -r_target;
  }
}

}  // namespace

bool kl_backward(int64_t rows, int64_t vocab, const KlShares& shares, Bf16* student,
                 const Bf16* teacher, const int64_t* next, float* sums, Stream stream) {
  using Kernel = void (*)(int64_t, KlShares, Bf16*, const Bf16*, const int64_t*, float*);
  static const Kernel kKernels[2][2][2] = {
      {{&kl_kernel<1, false, false>, &kl_kernel<1, false, true>},
       {&kl_kernel<1, true, false>, &kl_kernel<1, true, true>}},
      {{&kl_kernel<4, false, false>, &kl_kernel<4, false, true>},
       {&kl_kernel<4, true, false>, &kl_kernel<4, true, true>}}};
  const Kernel kernel =
      kKernels[vocab % 4 == 0][shares.reverse != 0.0F][shares.temperature != 1.0F];
  RABIT_LAUNCH(kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), stream, vocab, shares,
               student, teacher, next, sums);
  return cudaGetLastError() == cudaSuccess;
}

}  // namespace rabit::cuda
