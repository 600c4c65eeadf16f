// Divergence from logits: p (log p - log q) summed over the vocabulary, log p = logit - log sum
// exp.
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

Divergence divergence_of(std::span<const float> teacher, std::span<const float> student,
                         int32_t next) {
  const double of_teacher = log_sum(teacher), of_student = log_sum(student);
  double sum = 0;
  for (size_t i = 0; i < teacher.size(); ++i) {
    const double log_p = teacher[i] - of_teacher;
    sum += std::exp(log_p) * (log_p - (student[i] - of_student));
  }
  const auto top = [](std::span<const float> logits) {
    return std::max_element(logits.begin(), logits.end()) - logits.begin();
  };
  return {.teacher_nll = of_teacher - teacher[static_cast<size_t>(next)],
          .kl = sum < 0 ? 0 : sum,  // by rounding
          .same_top = top(teacher) == top(student)};
}

void DivergenceResult::add(const Divergence& position) {
  ++positions;
  mean_kl += (position.kl - mean_kl) / static_cast<double>(positions);
  teacher_nll += (position.teacher_nll - teacher_nll) / static_cast<double>(positions);
  largest_kl = position.kl > largest_kl || std::isnan(position.kl) ? position.kl : largest_kl;
  same_top += position.same_top ? 1 : 0;
}

}  // namespace rabit
