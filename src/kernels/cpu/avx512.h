// Kernels for AVX-512 without VBMI, with products by lookup and dot products. Included by the files
// that define RABIT_ISA, RABIT_LANES, RABIT_NAME and perhaps RABIT_VNNI; flags in CMakeLists.txt.
#include <immintrin.h>

#include "kernels/cpu/byte_tables_x86.h"
#include "kernels/cpu/dots_x86.h"

namespace rabit::RABIT_ISA {
namespace {

constexpr int kBytes = 64;
constexpr int kTilesAtOnce = 2;
typedef uint8_t Bytes __attribute__((vector_size(64), may_alias));

RABIT_INLINE void in_register(Bytes& v) { __asm__("" : "+v"(v)); }

RABIT_INLINE Bytes shuffle(Bytes table, Bytes indices) {
  return reinterpret_cast<Bytes>(
      _mm512_shuffle_epi8(reinterpret_cast<__m512i>(table), reinterpret_cast<__m512i>(indices)));
}

RABIT_INLINE Bytes load_table(const uint8_t* from) {
  return reinterpret_cast<Bytes>(
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(from))));
}

// Rows 0 to 7 of every 16, rows 8 to 15.
struct Sums {
  __m512i first, second;
};

RABIT_INLINE Sums start_sums(int16_t value) {
  return {_mm512_set1_epi16(value), _mm512_set1_epi16(value)};
}

RABIT_INLINE Sums add_sums(Sums sums, Bytes low, Bytes high) {
  const auto a = reinterpret_cast<__m512i>(low), b = reinterpret_cast<__m512i>(high);
  const __m512i weights = _mm512_set1_epi16(64 * 256 + 1);
  return {_mm512_add_epi16(sums.first, _mm512_maddubs_epi16(_mm512_unpacklo_epi8(a, b), weights)),
          _mm512_add_epi16(sums.second, _mm512_maddubs_epi16(_mm512_unpackhi_epi8(a, b), weights))};
}

// Even rows apart from odd ones.
RABIT_INLINE void flush_half(__m512i sums, __m512 scale, float* to) {
  const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(sums, 16), 16);
  const __m512i odd = _mm512_srai_epi32(sums, 16);
  _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(even), scale, _mm512_load_ps(to)));
  _mm512_store_ps(to + 16,
                  _mm512_fmadd_ps(_mm512_cvtepi32_ps(odd), scale, _mm512_load_ps(to + 16)));
}

RABIT_INLINE void flush_sums(Sums sums, float scale, float* to) {
  flush_half(sums.first, _mm512_set1_ps(scale), to);
  flush_half(sums.second, _mm512_set1_ps(scale), to + 32);
}

RABIT_INLINE void rows_in_order(const float* from, float* to) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512 even = _mm512_load_ps(from + 32 * half);
    const __m512 odd = _mm512_load_ps(from + 32 * half + 16);
    const __m512 first = _mm512_unpacklo_ps(even, odd), second = _mm512_unpackhi_ps(even, odd);
    float* out = to + 8 * half;
    _mm_store_ps(out, _mm512_extractf32x4_ps(first, 0));
    _mm_store_ps(out + 4, _mm512_extractf32x4_ps(second, 0));
    _mm_store_ps(out + 16, _mm512_extractf32x4_ps(first, 1));
    _mm_store_ps(out + 20, _mm512_extractf32x4_ps(second, 1));
    _mm_store_ps(out + 32, _mm512_extractf32x4_ps(first, 2));
    _mm_store_ps(out + 36, _mm512_extractf32x4_ps(second, 2));
    _mm_store_ps(out + 48, _mm512_extractf32x4_ps(first, 3));
    _mm_store_ps(out + 52, _mm512_extractf32x4_ps(second, 3));
  }
}

}  // namespace
}  // namespace rabit::RABIT_ISA

#include "kernels/cpu/byte_lookup.h"
