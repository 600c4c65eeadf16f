#include "train/layer_fit.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "base/interrupt.h"
#include "base/threads.h"
#include "train/host_tensor.h"

namespace rabit::train {
namespace {

constexpr double kRidge = 1e-5;  // of the normal equations' mean diagonal
constexpr int64_t kRefitSteps = 1;

Error not_definite(const std::string& name) {
  return Error{name +
               ": the second moment of the inputs is not positive definite; raise --ef-damp or "
               "--calib-tokens"};
}

// Upper Cholesky factor of the inverse of the damped H, (d, d) float64.
Result<at::Tensor> inverse_factor(const at::Tensor& damped_moment, const std::string& name) {
  const auto [factor, info] = at::linalg_cholesky_ex(damped_moment.to(at::kDouble));
  if (info.item<int64_t>() == 0) {
    const auto [upper, info2] =
        at::linalg_cholesky_ex(at::cholesky_inverse(factor), /*upper=*/true);
    if (info2.item<int64_t>() == 0) {
      return upper;
    }
  }
  return not_definite(name);
}

// tr(E H E^T), rows weighted where a weight (d_out) is given.
double quadratic(const at::Tensor& error, const at::Tensor& moment, const at::Tensor& row_weight) {
  const at::Tensor rows = (at::matmul(error, moment) * error).sum(1, false, at::kDouble);
  return (row_weight.defined() ? rows * row_weight : rows).sum().item<double>();
}

// Signs (k, d_out, d_in) as +-1 float32 on the host.
at::Tensor sign_tensor(const quant::Shape& shape, const std::vector<uint32_t>& words) {
  at::Tensor b = at::empty({shape.paths, shape.d_out, shape.d_in}, at::kFloat);
  float* out = b.mutable_data_ptr<float>();
  const int64_t stride = (shape.d_in + 31) / 32;
  for (int64_t row = 0; row < shape.paths * shape.d_out; ++row) {
    for (int64_t c = 0; c < shape.d_in; ++c) {
      const bool positive = (words[row * stride + c / 32] >> (c % 32) & 1U) != 0U;
      out[row * shape.d_in + c] = positive ? 1.0F : -1.0F;
    }
  }
  return b;
}

}  // namespace

std::vector<float> importance_from(at::Tensor values, double exponent) {
  values = values.to(at::kDouble);
  values = at::clamp_min(values, std::max(values.mean().item<double>() * 1e-3, 1e-30));
  values = at::pow(values / values.mean(), exponent);
  return to_vector(values / values.mean());
}

Result<at::Tensor> damped(const at::Tensor& moment, double damp, const std::string& name) {
  const double mean = moment.diagonal().mean().item<double>();
  if (!std::isfinite(mean) || mean <= 0.0) {
    return Error{name +
                 ": the calibration inputs of this layer are all zero or not finite; give "
                 "other text"};
  }
  at::Tensor out = moment.clone();
  out.diagonal().add_(damp * mean);
  return out;
}

Result<at::Tensor> best_target(const at::Tensor& weight, const at::Tensor& cross,
                               const at::Tensor& moment, double damp, const std::string& name) {
  RABIT_ASSIGN(const at::Tensor h, damped(moment, damp, name));
  const double lambda = damp * moment.diagonal().mean().item<double>();
  const auto [factor, info] = at::linalg_cholesky_ex(h.to(at::kDouble));
  if (info.item<int64_t>() != 0) {
    return not_definite(name);
  }
  const at::Tensor rhs = cross.to(at::kDouble) + weight.to(at::kDouble) * lambda;
  return at::cholesky_solve(rhs.t(), factor).t().to(at::kFloat).contiguous();
}

void refit_scales(const at::Tensor& b, const at::Tensor& target, const at::Tensor& moment,
                  const at::Tensor& row_weight, int64_t steps, at::Tensor& g, at::Tensor& h) {
  const int64_t paths = b.size(0), d_in = b.size(2);
  const at::Tensor target_moment = at::matmul(target, moment);  // (d_out, d_in)
  const auto solve = [](const at::Tensor& a, const at::Tensor& rhs) {
    const at::Tensor diagonal = a.diagonal(0, -2, -1);
    diagonal.add_(diagonal.mean(-1, true) * kRidge + 1e-30);
    const auto [factor, info] = at::linalg_cholesky_ex(a);
    const at::Tensor x = info.any().item<bool>() ? at::linalg_solve(a, rhs.unsqueeze(-1))
                                                 : at::cholesky_solve(rhs.unsqueeze(-1), factor);
    return x.squeeze(-1);
  };
  for (int64_t step = 0; step < steps; ++step) {
    const at::Tensor v = (b * h.unsqueeze(1)).transpose(0, 1);  // (d_out, k, d_in)
    const at::Tensor gram = at::matmul(at::matmul(v, moment), v.mT());
    const at::Tensor row_rhs = at::matmul(v, target_moment.unsqueeze(-1)).squeeze(-1);
    g = solve(gram.to(at::kDouble), row_rhs.to(at::kDouble)).to(at::kFloat).t().contiguous();
    if (paths * d_in > kMostColumnUnknowns) {
      continue;
    }
    at::Tensor p = b * g.unsqueeze(2);  // (k, d_out, d_in)
    const at::Tensor weighted = row_weight.defined() ? p * row_weight.unsqueeze(1) : p;
    const at::Tensor rhs = (weighted * target_moment).sum(1).reshape({paths * d_in});
    p = p.transpose(0, 1).reshape({-1, paths * d_in});
    const at::Tensor w = weighted.transpose(0, 1).reshape({-1, paths * d_in});
    const at::Tensor system = at::matmul(w.t(), p) * moment.repeat({paths, paths});
    h = solve(system, rhs).view({paths, d_in});
  }
}

Result<LayerFit> fit_layer(const LayerProblem& problem, int64_t paths,
                           const QuantizeOptions& options, ThreadPool& pool) {
  const quant::Shape shape = {problem.target.size(0), problem.target.size(1), paths};
  const at::Device device = problem.moment.device();
  RABIT_ASSIGN(at::Tensor moment, damped(problem.moment, options.ef_damp, problem.name));
  // Columns in the order in which they are rounded.
  at::Tensor order = at::arange(shape.d_in, at::TensorOptions().device(device).dtype(at::kLong));
  if (options.ef_order == ColumnOrder::kDiagonal) {
    order = at::argsort(moment.diagonal(), /*stable=*/true, /*dim=*/0, /*descending=*/true);
  }
  const at::Tensor back = at::argsort(order);
  moment = moment.index_select(0, order).index_select(1, order).contiguous();
  const at::Tensor target = problem.target.index_select(1, order).contiguous();
  RABIT_ASSIGN(const at::Tensor factor, inverse_factor(moment, problem.name));
  const at::Tensor u = factor.to(at::kCPU, at::kFloat).contiguous();
  const at::Tensor host_moment = moment.to(at::kCPU).contiguous();
  const at::Tensor host_target = target.to(at::kCPU).contiguous();
  at::Tensor row_weight;
  if (!problem.out.empty()) {
    row_weight = to_tensor({problem.out.begin(), problem.out.end()}, {shape.d_out}).square();
    row_weight = row_weight.to(device);
  }
  const double whole = std::max(quadratic(target, moment, row_weight), 1e-300);

  const std::vector<float> s_in =
      importance_from(problem.moment.diagonal().sqrt().index_select(0, order), options.alpha_in);
  quant::Scales scales = quant::fit_scales(shape, host_target.const_data_ptr<float>(), problem.out,
                                           s_in, {options.init_sweeps, options.als_steps}, pool);
  LayerFit best;
  best.error = INFINITY;
  const auto consider = [&](const at::Tensor& latent, const quant::Scales& with) {
    at::Tensor what = at::empty_like(latent);
    quant::coupled_forward(shape, latent.const_data_ptr<float>(), with.g.data(), with.h.data(), 0,
                           shape.d_out, what.mutable_data_ptr<float>());
    const at::Tensor error = target - what.to(device);
    const double value = quadratic(error, moment, row_weight) / whole;
    if (value < best.error || !best.latent.defined()) {
      best = {latent.clone(), with, value};
    }
    return error;
  };
  for (int64_t round = 0; round <= options.ef_rounds; ++round) {
    RABIT_CHECK(check_interrupt());
    at::Tensor latent = host_target.clone();
    float* w = latent.mutable_data_ptr<float>();
    quant::error_feedback(shape, w, scales, u.const_data_ptr<float>(), pool);
    at::Tensor error = consider(latent, scales);
    const auto descend = [&] {
      if (options.ef_sweeps > 0) {
        at::Tensor product = at::matmul(error, moment).to(at::kCPU).contiguous();
        quant::coordinate_descent(shape, host_moment.const_data_ptr<float>(), scales,
                                  options.ef_sweeps, product.mutable_data_ptr<float>(), w, pool);
        error = consider(latent, scales);
      }
    };
    descend();
    if (round == options.ef_rounds) {
      break;
    }
    const auto signs = quant::coupled_signs(shape, w, scales);
    at::Tensor g = to_tensor(scales.g, {paths, shape.d_out}).to(device);
    at::Tensor h = to_tensor(scales.h, {paths, shape.d_in}).to(device);
    refit_scales(sign_tensor(shape, signs).to(device), target, moment, row_weight, kRefitSteps, g,
                 h);
    scales = {to_vector(g), to_vector(h)};
    quant::settle(shape, signs, scales, w);
    error = consider(latent, scales);
    descend();
  }
  best.latent = best.latent.index_select(1, back.to(at::kCPU)).contiguous();
  const at::Tensor h = to_tensor(best.scales.h, {paths, shape.d_in});
  best.scales.h = to_vector(h.index_select(1, back.to(at::kCPU)));
  return best;
}

}  // namespace rabit::train
