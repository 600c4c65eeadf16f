// What the kernels of training share: bf16 by hand, vectors of it and of float, sums over a warp.
// Compiled by nvcc, or as plain C++ after tests/cuda_emulator.h; no header of torch or of ours.
#pragma once

#ifndef RABIT_CUDA_EMULATOR
#include <cuda_runtime.h>
#define RABIT_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

#include <cstdint>
#include <cstring>

#include "train/cuda/types.h"

namespace rabit::cuda {

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The upper half of a float.
struct Bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

/// Two values rounded to nearest, ties to even, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  const auto round = [](float value) -> uint32_t {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFFU) > 0x7F800000U) {
      return 0x7FFFU;
    }
    return (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  };
  return round(low) | round(high) << 16;
#endif
}

__device__ __forceinline__ float low_bf16(uint32_t packed) { return bits_to_float(packed << 16); }
__device__ __forceinline__ float high_bf16(uint32_t packed) {
  return bits_to_float(packed & 0xFFFF0000U);
}

/// kWidth neighbours, 1 or 4; four of them lie on 16 bytes of float or 8 of bf16.
template <int kWidth>
struct Vector {
  float v[kWidth];
};

template <int kWidth>
__device__ __forceinline__ Vector<kWidth> load(const float* at) {
  Vector<kWidth> out;
  if constexpr (kWidth == 4) {
    const float4 x = *reinterpret_cast<const float4*>(at);
    out.v[0] = x.x, out.v[1] = x.y, out.v[2] = x.z, out.v[3] = x.w;
  } else {
    out.v[0] = *at;
  }
  return out;
}

template <int kWidth>
__device__ __forceinline__ Vector<kWidth> load(const Bf16* at) {
  Vector<kWidth> out;
  if constexpr (kWidth == 4) {
    const uint2 x = *reinterpret_cast<const uint2*>(at);
    out.v[0] = low_bf16(x.x), out.v[1] = high_bf16(x.x);
    out.v[2] = low_bf16(x.y), out.v[3] = high_bf16(x.y);
  } else {
    out.v[0] = low_bf16(at->bits);
  }
  return out;
}

/// Copies kWidth neighbours to shared memory, without waiting for them where they are 4 bytes or
/// more.
template <int kWidth, typename T>
__device__ __forceinline__ void copy_async(T* shared, const T* from) {
#ifdef __CUDA_ARCH__
  constexpr int kBytes = kWidth * static_cast<int>(sizeof(T));
  if constexpr (kBytes >= 4) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes)
                 : "memory");
    return;
  }
#endif
  for (int l = 0; l < kWidth; ++l) {
    shared[l] = from[l];
  }
}

/// Ends a group of copies; waits until only the last kPending groups may be under way.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

template <int kWidth>
__device__ __forceinline__ void store(float* at, const Vector<kWidth>& x) {
  if constexpr (kWidth == 4) {
#ifdef __CUDA_ARCH__
    // Of an assignment the compiler makes four stores at times.
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(x.v[0]), "f"(x.v[1]),
                 "f"(x.v[2]), "f"(x.v[3])
                 : "memory");
#else
    *reinterpret_cast<float4*>(at) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
#endif
  } else {
    *at = x.v[0];
  }
}

template <int kWidth>
__device__ __forceinline__ void store(Bf16* at, const Vector<kWidth>& x) {
  if constexpr (kWidth == 4) {
    uint2 packed;
    packed.x = pack_bf16(x.v[0], x.v[1]);
    packed.y = pack_bf16(x.v[2], x.v[3]);
    *reinterpret_cast<uint2*>(at) = packed;
  } else {
    at->bits = static_cast<uint16_t>(pack_bf16(x.v[0], 0.0F));
  }
}

/// In every lane the sum over the warp, in one order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFU, value, step);
  }
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFU, value, step));
  }
  return value;
}

}  // namespace rabit::cuda
