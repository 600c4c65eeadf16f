// Block by block: initialise a block from the stream that the quantized prefix produces, train it
// to give the teacher block's output, go on with the stream it produces itself. Needs one block's
// graph and two streams, x_student and x_teacher, (windows, seq_len, d_model) float32.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "base/interrupt.h"
#include "train/optimizer.h"
#include "train/session.h"

namespace rabit::train {
namespace {

constexpr int64_t kForwardWindows = 8;  // windows computed at once where no gradient is kept

// One block over a whole stream, in place if `out` is `x`.
Status run_block(const TrainSession& session, const BlockWeights& weights, const Rotary& rotary,
                 const at::Tensor& x, at::Tensor& out) {
  const at::NoGradGuard no_grad;
  for (int64_t begin = 0; begin < x.size(0); begin += kForwardWindows) {
    RABIT_CHECK(check_interrupt());
    const int64_t count = std::min(kForwardWindows, x.size(0) - begin);
    out.narrow(0, begin, count)
        .copy_(block_forward(session.config(), weights, rotary, x.narrow(0, begin, count),
                             session.teacher.compute));
  }
  return {};
}

// A block that adds nothing is measured by the stream itself.
at::Tensor relative(const at::Tensor& error, const at::Tensor& change, const at::Tensor& whole) {
  return error / at::maximum(change, whole * 1e-12);
}

// Error of the student block's output in units of what the teacher's block adds to the stream:
// sum |y - target|^2 / sum |target - x|^2. Sums over all tokens: the few with outsized activations
// set the scale, and dividing token by token was measured worse (docs/results/start.md).
// Features weighted by --alpha-out were measured worse, too.
at::Tensor block_loss(const at::Tensor& y, const at::Tensor& target, const at::Tensor& change) {
  const auto size = [](const at::Tensor& x) { return x.square().sum(); };
  return relative(size(y - target), size(change), size(target));
}

// block_loss of whole streams, a few windows at a time: y, target and the teacher's stream before
// the block (S, T, d_model).
double stream_error(const at::Tensor& y, const at::Tensor& target, const at::Tensor& before) {
  at::Tensor error = at::zeros({}, y.options().dtype(at::kDouble));
  at::Tensor change = at::zeros_like(error), whole = at::zeros_like(error);
  const auto size = [](const at::Tensor& x) { return x.square().sum(at::kDouble); };
  for (int64_t begin = 0; begin < y.size(0); begin += kForwardWindows) {
    const int64_t count = std::min(kForwardWindows, y.size(0) - begin);
    const at::Tensor t = target.narrow(0, begin, count);
    error += size(y.narrow(0, begin, count) - t);
    change += size(t - before.narrow(0, begin, count));
    whole += size(t);
  }
  return relative(error, change, whole).item<double>();
}

struct BlockRun {
  double first_loss = NAN;  // before training, on the first batch
  double last_loss = NAN;   // mean over the last tenth of the steps
  int64_t steps = 0;
  double tokens_per_second = 0.0;
};

// Trains student block `layer` for `epochs` passes over x, the last one by what the head makes of
// its output; `budget` seconds bound it where > 0.
Result<BlockRun> train_block(TrainSession& session, int64_t layer, const Rotary& rotary,
                             const at::Tensor& x, const at::Tensor& target,
                             const at::Tensor& teacher_x, double epochs, double budget) {
  const QuantizeOptions& options = session.options;
  const auto block = static_cast<size_t>(layer);
  const bool last = layer + 1 == session.config().layers;
  const std::span trained(&session.student.blocks[block], 1);
  std::vector<at::Tensor> others = scales_and_norms(trained);
  if (last && session.student.output_norm.defined()) {
    others.push_back(session.student.output_norm);
  }
  Trainer trainer(options.optimizer, latents(trained), others, options.clip);

  const int64_t windows = x.size(0);
  const int64_t batch = std::min(options.warm_batch, windows);
  const auto steps = static_cast<int64_t>(
      std::floor(epochs * static_cast<double>(windows) / static_cast<double>(batch)));
  BlockRun run;
  std::vector<double> losses;
  WindowOrder order(
      windows, static_cast<uint64_t>(options.seed) * 1000003 + static_cast<uint64_t>(layer) * 1009);
  const Clock clock(budget);
  for (int64_t step = 0; step < steps; ++step) {
    RABIT_CHECK(check_interrupt());
    // By time or by steps, whichever is further.
    const double by_steps = (static_cast<double>(step) + 0.5) / static_cast<double>(steps);
    const double by_time = clock.limited() ? clock.elapsed() / budget : 0.0;
    const double progress = std::max(by_steps, by_time);
    if (progress >= 1.0) {
      break;
    }
    const at::Tensor drawn = order.batch(step, batch);
    const at::Tensor picks = drawn.to(x.device());
    const at::Tensor x_batch = x.index_select(0, picks);
    const at::Tensor target_batch = target.index_select(0, picks);
    const BlockWeights weights = student_weights(
        session.student.blocks[block], session.teacher.blocks[block], session.teacher.compute);
    const at::Tensor y =
        block_forward(session.config(), weights, rotary, x_batch, session.teacher.compute);
    const at::Tensor loss =
        last ? head_loss(session, session.student, y, target_batch,
                         session.windows.index_select(0, drawn).to(x.device()))
                   .loss
             : block_loss(y, target_batch, target_batch - teacher_x.index_select(0, picks));
    const double factor = cosine_schedule(progress, options.warmup);
    const auto taken =
        trainer.step(loss, loss, options.warm_latent_lr * factor, options.warm_scale_lr * factor);
    if (!taken) {
      return Error{fmt::format("block {}: {}; lower --warm-latent-lr and --warm-scale-lr", layer,
                               taken.error().message)};
    }
    if (taken->taken) {
      losses.push_back(taken->loss);
    }
  }
  if (!losses.empty()) {
    run.first_loss = losses.front();
    const size_t tail = std::max<size_t>(1, losses.size() / 10);
    run.last_loss = 0.0;
    for (size_t i = losses.size() - tail; i < losses.size(); ++i) {
      run.last_loss += losses[i] / static_cast<double>(tail);
    }
  }
  run.steps = static_cast<int64_t>(losses.size());
  run.tokens_per_second =
      static_cast<double>(run.steps * batch * x.size(1)) / std::max(1e-9, clock.elapsed());
  return run;
}

// Seconds that a block takes on this machine.
struct BlockCost {
  double fit = 0.0;               // scales and error feedback, whatever the text's length
  double pass_per_window = 0.0;   // second moments, and both streams through the block
  double train_per_window = 0.0;  // one step, a window
  double head_per_window = 0.0;   // what the last block's step takes on top

  // Of training `blocks` blocks, the last one among them, from so many windows.
  double training(int64_t blocks, double windows, double epochs) const {
    return blocks == 0 ? 0.0
                       : windows * epochs *
                             (train_per_window * static_cast<double>(blocks) + head_per_window);
  }
};

constexpr int64_t kMeasuredWindows = kForwardWindows;
constexpr int64_t kMinWindows = 8;     // fewer are no sample of the text
constexpr double kMostOverhead = 0.6;  // of a block's time may go to anything but its training

// Runs the phases on block 0 with a few windows and forgets the outcome.
Result<BlockCost> measure_cost(TrainSession& session, const Rotary& rotary, const at::Tensor& x) {
  const int64_t windows = std::min(kMeasuredWindows, x.size(0));
  const auto count = static_cast<double>(windows);
  const at::Tensor sample = x.narrow(0, 0, windows);
  at::Tensor output;  // the teacher's
  BlockCost cost;
  const StudentBlock kept = session.student.blocks[0];
  // The last norm must come out of this without steps and gradients: the teacher's stands in.
  const at::Tensor kept_norm = std::exchange(session.student.output_norm, at::Tensor());
  // The second of two runs of everything: the first pays for what torch sets up once.
  const QuantizeOptions given = session.options;
  for (int i = 0; i < 2; ++i) {
    session.options = i == 0 ? quick_start(given) : given;
    const double fit_before = session.fit_seconds;
    const Clock clock;
    const auto outputs = start_block(session, 0, sample, sample, true);
    session.options = given;
    RABIT_CHECK(outputs);
    at::Tensor student = outputs->student;
    output = outputs->teacher;
    for (at::Tensor* stream : {&student, &output}) {
      if (!stream->defined()) {
        *stream = at::empty_like(sample);
        RABIT_CHECK(run_block(session, session.teacher.blocks[0], rotary, sample, *stream));
      }
    }
    (void)student.sum().item<float>();  // a GPU only queues: wait for it
    cost.fit = session.fit_seconds - fit_before;
    cost.pass_per_window = (clock.elapsed() - cost.fit) / count;
  }
  if (session.options.warm_epochs > 0.0) {
    const int64_t batch = std::min(session.options.warm_batch, windows);
    const at::Tensor in = sample.narrow(0, 0, batch), target = output.narrow(0, 0, batch);
    for (int i = 0; i < 2; ++i) {
      const Clock train_clock;
      RABIT_CHECK(train_block(session, 0, rotary, in, target, in, 1.0, 0.0));
      cost.train_per_window = train_clock.elapsed() / static_cast<double>(batch);
      const Clock head_clock;
      const at::Tensor y = target.narrow(0, 0, 1).detach().clone().set_requires_grad(true);
      const DistillationLoss loss = head_loss(session, session.student, y, target.narrow(0, 0, 1),
                                              session.windows.narrow(0, 0, 1).to(x.device()));
      loss.loss.backward();
      (void)y.grad().sum().item<float>();
      cost.head_per_window = head_clock.elapsed();
    }
  }
  session.student.blocks[0] = kept;
  session.student.output_norm = kept_norm;
  return cost;
}

// From here on blocks are trained.
int64_t first_trained_block(const QuantizeOptions& options, int64_t layers) {
  if (options.warm_epochs == 0.0) {
    return layers;
  }
  return options.warm_blocks == 0 ? 0 : std::max<int64_t>(0, layers - options.warm_blocks);
}

// What the phase will do.
struct Plan {
  BlockCost cost;
  int64_t windows = 0;
  double epochs = 0.0;
};

// Times a block, says what the phase will do with at most `windows`, and, where time is bounded,
// takes as many of them and as many epochs as it can pay for.
Result<Plan> make_plan(TrainSession& session, const Rotary& rotary, int64_t first_block,
                       int64_t windows) {
  const QuantizeOptions& options = session.options;
  const Network& teacher = session.teacher;
  const at::Tensor sample = [&] {
    const at::NoGradGuard no_grad;
    const int64_t count = std::min(windows, kMeasuredWindows);
    return embed(teacher, session.windows.narrow(0, 0, count).to(teacher.device));
  }();
  RABIT_ASSIGN(const BlockCost cost, measure_cost(session, rotary, sample));
  double epochs = options.warm_epochs;
  const int64_t layers = session.config().layers, left = layers - first_block;
  const auto blocks = static_cast<double>(left);
  const int64_t trained = layers - std::max(first_block, first_trained_block(options, layers));
  const double fits = blocks * cost.fit;
  const auto seconds = [&](double count) {
    return fits + blocks * count * cost.pass_per_window + cost.training(trained, count, epochs);
  };
  const auto rate = [&](double seconds_per_window) {
    return seconds_per_window > 0.0
               ? fmt::format("{:.0f}", static_cast<double>(options.seq_len) / seconds_per_window)
               : std::string("-");
  };
  const std::string speed =
      fmt::format("{:.2f} s to fit a block, {} tokens/s through it, {} tokens/s in its training",
                  cost.fit, rate(cost.pass_per_window), rate(cost.train_per_window));
  if (session.clock.limited()) {
    const double available = session.clock.left();
    const auto least = static_cast<double>(std::min(windows, kMinWindows));
    if (seconds(least) > available) {
      epochs = std::min(epochs, 1.0);
    }
    if (seconds(least) > available) {
      const double minutes = (seconds(least) / session.warm_share + session.spent +
                              session.clock.elapsed() + 2.0 * kFinishSeconds) /
                             60.0;
      return Error{
          fmt::format("--minutes {}: too short for this machine, which needs about {:.1f} minutes "
                      "at least ({})",
                      options.minutes, std::ceil(minutes * 10.0) / 10.0, speed)};
    }
    const double affordable = (available - fits) / (seconds(1.0) - fits);
    windows = std::min(windows, static_cast<int64_t>(affordable));
  }
  session.observer.message(
      fmt::format("measured: {}; plan: {} blocks, each from {} tokens x {} epochs, {:.0f} s", speed,
                  left, windows * options.seq_len, epochs, seconds(static_cast<double>(windows))));
  return Plan{cost, windows, epochs};
}

// What a block took for each window besides its training and the fit: the middle of the last five,
// for a shared machine may be away for a while.
class TextCost {
 public:
  void add(double seconds) { last_[static_cast<size_t>(count_++) % last_.size()] = seconds; }
  bool known() const { return count_ >= 3; }
  double per_window() const {
    std::array<double, 5> sorted = last_;
    const auto end = sorted.begin() + std::min<int64_t>(count_, 5);
    const auto middle = sorted.begin() + std::min<int64_t>(count_, 5) / 2;
    std::nth_element(sorted.begin(), middle, end);
    return *middle;
  }

 private:
  std::array<double, 5> last_{};
  int64_t count_ = 0;
};

}  // namespace

Status warm_start(TrainSession& session, int64_t first_block) {
  const QuantizeOptions& options = session.options;
  const ModelConfig& config = session.config();
  const Network& teacher = session.teacher;
  const Rotary rotary = make_rotary(config, options.seq_len, teacher.device);
  const int64_t first_trained = first_trained_block(options, config.layers);
  RABIT_ASSIGN(const Plan plan,
               make_plan(session, rotary, first_block,
                         std::min(session.windows.size(0),
                                  std::max<int64_t>(1, options.calib_tokens / options.seq_len))));
  if (options.dry_run) {
    return {};
  }
  int64_t windows = plan.windows;
  session.log["calib_tokens_used"] = windows * options.seq_len;

  const at::Tensor ids = session.windows.narrow(0, 0, windows).to(teacher.device);
  at::Tensor x_teacher;
  at::Tensor x_student = [&] {
    const at::NoGradGuard no_grad;
    return embed(teacher, ids);
  }();
  const bool both =
      first_trained < config.layers || needs_teacher_stream(options);  // streams are kept
  if (both) {
    x_teacher = x_student.clone();
  }
  const auto weights_of = [&](size_t block) {
    const at::NoGradGuard no_grad;
    return student_weights(session.student.blocks[block], teacher.blocks[block], teacher.compute);
  };
  for (int64_t layer = 0; layer < first_block; ++layer) {  // resumed: only the streams are missing
    const auto block = static_cast<size_t>(layer);
    RABIT_CHECK(run_block(session, weights_of(block), rotary, x_student, x_student));
    if (both) {
      RABIT_CHECK(run_block(session, teacher.blocks[block], rotary, x_teacher, x_teacher));
    }
  }

  Clock since_checkpoint;
  TextCost text_cost;
  double fit_seconds = 0.0;  // of the last block, fitting scales and error feedback
  for (int64_t layer = first_block; layer < config.layers; ++layer) {
    const bool train = layer >= first_trained;
    const auto block = static_cast<size_t>(layer);
    const Clock block_clock;
    // Each remaining block gets an equal share of what is left, those that are not trained of what
    // the training of the others leaves.
    const double planned = plan.cost.training(config.layers - std::max(layer, first_trained),
                                              static_cast<double>(windows), plan.epochs);
    const double share = (session.clock.left() - (train ? 0.0 : planned)) /
                         static_cast<double>(config.layers - layer);
    // Slower than measured: less text for the blocks to come rather than a missed bound. The fit
    // takes its time whatever the text's length.
    if (session.clock.limited() && text_cost.known() && windows > kMinWindows) {
      const double text_share = (train ? kMostOverhead : 1.0) * (share - fit_seconds);
      const auto affordable =
          static_cast<int64_t>(std::max(text_share, 0.0) / text_cost.per_window());
      if (affordable < windows) {
        windows = std::max(kMinWindows, affordable);
        for (at::Tensor* stream : {&x_student, &x_teacher}) {
          *stream = stream->defined() ? stream->narrow(0, 0, windows).clone() : *stream;
        }
      }
    }
    const double fit_before = session.fit_seconds;
    const at::Tensor last_norm = session.student.output_norm.defined()
                                     ? session.student.output_norm.detach().clone()
                                     : at::Tensor();
    const auto body = [&]() -> Status {
      RABIT_ASSIGN(const BlockOutputs outputs,
                   start_block(session, layer, x_student, x_teacher, !train));
      BlockRun run;
      const double init_seconds = block_clock.elapsed();
      double train_seconds = 0.0;
      at::Tensor target = outputs.teacher;
      if (both && !target.defined()) {
        target = at::empty_like(x_teacher);
        RABIT_CHECK(run_block(session, teacher.blocks[block], rotary, x_teacher, target));
      }
      fit_seconds = session.fit_seconds - fit_before;
      if (train) {
        // What is left of the share once the rest is paid for: the pass that follows.
        double budget = 0.0;
        if (session.clock.limited()) {
          const double pass =
              static_cast<double>(windows) * (text_cost.known() ? text_cost.per_window() : 0.0);
          budget = std::max(0.1, share - std::max(fit_seconds + pass, init_seconds * 1.15));
        }
        const Clock train_clock;
        RABIT_ASSIGN(run, train_block(session, layer, rotary, x_student, target, x_teacher,
                                      plan.epochs, budget));
        train_seconds = train_clock.elapsed();
      }
      if (outputs.student.defined()) {
        x_student = outputs.student;
      } else {
        RABIT_CHECK(run_block(session, weights_of(block), rotary, x_student, x_student));
      }
      double output_error = NAN;
      if (both) {
        output_error = stream_error(x_student, target, x_teacher);
        x_teacher = target;
      }
      text_cost.add((block_clock.elapsed() - train_seconds - fit_seconds) /
                    static_cast<double>(windows));
      session.log["warm_start"].push_back({{"block", layer},
                                           {"windows", windows},
                                           {"steps", run.steps},
                                           {"loss_first", run.first_loss},
                                           {"loss_last", run.last_loss},
                                           {"output_error", output_error},
                                           {"fit_errors", session.fit_errors},
                                           {"init_seconds", init_seconds},
                                           {"train_seconds", train_seconds},
                                           {"tokens_per_second", run.tokens_per_second}});
      if (session.observer.progress) {
        session.observer.progress({options.warm_epochs > 0.0 ? "warm start" : "initialise",
                                   layer + 1, config.layers, output_error, run.tokens_per_second});
      }
      return {};
    };
    if (const Status status = body(); !status) {
      if (status.error().interrupted && layer > 0) {
        session.student.blocks[block] = {};
        if (last_norm.defined()) {
          session.student.output_norm = last_norm.set_requires_grad(true);
        }
        RABIT_CHECK(save_checkpoint(session, layer, nullptr));
      }
      return status;
    }
    if (since_checkpoint.elapsed() > options.checkpoint_minutes * 60.0) {
      save_or_say(session, layer + 1, nullptr);
      since_checkpoint = Clock();
    }
  }
  return {};
}

}  // namespace rabit::train
