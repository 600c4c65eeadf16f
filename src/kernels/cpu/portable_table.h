// The portable kernels of one instruction set as a table; those of an instruction set's own replace
// some of its entries. RABIT_ISA, RABIT_LANES and RABIT_NAME are defined before.
#pragma once

#include "kernels/cpu/attention.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/pointwise.h"

namespace rabit::RABIT_ISA {
namespace {

consteval KernelTable portable_table() {
  return {.name = RABIT_NAME,
          .sign_order = WeightOrder::kRows,
          .block_order = WeightOrder::kRows,
          .input_bytes = no_input,
          .group_tokens = 1,
          .prepare = nullptr,
          .matmul = matmul,
          .matmul_scratch = matmul_scratch,
          .matmul_row_grain = 32,
          .rms_norm = rms_norm,
          .rope = rope,
          .to_cache = to_cache,
          .attention = attention,
          .attention_part = attention_part,
          .merge_parts = merge_parts,
          .attention_scratch = attention_scratch,
          .attention_token_grain = kQueryTokens,
          .swiglu = swiglu,
          .cross_entropy = cross_entropy};
}

}  // namespace
}  // namespace rabit::RABIT_ISA
