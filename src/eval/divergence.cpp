#include "eval/divergence.h"

#include <algorithm>
#include <cmath>

namespace rabit {
namespace {

// log(sum(exp(logits))).
double log_sum(std::span<const float> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) {
    sum += std::exp(logit - largest);
  }
  return largest + std::log(sum);
}

}  // namespace

double kl_divergence(std::span<const float> teacher, std::span<const float> student) {
  const double of_teacher = log_sum(teacher), of_student = log_sum(student);
  double sum = 0;
  for (size_t i = 0; i < teacher.size(); ++i) {
    const double log_p = teacher[i] - of_teacher;
    sum += std::exp(log_p) * (log_p - (student[i] - of_student));
  }
  return sum < 0 ? 0 : sum;  // by rounding
}

void DivergenceResult::add(std::span<const float> teacher, std::span<const float> student) {
  const double kl = kl_divergence(teacher, student);
  ++positions;
  mean_kl += (kl - mean_kl) / static_cast<double>(positions);
  largest_kl = kl > largest_kl || std::isnan(kl) ? kl : largest_kl;
  const auto top = [](std::span<const float> logits) {
    return std::max_element(logits.begin(), logits.end()) - logits.begin();
  };
  same_top += top(teacher) == top(student) ? 1 : 0;
}

}  // namespace rabit
