// Block by block: initialise a block from the stream that the quantized prefix produces, train it
// to give the teacher block's output, go on with the stream it produces itself. Needs one block's
// graph and the streams x_student and x_teacher, (windows, seq_len, d_model) float32; error
// feedback both after the attention too, and what the attention gave.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/interrupt.h"
#include "train/block_times.h"
#include "train/optimizer.h"
#include "train/session.h"
#include "train/shards.h"

namespace rabit::train {
namespace {

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
// Of several processes each has its windows' part of the error, in units of the whole batch.
at::Tensor block_loss(const TrainSession& session, const at::Tensor& y, const at::Tensor& target,
                      const at::Tensor& change) {
  const auto size = [](const at::Tensor& x) { return x.square().sum(); };
  const at::Tensor units = at::stack({size(change), size(target)});
  session.sum(units);
  return relative(size(y - target), units[0], units[1]);
}

// block_loss of whole streams, a few windows at a time: y, target and the teacher's stream before
// the block (S, T, d_model).
double stream_error(const TrainSession& session, const at::Tensor& y, const at::Tensor& target,
                    const at::Tensor& before) {
  at::Tensor sums = at::zeros({3}, y.options().dtype(at::kDouble));  // error, change, whole
  const auto size = [](const at::Tensor& x) { return x.square().sum(at::kDouble); };
  for (int64_t begin = 0; begin < y.size(0); begin += kForwardWindows) {
    const int64_t count = std::min(kForwardWindows, y.size(0) - begin);
    const at::Tensor t = target.narrow(0, begin, count);
    sums += at::stack(
        {size(y.narrow(0, begin, count) - t), size(t - before.narrow(0, begin, count)), size(t)});
  }
  session.sum(sums);
  return relative(sums[0], sums[1], sums[2]).item<double>();
}

struct BlockRun {
  double first_loss = NAN;  // before training, on the first batch
  double last_loss = NAN;   // mean over the last tenth of the steps
  int64_t steps = 0;
  double tokens_per_second = 0.0;
};

// Trains student block `layer` for `epochs` passes over x, the last one by what the head makes of
// its output; `budget` seconds bound it where > 0. The windows lie in as many lanes as a batch has
// places, and each place goes through a lane of its own: so several processes, which have some of
// the lanes each, see the batches that one process would see. first: of x among all windows.
Result<BlockRun> train_block(TrainSession& session, int64_t layer, const Rotary& rotary,
                             const at::Tensor& x, const at::Tensor& target,
                             const at::Tensor& teacher_x, int64_t first, double epochs,
                             double budget) {
  const QuantizeOptions& options = session.options;
  const int64_t processes = session.processes();
  const auto block = static_cast<size_t>(layer);
  const bool last = layer + 1 == session.config().layers;
  const std::span trained(&session.student.blocks[block], 1);
  std::vector<at::Tensor> others = scales_and_norms(trained);
  if (last && session.student.output_norm.defined()) {
    others.push_back(session.student.output_norm);
  }
  Trainer trainer(options, latents(trained), others, shared_leaves(trained, others, session.ranks));

  const int64_t windows = x.size(0);
  const int64_t lanes = std::min(options.warm_batch / processes, windows);  // of this process
  const auto lane_begin = [&](int64_t lane) { return lane * windows / lanes; };
  const auto steps = static_cast<int64_t>(
      std::floor(epochs * static_cast<double>(windows) / static_cast<double>(lanes)));
  BlockRun run;
  std::vector<double> losses;
  std::vector<WindowOrder> orders;
  for (int64_t i = 0; i < lanes; ++i) {
    orders.emplace_back(lane_begin(i + 1) - lane_begin(i),
                        static_cast<uint64_t>(options.seed) * 1000003 +
                            static_cast<uint64_t>(layer) * 1009 +
                            static_cast<uint64_t>(session.rank() * lanes + i) * 7907);
  }
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
    std::vector<int64_t> drawn, distinct;  // in x, and of all windows
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t begin = lane_begin(i), count = lane_begin(i + 1) - begin;
      // The same windows in every epoch.
      drawn.push_back(begin + orders[static_cast<size_t>(i)].batch(step, 1).front() % count);
      distinct.push_back(first + drawn.back());
    }
    const at::Tensor picks = at::tensor(drawn, at::kLong).to(x.device());
    const at::Tensor x_batch = x.index_select(0, picks);
    const at::Tensor target_batch = target.index_select(0, picks);
    const BlockWeights weights = student_weights(
        session.student.blocks[block], session.teacher.blocks[block], session.teacher.compute);
    const at::Tensor y =
        block_forward(session.config(), weights, rotary, x_batch, session.teacher.compute);
    const at::Tensor loss = last ? head_loss(session, session.student, y, target_batch,
                                             session.windows.pick_distinct(distinct).to(x.device()))
                                           .loss /
                                       static_cast<double>(processes)
                                 : block_loss(session, y, target_batch,
                                              target_batch - teacher_x.index_select(0, picks));
    const double factor = cosine_schedule(progress, options.warmup);
    trainer.accumulate(loss);
    const auto taken =
        trainer.step({}, options.warm_latent_lr * factor, options.warm_scale_lr * factor);
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
  wait_for(latents(trained).front());
  run.steps = static_cast<int64_t>(losses.size());
  run.tokens_per_second = static_cast<double>(run.steps * lanes * processes * x.size(1)) /
                          std::max(1e-9, clock.elapsed());
  return run;
}

constexpr int64_t kMeasuredWindows = kForwardWindows;
constexpr int kMeasuredSteps = 4;   // of training
constexpr int64_t kMinWindows = 8;  // fewer are no sample of the text
constexpr double kPlanned = 0.97;   // of the time: measurements are noisy
constexpr double kTolerance = 0.9;  // text is cut when less than this share of it is affordable

// From here on blocks are trained.
int64_t first_trained_block(const QuantizeOptions& options, int64_t layers) {
  if (options.warm_epochs == 0.0) {
    return layers;
  }
  return options.warm_blocks == 0 ? 0 : std::max<int64_t>(0, layers - options.warm_blocks);
}

// The teacher's stream goes along: to train on, or for error feedback.
bool keeps_teacher_stream(const QuantizeOptions& options, int64_t layers) {
  return first_trained_block(options, layers) < layers || needs_teacher_stream(options);
}

double mean_paths(const TrainSession& session, int64_t layer) {
  int64_t sum = 0;
  for (const Role role : kRoles) {
    sum += session.bits.paths(layer, role);
  }
  return static_cast<double>(sum) / static_cast<double>(kRoleCount);
}

// From block `layer` on, with `replayed` finished ones to go through before.
BlockWork work_from(const TrainSession& session, int64_t layer, int64_t replayed, double epochs) {
  const int64_t layers = session.config().layers;
  const int64_t first_trained = first_trained_block(session.options, layers);
  BlockWork work{layers - layer, layers - std::max(layer, first_trained), replayed, 0.0, epochs};
  for (int64_t i = layer; i < layers; ++i) {
    work.paths += mean_paths(session, i);
  }
  return work;
}

// Of a block that all processes have fitted, each goes on with its share.
void share_block(TrainSession& session, int64_t layer) {
  StudentBlock& block = session.student.blocks[static_cast<size_t>(layer)];
  if (session.ranks) {
    block = shard_block(block, session.ranks);
  }
}

// Windows of each process, of so many in all: equally many, in whole batches where blocks are
// trained.
int64_t windows_of_each(const TrainSession& session, int64_t windows) {
  const int64_t processes = session.processes();
  if (processes == 1) {
    return windows;
  }
  const int64_t unit =
      session.options.warm_epochs > 0.0 ? session.options.warm_batch / processes : 1;
  return windows / processes / unit * unit;
}

// Runs the phases on block 0 with a few windows and forgets the outcome.
Result<BlockSeconds> measure_block(TrainSession& session, const Rotary& rotary,
                                   const at::Tensor& x) {
  const QuantizeOptions given = session.options;
  const int64_t layers = session.config().layers;
  const int64_t windows = std::min(kMeasuredWindows, x.size(0));
  const at::Tensor sample = x.narrow(0, 0, windows);
  const BlockWeights teacher = whole_weights(session.teacher, 0);
  at::Tensor target;
  BlockSeconds cost;
  const StudentBlock kept = session.student.blocks[0];
  // The last norm must come out of this without steps and gradients: the teacher's stands in.
  const at::Tensor kept_norm = std::exchange(session.student.output_norm, at::Tensor());
  // Where it matters, the second of two runs of everything: the first pays for what torch sets up
  // once.
  for (int i = session.clock.limited() || given.dry_run ? 0 : 1; i < 2; ++i) {
    session.options = i == 0 ? quick_start(given) : given;
    const double fit_before = session.fit_seconds;
    const Clock clock;
    const bool final = first_trained_block(given, layers) > 0;
    const auto outputs = start_block(session, 0, sample, sample, final);
    session.options = given;
    RABIT_CHECK(outputs);
    share_block(session, 0);
    at::Tensor student = outputs->student;
    if (!student.defined()) {
      student = at::empty_like(sample);
      RABIT_CHECK(run_block(session, teacher, rotary, sample, student));
    }
    target = outputs->teacher;
    if (!target.defined() && keeps_teacher_stream(given, layers)) {
      target = at::empty_like(sample);
      RABIT_CHECK(run_block(session, teacher, rotary, sample, target));
    }
    wait_for(student);
    const double fit = session.fit_seconds - fit_before;
    cost.fit = fit / mean_paths(session, 0);
    cost.pass = (clock.elapsed() - fit) / static_cast<double>(windows);
  }
  if (given.warm_epochs > 0.0) {
    const int64_t batch = std::min(given.warm_batch / session.processes(), windows);
    const at::Tensor in = sample.narrow(0, 0, batch), out = target.narrow(0, 0, batch);
    // After the first the fastest counts: what else runs on the machine only adds, and little text
    // for all blocks would come of it.
    const auto note = [](int i, double& least, double seconds) {
      least = i <= 1 ? seconds : std::min(least, seconds);
    };
    for (int i = 0; i < kMeasuredSteps; ++i) {
      const Clock train_clock;
      RABIT_CHECK(train_block(session, 0, rotary, in, out, in, 0, 1.0, 0.0));
      note(i, cost.train, train_clock.elapsed() / static_cast<double>(batch));
      if (layers == 1) {
        continue;  // it is the last
      }
      const Clock head_clock;
      const at::Tensor y = out.narrow(0, 0, 1).detach().clone().set_requires_grad(true);
      const DistillationLoss loss = head_loss(session, session.student, y, out.narrow(0, 0, 1),
                                              session.windows.distinct_range(0, 1).to(x.device()));
      loss.loss.backward();
      wait_for(y.grad());
      note(i, cost.head, head_clock.elapsed());
    }
  }
  session.student.blocks[0] = kept;
  session.student.output_norm = kept_norm;
  return cost;
}

// What the phase will do.
struct Plan {
  BlockSeconds cost;
  int64_t windows = 0;
  double epochs = 0.0;
};

// Times a block, says what the phase will do with at most `windows` in each process, and, where
// time is bounded, takes as many of them and as many epochs as it can pay for.
Result<Plan> make_plan(TrainSession& session, const Rotary& rotary, int64_t first_block,
                       int64_t windows) {
  const QuantizeOptions& options = session.options;
  const Network& teacher = session.teacher;
  const at::Tensor sample = [&] {
    const at::NoGradGuard no_grad;
    const int64_t count = std::min(windows, kMeasuredWindows);
    return embed(
        teacher,
        session.windows.distinct_range(session.rank() * windows, count).to(teacher.device));
  }();
  RABIT_ASSIGN(const BlockSeconds cost, measure_block(session, rotary, sample));
  BlockWork work = work_from(session, first_block, first_block, options.warm_epochs);
  const auto tokens = static_cast<double>(options.seq_len * session.processes());
  const auto rate = [&](double seconds_per_window) {
    return seconds_per_window > 0.0 ? fmt::format("{:.0f}", tokens / seconds_per_window)
                                    : std::string("-");
  };
  const std::string speed =
      fmt::format("{:.2f} s to fit a block, {} tokens/s through it, {} tokens/s in its training",
                  cost.fit * mean_paths(session, first_block), rate(cost.pass), rate(cost.train));
  if (session.clock.limited()) {
    const double available = kPlanned * session.clock.left();
    const int64_t least = std::min(windows, kMinWindows);
    if (affordable_windows(cost, work, available) < least) {
      work.epochs = std::min(work.epochs, 1.0);
    }
    const int64_t affordable = affordable_windows(cost, work, available);
    if (affordable < least) {
      const double seconds = seconds_for(cost, work, static_cast<double>(least)) / kPlanned;
      const double minutes = (seconds / session.warm_share + session.spent +
                              session.clock.elapsed() + 2.0 * kFinishSeconds) /
                             60.0;
      return Error{
          fmt::format("--minutes {}: too short for this machine, which needs about {:.1f} minutes "
                      "at least ({})",
                      options.minutes, std::ceil(minutes * 10.0) / 10.0, speed)};
    }
    windows = std::min(windows, affordable);
  }
  session.observer.message(
      fmt::format("measured: {}; plan: {} blocks, each from {} tokens x {} epochs, {:.0f} s", speed,
                  work.blocks, windows * session.processes() * options.seq_len, work.epochs,
                  seconds_for(cost, work, static_cast<double>(windows))));
  return Plan{cost, windows, work.epochs};
}

}  // namespace

Status warm_start(TrainSession& session, int64_t first_block) {
  const QuantizeOptions& options = session.options;
  const ModelConfig& config = session.config();
  const Network& teacher = session.teacher;
  const Rotary rotary = make_rotary(config, options.seq_len, teacher.device);
  const int64_t first_trained = first_trained_block(options, config.layers);
  const int64_t most = windows_of_each(
      session, std::min(session.windows.distinct(),
                        std::max<int64_t>(1, options.calib_tokens / options.seq_len)));
  RABIT_ASSIGN(const Plan plan, make_plan(session, rotary, first_block, most));
  if (options.dry_run) {
    return {};
  }
  int64_t windows = plan.windows;  // of each process
  const auto note_tokens = [&] {
    session.log["calib_tokens_used"] = windows * session.processes() * options.seq_len;
  };
  note_tokens();

  const int64_t first = session.rank() * windows;
  const at::Tensor ids = session.windows.distinct_range(first, windows).to(teacher.device);
  at::Tensor x_teacher;
  at::Tensor x_student = [&] {
    const at::NoGradGuard no_grad;
    return embed(teacher, ids);
  }();
  const bool both = keeps_teacher_stream(options, config.layers);
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
      RABIT_CHECK(run_block(session, whole_weights(teacher, layer), rotary, x_teacher, x_teacher));
    }
  }

  Clock since_checkpoint;
  BlockTimes times(plan.cost);
  for (int64_t layer = first_block; layer < config.layers; ++layer) {
    bool due = layer > first_block &&  // something is finished
               since_checkpoint.elapsed() > options.checkpoint_minutes * 60.0;
    if (session.stopped_together(due)) {  // the only place to stop at
      if (layer > 0) {
        RABIT_CHECK(save_checkpoint(session, layer, nullptr));
      }
      return Error{"interrupted", true};
    }
    if (due) {
      save_or_say(session, layer, nullptr);
      since_checkpoint = Clock();
    }
    const bool train = layer >= first_trained;
    const auto block = static_cast<size_t>(layer);
    const Clock block_clock;
    double budget = 0.0;  // for the block's training
    if (session.clock.limited()) {
      // Slower than measured: less text for the blocks to come rather than a missed bound.
      BlockWork work = work_from(session, layer, 0, plan.epochs);
      const int64_t affordable = affordable_windows(times.now(), work, session.clock.left());
      if (windows > kMinWindows &&
          static_cast<double>(affordable) < kTolerance * static_cast<double>(windows)) {
        windows = std::max(kMinWindows, affordable);
        note_tokens();
        for (at::Tensor* stream : {&x_student, &x_teacher}) {
          *stream = stream->defined() ? stream->narrow(0, 0, windows).clone() : *stream;
        }
      }
      if (train) {
        // An equal share of what all else leaves.
        const auto trained = static_cast<double>(std::exchange(work.trained, 0));
        const double other = seconds_for(times.now(), work, static_cast<double>(windows));
        budget = std::max(0.1, (session.clock.left() - other) / trained);
      }
    }
    const double fit_before = session.fit_seconds;
    const at::Tensor last_norm = session.student.output_norm.defined()
                                     ? session.student.output_norm.detach().clone()
                                     : at::Tensor();
    const auto body = [&]() -> Status {
      RABIT_ASSIGN(const BlockOutputs outputs,
                   start_block(session, layer, x_student, x_teacher, !train));
      share_block(session, layer);
      BlockRun run;
      const double init_seconds = block_clock.elapsed();
      double train_seconds = 0.0;
      at::Tensor target = outputs.teacher;
      if (both && !target.defined()) {
        target = at::empty_like(x_teacher);
        RABIT_CHECK(run_block(session, whole_weights(teacher, layer), rotary, x_teacher, target));
      }
      if (train) {
        const Clock train_clock;
        RABIT_ASSIGN(run, train_block(session, layer, rotary, x_student, target, x_teacher, first,
                                      plan.epochs, budget));
        train_seconds = train_clock.elapsed();
      }
      if (outputs.student.defined() && !session.ranks) {
        x_student = outputs.student;
      } else {
        RABIT_CHECK(run_block(session, weights_of(block), rotary, x_student, x_student));
      }
      double output_error = NAN;
      if (both) {
        output_error = stream_error(session, x_student, target, x_teacher);
        x_teacher = target;
      }
      wait_for(x_student);
      const double fit_seconds = session.fit_seconds - fit_before;
      times.fit.add(fit_seconds / mean_paths(session, layer));
      times.pass.add((block_clock.elapsed() - train_seconds - fit_seconds) /
                     static_cast<double>(windows));
      if (run.steps > 0 && layer + 1 < config.layers) {
        times.train.add(static_cast<double>(options.seq_len) / run.tokens_per_second);
      }
      session.log["warm_start"].push_back({{"block", layer},
                                           {"windows", windows * session.processes()},
                                           {"steps", run.steps},
                                           {"loss", layer + 1 == config.layers ? "head" : "block"},
                                           {"loss_first", run.first_loss},
                                           {"loss_last", run.last_loss},
                                           {"output_error", output_error},
                                           {"fit_errors", session.fit_errors},
                                           {"init_seconds", init_seconds},
                                           {"train_seconds", train_seconds},
                                           {"tokens_per_second", run.tokens_per_second}});
      if (session.observer.metrics) {
        nlohmann::json line = session.log["warm_start"].back();
        line["phase"] = "block";
        line["seconds"] = session.seconds();
        line.update(peak_memory(teacher.device));
        session.observer.metrics(line);
      }
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
  }
  return {};
}

}  // namespace rabit::train
