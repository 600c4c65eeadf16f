// How far one model's predictions are from another's.
#pragma once

#include <cstdint>
#include <span>

namespace rabit {

/// D_KL(softmax(teacher) || softmax(student)) in nats, summed in double, at least 0. Not finite
/// where a logit is not.
double kl_divergence(std::span<const float> teacher, std::span<const float> student);

/// Over positions.
struct DivergenceResult {
  int64_t positions = 0;
  double mean_kl = 0;  // nats a token
  double largest_kl = 0;
  int64_t same_top = 0;  // positions where both find the same token most likely

  void add(std::span<const float> teacher, std::span<const float> student);
};

}  // namespace rabit
