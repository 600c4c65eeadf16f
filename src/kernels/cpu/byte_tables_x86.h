// Tables of lookups and their sums (byte_lookup.h) for x86, all but what AVX2 and AVX-512 do not
// have alike.
#pragma once

#include "kernels/cpu/lanes_x86.h"

namespace rabit::RABIT_ISA {
namespace {

// A lane of 128 bits makes the sums of one nibble's four columns: those with the last column added,
// the upper eight of the table, and from them the lower eight, which are their opposites backwards.
RABIT_INLINE void tabulate_two(const int16_t* q, uint8_t* tables) {
  const __m256i both =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(q)));
  const __m256i first = _mm256_set_epi64x(0x0908090809080908, 0x0908090809080908,
                                          0x0100010001000100, 0x0100010001000100);
  const auto column = [&](char i) {  // i of the first nibble, i of the second
    return _mm256_shuffle_epi8(both,
                               _mm256_add_epi8(first, _mm256_set1_epi8(static_cast<char>(2 * i))));
  };
  const __m256i s0 = _mm256_set1_epi32(0x0001FFFF);
  const __m256i s1 = _mm256_set1_epi64x(0x00010001FFFFFFFF);
  const __m256i s2 = _mm256_set_epi64x(0x0001000100010001, -1, 0x0001000100010001, -1);
  const __m256i sums = _mm256_add_epi16(
      _mm256_add_epi16(_mm256_sign_epi16(column(0), s0), _mm256_sign_epi16(column(1), s1)),
      _mm256_add_epi16(_mm256_sign_epi16(column(2), s2), column(3)));
  // A sixteenth, rounded, halves away from 0.
  const __m256i rounded = _mm256_mulhrs_epi16(_mm256_add_epi16(sums, _mm256_srai_epi16(sums, 15)),
                                              _mm256_set1_epi16(2048));
  const __m256i backwards = _mm256_broadcastsi128_si256(
      _mm_set_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  const __m256i bias = _mm256_set1_epi16(2048), low_bits = _mm256_set1_epi16(63);
  const __m256i upper = _mm256_add_epi16(bias, rounded);
  const __m256i lower = _mm256_sub_epi16(bias, _mm256_shuffle_epi8(rounded, backwards));
  const __m256i low =
      _mm256_packus_epi16(_mm256_and_si256(lower, low_bits), _mm256_and_si256(upper, low_bits));
  const __m256i high =
      _mm256_packus_epi16(_mm256_srli_epi16(lower, 6), _mm256_srli_epi16(upper, 6));
  auto* to = reinterpret_cast<__m256i*>(tables);
  _mm256_store_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_store_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
}

constexpr int kBytes = 4 * kLanes;
typedef uint8_t Bytes __attribute__((vector_size(kBytes), may_alias));

RABIT_INLINE void in_register(Bytes& v) { __asm__("" : "+v"(v)); }

RABIT_INLINE Bytes shuffle(Bytes table, Bytes indices) {
  return reinterpret_cast<Bytes>(
      RABIT_SIMD(shuffle_epi8)(reinterpret_cast<Lanes>(table), reinterpret_cast<Lanes>(indices)));
}

// Rows 0 to 7 of every 16, rows 8 to 15.
struct Sums {
  Lanes first, second;
};

RABIT_INLINE Sums start_sums(int16_t value) {
  return {RABIT_SIMD(set1_epi16)(value), RABIT_SIMD(set1_epi16)(value)};
}

RABIT_INLINE Sums add_sums(Sums sums, Bytes low, Bytes high) {
  const auto a = reinterpret_cast<Lanes>(low), b = reinterpret_cast<Lanes>(high);
  const Lanes weights = RABIT_SIMD(set1_epi16)(64 * 256 + 1);
  const auto add = [&](Lanes sum, Lanes pairs) {
    return RABIT_SIMD(add_epi16)(sum, RABIT_SIMD(maddubs_epi16)(pairs, weights));
  };
  return {add(sums.first, RABIT_SIMD(unpacklo_epi8)(a, b)),
          add(sums.second, RABIT_SIMD(unpackhi_epi8)(a, b))};
}

// Even rows apart from odd ones: kLanes of the first half's, of its odd ones, of the second's.
RABIT_INLINE void flush_sums(Sums sums, float scale, float* to) {
  const auto add = [&](Lanes rows, int place) {
    float* at = to + place * kLanes;
    RABIT_SIMD(store_ps)
    (at,
     RABIT_SIMD(fmadd_ps)(RABIT_SIMD(cvtepi32_ps)(rows), splat(scale), RABIT_SIMD(load_ps)(at)));
  };
  const auto even = [](Lanes half) {
    return RABIT_SIMD(srai_epi32)(RABIT_SIMD(slli_epi32)(half, 16), 16);
  };
  add(even(sums.first), 0);
  add(RABIT_SIMD(srai_epi32)(sums.first, 16), 1);
  add(even(sums.second), 2);
  add(RABIT_SIMD(srai_epi32)(sums.second, 16), 3);
}

}  // namespace
}  // namespace rabit::RABIT_ISA
