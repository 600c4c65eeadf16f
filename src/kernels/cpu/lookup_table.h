// The table of kernels by lookup: packed layers by what the including file defines, Q8_0 by dot
// products (byte_products.h), all else by the portable code. Included once, last, by each file that
// defines RABIT_ISA, RABIT_LANES, RABIT_NAME and, in the namespace RABIT_ISA, what is listed below;
// nothing but `kTable` leaves it.
//
//   kSignOrder       the order of packed signs, Signs their reader for gemm.h
//   path_bytes       (words): of the prepared input of a token and path
//   prepare_signs    as KernelTable::prepare, for packed layers
//   matmul_of_signs  (w, input, tokens, y, row_begin, row_end): as KernelTable::matmul, for them
#pragma once

#include "kernels/cpu/byte_products.h"
#include "kernels/cpu/portable_table.h"

namespace rabit::RABIT_ISA {
namespace {

// Their tables, up to 14 MiB at 28,672 columns, stay in the third-level cache, while weights come
// from memory once for all of them.
constexpr int64_t kGroupTokens = 32;

int64_t input_bytes(const LinearWeights& w, int64_t tokens) {
  switch (w.format) {
    case WeightFormat::kResidualBinary:
      return tokens * w.paths * path_bytes((w.d_in + 31) / 32);
    case WeightFormat::kQ8_0:
      return tokens * blocks_bytes(w.d_in);
    default:
      return 0;
  }
}

void prepare(const LinearWeights& w, const float* x, int64_t tokens, void* input,
             int64_t word_begin, int64_t word_end) {
  auto* out = static_cast<uint8_t*>(input);
  w.format == WeightFormat::kQ8_0 ? prepare_blocks(w, x, tokens, out, word_begin, word_end)
                                  : prepare_signs(w, x, tokens, out, word_begin, word_end);
}

void matmul_by_lookup(const LinearWeights& w, const float* x, const void* input, int64_t tokens,
                      float* y, int64_t row_begin, int64_t row_end, float* scratch) {
  if (row_begin >= row_end || tokens <= 0) {
    return;
  }
  const auto* in = static_cast<const uint8_t*>(input);
  if (w.format == WeightFormat::kQ8_0 && input != nullptr) {
    matmul_of_blocks(w, in, tokens, y, row_begin, row_end);
  } else if (w.format != WeightFormat::kResidualBinary) {
    dense(w, x, tokens, y, row_begin, row_end, scratch);
  } else if (input == nullptr) {
    binary_many<Signs>(w, x, tokens, y, row_begin, row_end, scratch);
  } else {
    matmul_of_signs(w, in, tokens, y, row_begin, row_end);
  }
}

}  // namespace

extern const KernelTable kTable;
constinit const KernelTable kTable = [] {
  KernelTable table = portable_table();
  table.sign_order = kSignOrder;
  table.block_order = WeightOrder::kTiles;
  table.input_bytes = input_bytes;
  table.group_tokens = kGroupTokens;
  table.prepare = prepare;
  table.matmul = matmul_by_lookup;
  table.matmul_scratch = lookup_scratch;
  table.matmul_row_grain = 2 * kTileRows;
  return table;
}();

}  // namespace rabit::RABIT_ISA
