// Perplexity: windows do not overlap and start from nothing, so every scored token has between 1
// and ctx - 1 tokens before it. The loss is summed in double, window by window.
#include "eval/perplexity.h"

#include <fmt/format.h>

#include <cmath>
#include <vector>

#include "base/interrupt.h"

namespace rabit {

std::string perplexity_protocol(int64_t ctx) {
  return fmt::format(
      "non-overlapping windows of {} tokens, all but the first token of each scored, short last "
      "window dropped",
      ctx);
}

Result<PerplexityResult> perplexity(LogitSource& model, std::span<const int32_t> tokens,
                                    const PerplexityOptions& options,
                                    const PerplexityProgress& progress) {
  const int64_t ctx = options.ctx;
  if (ctx < 2) {
    return Error{fmt::format("a window needs at least 2 tokens, not {}", ctx)};
  }
  const auto total = static_cast<int64_t>(tokens.size());
  int64_t windows = total / ctx;
  if (windows == 0) {
    return Error{
        fmt::format("the text has {} tokens, fewer than one window of {}; give a longer text or a "
                    "smaller --ctx",
                    total, ctx)};
  }
  if (options.max_windows > 0 && options.max_windows < windows) {
    windows = options.max_windows;
  }

  std::vector<double> nll(static_cast<size_t>(ctx - 1));
  PerplexityResult result{.tokens_total = total, .ctx = ctx};
  double& mean = result.mean_nll;  // running mean and sum of squared deviations (Welford)
  double squares = 0;
  while (result.windows < windows) {
    const int64_t first = result.windows * ctx;
    RABIT_CHECK(check_interrupt());
    RABIT_CHECK(model.score(tokens.subspan(first, ctx), nll));
    for (int64_t i = 0; i < ctx - 1; ++i) {
      const double loss = nll[static_cast<size_t>(i)];
      if (!std::isfinite(loss)) {
        return Error{fmt::format("the loss of token {} is not finite ({}): the model is broken",
                                 first + i + 1, loss)};
      }
      ++result.tokens_scored;
      const double off = loss - mean;
      mean += off / static_cast<double>(result.tokens_scored);
      squares += off * (loss - mean);
    }
    ++result.windows;
    result.perplexity = std::exp(mean);
    // Variance of the mean from the sample variance; d exp(m) = exp(m) dm.
    if (const auto count = static_cast<double>(result.tokens_scored); count > 1) {
      result.perplexity_stderr = result.perplexity * std::sqrt(squares / (count - 1) / count);
    }
    if (progress) {
      progress(result, windows);
    }
  }
  return result;
}

}  // namespace rabit
