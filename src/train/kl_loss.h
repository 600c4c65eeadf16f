// Distillation loss from the last hidden states, in chunks of tokens, so that logits of a whole
// batch never exist at once.
#pragma once

#include <ATen/core/Tensor.h>

#include "train/network.h"

namespace rabit::train {

/// What the loss of a token is made of, p the teacher's and q the student's distribution at
/// temperature T:
///   (1 - cross_entropy) T^2 [(1 - reverse) KL(p || q) + reverse KL(q || p)]
///     + cross_entropy * (-log q_1(next token)), q_1 at temperature 1.
/// T^2 keeps the gradient's size (Hinton et al., arXiv 1503.02531).
struct LossShares {
  double reverse = 0.0;
  double temperature = 1.0;
  double cross_entropy = 0.0;
};

struct DistillationLoss {
  at::Tensor loss;  // () float32, with a graph
  at::Tensor nll;   // (2) float64: mean -log p(next token) of the student and of the teacher
};

/// Logits of each model that exist at once.
inline constexpr int64_t kChunkLogits = int64_t{1} << 26;

/// Mean loss over tokens in nats, both distributions from the same frozen head. student, teacher:
/// normalised hidden states (tokens, d_model) in the compute type; next (tokens) int64, the token
/// that follows each, -1 where none is known (it counts in no cross-entropy). Gradients flow to
/// `student` only. At most `chunk_logits` logits of each model exist at once, but a token's at
/// least.
DistillationLoss distillation_loss(const at::Tensor& student, const at::Tensor& teacher,
                                   const at::Tensor& head, const at::Tensor& next,
                                   const LossShares& shares = {},
                                   int64_t chunk_logits = kChunkLogits);

}  // namespace rabit::train
