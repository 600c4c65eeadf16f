// Kernels for AVX-512 without VBMI, with products by lookup and dot products. Included by the files
// that define RABIT_ISA, RABIT_LANES, RABIT_NAME and perhaps RABIT_VNNI; flags in CMakeLists.txt.
#include "kernels/cpu/byte_tables_x86.h"
#include "kernels/cpu/dots_x86.h"

namespace rabit::RABIT_ISA {
namespace {

constexpr int kTilesAtOnce = 2;

RABIT_INLINE Bytes load_table(const uint8_t* from) {
  return reinterpret_cast<Bytes>(
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(from))));
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
