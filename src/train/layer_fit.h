// One layer under the second moment of its inputs: scales and signs that minimise
//   E = tr((T - What) H (T - What)^T),
// T (d_out, d_in) what the layer is to compute, H (d_in, d_in) = mean x x^T of its inputs, damped.
#pragma once

#include <ATen/core/Tensor.h>

#include <span>
#include <string>

#include "quant/residual_binary.h"
#include "rabit/result.h"
#include "train/options.h"

namespace rabit {
class ThreadPool;
}

namespace rabit::train {

struct LayerProblem {
  std::string name;            // for messages
  at::Tensor target;           // T (d_out, d_in) float32, on the device of H
  at::Tensor moment;           // H (d_in, d_in) float32, not damped
  std::span<const float> out;  // importance of the rows (d_out), or empty: all ones
};

struct LayerFit {
  at::Tensor latent;     // (d_out, d_in) float32 on the host
  quant::Scales scales;  // float32
  double error = 0.0;    // E / tr(T H T^T), damping included
};

/// H + damp * mean(diag H) I. Errors: a moment that is all zero or not finite.
Result<at::Tensor> damped(const at::Tensor& moment, double damp, const std::string& name);

/// The T that minimises mean |Y - T x|^2 + lambda |T - W|^2, lambda = damp * mean(diag H):
/// T = (D + lambda W) (H + lambda I)^-1 with D = mean Y x^T (d_out, d_in), W the original weight.
Result<at::Tensor> best_target(const at::Tensor& weight, const at::Tensor& cross,
                               const at::Tensor& moment, double damp, const std::string& name);

/// Scales that minimise E for signs B (k, d_out, d_in) float32 held, starting from and written to g
/// (k, d_out) and h (k, d_in), by alternation: g solves k equations a row, h all k d_in at once
/// (left alone where k d_in is beyond kMostColumnUnknowns). row_weight (d_out) or undefined.
void refit_scales(const at::Tensor& b, const at::Tensor& target, const at::Tensor& moment,
                  const at::Tensor& row_weight, int64_t steps, at::Tensor& g, at::Tensor& h);
inline constexpr int64_t kMostColumnUnknowns = 16384;

/// Scales by importance, error feedback, and --ef-rounds times: scales refitted under the signs
/// reached, error feedback again; then --ef-sweeps of coordinate descent. The best round counts.
/// Errors: as damped, and a moment that is not positive definite.
Result<LayerFit> fit_layer(const LayerProblem& problem, int64_t paths,
                           const QuantizeOptions& options, ThreadPool& pool);

/// value^exponent, floored at a thousandth of the mean (a dead column must not get a zero weight),
/// with mean 1.
std::vector<float> importance_from(at::Tensor values, double exponent);

}  // namespace rabit::train
