// Kernels for AVX-512 with VBMI and VNNI: residual-binary products of few tokens by lookup; all
// else is the portable code for AVX-512. Flags in CMakeLists.txt.
//
// Columns times scales become integers q, and four neighbouring columns of a row contribute one of
// 16 sums +-q0 +-q1 +-q2 +-q3, which a nibble of the packed signs numbers. prepare() tabulates the
// 16 sums of every four columns, two bytes each. 64 bytes of tables, those of 16 columns, fill a
// register; one byte permutation then looks up four sums for each of 16 rows, and one dot product
// with ones adds them to the rows' 32-bit sums. So the 512 signs of a cache line cost four
// permutations and four dot products, and the sums are exact.
#define RABIT_ISA cpu_vbmi
#define RABIT_LANES 16
#define RABIT_NAME "avx512-vbmi"

#include <immintrin.h>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/pointwise.h"

namespace rabit::RABIT_ISA {
namespace {

// Of a token and a path: a header with the scale of q, then for every word of columns the tables of
// its bytes' low nibbles, low bytes first, then of the high ones.
constexpr int64_t kHeader = 64, kTable64 = 64, kWordTables = 4 * kTable64;
constexpr int32_t kBias = 32768;          // sums are kept as unsigned 16-bit numbers
constexpr float kLargestSum = 32765.0F;   // of |q| over four columns, rounded up to 2 beyond
constexpr int64_t kExactWords = 1 << 12;  // words whose sums 32 bits hold

int64_t path_bytes(int64_t words) { return kHeader + words * kWordTables; }

int64_t input_bytes(int64_t d_in, int64_t tokens, int64_t paths) {
  return tokens <= kFewTokens ? tokens * paths * path_bytes((d_in + 31) / 32) : 0;
}

RABIT_INLINE __mmask16 lanes_left(int64_t left) {
  return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1U << (left > 0 ? left : 0)) - 1);
}

// h x of 16 columns from c, zeros after d_in.
RABIT_INLINE __m512 scaled(const uint16_t* h, const float* x, int64_t c, int64_t d_in) {
  const __mmask16 mask = lanes_left(d_in - c);
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, h + c)),
                       _mm512_maskz_loadu_ps(mask, x + c));
}

// Largest sum of |h x| over four neighbouring columns; NaN if one is.
float largest_sum(const uint16_t* h, const float* x, int64_t d_in) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 unordered = 0;
  for (int64_t c = 0; c < d_in; c += 16) {
    const __m512 size = _mm512_abs_ps(scaled(h, x, c, d_in));
    const __m512 two = _mm512_add_ps(size, _mm512_permute_ps(size, 0xB1));
    const __m512 four = _mm512_add_ps(two, _mm512_permute_ps(two, 0x4E));
    unordered |= _mm512_cmp_ps_mask(four, four, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, four);
  }
  return unordered != 0 ? __builtin_nanf("") : _mm512_reduce_max_ps(largest);
}

// +1 where bit b (b + 1) of the lane's number is set, else -1, in the lane's low (high) half.
RABIT_INLINE __m512i pair_signs(int b) {
  const __m512i number = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i bit =
      _mm512_and_si512(_mm512_srli_epi32(number, static_cast<unsigned>(b)), _mm512_set1_epi32(1));
  const __m512i next = _mm512_and_si512(_mm512_srli_epi32(number, static_cast<unsigned>(b) + 1),
                                        _mm512_set1_epi32(1));
  const __m512i halves = _mm512_or_si512(bit, _mm512_slli_epi32(next, 16));
  return _mm512_sub_epi16(_mm512_slli_epi16(halves, 1), _mm512_set1_epi16(1));
}

void prepare(const LinearWeights& w, const float* x, int64_t tokens, void* input,
             int64_t word_begin, int64_t word_end) {
  const int64_t words = (w.d_in + 31) / 32;
  const __m512i low_pair = pair_signs(0), high_pair = pair_signs(2);
  for (int64_t i = 0; i < tokens * w.paths; ++i) {
    const float* in = x + i / w.paths * w.d_in;
    const uint16_t* h = w.col_scale + i % w.paths * w.d_in;
    auto* out = static_cast<uint8_t*>(input) + i * path_bytes(words);
    const float largest = largest_sum(h, in, w.d_in);
    // Where there is no such unit all q are 0, and the scale makes NaN of infinity and NaN.
    const bool usable = largest > 1e-30F && largest < __builtin_inff();
    const __m512 unit = _mm512_set1_ps(usable ? kLargestSum / largest : 0.0F);
    if (word_begin == 0) {
      *reinterpret_cast<float*>(out) =
          largest > 1e-30F || largest != largest ? largest / kLargestSum : 0.0F;
    }
    for (int64_t word = word_begin; word < word_end; ++word) {
      alignas(64) int16_t q[32];
      for (int half = 0; half < 2; ++half) {
        const __m512 in_units = _mm512_mul_ps(scaled(h, in, word * 32 + half * 16, w.d_in), unit);
        _mm256_store_si256(reinterpret_cast<__m256i*>(q + half * 16),
                           _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(in_units)));
      }
      const auto* pairs = reinterpret_cast<const int32_t __attribute__((may_alias))*>(q);
      uint8_t* tables = out + kHeader + word * kWordTables;
#pragma GCC unroll 8
      for (int nibble = 0; nibble < 8; ++nibble) {  // nibble n: columns 4n to 4n + 3
        __m512i sums = _mm512_dpwssd_epi32(_mm512_set1_epi32(kBias), low_pair,
                                           _mm512_set1_epi32(pairs[2 * nibble]));
        sums = _mm512_dpwssd_epi32(sums, high_pair, _mm512_set1_epi32(pairs[2 * nibble + 1]));
        uint8_t* table = tables + nibble % 2 * 2 * kTable64 + nibble / 2 * 16;
        _mm_store_si128(reinterpret_cast<__m128i*>(table), _mm512_cvtepi32_epi8(sums));
        _mm_store_si128(reinterpret_cast<__m128i*>(table + kTable64),
                        _mm512_cvtepi32_epi8(_mm512_srli_epi32(sums, 8)));
      }
    }
  }
}

// Sums of 16 kVectors kTiles rows over some words: signs of the first tile, the others' `stride`
// words apart; tables of the first word.
template <int kTiles>
RABIT_INLINE void lookup(const uint32_t* signs, int64_t stride, const uint8_t* tables,
                         int64_t words, __m512i (&sums)[kTiles * 4]) {
  constexpr int kVectors = 4 * kTiles;
  const __m512i nibbles = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
  const __m512i quarter = _mm512_set1_epi32(0x30201000);  // of the table, by byte of a word
  __m512i low[kVectors], high[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    low[v] = high[v] = _mm512_setzero_si512();
  }
  for (int64_t word = 0; word < words; ++word) {
    const auto table = [&](int i) {
      return _mm512_load_si512(tables + word * kWordTables + i * kTable64);
    };
    const __m512i even_low = table(0), even_high = table(1), odd_low = table(2),
                  odd_high = table(3);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t* from = signs + v / 4 * stride + word * kTileRows + v % 4 * 16;
      _mm_prefetch(reinterpret_cast<const char*>(from + 16 * kTileRows), _MM_HINT_T0);
      const __m512i bits = _mm512_load_si512(from);
      const __m512i even = _mm512_ternarylogic_epi32(bits, nibbles, quarter, 0xEA);
      const __m512i odd =
          _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits, 4), nibbles, quarter, 0xEA);
      low[v] = _mm512_dpbusd_epi32(low[v], _mm512_permutexvar_epi8(even, even_low), ones);
      high[v] = _mm512_dpbusd_epi32(high[v], _mm512_permutexvar_epi8(even, even_high), ones);
      low[v] = _mm512_dpbusd_epi32(low[v], _mm512_permutexvar_epi8(odd, odd_low), ones);
      high[v] = _mm512_dpbusd_epi32(high[v], _mm512_permutexvar_epi8(odd, odd_high), ones);
    }
  }
  const __m512i bias = _mm512_set1_epi32(static_cast<int32_t>(words * 8 * kBias));
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    sums[v] = _mm512_sub_epi32(_mm512_add_epi32(low[v], _mm512_slli_epi32(high[v], 8)), bias);
  }
}

// Rows of kTiles tiles from `tile` on, one token; only rows in [row_begin, row_end) are written.
template <int kTiles>
void tile_product(const LinearWeights& w, const uint8_t* input, int64_t tile, float* y,
                  int64_t row_begin, int64_t row_end) {
  constexpr int kVectors = 4 * kTiles;
  const int64_t words = (w.d_in + 31) / 32, stride = w.paths * words * kTileRows;
  __m512 totals[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    totals[v] = _mm512_setzero_ps();
  }
  for (int64_t path = 0; path < w.paths; ++path) {
    const uint8_t* of_path = input + path * path_bytes(words);
    const __m512 scale = _mm512_set1_ps(*reinterpret_cast<const float*>(of_path));
    const uint32_t* signs = w.signs + tile * stride + path * words * kTileRows;
    for (int64_t word = 0; word < words; word += kExactWords) {
      __m512i sums[kVectors];
      lookup<kTiles>(signs + word * kTileRows, stride, of_path + kHeader + word * kWordTables,
                     smaller(kExactWords, words - word), sums);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t row = tile * kTileRows + v * 16;
        const __m512 g = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(
            lanes_left(w.d_out - row), w.row_scale + path * w.d_out + row));
        totals[v] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[v]), _mm512_mul_ps(scale, g), totals[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int64_t row = tile * kTileRows + v * 16;
    const __mmask16 mask =
        static_cast<__mmask16>(lanes_left(row_end - row) & ~lanes_left(row_begin - row));
    _mm512_mask_storeu_ps(y + row, mask, totals[v]);
  }
}

void matmul_by_lookup(const LinearWeights& w, const float* x, const void* input, int64_t tokens,
                      float* y, int64_t row_begin, int64_t row_end, float* scratch) {
  if (row_begin >= row_end || tokens <= 0) {
    return;
  }
  if (w.format != WeightFormat::kResidualBinary) {
    dense(w, x, tokens, y, row_begin, row_end, scratch);
    return;
  }
  if (tokens > kFewTokens || input == nullptr) {
    binary_many<WordSigns>(w, x, tokens, y, row_begin, row_end, scratch);
    return;
  }
  const int64_t token_bytes = w.paths * path_bytes((w.d_in + 31) / 32);
  const int64_t end = (row_end + kTileRows - 1) / kTileRows;
  const auto over_tokens = [&](const auto& product, int64_t tile) {
    for (int64_t t = 0; t < tokens; ++t) {
      product(w, static_cast<const uint8_t*>(input) + t * token_bytes, tile, y + t * w.d_out,
              row_begin, row_end);
    }
  };
  int64_t tile = row_begin / kTileRows;
  for (; tile + 2 <= end; tile += 2) {
    over_tokens(tile_product<2>, tile);
  }
  if (tile < end) {
    over_tokens(tile_product<1>, tile);
  }
}

}  // namespace

extern const KernelTable kTable;
constinit const KernelTable kTable = {.name = RABIT_NAME,
                                      .sign_order = SignOrder::kTiles,
                                      .input_bytes = input_bytes,
                                      .prepare = prepare,
                                      .matmul = matmul_by_lookup,
                                      .matmul_scratch = lookup_scratch,
                                      .matmul_row_grain = 2 * kTileRows,
                                      .rms_norm = rms_norm,
                                      .rope = rope,
                                      .attention = attention,
                                      .attention_scratch = attention_scratch,
                                      .attention_token_grain = kQueryTokens,
                                      .swiglu = swiglu,
                                      .cross_entropy = cross_entropy};

}  // namespace rabit::RABIT_ISA
