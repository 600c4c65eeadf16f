// What the phases of one run share: the teacher, the student so far, clocks, randomness, the log.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/interrupt.h"
#include "base/threads.h"
#include "train/fake_quant.h"
#include "train/kl_loss.h"
#include "train/network.h"
#include "train/optimizer.h"
#include "train/quantize.h"
#include "train/ranks.h"
#include "train/windows.h"

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

/// What the importances of a block's rows and columns come from: docs/training.md.
struct BlockSums {
  std::array<at::Tensor, kRoleCount> in;   // sum of |input| by column (d_in), float64
  std::array<at::Tensor, kRoleCount> out;  // root of the sum of squared output gradients (d_out)
};

struct TrainSession {
  const GgufFile& model;
  QuantizeOptions options;
  const TrainObserver& observer;
  Network teacher;
  Student student;
  TextWindows windows;  // the text, cut and shuffled
  ThreadPool pool;      // for quant/; torch has its own threads
  Clock clock;          // the whole run's
  nlohmann::json log;   // settings, phases, losses
  std::filesystem::path checkpoint_path;
  Clock whole = clock;           // since the run began, whatever bounds `clock` gets
  double earlier_seconds = 0.0;  // of the runs that this one continues
  double spent = 0.0;            // seconds before the phases
  double warm_share = 1.0;       // of a bounded run's time, for phases 1 and 2
  double fit_seconds = 0.0;      // spent so far in fitting scales and error feedback
  PathPlan bits = PathPlan::parse(options.bits).value();  // checked by check_run
  std::shared_ptr<Ranks> ranks;    // the run's processes; none where it is alone
  std::vector<double> fit_errors;  // of the last block's layers, relative; error feedback only
  std::vector<BlockSums> sums;     // by block, where they are needed

  const ModelConfig& config() const { return teacher.config; }
  double seconds() const { return earlier_seconds + whole.elapsed(); }
  bool first() const { return !ranks || ranks->first(); }
  int64_t processes() const { return ranks ? ranks->size() : 1; }
  int64_t rank() const { return ranks ? ranks->rank() : 0; }
  /// In place, over all processes.
  void sum(const at::Tensor& tensor) const {
    if (ranks) {
      ranks->sum(tensor);
    }
  }
  /// Whether it holds on any of the processes.
  bool anywhere(bool here) const {
    if (ranks) {
      ranks->any(std::span(&here, 1));
    }
    return here;
  }
  /// Whether several processes are to stop, since one was asked to; then all were. due: becomes
  /// whether it holds on any of them.
  bool stopped_together(bool& due) const {
    if (!ranks) {
      return false;
    }
    std::array flags = {interrupted(), terminated(), due};
    ranks->any(flags);
    due = flags[2];
    if (flags[0]) {
      set_interrupted(true, flags[1]);
    }
    return flags[0];
  }
};

/// The device of a --device. Errors: not a device's name; not there.
Result<at::Device> pick_device(const std::string& name);
/// Threads of a --threads: as many as the process may use for 0.
int pick_threads(int64_t asked);
/// The type of the products: bf16 where the device is fast with it and nothing else is asked for.
at::ScalarType pick_compute(Compute compute, at::Device device);

/// Importance of one layer's columns and rows, with mean 1; empty: all ones.
struct Importance {
  std::vector<float> in, out;
};
Importance importance_of(const BlockSums& sums, Role role, const QuantizeOptions& options);

/// Error feedback needs the teacher's stream beside the student's.
inline bool needs_teacher_stream(const QuantizeOptions& options) {
  return options.error_feedback &&
         (options.ef_inputs == EfInputs::kTeacher || options.ef_target != EfTarget::kWeight);
}

/// Fills session.sums, from the language loss of the teacher on some windows.
Status measure_importance(TrainSession& session);

/// Streams after a block.
struct BlockOutputs {
  at::Tensor student, teacher;  // (S, T, d_model), or undefined
};

/// Windows computed at once where no gradient is kept. One for all passes: a stream that a resumed
/// run computes again must equal the one that error feedback went through, to the bit on a CPU (on
/// a GPU the two differ by rounding).
inline constexpr int64_t kForwardWindows = 8;

/// The most memory that the run has held so far: of the process (host_bytes), and on the device if
/// that has its own (device_bytes).
nlohmann::json peak_memory(at::Device device);

/// A GPU only queues its work: returns once it has this tensor.
inline void wait_for(const at::Tensor& x) { (void)x.flatten().select(0, 0).item(); }

/// Phase 1 of block `layer`: fills student.blocks[layer]. With error feedback from the residual
/// stream x (S, T, d_model) that the quantized prefix produces, and the teacher's stream where
/// needs_teacher_stream(); without, by the importances alone. Returns the streams after the block
/// as far as it came by them: with error feedback the teacher's where it was needed, the student's
/// where the block is `final`, which no training follows.
Result<BlockOutputs> start_block(TrainSession& session, int64_t layer, const at::Tensor& x,
                                 const at::Tensor& teacher_x, bool final);

/// Settings whose start takes less time and is nearly as good.
QuantizeOptions quick_start(QuantizeOptions options);

/// Gives a student norms of its own to train, from the teacher's.
void add_norms(const Network& teacher, int64_t layer, StudentBlock& block);
void add_output_norm(const Network& teacher, Student& student);

/// More paths than --bits gives that --target-bpw tries for a layer.
inline constexpr int64_t kMostExtraPaths = 2;

/// Finds what --alpha-search and --target-bpw ask for, and takes it into session.options,
/// session.bits and the log.
Status search_settings(TrainSession& session);

/// All linear layers under a plan; bits count the scales.
struct PlanSize {
  int64_t weights = 0, bits = 0;
  double bits_per_weight() const {
    return static_cast<double>(bits) / static_cast<double>(weights);
  }
};
PlanSize plan_size(const ModelConfig& config, const PathPlan& plan);

/// Phases 1 and 2 for all blocks from `first_block` on: initialise, then train each alone to give
/// the teacher block's output from the quantized prefix.
Status warm_start(TrainSession& session, int64_t first_block);

/// Steps of distillation from `tokens` tokens.
inline int64_t distill_steps(const QuantizeOptions& options, int64_t tokens) {
  return tokens > 0 ? std::max<int64_t>(1, tokens / (options.batch * options.seq_len)) : 0;
}

/// Of several processes each has its share.
struct DistillState {
  int64_t step = 0;
  TrainerState trainer;
  std::vector<at::Tensor> average;  // of the latents, with --ema
};

/// What distillation compares, from the streams after the last block (windows, T, d_model) and the
/// tokens (windows, T). Its graph goes into the student's stream and last norm.
DistillationLoss head_loss(const TrainSession& session, const Student& student,
                           const at::Tensor& student_stream, const at::Tensor& teacher_stream,
                           const at::Tensor& ids);

/// Phase 3: end-to-end distillation of the whole student, from `state` on, which holds the end's
/// when it succeeds.
Status distill(TrainSession& session, int64_t tokens, DistillState& state);

/// Seconds that distillation from `tokens` tokens takes, by a few steps of a stand-in student of
/// the same size.
Result<double> measure_distill(const TrainSession& session, int64_t tokens);

/// The name of the checkpoint that was written `age` ones before the last.
std::filesystem::path earlier_checkpoint(const std::filesystem::path& checkpoint, int64_t age);
/// All files with such a name.
std::vector<std::filesystem::path> checkpoints_beside(const std::filesystem::path& checkpoint);
/// Removes them, and what a kill may have left of one.
void remove_checkpoints(const std::filesystem::path& checkpoint);

/// What a continuation must share with the run that it continues, as JSON text.
std::string settings_fingerprint(const TrainSession& session);

/// Writes blocks [0, blocks_done) and, if given, the state of distillation. Several processes call
/// it together and write one file, each what it holds; any number of processes can go on from it.
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

/// A checkpoint, by its metadata.
bool is_checkpoint(const GgufFile& file);
struct CheckpointStudent {
  Student student;  // on the host
  int64_t blocks_done = 0;
};
/// The student that a checkpoint holds. Errors: damaged; of another model.
Result<CheckpointStudent> student_of_checkpoint(const GgufFile& file, const ModelConfig& config,
                                                const std::string& source_sha256);

/// Key of a packed file: the share of signs that training has turned, layer by layer (blocks and
/// roles in order) and path by path.
inline constexpr char kTurnedSignsKey[] = "rabit.train.turned_signs";

/// Packs the student and writes the model, reads it back and compares it with the student, then
/// gives it its name. Several processes call it together; the first writes.
Status write_packed_model(TrainSession& session, const GgufFile& model,
                          const std::filesystem::path& out);

}  // namespace rabit::train
