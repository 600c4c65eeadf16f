// Tables of lookups (byte_lookup.h) with AVX2, for the files of it that are for x86.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/vec.h"

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

}  // namespace
}  // namespace rabit::RABIT_ISA
