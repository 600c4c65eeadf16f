// Perplexity over non-overlapping windows (the protocol of quantization papers).
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "eval/logit_source.h"
#include "rabit/result.h"

namespace rabit {

struct PerplexityOptions {
  int64_t ctx = 2048;
  int64_t max_windows = 0;  // 0: all
};

struct PerplexityResult {
  double perplexity = 0;         // exp(mean nll)
  double perplexity_stderr = 0;  // delta method on the mean nll over tokens
  double mean_nll = 0;           // nats a token
  int64_t tokens_scored = 0;
  int64_t tokens_total = 0;  // in the text
  int64_t windows = 0;
  int64_t ctx = 0;
};

using PerplexityProgress = std::function<void(const PerplexityResult&, int64_t)>;

/// One line that names the protocol, for every output.
std::string perplexity_protocol(int64_t ctx);

/// Splits `tokens` into windows of ctx, scores all tokens of each but its first, drops a short last
/// window. `progress(so_far, windows)` after each window, with what all windows would give if it
/// were the last. Errors: fewer tokens than one window, ctx < 2, an interrupt, a failing model, a
/// loss that is not finite.
Result<PerplexityResult> perplexity(LogitSource& model, std::span<const int32_t> tokens,
                                    const PerplexityOptions& options,
                                    const PerplexityProgress& progress);

}  // namespace rabit
