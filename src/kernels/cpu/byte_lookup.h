// Residual-binary products by lookup, for instruction sets that shuffle the bytes of
// 128-bit lanes, with all else as lookup_table.h has it. Included once by each file that defines
// RABIT_ISA, RABIT_LANES, RABIT_NAME and, in the namespace RABIT_ISA, what is listed below and in
// byte_products.h; nothing but `kTable` leaves it.
//
// Four neighbouring columns of a row contribute one of 16 sums +-q0 +-q1 +-q2 +-q3 of columns times
// scales, which a nibble of the packed signs numbers. prepare() tabulates the 16 sums of every four
// columns as numbers of 12 bits, six in each of two bytes, so that one shuffle looks up half a sum
// for every row of a register, and four lookups are added as bytes before they are widened. The
// numbers' unit is that of a group of 128 columns: then the sum over a group fits 16 bits, and a
// large column costs accuracy in its group alone. Sums of a group are exact, and those of groups
// are added as floats.
//
// What the including file defines, B = kBytes rows at a time, at most a tile's:
//   Bytes         a vector of B unsigned bytes, a GCC vector
//   in_register   (bytes): must be in a register here, and is not computed in another way
//   kTilesAtOnce  tiles whose sums the registers hold
//   tabulate_two  (q, to): of four columns and the next four the table's 32 bytes: the 16 sums of
//                 their q, divided by 16, rounded with halves away from 0 (upwards they would shift
//                 every sum of a row to the same side) and 2048 added, six bits in each half
//   shuffle       (table, indices below 16): table's 16 bytes looked up in every 128-bit lane
//   load_table    16 bytes, copied to every lane
//   Sums          16-bit sums of B rows; start_sums(value) sets all
//   add_sums      (sums, low, high): adds low + 64 high of each row
//   flush_sums    (sums, scale, to): adds scale times the sums to B floats, in an order of its own
//   rows_in_order (from, to): B floats from that order to the rows'
#pragma once

#include "kernels/cpu/gemm.h"

namespace rabit::RABIT_ISA {
namespace {

constexpr int kParts = kTileRows / kBytes;  // of a tile
constexpr int64_t kGroupWords = 4, kGroupColumns = 32 * kGroupWords;
constexpr int64_t kWordSigns = 4 * kTileRows;  // bytes of a tile's signs
// Of a token and a path: the scale of each group, then for every word of columns the tables of its
// nibbles, lowest first: 16 low halves, 16 high ones.
constexpr int64_t kNibbleTable = 32, kWordTables = 8 * kNibbleTable;
// q is in 16ths of a sum's unit. Largest sums of |q| before it is rounded, over four columns, so
// that rounded they and the 8 that rounds a sixteenth of them stay below 2^15; and over a group, so
// that its sums do.
constexpr float kLargestFour = 32750.0F, kLargestGroup = 523000.0F;
constexpr int kBias = 2048;  // sums of four are kept as unsigned numbers
// Tiles whose products go through a group together, so that its tables serve them all from the
// first-level cache.
constexpr int64_t kBlockTiles = 4;
constexpr WeightOrder kSignOrder = WeightOrder::kByteTiles;
using Signs = ByteSigns;
constexpr int64_t kPrefetch = 8192;  // bytes ahead, over all tiles of a block

int64_t scale_bytes(int64_t words) {
  return round_up((words + kGroupWords - 1) / kGroupWords * 4, 64);
}

int64_t path_bytes(int64_t words) { return scale_bytes(words) + words * kWordTables; }

// What one unit of q is worth in a group of columns times scales: 0 if all are (almost) 0, infinity
// or NaN if one is. Sums are taken in the same order on every machine.
float unit_of(const float* scaled) {
  constexpr int kWidth = 16 / kLanes;
  Vec largest = {}, sums[kWidth] = {};
  for (int64_t c = 0; c < kGroupColumns; c += 16) {
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; ++i) {
      const Vec v = load(scaled + c + i * kLanes);
      const Vec size = reinterpret_cast<Vec>(reinterpret_cast<UintVec>(v) & 0x7FFFFFFFU);
      const Vec two = size + RABIT_SWAP(size);
      largest = max_of(two + RABIT_SWAP_PAIRS(two), largest);
      sums[i] += size;
    }
  }
  alignas(64) float parts[16];
  for (int i = 0; i < kWidth; ++i) {
    store(parts + i * kLanes, sums[i]);
  }
#pragma GCC unroll 4
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      parts[i] += parts[i + half];
    }
  }
  if (!(parts[0] < __builtin_inff())) {
    return parts[0];
  }
  const float four = max_lane(largest);
  const float by_four = four / kLargestFour, by_group = parts[0] / kLargestGroup;
  return four > 1e-30F ? (by_four > by_group ? by_four : by_group) : 0.0F;
}

void prepare_signs(const LinearWeights& w, const float* x, int64_t tokens, uint8_t* input,
                   int64_t word_begin, int64_t word_end) {
  const int64_t words = (w.d_in + 31) / 32;
  for (int64_t i = 0; i < tokens * w.paths; ++i) {
    const float* in = x + i / w.paths * w.d_in;
    const uint16_t* h = w.col_scale + i % w.paths * w.d_in;
    auto* out = input + i * path_bytes(words);
    uint8_t* tables = out + scale_bytes(words);
    for (int64_t group = word_begin / kGroupWords; group * kGroupWords < word_end; ++group) {
      const int64_t first = group * kGroupWords, column = first * 32;
      alignas(64) float scaled[kGroupColumns];
      if (w.d_in - column >= kGroupColumns) {
        for (int64_t c = 0; c < kGroupColumns; c += kLanes) {
          store(scaled + c, load_finite_half(h + column + c) * load(in + column + c));
        }
      } else {
        for (int64_t c = 0; c < kGroupColumns; c += kLanes) {
          const int64_t at = column + c, left = smaller(kLanes, larger(0, w.d_in - at));
          store(scaled + c, load_finite_half_part(h + at, left) * load_part(in + at, left));
        }
      }
      const float unit = unit_of(scaled);
      alignas(64) int16_t q[kGroupColumns];
      // Where there is no unit all q are 0, and the scale makes NaN of infinity and NaN.
      if (unit > 0 && unit < __builtin_inff()) {
        const float units = 1 / unit;
        for (int64_t c = 0; c < kGroupColumns; ++c) {
          q[c] = static_cast<int16_t>(static_cast<int32_t>(__builtin_rintf(scaled[c] * units)));
        }
      } else {
        __builtin_memset(q, 0, sizeof(q));
      }
      if (first >= word_begin) {
        reinterpret_cast<float*>(out)[group] = unit * 16;
      }
      const int64_t end = smaller(word_end, first + kGroupWords);
      for (int64_t word = larger(first, word_begin); word < end; ++word) {
        for (int64_t nibble = 0; nibble < 8; nibble += 2) {
          tabulate_two(q + (word - first) * 32 + nibble * 4,
                       tables + word * kWordTables + nibble * kNibbleTable);
        }
      }
    }
  }
}

// Adds the sums of kTiles tiles over `words` words, at most a group, times scale, to the tiles'
// floats; signs of the first tile, the others' `stride` bytes apart; those `ahead` bytes on are
// asked for.
template <int kTiles>
RABIT_INLINE void add_group(const uint8_t* signs, int64_t stride, int64_t ahead,
                            const uint8_t* tables, int64_t words, float scale, float* to) {
  constexpr int kRegisters = kTiles * kParts;
  Sums sums[kRegisters];
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) {
    sums[i] = start_sums(static_cast<int16_t>(-8 * kBias * words));
  }
#pragma GCC unroll 1
  for (int64_t step = 0; step < 2 * words; ++step) {  // of two bytes, four lookups a row
    Bytes low[kRegisters], high[kRegisters];
#pragma GCC unroll 2
    for (int byte = 0; byte < 2; ++byte) {
      const uint8_t* from = signs + (2 * step + byte) * kTileRows;
      const uint8_t* table = tables + (2 * step + byte) * 2 * kNibbleTable;
      Bytes bits[kRegisters];
#pragma GCC unroll 4
      for (int i = 0; i < kRegisters; ++i) {
        const uint8_t* at = from + i / kParts * stride + i % kParts * kBytes;
        if (i % kParts == 0) {
          __builtin_prefetch(at + ahead);
        }
        bits[i] = *reinterpret_cast<const Bytes*>(at);
      }
#pragma GCC unroll 2
      for (int nibble = 0; nibble < 2; ++nibble) {
        const Bytes low_table = load_table(table + nibble * kNibbleTable);
        const Bytes high_table = load_table(table + nibble * kNibbleTable + 16);
#pragma GCC unroll 4
        for (int i = 0; i < kRegisters; ++i) {
          const Bytes index = nibble == 0 ? bits[i] & 15 : bits[i] >> 4;
          const Bytes low_half = shuffle(low_table, index), high_half = shuffle(high_table, index);
          const bool first = byte == 0 && nibble == 0;
          low[i] = first ? low_half : low[i] + low_half;
          high[i] = first ? high_half : high[i] + high_half;
          // Added in another order they need more registers than there are.
          in_register(low[i]);
          in_register(high[i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) {
      sums[i] = add_sums(sums[i], low[i], high[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) {
    flush_sums(sums[i], scale, to + i * kBytes);
  }
}

// Rows of up to kBlockTiles tiles from `tile` on, one token; only rows in [row_begin, row_end) are
// written.
void tiles_by_lookup(const LinearWeights& w, const uint8_t* input, int64_t tile, int64_t tiles,
                     float* y, int64_t row_begin, int64_t row_end) {
  const int64_t words = (w.d_in + 31) / 32, stride = w.paths * words * kWordSigns;
  const int64_t ahead = kPrefetch / tiles;
  alignas(64) float totals[kBlockTiles * kTileRows] = {};
  for (int64_t path = 0; path < w.paths; ++path) {
    const uint8_t* of_path = input + path * path_bytes(words);
    const uint8_t* signs =
        reinterpret_cast<const uint8_t*>(w.signs) + tile * stride + path * words * kWordSigns;
    alignas(64) float sums[kBlockTiles * kTileRows] = {};
    for (int64_t word = 0; word < words; word += kGroupWords) {
      const float scale = reinterpret_cast<const float*>(of_path)[word / kGroupWords];
      const uint8_t* tables = of_path + scale_bytes(words) + word * kWordTables;
      const int64_t count = smaller(kGroupWords, words - word);
      const uint8_t* of_word = signs + word * kWordSigns;
      int64_t t = 0;
      for (; t + kTilesAtOnce <= tiles; t += kTilesAtOnce) {
        add_group<kTilesAtOnce>(of_word + t * stride, stride, ahead, tables, count, scale,
                                sums + t * kTileRows);
      }
      for (; t < tiles; ++t) {
        add_group<1>(of_word + t * stride, stride, ahead, tables, count, scale,
                     sums + t * kTileRows);
      }
    }
    for (int64_t r = 0; r < tiles * kTileRows; r += kBytes) {
      alignas(64) float in_order[kBytes];
      rows_in_order(sums + r, in_order);
      const uint16_t* g = w.row_scale + path * w.d_out;
      for (int64_t i = 0; i < kBytes; i += kLanes) {
        const int64_t row = tile * kTileRows + r + i, left = w.d_out - row;
        if (left > 0) {
          const Vec scale =
              left >= kLanes ? load_finite_half(g + row) : load_finite_half_part(g + row, left);
          store(totals + r + i, load(totals + r + i) + scale * load(in_order + i));
        }
      }
    }
  }
  const int64_t first = tile * kTileRows;
  const int64_t end = smaller(row_end, first + tiles * kTileRows);
  for (int64_t row = larger(first, row_begin); row < end; ++row) {
    y[row] = totals[row - first];
  }
}

void matmul_of_signs(const LinearWeights& w, const uint8_t* input, int64_t tokens, float* y,
                     int64_t row_begin, int64_t row_end) {
  const int64_t token_bytes = w.paths * path_bytes((w.d_in + 31) / 32);
  const int64_t end = (row_end + kTileRows - 1) / kTileRows;
  for (int64_t tile = row_begin / kTileRows; tile < end; tile += kBlockTiles) {
    for (int64_t t = 0; t < tokens; ++t) {
      tiles_by_lookup(w, input + t * token_bytes, tile, smaller(kBlockTiles, end - tile),
                      y + t * w.d_out, row_begin, row_end);
    }
  }
}

}  // namespace
}  // namespace rabit::RABIT_ISA

#include "kernels/cpu/lookup_table.h"
