// End to end: the whole student against the teacher's distribution over the next token.

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "base/interrupt.h"
#include "train/optimizer.h"
#include "train/recompute.h"
#include "train/session.h"
#include "train/shards.h"
#include "train/sign_watch.h"

namespace rabit::train {
namespace {

// What a step is made of, with its time and work.
enum StepPart { kOriginal, kForward, kHead, kBackward, kOptimizers, kStepParts };
constexpr std::array kPartNames = {"original", "forward", "head", "backward", "optimizers"};

// When the parts of a step end on a GPU, which the step does not wait for.
class PartTimes {
 public:
  explicit PartTimes(at::Device device) : device_(device) { mark(); }
  void ended(StepPart part) {
    parts_.push_back(part);
    mark();
  }

  // Seconds by part; waits for the last.
  std::array<double, kStepParts> seconds() const {
    events_.back().synchronize();
    std::array<double, kStepParts> sum{};
    for (size_t i = 0; i < parts_.size(); ++i) {
      sum[parts_[i]] += events_[i].elapsedTime(events_[i + 1]) / 1e3;
    }
    return sum;
  }

 private:
  void mark() {
    events_.emplace_back(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
    events_.back().record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  }

  at::Device device_;
  std::vector<c10::Event> events_;
  std::vector<StepPart> parts_;
};

// Floating-point operations of a step's products, by part: two for every weight and token, in the
// backward pass twice as many (the head's, whose weights are fixed, are in kHead); half of the
// attention's square counts.
std::array<double, kStepParts> step_operations(const ModelConfig& config,
                                               const QuantizeOptions& options) {
  double weights = 0.0;
  for (const Role role : kRoles) {
    const LinearShape shape = linear_shape(config, role);
    weights += static_cast<double>(shape.d_out * shape.d_in);
  }
  const auto tokens = static_cast<double>(options.batch * options.seq_len);
  const double attention = static_cast<double>(options.seq_len * config.d_q()) / 2.0;
  const double blocks =
      2.0 * tokens * static_cast<double>(config.layers) * (weights + 2.0 * attention);
  const double head = 2.0 * tokens * static_cast<double>(config.vocab_size * config.d_model);
  return {blocks, blocks, 3.0 * head, (options.recompute ? 3.0 : 2.0) * blocks, 0.0};
}

struct Losses {
  at::Tensor total;
  DistillationLoss head;  // its numbers, without a graph
  at::Tensor watched;     // what --gamma counts, without a graph; undefined without it
};

// What --gamma compares in teacher and student: the stream after each block, or the output of each
// linear layer.
class Watch : public LinearTap {
 public:
  explicit Watch(const QuantizeOptions& options)
      : blocks_(options.gamma > 0.0 && options.gamma_on == GammaOn::kBlocks),
        layers_(options.gamma > 0.0 && options.gamma_on == GammaOn::kLayers) {}

  LinearTap* tap() { return layers_ ? this : nullptr; }
  void see(Role, const at::Tensor&, const at::Tensor& output) override { seen_.push_back(output); }
  void see_stream(const at::Tensor& x) {
    if (blocks_) {
      seen_.push_back(x);
    }
  }

  // Mean over all that was seen of the mean over tokens of |y_s - y_t|^2 / |y_t|^2.
  static at::Tensor error(const Watch& student, const Watch& teacher) {
    at::Tensor sum;
    for (size_t i = 0; i < teacher.seen_.size(); ++i) {
      const at::Tensor y = teacher.seen_[i].to(at::kFloat);
      const at::Tensor one =
          ((student.seen_[i] - y).square().sum(-1) / y.square().sum(-1).clamp_min(1e-6)).mean();
      sum = sum.defined() ? sum + one : one;
    }
    return sum / static_cast<double>(teacher.seen_.size());
  }

 private:
  bool blocks_, layers_;
  std::vector<at::Tensor> seen_;
};

Losses distill_loss(const TrainSession& session, const Student& student, const Rotary& rotary,
                    const at::Tensor& ids, PartTimes* times) {
  const auto ended = [&](StepPart part) {
    if (times != nullptr) {
      times->ended(part);
    }
  };
  const Network& teacher = session.teacher;
  const ModelConfig& config = session.config();
  const QuantizeOptions& options = session.options;
  Watch of_teacher(options), of_student(options);
  at::Tensor x_teacher;
  const at::Tensor x0 = [&] {
    const at::NoGradGuard no_grad;
    return embed(teacher, ids);
  }();
  {
    const at::NoGradGuard no_grad;
    x_teacher = x0;
    block_by_block(
        config.layers, [&](int64_t b) { return begin_weights(teacher, b); },
        [&](int64_t, const BlockWeights& weights) {
          x_teacher =
              block_forward(config, weights, rotary, x_teacher, teacher.compute, of_teacher.tap());
          of_teacher.see_stream(x_teacher);
        });
  }
  ended(kOriginal);
  // What a tap sees would be gone when a block is computed again.
  TORCH_CHECK(!options.recompute || of_student.tap() == nullptr);
  at::Tensor x = x0;
  if (options.recompute) {
    // Is called on the way back, too, after this function has returned. The weights of the block
    // that comes next are on their way meanwhile.
    const size_t blocks = student.blocks.size();
    const auto coming = std::make_shared<std::vector<std::function<BlockWeights()>>>(blocks);
    for (size_t b = 0; b < blocks; ++b) {
      const auto block = [&student, &teacher, &config, &rotary, coming, b](const at::Tensor& in) {
        const auto begin = [&](size_t of) {
          return begin_weights(student.blocks[of], teacher.blocks[of], teacher.compute);
        };
        const auto begun = std::exchange((*coming)[b], {});
        const BlockWeights weights = begun ? begun() : begin(b)();
        const bool back = c10::GradMode::is_enabled();
        if (const size_t next = back ? b - 1 : b + 1; next < coming->size()) {
          (*coming)[next] = begin(next);
        }
        return block_forward(config, weights, rotary, in, teacher.compute);
      };
      x = recomputed(block, x, student.blocks[b].linear[0].latent);
      of_student.see_stream(x);
    }
  } else {
    block_by_block(
        config.layers,
        [&](int64_t b) {
          const auto block = static_cast<size_t>(b);
          return begin_weights(student.blocks[block], teacher.blocks[block], teacher.compute);
        },
        [&](int64_t, const BlockWeights& weights) {
          x = block_forward(config, weights, rotary, x, teacher.compute, of_student.tap());
          of_student.see_stream(x);
        });
  }
  ended(kForward);
  DistillationLoss head = head_loss(session, student, x, x_teacher, ids);
  at::Tensor total = head.loss;
  head.loss = head.loss.detach();
  at::Tensor watched;
  if (options.gamma > 0.0) {
    watched = Watch::error(of_student, of_teacher);
    total = total + watched * options.gamma;
    watched = watched.detach();
  }
  ended(kHead);
  return {total, head, watched};
}

// A step's numbers, without a graph; as in Losses.
struct StepLosses {
  at::Tensor loss, nll, watched;
};

// Adds the gradients of a step's loss, --micro-batch windows after the others; of several processes
// each takes its part of the windows. ids (windows, T) on the host. times: what to add the times of
// its parts to, or none. Errors: an interrupt.
Result<StepLosses> accumulate(const TrainSession& session, const Student& student,
                              const Rotary& rotary, const at::Tensor& ids, Trainer& trainer,
                              PartTimes* times = nullptr) {
  const int64_t windows = ids.size(0), own = windows / session.processes();
  const int64_t first = session.rank() * own;
  const int64_t at_once = session.options.micro_batch > 0 ? session.options.micro_batch : own;
  StepLosses sum;
  const auto add = [](at::Tensor& total, const at::Tensor& part, double share) {
    if (part.defined()) {
      total = total.defined() ? total + part * share : part * share;
    }
  };
  for (int64_t begin = 0; begin < own; begin += at_once) {
    RABIT_CHECK(check_interrupt());
    const int64_t count = std::min(at_once, own - begin);
    const double share = static_cast<double>(count) / static_cast<double>(windows);
    const Losses losses =
        distill_loss(session, student, rotary,
                     ids.narrow(0, first + begin, count).to(session.teacher.device), times);
    trainer.accumulate(losses.total * share);
    if (times != nullptr) {
      times->ended(kBackward);
    }
    add(sum.loss, losses.head.loss, share);
    add(sum.nll, losses.head.nll, share);
    add(sum.watched, losses.watched, share);
  }
  for (at::Tensor* part : {&sum.loss, &sum.nll, &sum.watched}) {
    if (part->defined()) {
      *part = part->clone();
      session.sum(*part);
    }
  }
  return sum;
}

// The teacher's weights as latents: the same sizes, and finite losses.
Student stand_in(const TrainSession& session) {
  Student student;
  for (int64_t layer = 0; layer < session.config().layers; ++layer) {
    const BlockWeights weights = whole_weights(session.teacher, layer);
    StudentBlock& block = student.blocks.emplace_back();
    for (const Role role : kRoles) {
      const at::Tensor latent = weights.linear[index_of(role)].to(at::kFloat);
      const int64_t paths = session.bits.paths(layer, role);
      const auto scale = [&](int64_t extent, double value) {
        return at::full({paths, extent}, value, latent.options());
      };
      const bool independent = has_independent_latents(session.options.method);
      block[role] = restore_student_linear(
          session.options.method, independent ? latent.repeat({paths, 1, 1}) : latent,
          scale(latent.size(0), latent.abs().mean().item<double>()), scale(latent.size(1), 1.0), {},
          latent.device());
    }
    if (session.options.train_norms) {
      add_norms(session.teacher, layer, block);
    }
    if (session.ranks) {
      block = shard_block(block, session.ranks);
    }
  }
  if (session.options.train_norms) {
    add_output_norm(session.teacher, student);
  }
  return student;
}

constexpr int64_t kMeasuredWindows = 4;  // of a step on a CPU
constexpr int kWatchedSteps = 5;         // for the times of its parts

// "measured: a step of 64.4 ms (...": medians, and what the products come to.
std::string describe_parts(const TrainSession& session,
                           std::vector<std::array<double, kStepParts>> steps) {
  const auto operations = step_operations(session.config(), session.options);
  double whole = 0.0, all = 0.0;
  std::string parts;
  for (int part = 0; part < kStepParts; ++part) {
    std::sort(steps.begin(), steps.end(),
              [part](const auto& a, const auto& b) { return a[part] < b[part]; });
    const double seconds = steps[steps.size() / 2][part];
    parts += fmt::format("{}{} {:.2f} ms", part == 0 ? "" : ", ", kPartNames[part], seconds * 1e3);
    if (operations[part] > 0.0) {
      parts += fmt::format(" ({:.0f} TFLOP/s)", operations[part] / seconds / 1e12);
    }
    whole += seconds;
    all += operations[part];
  }
  return fmt::format("measured: a step, part by part: {}; in all {:.2f} ms ({:.0f} TFLOP/s)", parts,
                     whole * 1e3, all / whole / 1e12);
}

}  // namespace

DistillationLoss head_loss(const TrainSession& session, const Student& student,
                           const at::Tensor& student_stream, const at::Tensor& teacher_stream,
                           const at::Tensor& ids) {
  const Network& teacher = session.teacher;
  const QuantizeOptions& options = session.options;
  const auto hidden = [&](const at::Tensor& stream, const at::Tensor& weight) {
    return norm(session.config(), stream, weight, teacher.compute).flatten(0, 1);
  };
  at::Tensor next = at::full_like(ids, -1);  // the token after each, none after a window's last
  next.narrow(1, 0, ids.size(1) - 1).copy_(ids.narrow(1, 1, ids.size(1) - 1));
  return distillation_loss(hidden(student_stream, output_norm(student, teacher)),
                           hidden(teacher_stream, teacher.output_norm), teacher.head,
                           next.flatten(),
                           {options.reverse_kl, options.temperature, options.cross_entropy});
}

Result<double> measure_distill(const TrainSession& session, int64_t tokens) {
  const QuantizeOptions& options = session.options;
  const Rotary rotary = make_rotary(session.config(), options.seq_len, session.teacher.device);
  const Student student = stand_in(session);
  const std::vector<at::Tensor> matrices = latents(student.blocks);
  Trainer trainer(options, matrices, scales_and_norms(student),
                  shared_leaves(student, session.ranks));
  const int64_t processes = session.processes();
  const auto seconds_of = [&](int64_t windows, PartTimes* times) -> Result<double> {
    RABIT_CHECK(check_interrupt());
    const Clock clock;
    std::vector<int64_t> picks;  // the first ones, as often as it takes
    for (int64_t i = 0; i < windows; ++i) {
      picks.push_back(i % session.windows.count());
    }
    RABIT_ASSIGN(const StepLosses losses,
                 accumulate(session, student, rotary, session.windows.pick(picks), trainer, times));
    RABIT_CHECK(trainer.step(losses.loss, 1e-6, 1e-6));
    if (times != nullptr) {
      times->ended(kOptimizers);
    }
    wait_for(matrices.back());
    return clock.elapsed();
  };
  // A GPU needs whole steps to show its speed; on a CPU a step is its windows and the optimizers'.
  const int64_t windows =
      session.teacher.device.is_cuda()
          ? options.batch
          : std::min(options.batch, std::max(processes, kMeasuredWindows / processes * processes));
  RABIT_CHECK(seconds_of(processes, nullptr));  // pays for what torch sets up once
  double step = 0.0;
  if (session.teacher.device.is_cuda()) {
    RABIT_CHECK(seconds_of(windows, nullptr));  // makes the memory and the kernels ready
    RABIT_ASSIGN(step, seconds_of(windows, nullptr));
  } else if (windows == options.batch) {
    RABIT_ASSIGN(step, seconds_of(windows, nullptr));
  } else {
    RABIT_ASSIGN(const double one, seconds_of(processes, nullptr));
    RABIT_ASSIGN(const double some, seconds_of(windows, nullptr));
    const double a_window = std::max(0.0, some - one) / static_cast<double>(windows - processes);
    step = some + a_window * static_cast<double>(options.batch - windows);
  }
  if (options.dry_run && session.teacher.device.is_cuda()) {
    std::vector<std::array<double, kStepParts>> steps;
    for (int i = 0; i < kWatchedSteps; ++i) {
      PartTimes times(session.teacher.device);
      RABIT_CHECK(seconds_of(windows, &times));
      steps.push_back(times.seconds());
    }
    session.observer.message(describe_parts(session, steps));
  }
  return step * static_cast<double>(distill_steps(options, tokens));
}

Status distill(TrainSession& session, int64_t tokens, DistillState& state) {
  const QuantizeOptions& options = session.options;
  const size_t blocks = session.student.blocks.size();
  const std::vector<at::Tensor> matrices = latents(session.student.blocks);
  Trainer trainer(options, matrices, scales_and_norms(session.student),
                  shared_leaves(session.student, session.ranks));
  trainer.load_state(state.trainer);
  const Rotary rotary = make_rotary(session.config(), options.seq_len, session.teacher.device);
  const int64_t step_tokens = options.batch * options.seq_len;
  const int64_t steps = distill_steps(options, tokens);
  WindowOrder order(session.windows.count(), static_cast<uint64_t>(options.seed) * 7919 + 1);
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
  const auto save = [&](int64_t step) -> Status {
    const DistillState now = state_at(step);
    const Status saved = save_checkpoint(session, static_cast<int64_t>(blocks), &now);
    return saved
               ? saved
               : Error{saved.error().message + "; what was done since the last checkpoint is lost"};
  };
  double smoothed = NAN, first_loss = NAN;
  at::Tensor nll;      // sums of the text's (student, teacher) over `nll_steps` steps
  at::Tensor watched;  // of the last step
  int64_t nll_steps = 0;
  const auto note = [&](int64_t after, double loss, double norm, double factor, double rate) {
    // The text's, in the mean of the steps since the last entry, each before its own update.
    const at::Tensor mean = nll.to(at::kCPU) / static_cast<double>(nll_steps);
    nll = at::Tensor();
    nll_steps = 0;
    session.log["distill"].push_back({{"step", after},
                                      {"tokens", after * step_tokens},
                                      {"loss", loss},
                                      {"text_nll", mean[0].item<double>()},
                                      {"text_nll_teacher", mean[1].item<double>()},
                                      {"scale_grad_norm", norm},
                                      {"learning_rate_factor", factor},
                                      {"tokens_per_second", rate}});
    if (watched.defined()) {
      session.log["distill"].back()["gamma_error"] = watched.item<double>();
    }
  };
  std::optional<SignWatch> watch;
  if (session.observer.metrics) {
    watch.emplace(session.student);
  }
  int64_t step = first_step;
  for (; step < steps; ++step) {
    bool due = since_checkpoint.elapsed() > options.checkpoint_minutes * 60.0;
    if (session.stopped_together(due)) {  // the only place to stop at
      RABIT_CHECK(save(step));
      return Error{"interrupted", true};
    }
    const double by_steps = (static_cast<double>(step) + 0.5) / static_cast<double>(steps);
    const double by_time =
        clock.limited() ? static_cast<double>(clock.elapsed()) / time_budget : 0.0;
    const double progress = std::max(by_steps, by_time);
    if (progress >= 1.0) {
      break;
    }
    const at::Tensor ids = session.windows.pick(order.batch(step, options.batch));
    const auto accumulated = accumulate(session, session.student, rotary, ids, trainer);
    if (!accumulated) {  // the step is not taken
      RABIT_CHECK(save(step));
      return accumulated.error();
    }
    const StepLosses& losses = *accumulated;
    const double factor = cosine_schedule(progress, options.warmup);
    const auto taken =
        trainer.step(losses.loss, options.latent_lr * factor, options.scale_lr * factor);
    if (!taken) {
      return Error{fmt::format("step {}: {}; lower --latent-lr and --scale-lr", step,
                               taken.error().message)};
    }
    if (!taken->taken) {
      if (session.observer.metrics) {
        session.observer.metrics({{"phase", "distill"}, {"step", step + 1}, {"taken", false}});
      }
      continue;
    }
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < average.size(); ++i) {
      // The first steps count in full, or the start would stay in the average.
      const double decay = std::min(
          options.ema, (1.0 + static_cast<double>(step)) / (10.0 + static_cast<double>(step)));
      average[i].lerp_(matrices[i].detach(), 1.0 - decay);
    }
    nll = nll.defined() ? nll + losses.nll : losses.nll;
    watched = losses.watched;
    ++nll_steps;
    const double value = taken->loss;
    first_loss = std::isnan(first_loss) ? value : first_loss;
    smoothed = std::isnan(smoothed) ? value : 0.9 * smoothed + 0.1 * value;

    const int64_t done = step + 1 - first_step;
    const double rate = static_cast<double>(done * step_tokens) / clock.elapsed();
    if (session.observer.metrics) {
      const at::Tensor text = losses.nll.to(at::kCPU);
      nlohmann::json line = {{"phase", "distill"},
                             {"step", step + 1},
                             {"taken", true},
                             {"tokens", (step + 1) * step_tokens},
                             {"loss", value},
                             {"text_nll", text[0].item<double>()},
                             {"text_nll_teacher", text[1].item<double>()},
                             {"scale_grad_norm", taken->gradient_norm},
                             {"latent_grad_norm", taken->latent_gradient_norm},
                             {"learning_rate_factor", factor},
                             {"signs_turned", watch->turned()},
                             {"tokens_per_second", rate},
                             {"seconds", session.seconds()}};
      if (losses.watched.defined()) {
        line["gamma_error"] = losses.watched.item<double>();
      }
      line.update(peak_memory(session.teacher.device));
      session.observer.metrics(line);
    }
    if (session.observer.progress) {
      // Where time will end the phase first, the total is what it will reach.
      const double share = std::max(static_cast<double>(step + 1) / static_cast<double>(steps),
                                    clock.limited() ? clock.elapsed() / time_budget : 0.0);
      const auto total = static_cast<int64_t>(static_cast<double>(step + 1) / std::min(1.0, share));
      session.observer.progress(
          {"distil", (step + 1) * step_tokens, total * step_tokens, smoothed, rate});
    }
    if (step % std::max<int64_t>(1, steps / 200) == 0 || step + 1 == steps) {
      note(step + 1, value, taken->gradient_norm, factor, rate);
    }
    const bool by_count =
        options.checkpoint_steps > 0 && (step + 1) % options.checkpoint_steps == 0;
    if (by_count || due) {
      const DistillState now = state_at(step + 1);
      save_or_say(session, static_cast<int64_t>(blocks), &now);
      since_checkpoint = Clock();
    }
  }
  if (smoothed > 1.5 * first_loss) {
    session.observer.message(fmt::format(
        "warning: the loss has risen from {:.4f} to {:.4f}; lower --latent-lr and --scale-lr",
        first_loss, smoothed));
  }
  if (nll_steps > 0) {  // the end came between two entries
    note(step, NAN, NAN, NAN, NAN);
  }
  state = state_at(step);
  if (session.ranks) {  // what follows may fail on one process alone
    save_or_say(session, static_cast<int64_t>(blocks), &state);
  }
  return {};
}

}  // namespace rabit::train
