// Path diagnostics of a whole student beside its teacher: docs/diagnose.md.
#pragma once

#include <functional>
#include <vector>

#include "eval/diagnostics.h"
#include "train/fake_quant.h"

namespace rabit::train {

/// A linear layer as it is packed, and how far its signs are from where training began.
struct LayerPaths {
  quant::Shape shape;
  std::vector<uint32_t> signs;  // (k, d_out, ceil(d_in/32))
  quant::Scales scales;
  std::vector<double> turned_signs;  // (k), shares; empty: not known
};

/// A block of the student, from whatever holds it.
struct BlockPaths {
  std::array<LayerPaths, kRoleCount> linear;
  at::Tensor attn_norm, ffn_norm;  // (d_model) float32; undefined: the teacher's
};

using BlockReader = std::function<Result<BlockPaths>(int64_t layer)>;

/// Blocks of a student in training.
BlockPaths block_paths(const StudentBlock& block);

/// Runs teacher and student over `windows` (count, positions) int64, block after block, and
/// measures the first `blocks` blocks' layers; one block's weights exist at once. `progress` hears
/// of every finished block. Errors: the reader's, an interrupt.
Result<std::vector<LayerDiagnosis>> diagnose(const Network& teacher, int64_t blocks,
                                             const BlockReader& student, const at::Tensor& windows,
                                             const std::function<void(int64_t)>& progress);

}  // namespace rabit::train
