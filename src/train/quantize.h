// The whole job: a pretrained model in, a packed 2-bit model out. This header is free of torch, so
// that the command line compiles without it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "io/gguf.h"
#include "rabit/result.h"

namespace rabit::train {

enum class Compute { kAuto, kF32, kBF16 };
enum class EmbeddingType { kQ8_0, kF16 };

/// Every setting of a run. `describe` lists them for logs, checkpoints and the packed file.
struct QuantizeOptions {
  int64_t paths = 2;           // k; bits a weight before scales
  std::string device = "cpu";  // "cpu", "cuda" or "cuda:N"
  int threads = 0;             // 0: all usable
  Compute compute = Compute::kAuto;
  uint64_t seed = 1;
  int64_t seq_len = 1024;  // tokens a training window

  double minutes = 0.0;  // 0: no bound on time
  int64_t tokens = -1;   // end-to-end distillation; -1: chosen (0 when time is short)

  int64_t calib_tokens = 262144;  // for error feedback and the block-by-block warm start
  bool error_feedback = true;
  double ef_damp = 0.01;   // of the mean diagonal of H
  double alpha_in = 1.0;   // exponent of the input importance
  double alpha_out = 0.0;  // exponent of the output importance, without error feedback
  int64_t init_sweeps = 8;
  int64_t als_steps = 12;

  double warm_epochs = 4.0;  // 0: no warm start
  int64_t warm_batch = 4;    // windows a step
  double warm_muon_lr = 4e-3;
  double warm_scale_lr = 1e-3;

  int64_t batch = 16;  // windows a step, end to end
  double muon_lr = 5e-4;
  double scale_lr = 1e-4;
  double warmup = 0.03;  // share of a phase's steps
  double gamma = 0.0;    // weight of the blocks' normalised MSE
  double clip = 1.0;     // largest norm of the scales' gradients

  EmbeddingType embedding = EmbeddingType::kQ8_0;
  double checkpoint_minutes = 10.0;
  bool resume = false;
  bool dry_run = false;  // measure, say the plan, stop
};

/// What the run is doing; `total` 0 when unknown.
struct TrainProgress {
  std::string phase;
  int64_t done = 0, total = 0;
  double loss = 0.0;               // of the phase's own objective; NaN: none yet
  double tokens_per_second = 0.0;  // 0: not measured yet
};

struct TrainObserver {
  std::function<void(const TrainProgress&)> progress;
  std::function<void(const std::string&)> message;  // one line
};

/// A text to measure perplexity on after training, with torch on the training device.
struct HeldOut {
  std::vector<int32_t> tokens;
  int64_t ctx = 2048;
};

struct TrainingText {
  std::vector<int32_t> tokens;
  std::vector<std::string> files;    // names without folders
  std::vector<std::string> digests;  // SHA-256 of each
};

/// Runs everything and writes the packed model to `out`, a log of all settings and losses to
/// `<out>.json`; from time to time, on an interrupt, and when what follows training fails, a
/// checkpoint to `<out>.ckpt`. Errors:
/// an unsupported model, a missing device, too little text, settings that contradict each other, a
/// checkpoint of other settings, a loss that is not finite, a full disk, an interrupt.
Status quantize(const GgufFile& model, const TrainingText& text, const HeldOut& held_out,
                const std::filesystem::path& out, const QuantizeOptions& options,
                const TrainObserver& observer);

}  // namespace rabit::train
