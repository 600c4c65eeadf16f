// What the phases of one run share: the teacher, the student so far, clocks, randomness, the log.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

#include "base/threads.h"
#include "train/fake_quant.h"
#include "train/network.h"
#include "train/optimizer.h"
#include "train/quantize.h"

namespace rabit::train {

/// Seconds since construction, and a bound.
class Clock {
 public:
  explicit Clock(double limit_seconds = 0.0) : limit_(limit_seconds) {}
  double elapsed() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  bool limited() const { return limit_ > 0.0; }
  double left() const { return limited() ? limit_ - elapsed() : 1e30; }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  double limit_;
};

struct TrainSession {
  const GgufFile& model;
  const QuantizeOptions& options;
  const TrainObserver& observer;
  Network teacher;
  Student student;
  at::Tensor windows;  // (count, seq_len) int64 on the host: the text, cut
  ThreadPool pool;     // for quant/; torch has its own threads
  Clock clock;         // the whole run's
  nlohmann::json log;  // settings, phases, losses
  std::filesystem::path checkpoint_path;
  double spent = 0.0;        // seconds before the phases
  double warm_share = 1.0;   // of a bounded run's time, for phases 1 and 2
  double fit_seconds = 0.0;  // spent so far in fitting scales and error feedback
  PathPlan bits = PathPlan::parse(options.bits).value();  // checked by check_run
  std::vector<double> fit_errors;  // of the last block's layers, relative; error feedback only

  const ModelConfig& config() const { return teacher.config; }
};

/// Fisher-Yates on our own generator: the same order on every machine.
inline std::vector<int64_t> shuffled(int64_t count, uint64_t seed) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    order[static_cast<size_t>(i)] = i;
  }
  std::mt19937_64 random(seed);
  for (int64_t i = count - 1; i > 0; --i) {
    std::swap(order[static_cast<size_t>(i)],
              order[static_cast<size_t>(random() % static_cast<uint64_t>(i + 1))]);
  }
  return order;
}

/// Windows in endless epochs, each a shuffle of its own, addressed by step: a run that is continued
/// sees what it would have seen.
class WindowOrder {
 public:
  WindowOrder(int64_t windows, uint64_t seed) : windows_(windows), seed_(seed) {}
  /// Indices of the windows of `step`, (batch) int64 on the host.
  at::Tensor batch(int64_t step, int64_t batch);

 private:
  int64_t windows_;
  uint64_t seed_;
  int64_t epoch_ = -1;
  std::vector<int64_t> order_;  // of epoch_
};

/// The device of a --device. Errors: not a device's name; not there.
Result<at::Device> pick_device(const std::string& name);

/// Importances by layer and role: docs/training.md.
struct Importance {
  std::vector<float> in, out;
};

/// Error feedback needs the teacher's stream beside the student's.
inline bool needs_teacher_stream(const QuantizeOptions& options) {
  return options.error_feedback &&
         (options.ef_inputs == EfInputs::kTeacher || options.ef_target != EfTarget::kWeight);
}

/// Phase 1 of block `layer` by error feedback from the residual stream x (S, T, d_model) that the
/// quantized prefix produces, and the teacher's stream where needs_teacher_stream(). `importance`
/// of the rows, if not null. Fills student.blocks[layer].
Status initialise_block(TrainSession& session, int64_t layer, const at::Tensor& x,
                        const at::Tensor& teacher_x,
                        const std::array<Importance, kRoleCount>* importance);

Result<std::vector<std::array<Importance, kRoleCount>>> measure_importance(TrainSession& session);

/// Fits the scales of a block to given importances, without error feedback.
Status initialise_block(TrainSession& session, int64_t layer,
                        const std::array<Importance, kRoleCount>& importance);

/// Phases 1 and 2 for all blocks from `first_block` on: initialise, then train each alone to give
/// the teacher block's output from the quantized prefix.
Status warm_start(TrainSession& session, int64_t first_block);

/// Steps of distillation from `tokens` tokens.
inline int64_t distill_steps(const QuantizeOptions& options, int64_t tokens) {
  return tokens > 0 ? std::max<int64_t>(1, tokens / (options.batch * options.seq_len)) : 0;
}

struct DistillState {
  int64_t step = 0;
  TrainerState trainer;
  std::vector<at::Tensor> average;  // of the latents, with --ema
};

/// Phase 3: end-to-end distillation of the whole student, from `state` on, which holds the end's
/// when it succeeds.
Status distill(TrainSession& session, int64_t tokens, DistillState& state);

/// Seconds that distillation from `tokens` tokens takes, by a few steps of a stand-in student of
/// the same size.
Result<double> measure_distill(const TrainSession& session, int64_t tokens);

/// What a continuation must share with the run that it continues, as JSON text.
std::string settings_fingerprint(const TrainSession& session);

/// Writes blocks [0, blocks_done) and, if given, the state of distillation.
Status save_checkpoint(const TrainSession& session, int64_t blocks_done,
                       const DistillState* distill);
/// The same in the middle of a run, where a full disk must not end it: says what failed and goes
/// on.
void save_or_say(const TrainSession& session, int64_t blocks_done, const DistillState* distill);
struct Resumed {
  int64_t blocks_done = 0;
  bool distilling = false;
  DistillState distill;
};
/// Reads what save_checkpoint wrote into session.student. Errors: missing or damaged, another
/// model, other data or settings (says which).
Result<Resumed> load_checkpoint(TrainSession& session);

/// Packs the student and writes the model, reads it back and compares it with the student, then
/// gives it its name.
Status write_packed_model(TrainSession& session, const GgufFile& model,
                          const std::filesystem::path& out);

}  // namespace rabit::train
