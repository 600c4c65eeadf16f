// How the paths of a layer work together, from first and second moments of their outputs: no array
// of outputs is kept, so moments of many texts and devices add up.
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

namespace rabit {

inline constexpr int64_t kMostDiagnosedPaths = 4;

/// Sums over all tokens and features of a layer's outputs: signal 0 is y, what the teacher's layer
/// gives, signal i is y_i, what path i gives.
class PathMoments {
 public:
  explicit PathMoments(int64_t paths) : paths_(paths) {}

  /// `count` values of each signal: their sums (paths + 1) and the sums of their products (paths +
  /// 1, paths + 1), row-major.
  void add(int64_t count, std::span<const double> sums, std::span<const double> products);
  /// The same from the values: signals one after another, (paths + 1, count).
  void add(int64_t count, std::span<const float> signals);

  int64_t paths() const { return paths_; }
  int64_t count() const { return count_; }

  /// Corr(y_i, y_j) over tokens and features, paths counted from 1; 0 where one of them is
  /// constant.
  double path_correlation(int64_t i, int64_t j) const;
  /// Corr(R_{i-1}, y_i), R_{i-1} = y - y_1 - ... - y_{i-1}: whether path i gives what is missing.
  double residual_alignment(int64_t i) const;
  /// mean |y - y_1 - ... - y_i|^2 / mean y^2: what is missing after path i; i = 0 gives 1.
  double relative_error(int64_t i) const;

  /// The mean squared error of all paths in parts of mean y^2:
  ///   mean (y - sum y_i)^2 = mean R_{k-1}^2 + mean y_k^2 - 2 mean R_{k-1} y_k,
  /// what the paths before the last leave, what the last adds, and what of it they cancel.
  struct Decomposition {
    double residual = 0.0, last = 0.0, cancelled = 0.0;
    double error() const { return residual + last - cancelled; }
  };
  Decomposition decomposition() const;

 private:
  static constexpr int64_t kSignals = kMostDiagnosedPaths + 1;
  using Weights = std::array<double, kSignals>;  // of a linear combination of the signals

  Weights residual_after(int64_t i) const;
  Weights path(int64_t i) const;
  double product(const Weights& a, const Weights& b) const;  // mean of the product
  double correlation(const Weights& a, const Weights& b) const;

  int64_t paths_;
  int64_t count_ = 0;
  std::array<double, kSignals> sums_{};
  std::array<std::array<double, kSignals>, kSignals> products_{};
};

/// Size and spread of the scales of one path.
struct Spread {
  double mean = 0.0;                  // of the magnitudes
  double deviation = 0.0;             // standard deviation of the magnitudes
  double least = 0.0, largest = 0.0;  // magnitudes
  double negative = 0.0;              // share of values below zero
};
Spread spread(std::span<const float> values);

/// What is known about one layer of a student.
struct LayerDiagnosis {
  explicit LayerDiagnosis(int64_t paths) : against_teacher(paths), on_own_inputs(paths) {}

  std::string name;  // "blk.0.attn_q"
  int64_t d_out = 0, d_in = 0;
  int64_t bits = 0;             // scales counted
  double weight_error = 0.0;    // |W - What|^2 / |W|^2
  PathMoments against_teacher;  // y: the teacher's layer on the teacher's inputs
  PathMoments on_own_inputs;    // y: the original weight on the inputs that the student has here
  std::vector<double> turned_signs;  // share since training began, by path; empty: not known
  std::vector<Spread> row_scales, column_scales;  // by path
};

/// {"layers": one object a layer, "summary": medians and extremes over the layers};
/// docs/diagnose.md has the keys.
nlohmann::json to_json(std::span<const LayerDiagnosis> layers);

}  // namespace rabit
