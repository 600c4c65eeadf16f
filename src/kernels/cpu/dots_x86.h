// Dot products of Q8_0 (byte_products.h) for x86: with VNNI where the file's instruction set has
// it (RABIT_VNNI), two signed bytes of every q; else 16-bit products of what lies in even and in
// odd bytes.
#pragma once

#include "kernels/cpu/lanes_x86.h"

namespace rabit::RABIT_ISA {
namespace {

constexpr int kLanesAtOnce = 4;
constexpr int32_t kWeightBias = 128;

#if RABIT_LANES == 16
#define RABIT_DOT_BYTES _mm512_dpbusd_epi32
#else
#define RABIT_DOT_BYTES _mm256_dpbusd_avx_epi32
#endif

RABIT_INLINE int32_t four_bytes(int32_t a, int32_t b, int32_t c, int32_t d) {
  return static_cast<int32_t>(static_cast<uint32_t>(a & 255) | static_cast<uint32_t>(b & 255) << 8 |
                              static_cast<uint32_t>(c & 255) << 16 |
                              static_cast<uint32_t>(d) << 24);
}

#ifdef RABIT_VNNI
// q = 256 upper + lower.
RABIT_INLINE void pack_four(const int16_t* q, int32_t* to) {
  int32_t upper[4];
  for (int i = 0; i < 4; ++i) {
    upper[i] = (q[i] + 128) >> 8;
  }
  to[0] = four_bytes(upper[0], upper[1], upper[2], upper[3]);
  to[1] = four_bytes(q[0], q[1], q[2], q[3]);
}

struct Dots {
  Lanes upper, lower;
  RABIT_INLINE void add(const uint8_t* weights, int32_t first, int32_t second) {
    const Lanes bytes = *reinterpret_cast<const Lanes*>(weights);
    upper = RABIT_DOT_BYTES(upper, bytes, RABIT_SIMD(set1_epi32)(first));
    lower = RABIT_DOT_BYTES(lower, bytes, RABIT_SIMD(set1_epi32)(second));
  }
  RABIT_INLINE IntVec sums() const {
    return reinterpret_cast<IntVec>(RABIT_SIMD(add_epi32)(RABIT_SIMD(slli_epi32)(upper, 8), lower));
  }
};
#else
RABIT_INLINE void pack_four(const int16_t* q, int32_t* to) {
  for (int i = 0; i < 2; ++i) {
    to[i] = static_cast<int32_t>(static_cast<uint32_t>(q[i] & 0xFFFF) |
                                 static_cast<uint32_t>(q[i + 2]) << 16);
  }
}

struct Dots {
  Lanes even, odd;
  RABIT_INLINE void add(const uint8_t* weights, int32_t first, int32_t second) {
    const Lanes bytes = *reinterpret_cast<const Lanes*>(weights);
    const Lanes low = reinterpret_cast<Lanes>(reinterpret_cast<UintVec>(bytes) & 0x00FF00FFU);
    const Lanes high = RABIT_SIMD(srli_epi16)(bytes, 8);
    even = RABIT_SIMD(add_epi32)(even, RABIT_SIMD(madd_epi16)(low, RABIT_SIMD(set1_epi32)(first)));
    odd = RABIT_SIMD(add_epi32)(odd, RABIT_SIMD(madd_epi16)(high, RABIT_SIMD(set1_epi32)(second)));
  }
  RABIT_INLINE IntVec sums() const {
    return reinterpret_cast<IntVec>(RABIT_SIMD(add_epi32)(even, odd));
  }
};
#endif

}  // namespace
}  // namespace rabit::RABIT_ISA
