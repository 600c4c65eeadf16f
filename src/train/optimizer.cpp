#include "train/optimizer.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numbers>
#include <string>
#include <utility>

namespace rabit::train {
namespace {

// Coefficients of the quintic iteration, from the Muon article.
constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315;
constexpr int kNewtonSchulzSteps = 5;
constexpr int kMaxUnusableSteps = 5;  // running, before a phase gives up

at::Tensor wide(const at::Tensor& matrix) {
  return matrix.size(0) > matrix.size(1) ? matrix.t() : matrix;
}

std::vector<at::Tensor> gradients(const std::vector<at::Tensor>& parameters) {
  std::vector<at::Tensor> grads;
  for (const auto& parameter : parameters) {
    if (parameter.grad().defined()) {
      grads.push_back(parameter.grad());
    }
  }
  return grads;
}

}  // namespace

at::Tensor orthogonalize(const at::Tensor& x) {
  at::Tensor y = x / (at::linalg_vector_norm(x, 2, at::IntArrayRef{-2, -1}, true) + 1e-7);
  for (int step = 0; step < kNewtonSchulzSteps; ++step) {
    const at::Tensor gram = at::bmm(y, y.mT());
    const at::Tensor polynomial = at::baddbmm(gram, gram, gram, kB, kC);
    y = at::baddbmm(y, polynomial, y, kA, 1.0);
  }
  return y;
}

Muon::Muon(const std::vector<at::Tensor>& parameters, double momentum, at::ScalarType momentum_type)
    : parameters_(parameters), decay_(momentum), momentum_type_(momentum_type) {
  std::map<std::pair<int64_t, int64_t>, std::vector<Slice>> by_size;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& p = parameters_[i];
    const int64_t slices = p.dim() == 3 ? p.size(0) : 1;
    for (int64_t s = 0; s < slices; ++s) {
      by_size[std::minmax(p.size(-2), p.size(-1))].push_back({i, s});
    }
  }
  for (const auto& [size, slices] : by_size) {
    const auto at_once =
        static_cast<size_t>(std::max<int64_t>(1, kMuonElements / (size.first * size.second)));
    for (size_t begin = 0; begin < slices.size(); begin += at_once) {
      const auto first = slices.begin() + static_cast<std::ptrdiff_t>(begin);
      const size_t count = std::min(at_once, slices.size() - begin);
      batches_.emplace_back(first, first + static_cast<std::ptrdiff_t>(count));
    }
  }
}

at::Tensor Muon::matrix(const at::Tensor& parameter, const Slice& slice) {
  return parameter.dim() == 3 ? parameter.select(0, slice.index) : parameter;
}

void Muon::step_together(const std::vector<Slice>& slices, double learning_rate) {
  std::vector<at::Tensor> matrices, grads, momentum, directions;
  for (const Slice& slice : slices) {
    const at::Tensor& parameter = parameters_[slice.parameter];
    matrices.push_back(matrix(parameter, slice));
    grads.push_back(matrix(parameter.grad(), slice));
    momentum.push_back(matrix(momentum_[slice.parameter], slice).to(at::kFloat));
  }
  at::_foreach_lerp_(momentum, grads, 1.0 - decay_);
  for (const at::Tensor& direction : at::_foreach_lerp(grads, momentum, decay_)) {  // Nesterov
    directions.push_back(wide(direction));
  }
  if (momentum_type_ != at::kFloat) {
    for (size_t i = 0; i < slices.size(); ++i) {
      at::Tensor kept = matrix(momentum_[slices[i].parameter], slices[i]);
      kept.copy_(momentum[i]);
    }
  }
  const at::Tensor update = orthogonalize(at::stack(directions).to(at::kBFloat16)).to(at::kFloat);
  const double scale = 0.2 * std::sqrt(static_cast<double>(update.size(2)));
  std::vector<at::Tensor> deltas;
  for (size_t i = 0; i < slices.size(); ++i) {
    const at::Tensor delta = update[static_cast<int64_t>(i)];
    deltas.push_back(matrices[i].size(0) > matrices[i].size(1) ? delta.t() : delta);
  }
  at::_foreach_add_(matrices, deltas, -learning_rate * scale);
}

void Muon::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  if (momentum_.empty()) {
    for (const at::Tensor& parameter : parameters_) {
      momentum_.push_back(at::zeros_like(parameter, parameter.options().dtype(momentum_type_)));
    }
  }
  for (const auto& slices : batches_) {
    step_together(slices, learning_rate);
  }
  clear_gradients(parameters_);
}

void Muon::load_state(const std::vector<at::Tensor>& momentum) {
  momentum_.clear();
  for (size_t i = 0; i < momentum.size(); ++i) {
    momentum_.push_back(momentum[i].to(parameters_[i].device(), momentum_type_,
                                       /*non_blocking=*/false,
                                       /*copy=*/true));
  }
}

AdamW::AdamW(std::vector<at::Tensor> parameters, const Options& options)
    : parameters_(std::move(parameters)), options_(options) {}

void AdamW::update(at::TensorList parameters, at::TensorList grads, at::TensorList means,
                   at::TensorList squares, double learning_rate) const {
  const std::vector<at::Tensor> steps(
      parameters.size(),
      at::full({}, static_cast<double>(state_.steps), means[0].options().dtype(at::kFloat)));
  at::_fused_adamw_(parameters, grads, means, squares, /*max_exp_avg_sqs=*/{}, steps, learning_rate,
                    options_.beta1, options_.beta2, options_.weight_decay, options_.epsilon,
                    /*amsgrad=*/false, /*maximize=*/false);
}

void AdamW::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  if (!state_.mean.defined()) {
    int64_t count = 0;
    for (const auto& parameter : parameters_) {
      count += parameter.numel();
    }
    state_.mean = at::zeros(
        {count}, parameters_.front().options().requires_grad(false).dtype(options_.moments));
    state_.square = at::zeros_like(state_.mean);
  }
  ++state_.steps;
  std::vector<at::Tensor> grads, means, squares;
  int64_t offset = 0;
  for (const auto& parameter : parameters_) {
    const auto part = [&](const at::Tensor& flat) {
      return flat.narrow(0, offset, parameter.numel()).view(parameter.sizes());
    };
    grads.push_back(parameter.grad().contiguous());
    means.push_back(part(state_.mean));
    squares.push_back(part(state_.square));
    offset += parameter.numel();
  }
  if (options_.moments == at::kFloat) {
    update(parameters_, grads, means, squares, learning_rate);
  } else {
    for (size_t i = 0; i < parameters_.size(); ++i) {  // float32 for one at a time
      const at::Tensor mean = means[i].to(at::kFloat), square = squares[i].to(at::kFloat);
      update(parameters_[i], grads[i], mean, square, learning_rate);
      means[i].copy_(mean);
      squares[i].copy_(square);
    }
  }
  clear_gradients(parameters_);
}

void AdamW::load_state(State state) {
  const at::Device device = parameters_.front().device();
  // Copies: what was given may be kept by others.
  const auto own = [&](const at::Tensor& x) { return x.to(device, options_.moments, false, true); };
  state_ = {own(state.mean), own(state.square), state.steps};
}

at::Tensor gradient_norm(const std::vector<at::Tensor>& parameters) {
  std::vector<at::Tensor> norms;
  for (const auto& norm : at::_foreach_norm(gradients(parameters), 2)) {
    norms.push_back(norm);
  }
  return at::linalg_vector_norm(at::stack(norms));
}

void scale_gradients(const std::vector<at::Tensor>& parameters, double factor) {
  at::_foreach_mul_(gradients(parameters), factor);
}

void clear_gradients(const std::vector<at::Tensor>& parameters) {
  for (const auto& parameter : parameters) {
    parameter.mutable_grad().reset();
  }
}

Trainer::Trainer(const QuantizeOptions& options, const std::vector<at::Tensor>& latents,
                 const std::vector<at::Tensor>& scales)
    : scale_adam_(scales, {}), latents_(latents), scales_(scales), clip_(options.clip) {
  const at::ScalarType moments =
      options.momentum == MomentumType::kBF16 ? at::kBFloat16 : at::kFloat;
  if (options.optimizer == Optimizer::kMuon) {
    muon_.emplace(latents, 0.95, moments);
  } else {
    AdamW::Options of_latents;
    of_latents.moments = moments;
    latent_adam_.emplace(latents, of_latents);
  }
}

void Trainer::accumulate(const at::Tensor& loss) {
  loss.backward();
  const at::Tensor value = loss.detach();
  accumulated_ = accumulated_.defined() ? accumulated_ + value : value;
}

Result<Trainer::Step> Trainer::step(const at::Tensor& watched, double latent_rate,
                                    double scale_rate) {
  const at::Tensor values =
      at::stack({std::exchange(accumulated_, at::Tensor()).to(at::kDouble),
                 watched.detach().to(at::kDouble), gradient_norm(scales_).to(at::kDouble),
                 gradient_norm(latents_).to(at::kDouble)})
          .to(at::kCPU);
  const Step step{true, values[1].item<double>(), values[2].item<double>(),
                  values[3].item<double>()};
  if (!std::isfinite(step.loss) || !std::isfinite(values[0].item<double>()) ||
      !std::isfinite(step.gradient_norm) || !std::isfinite(step.latent_gradient_norm)) {
    clear_gradients(latents_);
    clear_gradients(scales_);
    if (++unusable_ == kMaxUnusableSteps) {
      return Error{"the loss or its gradient is not finite in " +
                   std::to_string(kMaxUnusableSteps) + " steps running"};
    }
    return Step{false, step.loss, step.gradient_norm, step.latent_gradient_norm};
  }
  unusable_ = 0;
  if (step.gradient_norm > clip_) {
    scale_gradients(scales_, clip_ / step.gradient_norm);
  }
  if (muon_) {
    muon_->step(latent_rate);
  } else {
    latent_adam_->step(latent_rate);
  }
  scale_adam_.step(scale_rate);
  return step;
}

TrainerState Trainer::state() const {
  TrainerState state{{}, {}, scale_adam_.state()};
  if (!state.scales.mean.defined()) {
    return state;  // no step was usable
  }
  if (muon_) {
    state.momentum = muon_->state();
  } else {
    state.latents = latent_adam_->state();
  }
  return state;
}

void Trainer::load_state(const TrainerState& state) {
  if (!state.scales.mean.defined()) {
    return;
  }
  scale_adam_.load_state(state.scales);
  if (muon_) {
    muon_->load_state(state.momentum);
  } else {
    latent_adam_->load_state(state.latents);
  }
}

double cosine_schedule(double progress, double warmup) {
  progress = std::clamp(progress, 0.0, 1.0);
  if (progress < warmup) {
    return progress / warmup;
  }
  const double t = (progress - warmup) / std::max(1e-12, 1.0 - warmup);
  return 0.5 * (1.0 + std::cos(std::numbers::pi * t));
}

}  // namespace rabit::train
