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

/// Byte i of the result is that which digit i of `which` names: of `a` 0 to 3, of `b` 4 to 7.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t which) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, which);
#else
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>(both >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
  }
  return out;
#endif
}

/// Turns 32 words of a warp over their diagonal: bit j of what lane b gets is bit b of what lane j
/// gave.
class BitTranspose {
 public:
  __device__ __forceinline__ explicit BitTranspose(int lane) {
    // Of bytes 0 to 3 the lane's own, 4 to 7 the other lane's.
    bytes_[0] = (lane & 16) != 0 ? 0x3276U : 0x5410U;
    bytes_[1] = (lane & 8) != 0 ? 0x3715U : 0x6240U;
    constexpr uint32_t kLow[3] = {0x0F0F0F0FU, 0x33333333U, 0x55555555U};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int step = 4 >> i;
      const bool upper = (lane & step) != 0;
      keep_[i] = upper ? ~kLow[i] : kLow[i];
      left_[i] = upper ? 32 - step : step;
    }
  }

  __device__ __forceinline__ uint32_t operator()(uint32_t bits) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bits = pick_bytes(bits, __shfl_xor_sync(kAllLanes, bits, 16 >> i), bytes_[i]);
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, bits, 4 >> i);
      bits = (bits & keep_[i]) | (turn_left(other, left_[i]) & ~keep_[i]);
    }
    return bits;
  }

 private:
  static __device__ __forceinline__ uint32_t turn_left(uint32_t bits, uint32_t by) {  // 1 to 31
#ifdef __CUDA_ARCH__
    return __funnelshift_l(bits, bits, by);
#else
    return bits << by | bits >> (32 - by);
#endif
  }

  uint32_t bytes_[2], keep_[3], left_[3];
};

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

/// a b + c of pairs of halves, each rounded once.
__device__ __forceinline__ uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  uint32_t d = 0;
  for (int i = 0; i < 32; i += 16) {  // exact but for the last rounding: 22 bits and 11
    const auto half = [i](uint32_t pair) {
      return half_to_float(static_cast<uint16_t>(pair >> i & 0xFFFFU));
    };
    d |= static_cast<uint32_t>(float_to_half(half(a) * half(b) + half(c))) << i;
  }
  return d;
#endif
}

/// Two of four signed bytes as halves, the lower two or the upper.
__device__ __forceinline__ uint32_t halves_of_bytes(uint32_t bytes, int upper) {
  // 1024 + byte, and 128 more, in two halves.
  const uint32_t raised =
      pick_bytes(bytes ^ 0x80808080U, 0x64646464U, upper != 0 ? 0x4342U : 0x4140U);
  return multiply_add_pair(raised, 0x3C003C00U, 0xE480E480U);
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

/// As copy_16, or zeros.
__device__ __forceinline__ void copy_16_or_zeros(uint4* shared, const void* from, bool there) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
#else
  *shared = there ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
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

/// Asks for memory to be brought to the second-level cache, by `members` lanes, of which this is
/// number `member`. Where the GPU has a copy engine, that does it, and keeps no other read waiting.
__device__ __forceinline__ void fetch_ahead(const void* at, int bytes, int member = 0,
                                            int members = 1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (member == 0 && bytes > 0) {
    const auto begin = reinterpret_cast<uintptr_t>(at) & ~uintptr_t{15};
    const auto end = (reinterpret_cast<uintptr_t>(at) + bytes + 15) & ~uintptr_t{15};
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(begin),
                 "r"(static_cast<uint32_t>(end - begin))
                 : "memory");
  }
#elif defined(__CUDA_ARCH__)
  constexpr int kLine = 128;
#pragma unroll 1
  for (int i = member * kLine; i < bytes; i += members * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(at) + i));
  }
#else
  (void)at, (void)bytes, (void)member, (void)members;
#endif
}

__device__ __forceinline__ void eight_halves(const uint4& bits, float (&out)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = half_to_float(static_cast<uint16_t>(words[i]));
    out[2 * i + 1] = half_to_float(static_cast<uint16_t>(words[i] >> 16));
  }
}

/// Whether this block is the last of `blocks` to come here, by all its threads; what they all wrote
/// before can then be read. The counter is zero before the first and after the last.
__device__ __forceinline__ bool last_to_come(uint32_t* counter, int blocks) {
  __shared__ uint32_t before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    before = atomicAdd(counter, 1U);
    if (before + 1 == static_cast<uint32_t>(blocks)) {
      *counter = 0;
    }
  }
  __syncthreads();
  if (before + 1 < static_cast<uint32_t>(blocks)) {
    return false;
  }
  __threadfence();
  return true;
}

/// Floats that blocks hand each other in one launch, each by itself and in its own time: the lowest
/// bit of a float says whether it is of this use of its place or still of the one before, so that
/// no block waits for more than it reads, and nothing is read twice but what had not come.
class Arrivals {
 public:
  /// `tag`: the lowest bit of what is waited for, 0 or 1.
  __device__ __forceinline__ explicit Arrivals(uint32_t tag) : tag_(tag) {}

  /// Number `index` of `count`; 0, and here, where there is none. Without a branch, so that several
  /// are under way at once.
  __device__ __forceinline__ float read(const float* at, int index = 0, int count = 1) {
    uint32_t x = tag_;
#ifdef __CUDA_ARCH__
    asm volatile("{ .reg .pred p; setp.lt.s32 p, %2, %3; @p ld.relaxed.gpu.global.b32 %0, [%1]; }"
                 : "+r"(x)
                 : "l"(at), "r"(index), "r"(count)
                 : "memory");
#else
    if (index < count) {
      x = float_to_bits(*at);
    }
#endif
    differs_ |= x ^ tag_;
    return value(x);
  }
  __device__ __forceinline__ float2 read_2(const float* at, int index, int count) {
    uint2 x;
    x.x = x.y = tag_;
#ifdef __CUDA_ARCH__
    asm volatile(
        "{ .reg .pred p; setp.lt.s32 p, %3, %4; @p ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2]; }"
        : "+r"(x.x), "+r"(x.y)
        : "l"(at), "r"(index), "r"(count)
        : "memory");
#else
    if (index < count) {
      std::memcpy(&x, at, sizeof x);
    }
#endif
    differs_ |= (x.x ^ tag_) | (x.y ^ tag_);
    return make_float2(value(x.x), value(x.y));
  }
  __device__ __forceinline__ float4 read_4(const float* at, int index = 0, int count = 1) {
    uint4 x = make_uint4(tag_, tag_, tag_, tag_);
#ifdef __CUDA_ARCH__
    asm volatile(
        "{ .reg .pred p; setp.lt.s32 p, %5, %6; "
        "@p ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
        : "l"(at), "r"(index), "r"(count)
        : "memory");
#else
    if (index < count) {
      std::memcpy(&x, at, sizeof x);
    }
#endif
    differs_ |= (x.x ^ tag_) | (x.y ^ tag_) | (x.z ^ tag_) | (x.w ^ tag_);
    return make_float4(value(x.x), value(x.y), value(x.z), value(x.w));
  }
  /// Whether all that the warp's lanes have read since the last call had come; by all lanes.
  __device__ __forceinline__ bool all() {
    const bool own = (differs_ & 1U) == 0;
    differs_ = 0;
    return __all_sync(kAllLanes, own) != 0;
  }

 private:
  /// Without the tag, so that the same work gives the same bits.
  static __device__ __forceinline__ float value(uint32_t x) { return bits_to_float(x & ~1U); }

  uint32_t tag_, differs_ = 0;
};

__device__ __forceinline__ void write_tagged(float* at, float value, uint32_t tag) {
  const uint32_t bits = (float_to_bits(value) & ~1U) | tag;
#ifdef __CUDA_ARCH__
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(at), "r"(bits) : "memory");
#else
  *at = bits_to_float(bits);
#endif
}
__device__ __forceinline__ void write_tagged_4(float* at, const float4& value, uint32_t tag) {
  const auto tagged = [&](float x) { return (float_to_bits(x) & ~1U) | tag; };
  const uint4 bits = make_uint4(tagged(value.x), tagged(value.y), tagged(value.z), tagged(value.w));
#ifdef __CUDA_ARCH__
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(bits.x),
               "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
#else
  std::memcpy(at, &bits, sizeof bits);
#endif
}

/// A counter of the grid, which orders nothing but itself.
__device__ __forceinline__ void count_up(uint32_t* counter) {
#ifdef __CUDA_ARCH__
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
#else
  ++*counter;
#endif
}
__device__ __forceinline__ uint32_t read_counter(const uint32_t* counter) {
  uint32_t now;
#ifdef __CUDA_ARCH__
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
#else
  now = *counter;
#endif
  return now;
}

}  // namespace rabit::gpu
