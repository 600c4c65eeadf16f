// Distillation loss from the last hidden states, in chunks of tokens, so that logits of a whole
// batch never exist at once.
#pragma once

#include <ATen/core/Tensor.h>

#include "train/network.h"

namespace rabit::train {

/// Mean over tokens of KL(teacher || student) in nats, temperature 1, both distributions from the
/// same frozen head. student, teacher: normalised hidden states (tokens, d_model) in the compute
/// type; gradients flow to `student` only. Source: Hinton et al., arXiv 1503.02531.
at::Tensor kl_divergence(const at::Tensor& student, const at::Tensor& teacher,
                         const at::Tensor& head);

}  // namespace rabit::train
