// The matmul entry: few tokens read each weight once and keep the sums in registers, many tokens go
// through unpacked panels (gemm.h).
//
// Few tokens, residual binary: x_i = h_i * x is made once per call, in scratch, padded with zeros
// to a multiple of 32 columns; a sign bit then flips the sign bit of an element of x_i, and a row's
// sum over path i is scaled by g_i before the paths are added.
#pragma once

#include "kernels/cpu/gemm.h"

namespace rabit::RABIT_ISA {
namespace {

constexpr int64_t kFewTokens = 8;            // of more, unpacking to panels is cheaper
constexpr int kWide = kLanes == 16 ? 4 : 2;  // rows at once

// Bytes from what is read to what will be soon, for rows of so many bytes, kWide of them read side
// by side: the next ones, or further on in long rows. Processors foresee neither well enough.
RABIT_INLINE int64_t bytes_ahead(int64_t row_bytes) {
  constexpr int64_t kPage = 4096, kLongRow = 2048;
  return kWide * row_bytes <= kPage ? kWide * row_bytes : kLongRow;
}

RABIT_INLINE void prefetch(const void* from, int64_t ahead) {
  __builtin_prefetch(static_cast<const char*>(from) + ahead);
}

/// y[t][row + r] = the sum of sums[r][t]'s lanes.
template <int kRows, int kTokens>
RABIT_INLINE void store_sums(const Vec (&sums)[kRows][kTokens], int64_t d_out, int64_t row,
                             float* y) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      y[t * d_out + row + r] = sum_lanes(sums[r][t]);
    }
  }
}

/// kRows rows times kTokens tokens. sums[r][t] stay vectors until the end.
template <int kRows, int kTokens, typename Rows>
RABIT_INLINE void dense_rows(const Rows& source, int64_t d_out, int64_t d_in, int64_t row,
                             const float* x, float* y) {
  Vec sums[kRows][kTokens] = {};
  const auto* start = static_cast<const char*>(source.place(row, 0));
  const int64_t ahead = bytes_ahead(static_cast<const char*>(source.place(row + 1, 0)) - start);
  int64_t c = 0;
  for (; c + kLanes <= d_in; c += kLanes) {
    Vec in[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      in[t] = load(x + t * d_in + c);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      prefetch(source.place(row + r, c), ahead);
      const Vec weight = source.read(row + r, c, kLanes);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        sums[r][t] += weight * in[t];
      }
    }
  }
  if (c < d_in) {
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = source.read(row + r, c, d_in - c);
      for (int t = 0; t < kTokens; ++t) {
        sums[r][t] += weight * load_part(x + t * d_in + c, d_in - c);
      }
    }
  }
  store_sums(sums, d_out, row, y);
}

/// The same of quantized blocks, whose scales count once.
template <int kRows, int kTokens, typename Block>
RABIT_INLINE void dense_rows(const BlockRows<Block>& source, int64_t d_out, int64_t d_in,
                             int64_t row, const float* x, float* y) {
  Vec sums[kRows][kTokens] = {};
  const int64_t ahead = bytes_ahead(d_in / kBlock * Block::kBytes);
  for (int64_t c = 0; c < d_in; c += kBlock) {
    const uint8_t* blocks[kRows];
    Vec of_block[kRows][kTokens] = {};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      blocks[r] = source.block(row + r, c / kBlock);
      prefetch(blocks[r], ahead);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kBlock / kLanes; ++v) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec weight = __builtin_convertvector(Block::ints(blocks[r], v), Vec);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          of_block[r][t] += weight * load(x + t * d_in + c + v * kLanes);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float scale = block_scale(blocks[r]);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        sums[r][t] += scale * of_block[r][t];
      }
    }
  }
  store_sums(sums, d_out, row, y);
}

template <int kTokens, typename Rows>
RABIT_INLINE void dense_tokens(const Rows& source, int64_t d_out, int64_t d_in, int64_t row,
                               int64_t rows, const float* x, float* y) {
  if (rows == kWide) {
    dense_rows<kWide, kTokens>(source, d_out, d_in, row, x, y);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      dense_rows<1, kTokens>(source, d_out, d_in, row + r, x, y);
    }
  }
}

template <typename Rows>
void dense_few(const Rows& source, int64_t d_out, int64_t d_in, const float* x, int64_t tokens,
               float* y, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kWide) {
    const int64_t rows = smaller(kWide, row_end - row);
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
      dense_tokens<4>(source, d_out, d_in, row, rows, x + t * d_in, y + t * d_out);
    }
    for (; t + 2 <= tokens; t += 2) {
      dense_tokens<2>(source, d_out, d_in, row, rows, x + t * d_in, y + t * d_out);
    }
    for (; t < tokens; ++t) {
      dense_tokens<1>(source, d_out, d_in, row, rows, x + t * d_in, y + t * d_out);
    }
  }
}

/// kRows rows times kTokens tokens. scaled: (k, tokens, padded), path p's tokens at p *
/// path_stride.
template <int kRows, int kTokens>
RABIT_INLINE void binary_rows(const LinearWeights& w, int64_t words, int64_t row,
                              const float* scaled, int64_t path_stride, float* y) {
  const int64_t padded = words * 32;
  Vec totals[kRows][kTokens] = {};
  for (int64_t path = 0; path < w.paths; ++path) {
    const uint32_t* signs = w.signs + (path * w.d_out + row) * words;
    const float* x = scaled + path * path_stride;
    Vec sums[kRows][kTokens] = {};
    for (int64_t word = 0; word < words; ++word) {
#pragma GCC unroll 8
      for (int shift = 0; shift < 32; shift += kLanes) {
        Vec in[kTokens];
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          in[t] = load(x + t * padded + word * 32 + shift);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const UintVec bits = flips(signs[r * words + word], shift);
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) {
            sums[r][t] += flip(in[t], bits);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float g = half_value(w.row_scale[path * w.d_out + row + r]);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        totals[r][t] += g * sums[r][t];
      }
    }
  }
  store_sums(totals, w.d_out, row, y);
}

template <int kTokens>
RABIT_INLINE void binary_tokens(const LinearWeights& w, int64_t words, int64_t row, int64_t rows,
                                const float* scaled, int64_t path_stride, float* y) {
  if (rows == kWide) {
    binary_rows<kWide, kTokens>(w, words, row, scaled, path_stride, y);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      binary_rows<1, kTokens>(w, words, row + r, scaled, path_stride, y);
    }
  }
}

/// Column scales as floats, (k, padded), zeros after d_in.
void decode_columns(const LinearWeights& w, int64_t padded, float* h) {
  for (int64_t path = 0; path < w.paths; ++path) {
    const uint16_t* from = w.col_scale + path * w.d_in;
    for (int64_t c = 0; c < padded; c += kLanes) {
      const int64_t left = w.d_in - c;
      store(h + path * padded + c,
            left >= kLanes ? load_finite_half(from + c) : load_finite_half_part(from + c, left));
    }
  }
}

void binary_few(const LinearWeights& w, const float* x, int64_t tokens, float* y, int64_t row_begin,
                int64_t row_end, float* scaled) {
  const int64_t words = (w.d_in + 31) / 32;
  const int64_t padded = words * 32;
  for (int64_t path = 0; path < w.paths; ++path) {
    const uint16_t* scale = w.col_scale + path * w.d_in;
    for (int64_t c = 0; c < padded; c += kLanes) {
      const int64_t left = w.d_in - c;
      const bool whole = left >= kLanes;
      const Vec h = whole ? load_finite_half(scale + c) : load_finite_half_part(scale + c, left);
      for (int64_t t = 0; t < tokens; ++t) {
        const float* from = x + t * w.d_in + c;
        store(scaled + (path * tokens + t) * padded + c,
              h * (whole ? load(from) : load_part(from, left)));
      }
    }
  }
  for (int64_t row = row_begin; row < row_end; row += kWide) {
    const int64_t rows = smaller(kWide, row_end - row);
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
      binary_tokens<4>(w, words, row, rows, scaled + t * padded, tokens * padded, y + t * w.d_out);
    }
    for (; t + 2 <= tokens; t += 2) {
      binary_tokens<2>(w, words, row, rows, scaled + t * padded, tokens * padded, y + t * w.d_out);
    }
    for (; t < tokens; ++t) {
      binary_tokens<1>(w, words, row, rows, scaled + t * padded, tokens * padded, y + t * w.d_out);
    }
  }
}

template <int kPaths, typename Signs>
void binary_many_paths(const LinearWeights& w, const float* x, int64_t tokens, float* y,
                       int64_t row_begin, int64_t row_end, float* scratch) {
  const int64_t words = (w.d_in + 31) / 32;
  float* h = scratch + kGemmScratch;
  decode_columns(w, words * 32, h);
  const BinaryRows<kPaths, Signs> rows = {Signs(w), w.row_scale, h, w.d_out, words * 32};
  gemm(rows, w.d_out, w.d_in, x, tokens, y, row_begin, row_end, scratch);
}

/// Signs: the reader of the signs' order, of gemm.h.
template <typename Signs>
void binary_many(const LinearWeights& w, const float* x, int64_t tokens, float* y,
                 int64_t row_begin, int64_t row_end, float* scratch) {
  switch (w.paths) {
    case 1:
      return binary_many_paths<1, Signs>(w, x, tokens, y, row_begin, row_end, scratch);
    case 2:
      return binary_many_paths<2, Signs>(w, x, tokens, y, row_begin, row_end, scratch);
    case 3:
      return binary_many_paths<3, Signs>(w, x, tokens, y, row_begin, row_end, scratch);
    case 4:
      return binary_many_paths<4, Signs>(w, x, tokens, y, row_begin, row_end, scratch);
    default:
      __builtin_unreachable();
  }
}

void dense(const LinearWeights& w, const float* x, int64_t tokens, float* y, int64_t row_begin,
           int64_t row_end, float* scratch) {
  const auto product = [&](const auto& rows) {
    tokens <= kFewTokens ? dense_few(rows, w.d_out, w.d_in, x, tokens, y, row_begin, row_end)
                         : gemm(rows, w.d_out, w.d_in, x, tokens, y, row_begin, row_end, scratch);
  };
  switch (w.format) {
    case WeightFormat::kF32:
      return product(FloatRows{static_cast<const float*>(w.dense), w.d_in});
    case WeightFormat::kQ8_0:
      return product(BlockRows<Q8Block>{static_cast<const uint8_t*>(w.dense), w.d_in});
    case WeightFormat::kQ4_0:
      return product(BlockRows<Q4Block>{static_cast<const uint8_t*>(w.dense), w.d_in});
    default:
      return product(FiniteHalfRows{static_cast<const uint16_t*>(w.dense), w.d_in});
  }
}

void matmul(const LinearWeights& w, const float* x, const void* /*input*/, int64_t tokens, float* y,
            int64_t row_begin, int64_t row_end, float* scratch) {
  if (row_begin >= row_end || tokens <= 0) {
    return;
  }
  if (w.format != WeightFormat::kResidualBinary) {
    dense(w, x, tokens, y, row_begin, row_end, scratch);
  } else if (tokens <= kFewTokens) {
    binary_few(w, x, tokens, y, row_begin, row_end, scratch);
  } else {
    binary_many<RowSigns>(w, x, tokens, y, row_begin, row_end, scratch);
  }
}

int64_t no_input(const LinearWeights&, int64_t) { return 0; }

int64_t matmul_scratch(int64_t d_in, int64_t tokens, int64_t paths) {
  const int64_t padded = round_up(d_in, 32);
  return tokens > kFewTokens ? kGemmScratch + paths * padded : paths * tokens * padded;
}

/// For kernels by lookup, whose packed layers go through panels where no input is prepared.
int64_t lookup_scratch(int64_t d_in, int64_t tokens, int64_t paths) {
  return matmul_scratch(d_in, paths > 0 ? larger(tokens, kFewTokens + 1) : tokens, paths);
}

}  // namespace
}  // namespace rabit::RABIT_ISA
