// Keys and values as a cache holds them: how kernels read and write them.
#pragma once

#include "kernels/api/gpu_weights.h"
#include "kernels/cuda/warp.h"

namespace rabit::gpu {

/// Eight neighbours as the cache holds them: halves, or bytes with their scale.
template <bool kBytes>
struct CachedEight {
  uint4 words = make_uint4(0, 0, 0, 0);

  /// From element `at` on, a multiple of 8.
  __device__ __forceinline__ void read(const CacheRows& cache, int64_t at) {
    if constexpr (kBytes) {
      const uint2 bytes =
          *reinterpret_cast<const uint2*>(static_cast<const int8_t*>(cache.rows) + at);
      words = make_uint4(bytes.x, bytes.y, cache.scales[at / 32], 0);
    } else {
      words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(cache.rows) + at);
    }
  }
  /// In halves; products of bytes and scales are rounded to them.
  __device__ __forceinline__ uint4 halves() const {
    if constexpr (kBytes) {
      const uint32_t scale = words.z | words.z << 16;
      return make_uint4(multiply_add_pair(halves_of_bytes(words.x, 0), scale, 0),
                        multiply_add_pair(halves_of_bytes(words.x, 1), scale, 0),
                        multiply_add_pair(halves_of_bytes(words.y, 0), scale, 0),
                        multiply_add_pair(halves_of_bytes(words.y, 1), scale, 0));
    } else {
      return words;
    }
  }
};

/// Two neighbours into the cache, from element `at` on, by lanes that are `active`, and as they
/// will be read. With scales: 16 lanes from a multiple of 16 on have the 32 of one, and are active
/// together; the scale is the largest over 127, NaN where a value is none or infinite, and what is
/// too large for halves becomes the largest that fits. All lanes of a warp, on caches of one type.
__device__ __forceinline__ uint32_t put_pair(const CacheRows& cache, int64_t at, float a, float b,
                                             bool active) {
  if (cache.scales == nullptr) {
    const uint32_t pair = pack_saturated(a, b);
    if (active) {
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(cache.rows) + at) = pair;
    }
    return pair;
  }
  constexpr float kMost = 127 * 512;
  const float size_a = fabsf(a), size_b = fabsf(b);
  float largest = size_a < INFINITY && size_b < INFINITY ? fmaxf(size_a, size_b) : INFINITY;
#pragma unroll
  for (int step = 1; step < 16; step *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
  }
  const bool finite = largest < INFINITY;
  const uint16_t scale =
      finite ? float_to_half(fminf(largest, kMost) / 127) : static_cast<uint16_t>(0x7E00);
  const float unit = half_to_float(scale), units = unit > 0 ? 1 / unit : 0;
  const auto byte_of = [&](float value) {
    return finite ? fminf(fmaxf(rintf(value * units), -127.0F), 127.0F) : 0.0F;
  };
  const float first = byte_of(a), second = byte_of(b);
  if (active) {
    auto* const to = static_cast<int8_t*>(cache.rows) + at;
    *reinterpret_cast<uint16_t*>(to) =
        static_cast<uint16_t>((static_cast<int>(first) & 0xFF) | static_cast<int>(second) << 8);
    if (at % 32 == 0) {
      cache.scales[at / 32] = scale;
    }
  }
  return pack_halves(first * unit, second * unit);
}

}  // namespace rabit::gpu
