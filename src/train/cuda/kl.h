// The distillation loss of logits and its gradient in one kernel, without an array beside the
// logits.
#pragma once

#include <cstdint>

#include "train/cuda/types.h"

namespace rabit::cuda {

/// What a row's loss is made of; LossShares in train/kl_loss.h has the formula. The weights hold
/// all that is constant: the share, and one over the tokens or the known successors.
struct KlShares {
  float reverse;  // of KL(student || teacher) in the divergence
  float temperature;
  float divergence_weight;  // of T^2 times the divergence
  float entropy_weight;     // of the cross entropy, where the successor is known
};

/// Replaces the student's logits by the gradient of the weighted loss. student, teacher
/// (rows, vocab) bf16; next (rows), the token that follows or -1; sums (rows, 3) float32 gets the
/// row's divergence (without T^2 and weight), and the cross entropies of student and teacher at
/// temperature 1, 0 where the successor is not known. False: the launch failed.
bool kl_backward(int64_t rows, int64_t vocab, const KlShares& shares, Bf16* student,
                 const Bf16* teacher, const int64_t* next, float* sums, Stream stream);

}  // namespace rabit::cuda
