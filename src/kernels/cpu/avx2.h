// Kernels for AVX2, with products by lookup and dot products. Included by the files that define
// RABIT_ISA, RABIT_LANES, RABIT_NAME and perhaps RABIT_VNNI; flags in CMakeLists.txt.
#include "kernels/cpu/byte_tables_x86.h"
#include "kernels/cpu/dots_x86.h"

namespace rabit::RABIT_ISA {
namespace {

constexpr int kTilesAtOnce = 1;

RABIT_INLINE Bytes load_table(const uint8_t* from) {
  return reinterpret_cast<Bytes>(
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(from))));
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
