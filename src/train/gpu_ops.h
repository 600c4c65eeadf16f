// The kernels of src/train/cuda/ under autograd, and a decoder block made of them. In builds for
// GPUs; tests run the same on the CPU over an emulator of the kernels' language.
#pragma once

#include <ATen/core/Tensor.h>

#include <span>
#include <utility>

#include "train/kl_loss.h"
#include "train/network.h"

namespace rabit::train {

/// One coupled layer's leaves: latent (d_out, d_in), g (k, d_out), h (k, d_in), float32.
struct CoupledLeaves {
  at::Tensor latent, g, h;
};

/// Weights of layers with the same inputs, one below the other: (sum of d_out, d_in) in `compute`,
/// with the gradients of fake_quant_weight.
at::Tensor gpu_coupled_weights(std::span<const CoupledLeaves> layers, at::ScalarType compute);

/// Packs the layer's signs into `packed` (k, d_out, words) int32, which held earlier ones, as
/// quant::coupled_signs does. Returns how many differ, a number int64 on the device.
at::Tensor gpu_coupled_signs(const CoupledLeaves& layer, const at::Tensor& packed);

/// RMSNorm of x (..., d_model) float32 in bf16.
at::Tensor gpu_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon);

/// x + delta in float32, and its RMSNorm in bf16. delta bf16, both (..., d_model).
std::pair<at::Tensor, at::Tensor> gpu_add_norm(const at::Tensor& x, const at::Tensor& delta,
                                               const at::Tensor& weight, double epsilon);

/// Turns queries and keys in qkv (S, T, d_q + 2 d_kv) bf16 by their positions; values stay. Pairs
/// of features keep their places.
at::Tensor gpu_rotate(const ModelConfig& config, const Rotary& rotary, const at::Tensor& qkv);

/// silu(gate) * up from both (..., 2 d_ff) bf16, gate first: (..., d_ff).
at::Tensor gpu_swiglu(const at::Tensor& both);

/// block_forward in bf16, without taps.
at::Tensor gpu_block_forward(const ModelConfig& config, const BlockWeights& block,
                             const Rotary& rotary, const at::Tensor& x);

/// One chunk of tokens of distillation_loss: the sums (tokens, 3) float32 of cuda/kl.h, and the
/// gradient of the weighted loss in place of `student`'s logits. student, teacher (tokens, vocab)
/// bf16, next (tokens) int64.
at::Tensor gpu_kl_backward(const at::Tensor& student, const at::Tensor& teacher,
                           const at::Tensor& next, const LossShares& shares,
                           double divergence_weight, double entropy_weight);

}  // namespace rabit::train
