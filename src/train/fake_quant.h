// Coupled binarization under autograd: the dense weight that a packed layer stands for, from its
// latent, every step anew.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "quant/residual_binary.h"
#include "train/network.h"

namespace rabit::train {

/// One linear layer in training: leaves of the graph, float32, on the training device.
struct StudentLinear {
  quant::Shape shape;
  at::Tensor latent;  // W (d_out, d_in)
  at::Tensor g;       // (k, d_out)
  at::Tensor h;       // (k, d_in)

  bool defined() const { return latent.defined(); }
};

using StudentBlock = std::array<StudentLinear, kRoleCount>;

/// What (d_out, d_in) in `compute`, with gradients for latent (straight-through), g and h
/// (docs/training.md). The CPU runs quant/'s own code, other devices the same
/// arithmetic in torch operations, equal to the bit in float32.
at::Tensor coupled_weight(const StudentLinear& linear, at::ScalarType compute);

/// The torch operations on any device; exposed so that a test can hold both paths equal.
at::Tensor coupled_weight_by_operations(const StudentLinear& linear, at::ScalarType compute);

/// The weights of a block as its student computes them; norms are the teacher's.
BlockWeights student_weights(const StudentBlock& student, const BlockWeights& teacher,
                             at::ScalarType compute);

struct Student {
  std::vector<StudentBlock> blocks;
};

/// Leaves of the graph, in one fixed order: latents, then scales.
std::vector<at::Tensor> latents(const Student& student, size_t begin_block, size_t end_block);
std::vector<at::Tensor> scale_tensors(const Student& student, size_t begin_block, size_t end_block);

/// The float scales, on the host.
quant::Scales host_scales(const StudentLinear& linear);

}  // namespace rabit::train
