#include "eval/diagnostics.h"

#include <cmath>

namespace rabit {

void PathMoments::add(int64_t count, std::span<const double> sums,
                      std::span<const double> products) {
  const int64_t signals = paths_ + 1;
  count_ += count;
  for (int64_t a = 0; a < signals; ++a) {
    sums_[a] += sums[a];
    for (int64_t b = 0; b < signals; ++b) {
      products_[a][b] += products[a * signals + b];
    }
  }
}

void PathMoments::add(int64_t count, std::span<const float> signals) {
  std::array<double, kSignals> sums{};
  std::array<double, kSignals * kSignals> products{};
  const int64_t n = paths_ + 1;
  for (int64_t a = 0; a < n; ++a) {
    for (int64_t i = 0; i < count; ++i) {
      sums[a] += signals[a * count + i];
    }
    for (int64_t b = 0; b < n; ++b) {
      double sum = 0.0;
      for (int64_t i = 0; i < count; ++i) {
        sum += static_cast<double>(signals[a * count + i]) * signals[b * count + i];
      }
      products[a * n + b] = sum;
    }
  }
  add(count, std::span(sums), std::span<const double>(products));
}

PathMoments::Weights PathMoments::residual_after(int64_t i) const {
  Weights weights{};
  weights[0] = 1.0;
  for (int64_t j = 1; j <= i; ++j) {
    weights[j] = -1.0;
  }
  return weights;
}

PathMoments::Weights PathMoments::path(int64_t i) const {
  Weights weights{};
  weights[i] = 1.0;
  return weights;
}

double PathMoments::product(const Weights& a, const Weights& b) const {
  double sum = 0.0;
  for (int64_t i = 0; i < kSignals; ++i) {
    for (int64_t j = 0; j < kSignals; ++j) {
      sum += a[i] * b[j] * products_[i][j];
    }
  }
  return count_ > 0 ? sum / static_cast<double>(count_) : 0.0;
}

double PathMoments::correlation(const Weights& a, const Weights& b) const {
  const auto mean = [&](const Weights& weights) {
    double sum = 0.0;
    for (int64_t i = 0; i < kSignals; ++i) {
      sum += weights[i] * sums_[i];
    }
    return count_ > 0 ? sum / static_cast<double>(count_) : 0.0;
  };
  const double mean_a = mean(a), mean_b = mean(b);
  const double variance_a = product(a, a) - mean_a * mean_a;
  const double variance_b = product(b, b) - mean_b * mean_b;
  if (!(variance_a > 0.0) || !(variance_b > 0.0)) {
    return 0.0;
  }
  return (product(a, b) - mean_a * mean_b) / std::sqrt(variance_a * variance_b);
}

double PathMoments::path_correlation(int64_t i, int64_t j) const {
  return correlation(path(i), path(j));
}

double PathMoments::residual_alignment(int64_t i) const {
  return correlation(residual_after(i - 1), path(i));
}

double PathMoments::relative_error(int64_t i) const {
  const Weights residual = residual_after(i);
  const double whole = product(residual_after(0), residual_after(0));
  return whole > 0.0 ? product(residual, residual) / whole : 0.0;
}

PathMoments::Decomposition PathMoments::decomposition() const {
  const Weights before = residual_after(paths_ - 1), last = path(paths_);
  const double whole = product(residual_after(0), residual_after(0));
  if (!(whole > 0.0)) {
    return {};
  }
  return {product(before, before) / whole, product(last, last) / whole,
          2.0 * product(before, last) / whole};
}

}  // namespace rabit
