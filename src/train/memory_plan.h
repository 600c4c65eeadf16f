// What a run will hold on a GPU, before it holds it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model/config.h"
#include "train/options.h"

namespace rabit::train {

struct MemoryPart {
  std::string what;
  int64_t bytes = 0;
};

/// The parts of a phase that are there together where it needs most.
struct MemoryPhase {
  std::string name;
  std::vector<MemoryPart> parts;

  int64_t bytes() const;
  /// "distillation 12.1 GB: activations 9.4, latents 0.4, ..."
  std::string describe() const;
};

/// Phases of a run in bf16 on a GPU, of each of several where it is shared by `processes`.
/// `calib_tokens` and `distill_tokens`: of this run and text; a phase without tokens is left out.
std::vector<MemoryPhase> plan_memory(const ModelConfig& config, const PathPlan& bits,
                                     const QuantizeOptions& options, int64_t calib_tokens,
                                     int64_t distill_tokens, int processes = 1);

/// Of the largest phase.
int64_t peak_bytes(const std::vector<MemoryPhase>& phases);

/// The options, written as on a command line, of the fastest way known to stay within `bytes`; none
/// if there is none. They change no result but by rounding, as far as that is enough; after that
/// less text for the start, and Muon in place of AdamW.
std::optional<std::string> options_within(const ModelConfig& config, const PathPlan& bits,
                                          const QuantizeOptions& options, int64_t calib_tokens,
                                          int64_t distill_tokens, int64_t bytes, int processes = 1);

}  // namespace rabit::train
