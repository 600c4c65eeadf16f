// The whole job: a pretrained model in, a packed 2-bit model out. This header is free of torch, so
// that the command line compiles without it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "io/gguf.h"
#include "rabit/result.h"
#include "train/corpus.h"
#include "train/options.h"

namespace rabit::train {

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
  /// An object for every block and every step of distillation; docs/training.md, "Metrics".
  std::function<void(const nlohmann::json&)> metrics;
};

/// A text to measure perplexity on after training, with torch on the training device.
struct HeldOut {
  std::vector<int32_t> tokens;
  int64_t ctx = 2048;
  std::string sha256;  // of the text, for the log; may be empty
};

class Ranks;

/// Meets the other processes of a run, as the launcher's environment says; null where this one is
/// alone. lost: another was lost, and this one cannot end by itself; called once, from another
/// thread, with what to say, and must end the process. waiting: called once, with what to say,
/// where the others do not come at once. Errors: an environment that makes no sense, processes that
/// do not come, an interrupt.
Result<std::shared_ptr<Ranks>> join_processes(
    const QuantizeOptions& options, std::function<void(const std::string&)> lost,
    const std::function<void(const std::string&)>& waiting);
/// Tells them how this one's part has ended, if they do not know.
void leave_processes(const std::shared_ptr<Ranks>& ranks, const Status& status);

/// Runs everything and writes the packed model to `out`, a log of all settings and losses to
/// `<out>.json`; from time to time, on an interrupt, and when what follows training fails, a
/// checkpoint to `<out>.ckpt`. Errors:
/// an unsupported model, a missing device, too little text, settings that contradict each other, a
/// checkpoint of other settings, a loss that is not finite, a full disk, an interrupt. ranks: the
/// processes that do it together; all get an error where one does.
Status quantize(const GgufFile& model, const TrainingText& text, const HeldOut& held_out,
                const std::filesystem::path& out, const QuantizeOptions& options,
                const TrainObserver& observer, const std::shared_ptr<Ranks>& ranks = {});

}  // namespace rabit::train
