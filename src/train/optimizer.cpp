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

Muon::Muon(const std::vector<at::Tensor>& parameters, double momentum, at::ScalarType momentum_type,
           const SharedLeaves& shared)
    : parameters_(parameters), shared_(shared), decay_(momentum), momentum_type_(momentum_type) {
  std::map<std::pair<int64_t, int64_t>, std::vector<Slice>> by_size;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& p = parameters_[i];
    const int64_t slices = p.dim() == 3 ? p.size(0) : 1;
    std::pair<int64_t, int64_t> size = {whole_rows(i), p.size(-1)};
    // Matrices and transposes go together; not where their rows lie on several processes.
    if (!shared_.ranks && size.first > size.second) {
      std::swap(size.first, size.second);
    }
    for (int64_t s = 0; s < slices; ++s) {
      by_size[size].push_back({i, s});
    }
  }
  const int owners = shared_.ranks ? shared_.ranks->size() : 1;
  for (const auto& [size, slices] : by_size) {
    const auto at_once = static_cast<size_t>(
        owners * std::max<int64_t>(1, kMuonElements / (size.first * size.second)));
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

int64_t Muon::whole_rows(size_t parameter) const {
  return shared_.ranks ? shared_.latents[parameter].rows : parameters_[parameter].size(-2);
}

std::vector<at::Tensor> Muon::directions(const std::vector<Slice>& slices) {
  std::vector<at::Tensor> grads, momentum;
  for (const Slice& slice : slices) {
    grads.push_back(matrix(parameters_[slice.parameter].grad(), slice));
    momentum.push_back(matrix(momentum_[slice.parameter], slice).to(at::kFloat));
  }
  at::_foreach_lerp_(momentum, grads, 1.0 - decay_);
  if (momentum_type_ != at::kFloat) {
    for (size_t i = 0; i < slices.size(); ++i) {
      at::Tensor kept = matrix(momentum_[slices[i].parameter], slices[i]);
      kept.copy_(momentum[i]);
    }
  }
  return at::_foreach_lerp(grads, momentum, decay_);  // Nesterov
}

std::vector<at::Tensor> Muon::orthogonal(const std::vector<at::Tensor>& directions) const {
  std::vector<at::Tensor> all, out;
  for (const at::Tensor& direction : directions) {
    all.push_back(wide(direction));
  }
  const at::Tensor update = orthogonalize(at::stack(all).to(at::kBFloat16));
  for (size_t i = 0; i < directions.size(); ++i) {
    const at::Tensor one = update[static_cast<int64_t>(i)];
    out.push_back(directions[i].size(0) > directions[i].size(1) ? one.t() : one);
  }
  return out;
}

std::vector<at::Tensor> Muon::orthogonal_together(const std::vector<at::Tensor>& directions,
                                                  int64_t rows) const {
  Ranks& ranks = *shared_.ranks;
  const int64_t size = ranks.size(), columns = directions.front().size(1);
  const auto count = static_cast<int64_t>(directions.size());
  const int64_t each = rows_each(rows, ranks.size()), places = (count + size - 1) / size;
  // Matrix i goes to process i % size, there to place i / size.
  const at::Tensor parts =
      at::zeros({size, places, each, columns}, directions.front().options().dtype(at::kBFloat16));
  const auto part = [&](const at::Tensor& of, int64_t i) {
    return of[i % size][i / size].narrow(0, 0, directions[static_cast<size_t>(i)].size(0));
  };
  for (int64_t i = 0; i < count; ++i) {
    part(parts, i).copy_(directions[static_cast<size_t>(i)]);
  }
  const at::Tensor swapped = at::empty_like(parts);
  ranks.swap_parts(parts, swapped);
  const at::Tensor whole =
      swapped.transpose(0, 1).reshape({places, size * each, columns}).narrow(1, 0, rows);
  std::vector<at::Tensor> own;
  for (int64_t i = ranks.rank(); i < count; i += size) {
    own.push_back(whole[i / size]);
  }
  if (!own.empty()) {
    const std::vector<at::Tensor> updates = orthogonal(own);
    for (size_t i = 0; i < own.size(); ++i) {
      own[i].copy_(updates[i]);
    }
  }
  const at::Tensor back = at::constant_pad_nd(whole, {0, 0, 0, size * each - rows})
                              .view({places, size, each, columns})
                              .transpose(0, 1)
                              .contiguous();
  ranks.swap_parts(back, parts);
  std::vector<at::Tensor> out;
  for (int64_t i = 0; i < count; ++i) {
    out.push_back(part(parts, i));
  }
  return out;
}

void Muon::step_together(const std::vector<Slice>& slices, double learning_rate) {
  const std::vector<at::Tensor> wanted = directions(slices);
  const int64_t rows = whole_rows(slices.front().parameter);
  const std::vector<at::Tensor> updates =
      shared_.ranks ? orthogonal_together(wanted, rows) : orthogonal(wanted);
  std::vector<at::Tensor> matrices, deltas;
  for (size_t i = 0; i < slices.size(); ++i) {
    matrices.push_back(matrix(parameters_[slices[i].parameter], slices[i]));
    deltas.push_back(updates[i].to(at::kFloat));
  }
  const int64_t longer = std::max(rows, wanted.front().size(1));
  at::_foreach_add_(matrices, deltas,
                    -learning_rate * 0.2 * std::sqrt(static_cast<double>(longer)));
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
                 const std::vector<at::Tensor>& scales, const SharedLeaves& shared)
    : scale_adam_(scales, {}),
      latents_(latents),
      scales_(scales),
      shared_(shared),
      clip_(options.clip) {
  const at::ScalarType moments =
      options.momentum == MomentumType::kBF16 ? at::kBFloat16 : at::kFloat;
  if (options.optimizer == Optimizer::kMuon) {
    muon_.emplace(latents, 0.95, moments, shared);
  } else {
    AdamW::Options of_latents;
    of_latents.moments = moments;
    latent_adam_.emplace(latents, of_latents);
  }
}

void Trainer::accumulate(const at::Tensor& loss) {
  loss.backward();
  if (shared_.ranks) {
    shared_.ranks->finish();
  }
  const at::Tensor value = loss.detach();
  accumulated_ = accumulated_.defined() ? accumulated_ + value : value;
}

void Trainer::sum_copies() {
  std::vector<at::Tensor> copies, grads;
  for (size_t i = 0; i < scales_.size(); ++i) {
    if (shared_.scales[i].dim < 0) {
      copies.push_back(scales_[i]);
      const at::Tensor& grad = scales_[i].grad();
      grads.push_back((grad.defined() ? grad : at::zeros_like(scales_[i].detach())).flatten());
    }
  }
  if (copies.empty()) {
    return;
  }
  const at::Tensor all = at::cat(grads);
  shared_.ranks->sum(all);
  int64_t begin = 0;
  for (const at::Tensor& copy : copies) {
    copy.mutable_grad() = all.narrow(0, begin, copy.numel()).view(copy.sizes());
    begin += copy.numel();
  }
}

std::pair<at::Tensor, at::Tensor> Trainer::squares() {
  const auto square = [](const std::vector<at::Tensor>& leaves) {
    return gradient_norm(leaves).to(at::kDouble).square();
  };
  if (!shared_.ranks) {
    return {square(scales_), square(latents_)};
  }
  std::vector<at::Tensor> rows, copies;
  for (size_t i = 0; i < scales_.size(); ++i) {
    (shared_.scales[i].dim < 0 ? copies : rows).push_back(scales_[i]);
  }
  const at::Tensor sums = at::stack({square(rows), square(latents_)});
  shared_.ranks->sum(sums);
  return {copies.empty() ? sums[0] : sums[0] + square(copies), sums[1]};
}

Result<Trainer::Step> Trainer::step(const at::Tensor& watched, double latent_rate,
                                    double scale_rate) {
  at::Tensor accumulated = std::exchange(accumulated_, at::Tensor()).to(at::kDouble);
  if (shared_.ranks) {
    sum_copies();
    shared_.ranks->sum(accumulated);
  }
  const auto [of_scales, of_latents] = squares();
  const at::Tensor reported = watched.defined() ? watched.detach().to(at::kDouble) : accumulated;
  const at::Tensor values =
      at::stack({accumulated, reported, of_scales.sqrt(), of_latents.sqrt()}).to(at::kCPU);
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
