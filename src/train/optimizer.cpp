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

Muon::Muon(const std::vector<at::Tensor>& parameters, double momentum)
    : parameters_(parameters), momentum_(momentum) {
  std::map<std::pair<int64_t, int64_t>, std::vector<Slice>> by_size;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& p = parameters_[i];
    const int64_t slices = p.dim() == 3 ? p.size(0) : 1;
    for (int64_t s = 0; s < slices; ++s) {
      by_size[std::minmax(p.size(-2), p.size(-1))].push_back({i, s});
    }
  }
  for (auto& [size, members] : by_size) {
    groups_.push_back({std::move(members), {}});
  }
}

at::Tensor Muon::matrix(const at::Tensor& parameter, const Slice& slice) {
  return parameter.dim() == 3 ? parameter.select(0, slice.index) : parameter;
}

void Muon::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  for (auto& group : groups_) {
    std::vector<at::Tensor> grads;
    for (const Slice& slice : group.members) {
      grads.push_back(wide(matrix(parameters_[slice.parameter].grad(), slice)));
    }
    const at::Tensor grad = at::stack(grads);
    if (!group.momentum.defined()) {
      group.momentum = at::zeros_like(grad);
    }
    group.momentum.lerp_(grad, 1.0 - momentum_);
    const at::Tensor direction = at::lerp(grad, group.momentum, momentum_);  // Nesterov
    const double scale = 0.2 * std::sqrt(static_cast<double>(grad.size(2)));
    const at::Tensor update =
        orthogonalize(direction.to(at::kBFloat16)).to(at::kFloat).mul_(-learning_rate * scale);
    for (size_t m = 0; m < group.members.size(); ++m) {
      const Slice& slice = group.members[m];
      at::Tensor parameter = matrix(parameters_[slice.parameter], slice);
      const at::Tensor delta = update[static_cast<int64_t>(m)];
      parameter.add_(parameter.size(0) > parameter.size(1) ? delta.t() : delta);
    }
  }
  for (auto& parameter : parameters_) {
    parameter.mutable_grad().reset();
  }
}

std::vector<at::Tensor> Muon::state() const {
  std::vector<at::Tensor> momentum(parameters_.size());
  for (const auto& group : groups_) {
    for (size_t m = 0; m < group.members.size() && group.momentum.defined(); ++m) {
      const Slice& slice = group.members[m];
      const at::Tensor& parameter = parameters_[slice.parameter];
      at::Tensor& whole = momentum[slice.parameter];
      if (!whole.defined()) {
        whole = at::empty(parameter.sizes(), parameter.options().requires_grad(false));
      }
      const at::Tensor part = group.momentum[static_cast<int64_t>(m)];
      at::Tensor place = matrix(whole, slice);
      place.copy_(place.size(0) > place.size(1) ? part.t() : part);
    }
  }
  return momentum;
}

void Muon::load_state(const std::vector<at::Tensor>& momentum) {
  for (auto& group : groups_) {
    std::vector<at::Tensor> parts;
    for (const Slice& slice : group.members) {
      parts.push_back(
          wide(matrix(momentum[slice.parameter], slice)).to(parameters_[slice.parameter].device()));
    }
    group.momentum = at::stack(parts);
  }
}

AdamW::AdamW(std::vector<at::Tensor> parameters, const Options& options)
    : parameters_(std::move(parameters)), options_(options) {}

void AdamW::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> flat_grads;
  for (const auto& parameter : parameters_) {
    flat_grads.push_back(parameter.grad().flatten());
  }
  const at::Tensor grad = at::cat(flat_grads);
  if (!state_.mean.defined()) {
    state_.mean = at::zeros_like(grad);
    state_.square = at::zeros_like(grad);
  }
  ++state_.steps;
  state_.mean.lerp_(grad, 1.0 - options_.beta1);
  state_.square.mul_(options_.beta2).addcmul_(grad, grad, 1.0 - options_.beta2);
  const double steps = static_cast<double>(state_.steps);
  const double correction1 = 1.0 - std::pow(options_.beta1, steps);
  const double correction2 = 1.0 - std::pow(options_.beta2, steps);
  const at::Tensor denominator = (state_.square / correction2).sqrt_().add_(options_.epsilon);
  const at::Tensor update = (state_.mean / denominator).mul_(-learning_rate / correction1);
  int64_t offset = 0;
  for (auto& parameter : parameters_) {
    if (options_.weight_decay != 0.0) {
      parameter.mul_(1.0 - learning_rate * options_.weight_decay);
    }
    parameter.add_(update.narrow(0, offset, parameter.numel()).view(parameter.sizes()));
    offset += parameter.numel();
    parameter.mutable_grad().reset();
  }
}

void AdamW::load_state(State state) {
  const at::Device device = parameters_.front().device();
  state_ = {state.mean.to(device), state.square.to(device), state.steps};
}

double gradient_norm(const std::vector<at::Tensor>& parameters) {
  std::vector<at::Tensor> norms;
  for (const auto& norm : at::_foreach_norm(gradients(parameters), 2)) {
    norms.push_back(norm);
  }
  return at::linalg_vector_norm(at::stack(norms)).item<double>();
}

void scale_gradients(const std::vector<at::Tensor>& parameters, double factor) {
  at::_foreach_mul_(gradients(parameters), factor);
}

void clear_gradients(const std::vector<at::Tensor>& parameters) {
  for (const auto& parameter : parameters) {
    parameter.mutable_grad().reset();
  }
}

Trainer::Trainer(Optimizer optimizer, const std::vector<at::Tensor>& latents,
                 const std::vector<at::Tensor>& scales, double clip)
    : scale_adam_(scales, {}), latents_(latents), scales_(scales), clip_(clip) {
  if (optimizer == Optimizer::kMuon) {
    muon_.emplace(latents);
  } else {
    latent_adam_.emplace(latents, AdamW::Options());
  }
}

Result<Trainer::Step> Trainer::step(const at::Tensor& loss, const at::Tensor& watched,
                                    double latent_rate, double scale_rate) {
  loss.backward();
  const at::Tensor values = at::stack({loss.detach(), watched.detach()}).to(at::kCPU, at::kDouble);
  const Step step{true, values[1].item<double>(), gradient_norm(scales_)};
  if (!std::isfinite(step.loss) || !std::isfinite(values[0].item<double>()) ||
      !std::isfinite(step.gradient_norm)) {
    clear_gradients(latents_);
    clear_gradients(scales_);
    if (++unusable_ == kMaxUnusableSteps) {
      return Error{"the loss or its gradient is not finite in " +
                   std::to_string(kMaxUnusableSteps) + " steps running"};
    }
    return Step{false, step.loss, step.gradient_norm};
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
