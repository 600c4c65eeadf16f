// What the kernel for whole tokens needs beside device_code.h: products of bits on tensor cores,
// copies that do not wait, whole numbers over a warp. Where a GPU lacks the instruction, products
// of bits are written out over shuffles.
#pragma once

#include "kernels/cuda/device_code.h"

#ifndef RABIT_CUDA_EMULATOR
#define RABIT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace rabit::gpu {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;

__device__ __forceinline__ int warp_sum(int value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAllLanes, value);
#else
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
#endif
}

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAllLanes, value);
#else
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, value, step);
    value = other > value ? other : value;
  }
  return value;
#endif
}

/// Bit j of what lane b gets is bit b of what lane j gave.
__device__ __forceinline__ uint32_t transpose_bits(uint32_t bits, int lane) {
  constexpr uint32_t kLow[5] = {0x55555555U, 0x33333333U, 0x0F0F0F0FU, 0x00FF00FFU, 0x0000FFFFU};
#pragma unroll
  for (int i = 4; i >= 0; --i) {
    const int step = 1 << i;
    const uint32_t other = __shfl_xor_sync(kAllLanes, bits, step);
    const bool upper = (lane & step) != 0;
    const uint32_t keep = upper ? ~kLow[i] : kLow[i];
    const uint32_t moved = upper ? other >> step : other << step;
    bits = (bits & keep) | (moved & ~keep);
  }
  return bits;
}

/// c += A B over 256 bits: c[row, n] += popcount(A[row] & B[n]), A 16 rows and B 8 columns in
/// fragments as mma.m16n8k256 has them.
__device__ __forceinline__ void multiply_bits(int (&c)[4], const uint4& a, uint32_t b0, uint32_t b1,
                                              int lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#else
  for (int u = 0; u < 4; ++u) {
    const int row = lane / 4 * 4 + u;
    const uint32_t x = __shfl_sync(kAllLanes, a.x, row), y = __shfl_sync(kAllLanes, a.y, row);
    const uint32_t z = __shfl_sync(kAllLanes, a.z, row), w = __shfl_sync(kAllLanes, a.w, row);
    for (int e = 0; e < 2; ++e) {
      const int column = (lane % 4 * 2 + e) * 4 + u;
      const uint32_t p = __shfl_sync(kAllLanes, b0, column), q = __shfl_sync(kAllLanes, b1, column);
      c[e] += __popc(x & p) + __popc(z & q);
      c[2 + e] += __popc(y & p) + __popc(w & q);
    }
  }
#endif
}

/// Starts to copy 16 bytes of device memory to shared memory, where the GPU can.
__device__ __forceinline__ void copy_16(uint4* shared, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
#else
  *shared = *static_cast<const uint4*>(from);
#endif
}

__device__ __forceinline__ void end_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Until at most kPending of the groups that end_copies() closed are under way.
template <int kPending>
__device__ __forceinline__ void await_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

/// Asks for memory to be brought to the second-level cache; by all lanes of a warp. Where the GPU
/// has a copy engine, that does it, and keeps no other read waiting.
__device__ __forceinline__ void fetch_ahead(const void* at, int bytes, int lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (lane == 0 && bytes > 0) {
    const auto begin = reinterpret_cast<uintptr_t>(at) & ~uintptr_t{15};
    const auto end = (reinterpret_cast<uintptr_t>(at) + bytes + 15) & ~uintptr_t{15};
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(begin),
                 "r"(static_cast<uint32_t>(end - begin))
                 : "memory");
  }
#elif defined(__CUDA_ARCH__)
  constexpr int kLine = 128;
#pragma unroll 1
  for (int i = lane * kLine; i < bytes; i += 32 * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(at) + i));
  }
#else
  (void)at, (void)bytes, (void)lane;
#endif
}

/// What other blocks wrote in this launch: not from the first-level cache. 0 unless `wanted`, and
/// without a branch, so that several are under way at once.
__device__ __forceinline__ float read_fresh(const float* at, bool wanted = true) {
  float x = 0;
#ifdef __CUDA_ARCH__
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.cg.f32 %0, [%1]; }"
               : "+f"(x)
               : "l"(at), "r"(static_cast<int>(wanted)));
#else
  if (wanted) {
    x = *at;
  }
#endif
  return x;
}
__device__ __forceinline__ float4 read_fresh_4(const float* at, bool wanted = true) {
  float4 x = make_float4(0, 0, 0, 0);
#ifdef __CUDA_ARCH__
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4]; }"
      : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
      : "l"(at), "r"(static_cast<int>(wanted)));
#else
  if (wanted) {
    x = *reinterpret_cast<const float4*>(at);
  }
#endif
  return x;
}

}  // namespace rabit::gpu
