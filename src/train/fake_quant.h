// Coupled binarization under autograd: the dense weight that a packed layer stands for, from its
// latent, every step anew.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "quant/residual_binary.h"
#include "train/network.h"
#include "train/options.h"

namespace rabit::train {

/// One linear layer in training: leaves of the graph, float32, on the training device.
struct StudentLinear {
  quant::Shape shape;
  /// Coupled: W (d_out, d_in), from which all paths follow in order. Independent: (k, d_out, d_in),
  /// each path the sign of its own.
  at::Tensor latent;
  at::Tensor g;            // (k, d_out)
  at::Tensor h;            // (k, d_in)
  int64_t held_paths = 0;  // independent: latents of the first that are not trained

  bool defined() const { return latent.defined(); }
  bool independent() const { return latent.dim() == 3; }
};

using StudentBlock = std::array<StudentLinear, kRoleCount>;

/// Each path has a latent of its own.
constexpr bool has_independent_latents(Method method) {
  return method == Method::kStandard || method == Method::kMbok;
}

/// What a method makes of a start: a coupled latent (d_out, d_in) and scales g (k, d_out), h (k,
/// d_in), float32 on any device. Independent latents begin as what is left for each path.
StudentLinear make_student_linear(Method method, const at::Tensor& latent, const at::Tensor& g,
                                  const at::Tensor& h, at::Device device);

/// The same from tensors that are its own latents already.
StudentLinear restore_student_linear(Method method, const at::Tensor& latent, const at::Tensor& g,
                                     const at::Tensor& h, at::Device device);

/// What (d_out, d_in) in `compute`, with gradients for latent (straight-through), g and h
/// (docs/training.md). The CPU runs quant/'s own code, other devices the same
/// arithmetic in torch operations, equal to the bit in float32. Independent paths are k layers of
/// one path, added.
at::Tensor fake_quant_weight(const StudentLinear& linear, at::ScalarType compute);

/// The coupled weight in torch operations on any device; exposed so that a test can hold both
/// equal.
at::Tensor coupled_weight_by_operations(const StudentLinear& linear, at::ScalarType compute);

/// Signs as they are packed: (k, d_out, ceil(d_in/32)).
std::vector<uint32_t> student_signs(const StudentLinear& linear);

/// The weights of a block as its student computes them; norms are the teacher's.
BlockWeights student_weights(const StudentBlock& student, const BlockWeights& teacher,
                             at::ScalarType compute);

struct Student {
  std::vector<StudentBlock> blocks;
};

/// Leaves of the graph that are trained, in one fixed order: latents, then scales.
std::vector<at::Tensor> latents(const Student& student, size_t begin_block, size_t end_block);
std::vector<at::Tensor> scale_tensors(const Student& student, size_t begin_block, size_t end_block);

/// The float scales, on the host.
quant::Scales host_scales(const StudentLinear& linear);

}  // namespace rabit::train
