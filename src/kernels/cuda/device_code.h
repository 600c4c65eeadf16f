// What the kernels of the runtime share: F16 by hand, sums over a warp, products of the tensor
// cores. Compiled by nvcc, or as plain C++ after tests/cuda_emulator.h.
#pragma once

#ifndef RABIT_CUDA_EMULATOR
#include <cuda_runtime.h>
#define RABIT_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define RABIT_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#endif

#include <cstdint>
#include <cstring>
#include <string>

#include "rabit/result.h"

namespace rabit::gpu {

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// What a launcher returns. A grid has at most 2^31 - 1 blocks along x.
inline Status launched(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    return Error{std::string("the GPU refused to start ") + what + ": " +
                 cudaGetErrorString(error)};
  }
  return {};
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}
__device__ __forceinline__ uint32_t float_to_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

__device__ __forceinline__ float half_to_float(uint16_t half) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  const uint32_t sign = (half & 0x8000U) << 16, magnitude = half & 0x7FFFU;
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000U);
  return bits_to_float(
      sign | (magnitude >= 0x7C00U ? (magnitude << 13) | 0x7F800000U : float_to_bits(scaled)));
#endif
}

/// To nearest, ties to even.
__device__ __forceinline__ uint16_t float_to_half(float value) {
#ifdef __CUDA_ARCH__
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  uint32_t half = 0;
  if (magnitude >= 0x477FF000U) {
    half = magnitude > 0x7F800000U ? 0x7FFFU : 0x7C00U;
  } else if (magnitude < 0x38800000U) {  // the adder rounds at 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5F) - 0x3F000000U;
  } else {
    half = (magnitude + 0xFFFU + ((magnitude >> 13) & 1U) - 0x38000000U) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
#endif
}

/// What is too large becomes the largest; NaN stays.
__device__ __forceinline__ uint16_t saturated_half(float value) {
  constexpr float kMost = 65504.0F;
  value = value > kMost ? kMost : value;
  return float_to_half(value < -kMost ? -kMost : value);
}

/// `low` in the lower half.
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
#endif
}
__device__ __forceinline__ uint32_t pack_saturated(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair = pack_halves(low, high);
  asm("min.NaN.f16x2 %0, %0, %1; max.NaN.f16x2 %0, %0, %2;"
      : "+r"(pair)
      : "r"(0x7BFF7BFFU), "r"(0xFBFFFBFFU));
  return pair;
#else
  return saturated_half(low) | static_cast<uint32_t>(saturated_half(high)) << 16;
#endif
}

/// In every lane the sum over the warp, in one order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFU, value, step);
  }
  return value;
}

/// d += a b, of a warp: a (16, 16) and b (16, 8) in F16, d (16, 8) in F32. With g = lane/4 and
/// t = lane%4, words of neighbours in k: a = rows g, g+8, g, g+8 at k = 2t, 2t, 2t+8, 2t+8; b =
/// column g at k = 2t, 2t+8; d = row g at columns 2t, 2t+1, then row g+8.
__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
#ifdef RABIT_CUDA_EMULATOR
  emulator::multiply_tile(d, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}

/// Four 8 by 8 matrices of F16 in shared memory, each turned over its diagonal: word i holds of
/// matrix i the rows 2t and 2t+1 of column g. `row`: where row lane%8 of matrix lane/8 begins,
/// 16-byte aligned.
__device__ __forceinline__ void load_turned(uint32_t (&out)[4], const uint16_t* row) {
#ifdef RABIT_CUDA_EMULATOR
  emulator::load_turned(out, row);
#else
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
#endif
}

}  // namespace rabit::gpu
