// Vectors of kLanes floats by the compilers' vector extensions, and the few conversions that the
// kernels need; 8 and 16 lanes are those of AVX2 and AVX-512. Everything lies in an unnamed
// namespace inside RABIT_ISA, so each instruction set has its own copy with internal linkage; the
// file that includes this defines RABIT_ISA and RABIT_LANES. No standard header with inline
// functions may be used here: the linker would keep one copy of such a function for all sets.
#pragma once

#include "kernels/api/kernels.h"

#if RABIT_LANES > 4  // conversions that compilers make of their vector extensions in many steps
#include <immintrin.h>
#endif

#define RABIT_INLINE inline __attribute__((always_inline))

namespace rabit::RABIT_ISA {
namespace {

constexpr int kLanes = RABIT_LANES;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef int16_t ShortVec __attribute__((vector_size(2 * kLanes)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));
// The same at any address.
typedef float LooseVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int16_t LooseShortVec __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef int8_t LooseByteVec __attribute__((vector_size(kLanes), aligned(1), may_alias));

RABIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
RABIT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
RABIT_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

RABIT_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
RABIT_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
RABIT_INLINE Vec splat(float value) { return value - Vec{}; }

/// The first `count` < kLanes floats, zeros after them.
RABIT_INLINE Vec load_part(const float* p, int64_t count) {
  Vec v = {};
  for (int64_t i = 0; i < count; ++i) {
    v[i] = p[i];
  }
  return v;
}

RABIT_INLINE void store_part(float* p, Vec v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    p[i] = v[i];
  }
}

// Sign-extended half bits, shifted so that exponent and mantissa sit where a float's low exponent
// bits are; three copies of the sign above them are cleared, and 2^112 mends the exponent bias,
// subnormals included.
RABIT_INLINE Vec widen(ShortVec bits) {
  const IntVec placed =
      (__builtin_convertvector(bits, IntVec) << 13) & static_cast<int>(0x8FFFFFFF);
  return reinterpret_cast<Vec>(placed) * 0x1p112F;
}

/// F16 to float for finite values only.
RABIT_INLINE Vec load_finite_half(const uint16_t* p) {
#if RABIT_LANES == 16
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p)));
#elif RABIT_LANES == 8
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p)));
#else
  return widen(*reinterpret_cast<const LooseShortVec*>(p));
#endif
}

/// kLanes bytes, signed.
RABIT_INLINE IntVec load_bytes(const uint8_t* p) {
#if RABIT_LANES == 16
  return reinterpret_cast<IntVec>(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p))));
#elif RABIT_LANES == 8
  return reinterpret_cast<IntVec>(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const LooseByteVec*>(p), IntVec);
#endif
}

RABIT_INLINE Vec load_finite_half_part(const uint16_t* p, int64_t count) {
  ShortVec bits = {};
  for (int64_t i = 0; i < count; ++i) {
    bits[i] = static_cast<int16_t>(p[i]);
  }
  return widen(bits);
}

/// F16 to float for all values.
RABIT_INLINE Vec widen_any(ShortVec bits) {
  const IntVec wide = __builtin_convertvector(bits, IntVec) & 0x7C00;
  const IntVec special = (wide == 0x7C00) & 0x7F800000;
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(widen(bits)) | special);
}

RABIT_INLINE Vec load_half(const uint16_t* p) {
#if RABIT_LANES > 4
  return load_finite_half(p);  // the instruction takes all
#else
  return widen_any(*reinterpret_cast<const LooseShortVec*>(p));
#endif
}

RABIT_INLINE Vec load_half_part(const uint16_t* p, int64_t count) {
  ShortVec bits = {};
  for (int64_t i = 0; i < count; ++i) {
    bits[i] = static_cast<int16_t>(p[i]);
  }
  return widen_any(bits);
}

/// F16 to float for all values.
RABIT_INLINE float half_value(uint16_t bits) {
#if RABIT_LANES > 4
  return _cvtsh_ss(bits);
#else
  return widen_any(ShortVec{static_cast<int16_t>(bits)})[0];
#endif
}

/// Float to F16, to the nearest, ties to even; as base/half.h does it.
RABIT_INLINE void store_half(uint16_t* p, Vec v) {
#if RABIT_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif RABIT_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i_u*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const IntVec bits = reinterpret_cast<IntVec>(v), sign = (bits >> 16) & 0x8000;
  const IntVec size = bits & 0x7FFFFFFF;
  // Below the smallest normal half, the float adder rounds at 2^-24.
  const IntVec small = reinterpret_cast<IntVec>(reinterpret_cast<Vec>(size) + 0.5F) - 0x3F000000;
  const IntVec usual = (size + 0xFFF + ((size >> 13) & 1) - 0x38000000) >> 13;
  const IntVec finite = size < 0x38800000 ? small : usual;
  const IntVec special = size > 0x7F800000 ? IntVec{} + 0x7E00 : IntVec{} + 0x7C00;
  const IntVec half = sign | (size >= 0x477FF000 ? special : finite);
  *reinterpret_cast<LooseShortVec*>(p) = __builtin_convertvector(half, ShortVec);
#endif
}

#if RABIT_LANES == 16
#define RABIT_LOW(a, b) \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define RABIT_HIGH(a, b) \
  __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define RABIT_SWAP(a) \
  __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#define RABIT_SWAP_PAIRS(a) \
  __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define RABIT_EVEN(a) \
  __builtin_shufflevector(a, a, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14)
#define RABIT_ODD(a) \
  __builtin_shufflevector(a, a, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15)
constexpr int kStages = 4;
constexpr IntVec kLaneIndex = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif RABIT_LANES == 8
#define RABIT_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define RABIT_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define RABIT_SWAP(a) __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6)
#define RABIT_SWAP_PAIRS(a) __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5)
#define RABIT_EVEN(a) __builtin_shufflevector(a, a, 0, 0, 2, 2, 4, 4, 6, 6)
#define RABIT_ODD(a) __builtin_shufflevector(a, a, 1, 1, 3, 3, 5, 5, 7, 7)
constexpr int kStages = 3;
constexpr IntVec kLaneIndex = {0, 1, 2, 3, 4, 5, 6, 7};
#else
#define RABIT_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define RABIT_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define RABIT_SWAP(a) __builtin_shufflevector(a, a, 1, 0, 3, 2)
#define RABIT_SWAP_PAIRS(a) __builtin_shufflevector(a, a, 2, 3, 0, 1)
#define RABIT_EVEN(a) __builtin_shufflevector(a, a, 0, 0, 2, 2)
#define RABIT_ODD(a) __builtin_shufflevector(a, a, 1, 1, 3, 3)
constexpr int kStages = 2;
constexpr IntVec kLaneIndex = {0, 1, 2, 3};
#endif

/// rows[i][j] <-> rows[j][i]. Each stage interleaves the two halves of the list; after log2(kLanes)
/// of them the row number has moved into the lane number and the other way round.
RABIT_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int stage = 0; stage < kStages; ++stage) {
    Vec mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = RABIT_LOW(rows[i], rows[i + kLanes / 2]);
      mixed[2 * i + 1] = RABIT_HIGH(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = mixed[i];
    }
  }
}

/// Sum of the lanes, halves first: always the same order.
RABIT_INLINE float sum_lanes(Vec v) {
  typedef float Four __attribute__((vector_size(16)));
#if RABIT_LANES == 16
  typedef float Eight __attribute__((vector_size(32)));
  const Eight half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Four four = __builtin_shufflevector(half, half, 0, 1, 2, 3) +
                    __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif RABIT_LANES == 8
  const Four four =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  const Four four = v;
#endif
  const Four two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return two[0] + two[1];
}

RABIT_INLINE Vec max_of(Vec a, Vec b) { return a > b ? a : b; }

RABIT_INLINE float max_lane(Vec v) {
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) {
    largest = v[i] > largest ? v[i] : largest;
  }
  return largest;
}

/// Sum of the lanes in double.
RABIT_INLINE double sum_lanes_double(Vec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) {
    sum += v[i];
  }
  return sum;
}

/// e^x, relative error below 2e-7 for x in [-87, 88]; 0 below, infinity above, NaN stays NaN.
/// x = n ln 2 + r with |r| <= ln(2)/2, then the Taylor series of e^r to the 7th power, whose rest
/// is below 6e-9 there.
RABIT_INLINE Vec exp_of(Vec x) {
  const IntVec tiny = x < -87.0F;
  const IntVec huge = x > 88.0F;
  const Vec bounded = tiny ? splat(-87.0F) : huge ? splat(88.0F) : x;
  constexpr float kRounder = 0x1.8p23F;  // adding it leaves the nearest integer in the low bits
  const Vec shifted = bounded * 1.44269504088896341F + kRounder;
  const Vec n = shifted - kRounder;
  // ln 2 in two parts: n times the first is exact.
  const Vec r = (bounded - n * 0x1.62e4p-1F) - n * 0x1.7f7d1cp-20F;
  Vec p = r * (1.0F / 5040) + 1.0F / 720;
  p = p * r + 1.0F / 120;
  p = p * r + 1.0F / 24;
  p = p * r + 1.0F / 6;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  const IntVec exponent = (reinterpret_cast<IntVec>(shifted) + 127) << 23;
  const Vec result = p * reinterpret_cast<Vec>(exponent);
  return tiny ? Vec{} : huge ? splat(__builtin_inff()) : result;
}

}  // namespace
}  // namespace rabit::RABIT_ISA
