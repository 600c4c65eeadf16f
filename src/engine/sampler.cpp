// Sampling from one row of logits. Everything that decides is a comparison of floats or arithmetic
// in double in a fixed order, and the generator's sequence is fixed by the C++ standard, so a seed
// gives the same tokens everywhere (as far as the C library's exp agrees to the last digit that
// matters).
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "rabit/engine.h"

namespace rabit {
namespace {

struct Candidate {
  float logit;
  int32_t token;
};

bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

}  // namespace

struct Sampler::State {
  SamplingOptions options;
  std::mt19937_64 generator;
  std::vector<Candidate> candidates;  // kept between calls for its memory
  std::vector<double> weights;

  /// Uniform in [0, 1): the 53 high bits. std::uniform_real_distribution differs between libraries.
  double uniform() { return static_cast<double>(generator() >> 11) * 0x1p-53; }
};

Sampler::Sampler(const SamplingOptions& options)
    : state_(new State{options, std::mt19937_64(options.seed), {}, {}}) {}
Sampler::~Sampler() = default;

int32_t Sampler::sample(std::span<const float> logits) {
  const SamplingOptions& options = state_->options;
  std::vector<Candidate>& candidates = state_->candidates;
  candidates.clear();
  // NaN and -infinity are never drawn, +infinity always.
  Candidate best = {-std::numeric_limits<float>::infinity(), 0};
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > -std::numeric_limits<float>::infinity()) {
      candidates.push_back({logits[i], static_cast<int32_t>(i)});
      if (logits[i] > best.logit) {
        best = candidates.back();
      }
    }
  }
  const bool greedy = !(options.temperature > 0);
  if (greedy || candidates.empty() || std::isinf(best.logit)) {
    return best.token;
  }

  const auto count = static_cast<int64_t>(candidates.size());
  const int64_t top_k = options.top_k > 0 ? std::min(options.top_k, count) : count;
  std::partial_sort(candidates.begin(), candidates.begin() + top_k, candidates.end(), likelier);
  candidates.resize(static_cast<size_t>(top_k));

  // Probabilities relative to the largest, at temperature 1, for top-p and min-p.
  std::vector<double>& weights = state_->weights;
  weights.clear();
  double total = 0;
  for (const Candidate& candidate : candidates) {
    weights.push_back(std::exp(static_cast<double>(candidate.logit) - best.logit));
    total += weights.back();
  }
  size_t kept = candidates.size();
  if (options.top_p < 1) {
    double sum = 0;
    for (kept = 0; kept < weights.size();) {
      sum += weights[kept++];
      if (sum >= options.top_p * total) {
        break;
      }
    }
  }
  if (options.min_p > 0) {
    while (kept > 1 && weights[kept - 1] < options.min_p) {
      --kept;
    }
  }

  total = 0;
  for (size_t i = 0; i < kept; ++i) {
    weights[i] =
        std::exp((static_cast<double>(candidates[i].logit) - best.logit) / options.temperature);
    total += weights[i];
  }
  double left = state_->uniform() * total;
  for (size_t i = 0; i < kept; ++i) {
    left -= weights[i];
    if (left < 0) {
      return candidates[i].token;
    }
  }
  return candidates.front().token;
}

}  // namespace rabit
