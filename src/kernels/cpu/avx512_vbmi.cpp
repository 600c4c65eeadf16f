// Kernels for AVX-512 with VBMI and VNNI: residual-binary products of few tokens by lookup, those
// of Q8_0 by dot products of bytes; all else is the portable code for AVX-512. Flags in
// CMakeLists.txt.
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
#define RABIT_VNNI

#include <immintrin.h>

#include "kernels/cpu/dots_x86.h"
#include "kernels/cpu/gemm.h"

namespace rabit::RABIT_ISA {
namespace {

// Of a token and a path: a header with the scale of q, then for every word of columns the tables of
// its bytes' low nibbles, low bytes first, then of the high ones.
constexpr int64_t kHeader = 64, kTable64 = 64, kWordTables = 4 * kTable64;
constexpr int32_t kBias = 32768;          // sums are kept as unsigned 16-bit numbers
constexpr float kLargestSum = 32765.0F;   // of |q| over four columns, rounded up to 2 beyond
constexpr int64_t kExactWords = 1 << 12;  // words whose sums 32 bits hold
constexpr int64_t kAhead = 8192;          // bytes from the signs read to those asked for
// Of several tokens: as many go through some words of some tiles, two at a time. The tiles' signs
// (256 KiB) and the tables of two tokens (64 KiB) stay in a second-level cache of 1 MiB.
constexpr int64_t kTokensAtOnce = 32, kGroupTiles = 8, kBlockWords = 128;
constexpr int64_t kGroupRows = kGroupTiles * kTileRows;
constexpr WeightOrder kSignOrder = WeightOrder::kTilePairs;
using Signs = PairSigns;

int64_t path_bytes(int64_t words) { return kHeader + words * kWordTables; }

RABIT_INLINE __mmask16 lanes_left(int64_t left) {
  return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1U << (left > 0 ? left : 0)) - 1);
}

// h x of 16 columns from c, zeros after d_in.
RABIT_INLINE __m512 scaled(const uint16_t* h, const float* x, int64_t c, int64_t d_in) {
  const __mmask16 mask = lanes_left(d_in - c);
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, h + c)),
                       _mm512_maskz_loadu_ps(mask, x + c));
}

// Units of q in 1, and what a unit is worth, where the largest sum of four is to be kLargestSum.
// Without such a unit q are 0 or, of infinity and NaN, anything: the worth is neither then,
// and so is what is multiplied by it.
struct Unit {
  float units, worth;
};

RABIT_INLINE Unit unit_of(float largest) {
  const bool usable = largest > 1e-30F && largest < __builtin_inff();
  return {usable ? kLargestSum / largest : 0.0F,
          largest > 1e-30F || largest != largest ? largest / kLargestSum : 0.0F};
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

// Tables of a word's 32 columns from their q. Of a pair of columns, R has q0 + q1 and q1 - q0 and
// -R the other two sums with signs; two pairs add up to the 16 sums of four columns, for two
// nibbles at a time. The bias comes with the first pair's.
class Tabulate {
 public:
  Tabulate() {
    // Of nibbles 0 and 2: which of a pair's sums, R before -R, by the pair's two bits.
    constexpr int16_t kOfSigns[4] = {32, 33, 1, 0};
    alignas(64) int16_t first[32], second[32];
    alignas(64) uint8_t low[64];
    for (int lane = 0; lane < 32; ++lane) {
      const int pairs = lane / 16 * 8, number = lane % 16;
      first[lane] = static_cast<int16_t>(pairs + kOfSigns[number % 4]);
      second[lane] = static_cast<int16_t>(pairs + 2 + kOfSigns[number / 4]);
    }
    for (int byte = 0; byte < 64; ++byte) {
      low[byte] = static_cast<uint8_t>(2 * byte);
    }
    first_ = _mm512_load_si512(first);
    second_ = _mm512_load_si512(second);
    low_ = _mm512_load_si512(low);
  }

  RABIT_INLINE void operator()(__m512i q, uint8_t* tables) const {
    const __m512i bias = _mm512_set1_epi16(static_cast<int16_t>(kBias));
    const __m512i neighbours = _mm512_rol_epi32(q, 16);
    const __m512i r =
        _mm512_mask_sub_epi16(_mm512_add_epi16(q, neighbours), 0xAAAAAAAA, q, neighbours);
    const __m512i minus = _mm512_sub_epi16(_mm512_setzero_si512(), r);
    const __m512i r_plus = _mm512_add_epi16(r, bias), minus_plus = _mm512_sub_epi16(bias, r);
    const auto two_nibbles = [&](int lanes) {  // those so many lanes of R after 0 and 2
      const __m512i after = _mm512_set1_epi16(static_cast<int16_t>(lanes));
      return _mm512_add_epi16(
          _mm512_permutex2var_epi16(r_plus, _mm512_add_epi16(first_, after), minus_plus),
          _mm512_permutex2var_epi16(r, _mm512_add_epi16(second_, after), minus));
    };
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i sums = two_nibbles(4 * odd), more = two_nibbles(4 * odd + 16);
      const __m512i high = _mm512_add_epi8(low_, _mm512_set1_epi8(1));
      uint8_t* to = tables + odd * 2 * kTable64;
      _mm512_store_si512(to, _mm512_permutex2var_epi8(sums, low_, more));
      _mm512_store_si512(to + kTable64, _mm512_permutex2var_epi8(sums, high, more));
    }
  }

 private:
  __m512i first_, second_, low_;
};

void prepare_signs(const LinearWeights& w, const float* x, int64_t tokens, uint8_t* input,
                   int64_t word_begin, int64_t word_end) {
  const int64_t words = (w.d_in + 31) / 32;
  const Tabulate tabulate;
  for (int64_t i = 0; i < tokens * w.paths; ++i) {
    const float* in = x + i / w.paths * w.d_in;
    const uint16_t* h = w.col_scale + i % w.paths * w.d_in;
    auto* out = input + i * path_bytes(words);
    const Unit unit = unit_of(largest_sum(h, in, w.d_in));
    const __m512 units = _mm512_set1_ps(unit.units);
    if (word_begin == 0 && word_end > 0) {
      *reinterpret_cast<float*>(out) = unit.worth;
    }
    for (int64_t word = word_begin; word < word_end; ++word) {
      const auto half = [&](int64_t c) {
        const __m512 in_units = _mm512_mul_ps(scaled(h, in, c, w.d_in), units);
        return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(in_units));
      };
      const __m512i q =
          _mm512_inserti64x4(_mm512_castsi256_si512(half(word * 32)), half(word * 32 + 16), 1);
      tabulate(q, out + kHeader + word * kWordTables);
    }
  }
}

constexpr int kTileVectors = kTileRows / 16;  // of a tile's rows

// Sums of a tile's rows or of a pair's, in parts: of tables' low bytes and of high ones.
template <int kTokens, int kVectors>
struct Sums {
  __m512i low[kTokens][kVectors], high[kTokens][kVectors];
  RABIT_INLINE __m512i together(int t, int v) const {
    const auto whole = reinterpret_cast<IntVec>(low[t][v]);
    return reinterpret_cast<__m512i>(whole + (reinterpret_cast<IntVec>(high[t][v]) << 8));
  }
};

// Sums over some words: signs and tables of the first, words `next_word` apart, tokens' tables
// `token_bytes`.
template <int kTokens, int kVectors>
RABIT_INLINE Sums<kTokens, kVectors> lookup(const uint32_t* signs, int64_t next_word,
                                            const uint8_t* tables, int64_t token_bytes,
                                            int64_t words) {
  const __m512i nibbles = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
  const __m512i quarter = _mm512_set1_epi32(0x30201000);  // of the table, by byte of a word
  Sums<kTokens, kVectors> sums = {};
  for (int64_t word = 0; word < words; ++word) {
    __m512i even_low[kTokens], even_high[kTokens], odd_low[kTokens], odd_high[kTokens];
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      const uint8_t* of_word = tables + t * token_bytes + word * kWordTables;
      even_low[t] = _mm512_load_si512(of_word);
      even_high[t] = _mm512_load_si512(of_word + kTable64);
      odd_low[t] = _mm512_load_si512(of_word + 2 * kTable64);
      odd_high[t] = _mm512_load_si512(of_word + 3 * kTable64);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t* from = signs + word * next_word + v * 16;
      _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
      const __m512i bits = _mm512_load_si512(from);
      const __m512i even = _mm512_ternarylogic_epi32(bits, nibbles, quarter, 0xEA);
      const __m512i odd =
          _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits, 4), nibbles, quarter, 0xEA);
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) {
        const auto add = [&](__m512i& sum, __m512i which, __m512i table) {
          sum = _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(which, table), ones);
        };
        add(sums.low[t][v], even, even_low[t]);
        add(sums.high[t][v], even, even_high[t]);
        add(sums.low[t][v], odd, odd_low[t]);
        add(sums.high[t][v], odd, odd_high[t]);
      }
    }
  }
  return sums;
}

// Adds a path's sums of low and high bytes over `words` words, put together, times its scales to
// the totals of 16 rows from `row` on. of_path: the token's.
RABIT_INLINE __m512 add_scaled(const LinearWeights& w, int64_t path, int64_t row,
                               const uint8_t* of_path, int64_t words, __m512i sums, __m512 totals) {
  const __m512i bias = _mm512_set1_epi32(static_cast<int32_t>(words * 8 * kBias));
  const __m512 g = _mm512_cvtph_ps(
      _mm256_maskz_loadu_epi16(lanes_left(w.d_out - row), w.row_scale + path * w.d_out + row));
  const __m512 scale = _mm512_set1_ps(*reinterpret_cast<const float*>(of_path));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, bias)), _mm512_mul_ps(scale, g),
                         totals);
}

// Those of 16 rows from `row` on that are in [row_begin, row_end).
RABIT_INLINE __mmask16 rows_within(int64_t row, int64_t row_begin, int64_t row_end) {
  return static_cast<__mmask16>(lanes_left(row_end - row) & ~lanes_left(row_begin - row));
}

// Rows of a tile, or of a pair, from `tile` on, one token; only rows in [row_begin, row_end) are
// written.
template <int kVectors>
void tile_by_lookup(const LinearWeights& w, const uint8_t* input, int64_t tile, float* y,
                    int64_t row_begin, int64_t row_end) {
  const int64_t words = (w.d_in + 31) / 32, row = tile * kTileRows;
  const PlaceInPairs place = place_in_pairs(w, tile);
  __m512 totals[kVectors] = {};
  for (int64_t path = 0; path < w.paths; ++path) {
    const uint8_t* of_path = input + path * path_bytes(words);
    const uint32_t* signs = w.signs + place.first + path * place.next_path;
    for (int64_t begin = 0; begin < words; begin += kExactWords) {
      const int64_t part = smaller(kExactWords, words - begin);
      const auto sums = lookup<1, kVectors>(signs + begin * place.next_word, place.next_word,
                                            of_path + kHeader + begin * kWordTables, 0, part);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        totals[v] =
            add_scaled(w, path, row + v * 16, of_path, part, sums.together(0, v), totals[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = row + v * 16;
    _mm512_mask_storeu_ps(y + at, rows_within(at, row_begin, row_end), totals[v]);
  }
}

// Some words of a path, and where they stand among those whose sums are exact.
struct Words {
  int64_t path, begin, count;
  bool first;     // of those
  int64_t exact;  // how many those are where these are the last of them, else 0
};

// Sums of a tile over some words, kTokens tokens: kept in `sums` (tokens, kGroupRows) until they
// are complete, then added to y. of_path: the first token's, as y.
template <int kTokens>
void add_words(const LinearWeights& w, const Words& words, const uint8_t* of_path,
               int64_t token_bytes, int64_t tile, int32_t* sums, float* y, int64_t row_begin,
               int64_t row_end) {
  const PlaceInPairs place = place_in_pairs(w, tile);
  const uint32_t* signs =
      w.signs + place.first + words.path * place.next_path + words.begin * place.next_word;
  const uint8_t* tables = of_path + kHeader + words.begin * kWordTables;
  const auto here =
      lookup<kTokens, kTileVectors>(signs, place.next_word, tables, token_bytes, words.count);
  const bool none = words.path == 0 && words.begin + words.count <= kExactWords;  // in y
#pragma GCC unroll 8
  for (int v = 0; v < kTileVectors; ++v) {
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      int32_t* at = sums + t * kGroupRows + v * 16;
      const __m512i before = words.first ? _mm512_setzero_si512() : _mm512_load_si512(at);
      const __m512i sum = _mm512_add_epi32(here.together(t, v), before);
      if (words.exact == 0) {
        _mm512_store_si512(at, sum);
        continue;
      }
      const int64_t row = tile * kTileRows + v * 16;
      const __mmask16 mask = rows_within(row, row_begin, row_end);
      float* to = y + t * w.d_out + row;
      const __m512 total = none ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, to);
      _mm512_mask_storeu_ps(
          to, mask,
          add_scaled(w, words.path, row, of_path + t * token_bytes, words.exact, sum, total));
    }
  }
}

// Tiles [first, last), at most kGroupTiles, of at most kTokensAtOnce tokens.
void tiles_by_lookup(const LinearWeights& w, const uint8_t* input, int64_t tokens, int64_t first,
                     int64_t last, float* y, int64_t row_begin, int64_t row_end) {
  const int64_t all = (w.d_in + 31) / 32, token_bytes = w.paths * path_bytes(all);
  alignas(64) int32_t sums[kTokensAtOnce * kGroupRows];
  static_assert(kExactWords % kBlockWords == 0);
  for (int64_t i = 0, blocks = (all + kBlockWords - 1) / kBlockWords; i < w.paths * blocks; ++i) {
    const int64_t begin = i % blocks * kBlockWords, exact = begin / kExactWords * kExactWords;
    const int64_t end = smaller(all, begin + kBlockWords);
    const bool complete = end == smaller(all, exact + kExactWords);
    const Words words = {.path = i / blocks,
                         .begin = begin,
                         .count = end - begin,
                         .first = begin == exact,
                         .exact = complete ? end - exact : 0};
    for (int64_t token = 0; token < tokens; token += 2) {
      const uint8_t* of_path = input + token * token_bytes + words.path * path_bytes(all);
      const auto add = token + 1 < tokens ? add_words<2> : add_words<1>;
      for (int64_t tile = first; tile < last; ++tile) {
        add(w, words, of_path, token_bytes, tile,
            sums + token * kGroupRows + (tile - first) * kTileRows, y + token * w.d_out, row_begin,
            row_end);
      }
    }
  }
}

void matmul_of_signs(const LinearWeights& w, const uint8_t* input, int64_t tokens, float* y,
                     int64_t row_begin, int64_t row_end) {
  const int64_t token_bytes = w.paths * path_bytes((w.d_in + 31) / 32);
  const int64_t end = (row_end + kTileRows - 1) / kTileRows;
  int64_t token = 0;
  for (; tokens - token > 1; token += smaller(kTokensAtOnce, tokens - token)) {
    const int64_t some = smaller(kTokensAtOnce, tokens - token);
    for (int64_t tile = row_begin / kTileRows; tile < end; tile += kGroupTiles) {
      tiles_by_lookup(w, input + token * token_bytes, some, tile, smaller(end, tile + kGroupTiles),
                      y + token * w.d_out, row_begin, row_end);
    }
  }
  for (int64_t tile = row_begin / kTileRows; token < tokens && tile < end; ++tile) {
    const bool pair = tile % 2 == 0 && tile + 1 < end;
    const auto product = pair ? tile_by_lookup<2 * kTileVectors> : tile_by_lookup<kTileVectors>;
    product(w, input + token * token_bytes, tile, y + token * w.d_out, row_begin, row_end);
    tile += pair ? 1 : 0;
  }
}

}  // namespace
}  // namespace rabit::RABIT_ISA

#include "kernels/cpu/lookup_table.h"
