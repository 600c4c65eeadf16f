// How far one model's predictions are from another's.
#pragma once

#include <cstdint>
#include <span>

namespace rabit {

/// At one position.
struct Divergence {
  double teacher_nll = 0;  // of the text's next token, nats
  double kl = 0;           // D_KL(softmax(teacher) || softmax(student)) in nats, at least 0
  bool same_top = false;   // both find the same token most likely
};

/// From logits of one length, with sums in double; next: the token that follows in the text. Not
/// finite where a logit is not.
Divergence divergence_of(std::span<const float> teacher, std::span<const float> student,
                         int32_t next);

/// Over positions.
struct DivergenceResult {
  int64_t positions = 0;
  double teacher_nll = 0;  // mean, nats a token
  double mean_kl = 0;      // nats a token
  double largest_kl = 0;
  int64_t same_top = 0;  // positions where both find the same token most likely

  void add(const Divergence& position);
};

}  // namespace rabit
