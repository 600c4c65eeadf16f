// Kernels for AVX2, with products by lookup and dot products. Included by the files that define
// RABIT_ISA, RABIT_LANES, RABIT_NAME and perhaps RABIT_VNNI; flags in CMakeLists.txt.
#include <immintrin.h>

#include "kernels/cpu/byte_tables_x86.h"
#include "kernels/cpu/dots_x86.h"

namespace rabit::RABIT_ISA {
namespace {

constexpr int kBytes = 32;
constexpr int kTilesAtOnce = 1;
typedef uint8_t Bytes __attribute__((vector_size(32), may_alias));

RABIT_INLINE void in_register(Bytes& v) { __asm__("" : "+x"(v)); }

RABIT_INLINE Bytes shuffle(Bytes table, Bytes indices) {
  return reinterpret_cast<Bytes>(
      _mm256_shuffle_epi8(reinterpret_cast<__m256i>(table), reinterpret_cast<__m256i>(indices)));
}

RABIT_INLINE Bytes load_table(const uint8_t* from) {
  return reinterpret_cast<Bytes>(
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(from))));
}

// Rows 0 to 7 of every 16, rows 8 to 15.
struct Sums {
  __m256i first, second;
};

RABIT_INLINE Sums start_sums(int16_t value) {
  return {_mm256_set1_epi16(value), _mm256_set1_epi16(value)};
}

RABIT_INLINE Sums add_sums(Sums sums, Bytes low, Bytes high) {
  const auto a = reinterpret_cast<__m256i>(low), b = reinterpret_cast<__m256i>(high);
  const __m256i weights = _mm256_set1_epi16(64 * 256 + 1);
  return {_mm256_add_epi16(sums.first, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(a, b), weights)),
          _mm256_add_epi16(sums.second, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(a, b), weights))};
}

// Even rows apart from odd ones.
RABIT_INLINE void flush_half(__m256i sums, __m256 scale, float* to) {
  const __m256i even = _mm256_srai_epi32(_mm256_slli_epi32(sums, 16), 16);
  const __m256i odd = _mm256_srai_epi32(sums, 16);
  _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(even), scale, _mm256_load_ps(to)));
  _mm256_store_ps(to + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(odd), scale, _mm256_load_ps(to + 8)));
}

RABIT_INLINE void flush_sums(Sums sums, float scale, float* to) {
  flush_half(sums.first, _mm256_set1_ps(scale), to);
  flush_half(sums.second, _mm256_set1_ps(scale), to + 16);
}

RABIT_INLINE void rows_in_order(const float* from, float* to) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256 even = _mm256_load_ps(from + 16 * half);
    const __m256 odd = _mm256_load_ps(from + 16 * half + 8);
    const __m256 first = _mm256_unpacklo_ps(even, odd), second = _mm256_unpackhi_ps(even, odd);
    _mm256_store_ps(to + 8 * half, _mm256_permute2f128_ps(first, second, 0x20));
    _mm256_store_ps(to + 16 + 8 * half, _mm256_permute2f128_ps(first, second, 0x31));
  }
}

}  // namespace
}  // namespace rabit::RABIT_ISA

#include "kernels/cpu/byte_lookup.h"
