// Coupled binarization under autograd: the dense weight that a packed layer stands for, from its
// latent, every step anew.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "quant/residual_binary.h"
#include "train/network.h"
#include "train/options.h"

namespace rabit::train {

class Ranks;

/// One linear layer in training: leaves of the graph, float32, on the training device.
struct StudentLinear {
  quant::Shape shape;
  /// Coupled: W (d_out, d_in), from which all paths follow in order. Independent: (k, d_out, d_in),
  /// each path the sign of its own.
  at::Tensor latent;
  at::Tensor g;                       // (k, d_out)
  at::Tensor h;                       // (k, d_in)
  int64_t held_paths = 0;             // independent: latents of the first that are not trained
  std::vector<uint32_t> start_signs;  // as student_signs() gave them before any training

  bool defined() const { return latent.defined(); }
  bool independent() const { return latent.dim() == 3; }
};

/// One block of the student. Norms (d_model) float32 are leaves of the graph where they are
/// trained, undefined where they stay the teacher's.
struct StudentBlock {
  std::array<StudentLinear, kRoleCount> linear;
  at::Tensor attn_norm, ffn_norm;
  // Where the block is shared out (train/shards.h): among these processes, the layers' rows in all;
  // `linear` has those of this one.
  std::shared_ptr<Ranks> ranks;
  std::array<int64_t, kRoleCount> rows{};

  StudentLinear& operator[](Role role) { return linear[index_of(role)]; }
  const StudentLinear& operator[](Role role) const { return linear[index_of(role)]; }
};

/// What a method makes of a start: a coupled latent (d_out, d_in) and scales g (k, d_out), h (k,
/// d_in), float32 on any device. Independent latents begin as what is left for each path.
StudentLinear make_student_linear(Method method, const at::Tensor& latent, const at::Tensor& g,
                                  const at::Tensor& h, at::Device device);

/// The same from tensors that are its own latents already, in the middle of a training that began
/// with `start_signs`.
StudentLinear restore_student_linear(Method method, const at::Tensor& latent, const at::Tensor& g,
                                     const at::Tensor& h, std::vector<uint32_t> start_signs,
                                     at::Device device);

/// What (d_out, d_in) in `compute`, with gradients for latent (straight-through), g and h
/// (docs/training.md). The CPU runs quant/'s own code, a GPU a kernel with the same
/// arithmetic, equal to the bit in float32. Independent paths are k layers of
/// one path, added.
at::Tensor fake_quant_weight(const StudentLinear& linear, at::ScalarType compute);

/// The coupled weight in torch operations on any device; exposed so that a test can hold both
/// equal.
at::Tensor coupled_weight_by_operations(const StudentLinear& linear, at::ScalarType compute);

/// Signs as they are packed: (k, d_out, ceil(d_in/32)).
std::vector<uint32_t> student_signs(const StudentLinear& linear);

/// Share of each path's signs that training has turned, (k); `now` as student_signs() gives them.
std::vector<double> turned_signs(const StudentLinear& linear, std::span<const uint32_t> now);

/// The weights of a block as its student computes them; what it has none of is the teacher's.
BlockWeights student_weights(const StudentBlock& student, const BlockWeights& teacher,
                             at::ScalarType compute);

/// A block's norms with their names in a file, less ".weight". Block: StudentBlock, const or not.
template <typename Block>
auto block_norms(Block& block, int64_t layer) {
  const std::string prefix = "blk." + std::to_string(layer) + ".";
  return std::array{std::pair{prefix + "attn_norm", &block.attn_norm},
                    std::pair{prefix + "ffn_norm", &block.ffn_norm}};
}

struct Student {
  std::vector<StudentBlock> blocks;
  at::Tensor output_norm;  // (d_model), as a block's norms

  StudentLinear& at(int64_t layer, Role role) { return blocks[static_cast<size_t>(layer)][role]; }
  const StudentLinear& at(int64_t layer, Role role) const {
    return blocks[static_cast<size_t>(layer)][role];
  }
};

/// The student's own last norm, or the teacher's where it has none.
inline const at::Tensor& output_norm(const Student& student, const Network& teacher) {
  return student.output_norm.defined() ? student.output_norm : teacher.output_norm;
}

/// Leaves of the graph that are trained, in one fixed order: the latents of some blocks; and their
/// scales and norms, which share an optimizer.
std::vector<at::Tensor> latents(std::span<const StudentBlock> blocks);
std::vector<at::Tensor> scales_and_norms(std::span<const StudentBlock> blocks);
/// Of the whole student, its last norm among them.
std::vector<at::Tensor> scales_and_norms(const Student& student);

/// The float scales, on the host.
quant::Scales host_scales(const StudentLinear& linear);

}  // namespace rabit::train
