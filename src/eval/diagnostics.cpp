#include "eval/diagnostics.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

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

Spread spread(std::span<const float> values) {
  Spread out;
  const auto count = static_cast<double>(values.size());
  if (values.empty()) {
    return out;
  }
  out.least = INFINITY;
  for (const float value : values) {
    const double size = std::fabs(value);
    out.mean += size / count;
    out.least = std::min(out.least, size);
    out.largest = std::max(out.largest, size);
    out.negative += (value < 0.0F ? 1.0 : 0.0) / count;
  }
  for (const float value : values) {
    out.deviation += std::pow(std::fabs(value) - out.mean, 2.0) / count;
  }
  out.deviation = std::sqrt(out.deviation);
  return out;
}

namespace {

using nlohmann::json;

json to_json(const PathMoments& moments) {
  json errors = json::array(), alignments = json::array();
  for (int64_t i = 1; i <= moments.paths(); ++i) {
    errors.push_back(moments.relative_error(i));
    alignments.push_back(moments.residual_alignment(i));
  }
  const auto parts = moments.decomposition();
  return {{"error", moments.relative_error(moments.paths())},
          {"error_after_path", errors},
          {"residual_alignment", alignments},
          {"decomposition",
           {{"residual", parts.residual}, {"last", parts.last}, {"cancelled", parts.cancelled}}}};
}

json to_json(const std::vector<Spread>& spreads) {
  json out = json::array();
  for (const Spread& s : spreads) {
    out.push_back({{"mean", s.mean},
                   {"deviation", s.deviation},
                   {"least", s.least},
                   {"largest", s.largest},
                   {"negative", s.negative}});
  }
  return out;
}

json to_json(const LayerDiagnosis& layer) {
  const PathMoments& moments = layer.against_teacher;
  json correlations = json::array();
  for (int64_t i = 1; i <= moments.paths(); ++i) {
    json row = json::array();
    for (int64_t j = 1; j <= moments.paths(); ++j) {
      row.push_back(moments.path_correlation(i, j));
    }
    correlations.push_back(row);
  }
  const bool pair = moments.paths() > 1;
  return {{"layer", layer.name},
          {"d_out", layer.d_out},
          {"d_in", layer.d_in},
          {"paths", moments.paths()},
          {"bits_per_weight",
           static_cast<double>(layer.bits) / static_cast<double>(layer.d_out * layer.d_in)},
          {"path_correlation", pair ? json(moments.path_correlation(1, 2)) : json()},
          {"residual_alignment", pair ? json(layer.on_own_inputs.residual_alignment(2)) : json()},
          {"running_alignment", pair ? json(moments.residual_alignment(2)) : json()},
          {"output_error", moments.relative_error(moments.paths())},
          {"own_error", layer.on_own_inputs.relative_error(layer.on_own_inputs.paths())},
          {"weight_error", layer.weight_error},
          {"turned_signs", layer.turned_signs.empty() ? json() : json(layer.turned_signs)},
          {"path_correlations", correlations},
          {"against_teacher", to_json(moments)},
          {"on_own_inputs", to_json(layer.on_own_inputs)},
          {"row_scales", to_json(layer.row_scales)},
          {"column_scales", to_json(layer.column_scales)}};
}

}  // namespace

json to_json(std::span<const LayerDiagnosis> layers) {
  json list = json::array(), summary = json::object();
  for (const LayerDiagnosis& layer : layers) {
    list.push_back(to_json(layer));
  }
  for (const char* key : {"path_correlation", "residual_alignment", "running_alignment",
                          "output_error", "own_error", "weight_error"}) {
    std::vector<double> values;
    for (const json& layer : list) {
      if (layer[key].is_number()) {
        values.push_back(layer[key].get<double>());
      }
    }
    if (!values.empty()) {
      std::sort(values.begin(), values.end());
      const size_t n = values.size();
      summary[key] = {{"least", values.front()},
                      {"median", 0.5 * (values[(n - 1) / 2] + values[n / 2])},
                      {"largest", values.back()}};
    }
  }
  return {{"layers", list}, {"summary", summary}};
}

}  // namespace rabit
