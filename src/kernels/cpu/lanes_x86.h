// The integers of a register and the intrinsics for them by one name, for files that are compiled
// for AVX2 and for AVX-512: RABIT_SIMD(add_epi16) is _mm256_add_epi16 or _mm512_add_epi16.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/vec.h"

namespace rabit::RABIT_ISA {
namespace {

#if RABIT_LANES == 16
typedef __m512i Lanes;
#define RABIT_SIMD(operation) _mm512_##operation
#else
typedef __m256i Lanes;
#define RABIT_SIMD(operation) _mm256_##operation
#endif

}  // namespace
}  // namespace rabit::RABIT_ISA
