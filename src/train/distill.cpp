// End to end: the whole student against the teacher's distribution over the next token.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>

#include "base/interrupt.h"
#include "train/kl_loss.h"
#include "train/optimizer.h"
#include "train/session.h"

namespace rabit::train {
namespace {

struct Losses {
  at::Tensor total, divergence;
};

Losses distill_loss(const TrainSession& session, const Student& student, const Rotary& rotary,
                    const at::Tensor& ids) {
  const Network& teacher = session.teacher;
  const ModelConfig& config = session.config();
  const double gamma = session.options.gamma;
  at::Tensor x_teacher, blocks_error;
  std::vector<at::Tensor> outputs;  // the teacher's, kept only if the blocks' error is asked for
  const at::Tensor x0 = [&] {
    const at::NoGradGuard no_grad;
    return embed(teacher, ids);
  }();
  {
    const at::NoGradGuard no_grad;
    x_teacher = x0;
    for (const auto& block : teacher.blocks) {
      x_teacher = block_forward(config, block, rotary, x_teacher, teacher.compute);
      if (gamma > 0.0) {
        outputs.push_back(x_teacher);
      }
    }
    x_teacher = norm(config, x_teacher, teacher.output_norm, teacher.compute);
  }
  at::Tensor x = x0;
  for (size_t b = 0; b < teacher.blocks.size(); ++b) {
    const BlockWeights weights =
        student_weights(student.blocks[b], teacher.blocks[b], teacher.compute);
    x = block_forward(config, weights, rotary, x, teacher.compute);
    if (gamma > 0.0) {
      const at::Tensor error =
          (x - outputs[b]).square().sum(-1) / outputs[b].square().sum(-1).clamp_min(1e-6);
      blocks_error = blocks_error.defined() ? blocks_error + error.mean() : error.mean();
    }
  }
  x = norm(config, x, teacher.output_norm, teacher.compute);
  const QuantizeOptions& options = session.options;
  at::Tensor next;  // the token after each, none after a window's last
  if (options.cross_entropy > 0.0) {
    next = at::full_like(ids, -1);
    next.narrow(1, 0, ids.size(1) - 1).copy_(ids.narrow(1, 1, ids.size(1) - 1));
    next = next.flatten();
  }
  const at::Tensor divergence =
      distillation_loss(x.flatten(0, 1), x_teacher.flatten(0, 1), teacher.head, next,
                        {options.reverse_kl, options.temperature, options.cross_entropy});
  at::Tensor total = divergence;
  if (gamma > 0.0) {
    total = total + blocks_error * (gamma / static_cast<double>(teacher.blocks.size()));
  }
  return {total, divergence.detach()};
}

// The teacher's weights as latents: the same sizes, and finite losses.
Student stand_in(const TrainSession& session) {
  Student student;
  int64_t layer = 0;
  for (const BlockWeights& weights : session.teacher.blocks) {
    StudentBlock& block = student.blocks.emplace_back();
    for (const Role role : kRoles) {
      const at::Tensor latent = weights.linear[index_of(role)].to(at::kFloat);
      const int64_t paths = session.bits.paths(layer, role);
      const auto scale = [&](int64_t extent, double value) {
        return at::full({paths, extent}, value, latent.options());
      };
      block[index_of(role)] = make_student_linear(
          session.options.method, latent, scale(latent.size(0), latent.abs().mean().item<double>()),
          scale(latent.size(1), 1.0), latent.device());
    }
    ++layer;
  }
  return student;
}

constexpr int64_t kMeasuredWindows = 4;  // of a step on a CPU

}  // namespace

at::Tensor WindowOrder::batch(int64_t step, int64_t batch) {
  at::Tensor picks = at::empty({batch}, at::kLong);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t position = step * batch + i;
    if (position / windows_ != epoch_) {
      epoch_ = position / windows_;
      order_ = shuffled(windows_, seed_ + static_cast<uint64_t>(epoch_));
    }
    picks[i] = order_[static_cast<size_t>(position % windows_)];
  }
  return picks;
}

Result<double> measure_distill(const TrainSession& session, int64_t tokens) {
  const QuantizeOptions& options = session.options;
  const Rotary rotary = make_rotary(session.config(), options.seq_len, session.teacher.device);
  const Student student = stand_in(session);
  const std::vector<at::Tensor> matrices = latents(student, 0, student.blocks.size());
  Trainer trainer(options.optimizer, matrices, scale_tensors(student, 0, student.blocks.size()),
                  options.clip);
  const auto seconds_of = [&](int64_t windows) -> Result<double> {
    RABIT_CHECK(check_interrupt());
    const Clock clock;
    const at::Tensor picks = at::arange(windows) % session.windows.size(0);
    const at::Tensor ids = session.windows.index_select(0, picks).to(session.teacher.device);
    const Losses losses = distill_loss(session, student, rotary, ids);
    RABIT_CHECK(trainer.step(losses.total, losses.divergence, 1e-6, 1e-6));
    (void)matrices.back().sum().item<float>();  // a GPU only queues: wait for it
    return clock.elapsed();
  };
  // A GPU needs whole steps to show its speed; on a CPU a step is its windows and the optimizers'.
  const int64_t windows =
      session.teacher.device.is_cuda() ? options.batch : std::min(options.batch, kMeasuredWindows);
  RABIT_CHECK(seconds_of(1));  // pays for what torch sets up once
  double step = 0.0;
  if (windows == options.batch) {
    RABIT_ASSIGN(step, seconds_of(windows));
  } else {
    RABIT_ASSIGN(const double one, seconds_of(1));
    RABIT_ASSIGN(const double some, seconds_of(windows));
    const double a_window = std::max(0.0, some - one) / static_cast<double>(windows - 1);
    step = some + a_window * static_cast<double>(options.batch - windows);
  }
  return step * static_cast<double>(distill_steps(options, tokens));
}

Status distill(TrainSession& session, int64_t tokens, DistillState& state) {
  const QuantizeOptions& options = session.options;
  const size_t blocks = session.student.blocks.size();
  const std::vector<at::Tensor> matrices = latents(session.student, 0, blocks);
  Trainer trainer(options.optimizer, matrices, scale_tensors(session.student, 0, blocks),
                  options.clip);
  trainer.load_state(state.trainer);
  const Rotary rotary = make_rotary(session.config(), options.seq_len, session.teacher.device);
  const int64_t step_tokens = options.batch * options.seq_len;
  const int64_t steps = distill_steps(options, tokens);
  WindowOrder order(session.windows.size(0), static_cast<uint64_t>(options.seed) * 7919 + 1);
  const int64_t first_step = state.step;
  const double time_budget = session.clock.limited() ? session.clock.left() : 0.0;
  const Clock clock(time_budget);
  Clock since_checkpoint;
  std::vector<at::Tensor> average = state.average;
  if (options.ema > 0.0 && average.empty()) {
    for (const auto& matrix : matrices) {
      average.push_back(matrix.detach().clone());
    }
  }
  const auto state_at = [&](int64_t step) { return DistillState{step, trainer.state(), average}; };
  const auto save = [&](int64_t step) {
    const DistillState now = state_at(step);
    return save_checkpoint(session, static_cast<int64_t>(blocks), &now);
  };
  double smoothed = NAN;
  int64_t step = first_step;
  for (; step < steps; ++step) {
    if (interrupted()) {
      RABIT_CHECK(save(step));
      return check_interrupt();
    }
    const double by_steps = (static_cast<double>(step) + 0.5) / static_cast<double>(steps);
    const double by_time =
        clock.limited() ? static_cast<double>(clock.elapsed()) / time_budget : 0.0;
    const double progress = std::max(by_steps, by_time);
    if (progress >= 1.0) {
      break;
    }
    const at::Tensor ids = session.windows.index_select(0, order.batch(step, options.batch));
    const Losses losses =
        distill_loss(session, session.student, rotary, ids.to(session.teacher.device));
    const double factor = cosine_schedule(progress, options.warmup);
    const auto taken = trainer.step(losses.total, losses.divergence, options.latent_lr * factor,
                                    options.scale_lr * factor);
    if (!taken) {
      return Error{fmt::format("step {}: {}; lower --latent-lr and --scale-lr", step,
                               taken.error().message)};
    }
    if (!taken->taken) {
      continue;
    }
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < average.size(); ++i) {
      // The first steps count in full, or the start would stay in the average.
      const double decay = std::min(
          options.ema, (1.0 + static_cast<double>(step)) / (10.0 + static_cast<double>(step)));
      average[i].lerp_(matrices[i].detach(), 1.0 - decay);
    }
    const double value = taken->loss;
    smoothed = std::isnan(smoothed) ? value : 0.9 * smoothed + 0.1 * value;

    const int64_t done = step + 1 - first_step;
    const double rate = static_cast<double>(done * step_tokens) / clock.elapsed();
    if (session.observer.progress) {
      // Where time will end the phase first, the total is what it will reach.
      const double share = std::max(static_cast<double>(step + 1) / static_cast<double>(steps),
                                    clock.limited() ? clock.elapsed() / time_budget : 0.0);
      const auto total = static_cast<int64_t>(static_cast<double>(step + 1) / std::min(1.0, share));
      session.observer.progress(
          {"distil", (step + 1) * step_tokens, total * step_tokens, smoothed, rate});
    }
    if (step % std::max<int64_t>(1, steps / 200) == 0 || step + 1 == steps) {
      session.log["distill"].push_back({{"step", step + 1},
                                        {"tokens", (step + 1) * step_tokens},
                                        {"kl", value},
                                        {"scale_grad_norm", taken->gradient_norm},
                                        {"learning_rate_factor", factor},
                                        {"tokens_per_second", rate}});
    }
    if (since_checkpoint.elapsed() > options.checkpoint_minutes * 60.0) {
      const DistillState now = state_at(step + 1);
      save_or_say(session, static_cast<int64_t>(blocks), &now);
      since_checkpoint = Clock();
    }
  }
  {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < average.size(); ++i) {
      at::Tensor matrix = matrices[i];
      matrix.copy_(average[i]);
    }
  }
  state = state_at(step);
  return {};
}

}  // namespace rabit::train
