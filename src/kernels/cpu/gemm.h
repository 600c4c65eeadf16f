// Products of many tokens: C (tokens, rows) = A (tokens, columns) B, B = W^T.
// B is unpacked to float into panels of kPanel rows of W, column after column: panel[c][row], so
// that a tile of kTile tokens x kPanel rows stays in registers while each column costs
// kPanel/kLanes loads of B and kTile broadcasts of A. A's tile is copied to rows kTileStride floats
// apart: a constant, so that all of them are reached from one pointer, and no multiple of a page,
// so that they do not evict one another from the first-level cache.
#pragma once

#include "kernels/cpu/vec.h"

namespace rabit::RABIT_ISA {
namespace {

// Accumulators, a row of B and one broadcast must fit 32 registers at 16 lanes, 16 otherwise.
constexpr int kTile = kLanes == 16 ? 12 : 6;  // tokens
constexpr int kVectors = 2;                   // vectors across a panel
constexpr int kPanel = kVectors * kLanes;     // rows of W
constexpr int64_t kMaxColumns = 384;          // columns unpacked at a time
constexpr int64_t kMaxRows = 384;             // rows unpacked at a time; both: 576 KiB of L2
constexpr int64_t kTileStride = kMaxColumns + 16;

static_assert(kMaxColumns % 32 == 0 && kMaxRows % kPanel == 0 && kMaxHeadDim <= kMaxColumns);

/// c[t][r] (+)= sum_k a[t][k] b[k][r] for kRows tokens and kPanel rows of W.
/// a: rows kTileStride apart; b: rows `b_stride` apart; c: rows `c_stride` apart.
template <int kRows, bool kAdd>
void tile_product(const float* __restrict a, const float* __restrict b, int64_t b_stride,
                  int64_t columns, float* __restrict c, int64_t c_stride) {
  Vec sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < columns; ++k) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      row[j] = load(b + k * b_stride + j * kLanes);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) {
      const Vec x = splat(a[t * kTileStride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        sums[t][j] += x * row[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* out = c + t * c_stride + j * kLanes;
      store(out, kAdd ? load(out) + sums[t][j] : sums[t][j]);
    }
  }
}

using TileProduct = void (*)(const float*, const float*, int64_t, int64_t, float*, int64_t);

template <bool kAdd>
TileProduct tile_product_for(int64_t rows) {
  switch (rows) {
#define RABIT_TILE(n) \
  case n:             \
    return tile_product<n, kAdd>
    RABIT_TILE(1);
    RABIT_TILE(2);
    RABIT_TILE(3);
    RABIT_TILE(4);
    RABIT_TILE(5);
#if RABIT_LANES == 16
    RABIT_TILE(6);
    RABIT_TILE(7);
    RABIT_TILE(8);
    RABIT_TILE(9);
    RABIT_TILE(10);
    RABIT_TILE(11);
#endif
#undef RABIT_TILE
    default:
      return tile_product<kTile, kAdd>;
  }
}

/// A tile of up to kTile tokens times one panel, of which `panel_rows` rows are real; only these
/// columns of c are written.
RABIT_INLINE void panel_product(const float* a, int64_t rows, const float* b, int64_t b_stride,
                                int64_t columns, float* c, int64_t c_stride, int64_t panel_rows,
                                bool add) {
  if (panel_rows >= kPanel) {
    const TileProduct product = add ? tile_product_for<true>(rows) : tile_product_for<false>(rows);
    product(a, b, b_stride, columns, c, c_stride);
    return;
  }
  alignas(64) float edge[kTile * kPanel];
  tile_product_for<false>(rows)(a, b, b_stride, columns, edge, kPanel);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t r = 0; r < panel_rows; ++r) {
      c[t * c_stride + r] = edge[t * kPanel + r] + (add ? c[t * c_stride + r] : 0.0F);
    }
  }
}

/// Copies `rows` rows of `columns` floats to rows kTileStride apart.
RABIT_INLINE void copy_tile(const float* x, int64_t stride, int64_t rows, int64_t columns,
                            float* tile) {
  for (int64_t t = 0; t < rows; ++t) {
    const float* from = x + t * stride;
    float* to = tile + t * kTileStride;
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      store(to + c, load(from + c));
    }
    for (; c < columns; ++c) {
      to[c] = from[c];
    }
  }
}

// Row readers: read(row, column, left) gives kLanes weights from (row, column), zeros after `left`.

struct FloatRows {
  const float* data;  // (rows, stride)
  int64_t stride;
  RABIT_INLINE const void* place(int64_t row, int64_t column) const {
    return data + row * stride + column;
  }
  RABIT_INLINE Vec read(int64_t row, int64_t column, int64_t left) const {
    const float* p = data + row * stride + column;
    return left >= kLanes ? load(p) : load_part(p, left);
  }
};

struct FiniteHalfRows {
  const uint16_t* data;
  int64_t stride;
  RABIT_INLINE const void* place(int64_t row, int64_t column) const {
    return data + row * stride + column;
  }
  RABIT_INLINE Vec read(int64_t row, int64_t column, int64_t left) const {
    const uint16_t* p = data + row * stride + column;
    return left >= kLanes ? load_finite_half(p) : load_finite_half_part(p, left);
  }
};

struct HalfRows {
  const uint16_t* data;
  int64_t stride;
  RABIT_INLINE const void* place(int64_t row, int64_t column) const {
    return data + row * stride + column;
  }
  RABIT_INLINE Vec read(int64_t row, int64_t column, int64_t left) const {
    const uint16_t* p = data + row * stride + column;
    return left >= kLanes ? load_half(p) : load_half_part(p, left);
  }
};

constexpr int64_t kBlock = 32;  // columns of Q8_0 and Q4_0 that share a scale

// Blocks: ints(block, v) gives values v kLanes and on of a block, as integers; a half-precision
// scale comes first.

struct Q8Block {
  static constexpr int64_t kBytes = kQ8BlockBytes;
  RABIT_INLINE static IntVec ints(const uint8_t* block, int64_t v) {
    return load_bytes(block + 2 + v * kLanes);
  }
};

struct Q4Block {
  static constexpr int64_t kBytes = kQ4BlockBytes;
  // Byte i holds values i, in its low half, and i + 16.
  RABIT_INLINE static IntVec ints(const uint8_t* block, int64_t v) {
    const IntVec bytes = load_bytes(block + 2 + v * kLanes % 16);
    return ((v * kLanes < 16 ? bytes : bytes >> 4) & 15) - 8;
  }
};

RABIT_INLINE float block_scale(const uint8_t* block) {
  return half_value(static_cast<uint16_t>(block[0] | block[1] << 8));
}

template <typename Block>
struct BlockRows {
  const uint8_t* data;
  int64_t stride;  // columns
  RABIT_INLINE const uint8_t* block(int64_t row, int64_t index) const {
    return data + (row * (stride / kBlock) + index) * Block::kBytes;
  }
  RABIT_INLINE const void* place(int64_t row, int64_t column) const {
    return block(row, column / kBlock);
  }
  RABIT_INLINE Vec read(int64_t row, int64_t column, int64_t /*left*/) const {
    const uint8_t* from = block(row, column / kBlock);
    return block_scale(from) *
           __builtin_convertvector(Block::ints(from, column % kBlock / kLanes), Vec);
  }
};

/// Sign bits to flip: lane l gets bit 31 set where bit `shift` + l of the word is 0.
RABIT_INLINE UintVec flips(uint32_t word, int64_t shift) {
  const UintVec places = static_cast<uint32_t>(31 - shift) - reinterpret_cast<UintVec>(kLaneIndex);
  return ((~word - UintVec{}) << places) & 0x80000000U;
}

RABIT_INLINE Vec flip(Vec v, UintVec bits) {
  return reinterpret_cast<Vec>(reinterpret_cast<UintVec>(v) ^ bits);
}

/// The flips of kLanes columns from `column` on, a multiple of kLanes; signs in kRows order.
struct RowSigns {
  const uint32_t* signs;
  int64_t path, words;
  explicit RowSigns(const LinearWeights& w)
      : signs(w.signs), path(w.d_out * ((w.d_in + 31) / 32)), words((w.d_in + 31) / 32) {}
  RABIT_INLINE UintVec flips_at(int64_t p, int64_t row, int64_t column) const {
    return flips(signs[p * path + row * words + column / 32], column % 32);
  }
};

/// The same of signs in kTilePairs order.
struct PairSigns {
  const LinearWeights& w;
  explicit PairSigns(const LinearWeights& weights) : w(weights) {}
  RABIT_INLINE UintVec flips_at(int64_t p, int64_t row, int64_t column) const {
    const PlaceInPairs place = place_in_pairs(w, row / kTileRows);
    const int64_t at = place.first + p * place.next_path + column / 32 * place.next_word;
    return flips(w.signs[at + row % kTileRows], column % 32);
  }
};

/// The same of signs in kByteTiles order.
struct ByteSigns {
  const uint8_t* signs;
  int64_t path, tile;  // distances between neighbours
  explicit ByteSigns(const LinearWeights& w)
      : signs(reinterpret_cast<const uint8_t*>(w.signs)),
        path((w.d_in + 31) / 32 * 4 * kTileRows),
        tile(w.paths * path) {}
  RABIT_INLINE UintVec flips_at(int64_t p, int64_t r, int64_t column) const {
    const uint8_t* at =
        signs + p * path + r / kTileRows * tile + r % kTileRows + column / 8 * kTileRows;
    const uint32_t bits = kLanes == 16 ? at[0] | at[kTileRows] << 8 : at[0];
    return flips(bits, column % 8);
  }
};

template <int kPaths, typename Signs>
struct BinaryRows {
  Signs signs;
  const uint16_t* row_scale;  // F16 (k, d_out)
  const float* h;             // (k, h_stride), zeros after d_in
  int64_t d_out, h_stride;
  RABIT_INLINE Vec read(int64_t row, int64_t column, int64_t /*left*/) const {
    Vec sum = {};
#pragma GCC unroll 4
    for (int path = 0; path < kPaths; ++path) {
      const Vec signed_h =
          flip(load(h + path * h_stride + column), signs.flips_at(path, row, column));
      sum += half_value(row_scale[path * d_out + row]) * signed_h;
    }
    return sum;
  }
};

/// Unpacks rows [row, row + rows) of columns [column, column + columns) into one panel
/// [round_up(columns, kLanes)][kPanel]; missing rows become zeros. column: a multiple of kLanes.
template <typename Rows>
RABIT_INLINE void unpack_panel(const Rows& source, int64_t row, int64_t rows, int64_t column,
                               int64_t columns, float* panel) {
  for (int group = 0; group < kVectors; ++group) {
    const int64_t first = group * kLanes;
    const int64_t count = smaller(kLanes, larger(0, rows - first));
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec block[kLanes];
      if (count == kLanes && columns - c >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          block[i] = source.read(row + first + i, column + c, kLanes);
        }
      } else {
        for (int i = 0; i < kLanes; ++i) {
          block[i] = i < count ? source.read(row + first + i, column + c, columns - c) : Vec{};
        }
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        store(panel + (c + i) * kPanel + first, block[i]);
      }
    }
  }
}

constexpr int64_t kGemmScratch = kMaxRows * kMaxColumns + kTile * kTileStride;

template <typename Rows>
void gemm(const Rows& source, int64_t d_out, int64_t d_in, const float* x, int64_t tokens, float* y,
          int64_t row_begin, int64_t row_end, float* scratch) {
  float* panels = scratch;
  float* tile = scratch + kMaxRows * kMaxColumns;
  // Blocks of equal size rather than full ones and a small rest.
  const int64_t rows = row_end - row_begin;
  const int64_t row_blocks = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t row_step = round_up((rows + row_blocks - 1) / larger(row_blocks, 1), kPanel);
  const int64_t column_blocks = (d_in + kMaxColumns - 1) / kMaxColumns;
  const int64_t column_step = round_up((d_in + column_blocks - 1) / larger(column_blocks, 1), 32);
  for (int64_t r0 = row_begin; r0 < row_end; r0 += row_step) {
    const int64_t block_rows = smaller(row_step, row_end - r0);
    for (int64_t c0 = 0; c0 < d_in; c0 += column_step) {
      const int64_t columns = smaller(column_step, d_in - c0);
      const int64_t panel_floats = round_up(columns, kLanes) * kPanel;
      for (int64_t r = 0; r < block_rows; r += kPanel) {
        unpack_panel(source, r0 + r, smaller(kPanel, block_rows - r), c0, columns,
                     panels + r / kPanel * panel_floats);
      }
      for (int64_t t = 0; t < tokens; t += kTile) {
        const int64_t tile_rows = smaller(kTile, tokens - t);
        copy_tile(x + t * d_in + c0, d_in, tile_rows, columns, tile);
        for (int64_t r = 0; r < block_rows; r += kPanel) {
          panel_product(tile, tile_rows, panels + r / kPanel * panel_floats, kPanel, columns,
                        y + t * d_out + r0 + r, d_out, block_rows - r, c0 > 0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace rabit::RABIT_ISA
