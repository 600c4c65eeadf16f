// Sampling from one row of logits. Everything that decides is a comparison of floats or arithmetic
// in double in a fixed order, and the generator's sequence is fixed by the C++ standard, so a seed
// gives the same tokens everywhere (as far as the C library's exp agrees to the last digit that
// matters). Few tokens of a vocabulary are ever likely: candidates are put in order only as far as
// a decision looks.
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
  size_t sorted = 0;                  // of them: the likeliest, in order

  /// Takes what can be drawn; NaN and -infinity never are.
  void add(float logit, int32_t token) {
    if (logit > -std::numeric_limits<float>::infinity()) {
      candidates.push_back({logit, token});
    }
  }

  int32_t draw();

  /// The candidate at this place of the order.
  const Candidate& at(size_t place) {
    constexpr size_t kFirst = 64, kGrowth = 4;
    const auto begin = candidates.begin(), end = candidates.end();
    while (sorted <= place) {
      const size_t next = std::min(candidates.size(), std::max(kFirst, sorted * kGrowth));
      const auto from = begin + static_cast<int64_t>(sorted);
      const auto to = begin + static_cast<int64_t>(next);
      std::nth_element(from, to, end, likelier);
      std::sort(from, to, likelier);
      sorted = next;
    }
    return candidates[place];
  }

  /// Uniform in [0, 1): the 53 high bits. std::uniform_real_distribution differs between libraries.
  double uniform() { return static_cast<double>(generator() >> 11) * 0x1p-53; }
};

Sampler::Sampler(const SamplingOptions& options)
    : state_(new State{options, std::mt19937_64(options.seed), {}, {}}) {}
Sampler::~Sampler() = default;

int64_t Sampler::deciding() const {
  const SamplingOptions& options = state_->options;
  return options.temperature > 0 ? std::max<int64_t>(options.top_k, 0) : 1;
}

int32_t Sampler::sample(std::span<const float> logits) {
  state_->candidates.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    state_->add(logits[i], static_cast<int32_t>(i));
  }
  return state_->draw();
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> tokens) {
  std::vector<Candidate>& candidates = state_->candidates;
  candidates.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    state_->add(logits[i], tokens[i]);
  }
  // As they come from a whole vocabulary.
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  return state_->draw();
}

/// From candidates in the order of their tokens.
int32_t Sampler::State::draw() {
  Candidate best = {-std::numeric_limits<float>::infinity(), 0};
  for (const Candidate& candidate : candidates) {
    if (candidate.logit > best.logit) {
      best = candidate;
    }
  }
  const bool greedy = !(options.temperature > 0);
  if (greedy || candidates.empty() || std::isinf(best.logit)) {  // +infinity is always drawn
    return best.token;
  }

  size_t count = candidates.size();
  sorted = 0;
  if (options.top_k > 0 && options.top_k < static_cast<int64_t>(count)) {
    std::partial_sort(candidates.begin(), candidates.begin() + options.top_k, candidates.end(),
                      likelier);
    count = sorted = static_cast<size_t>(options.top_k);
    candidates.resize(count);
  }

  // Probabilities relative to the largest.
  const auto weight = [&](const Candidate& candidate, double temperature) {
    return std::exp((static_cast<double>(candidate.logit) - best.logit) / temperature);
  };
  // Top-p and min-p are at temperature 1.
  size_t kept = count;
  if (options.top_p < 1 || options.min_p > 0) {
    double total = 0, sum = 0;
    if (options.top_p < 1) {
      for (const Candidate& candidate : candidates) {
        total += weight(candidate, 1);
      }
    }
    for (kept = 0; kept < count;) {
      const double next = weight(at(kept), 1);
      if (kept > 0 && next < options.min_p) {
        break;
      }
      ++kept;
      sum += next;
      if (options.top_p < 1 && sum >= options.top_p * total) {
        break;
      }
    }
  }

  double total = 0;
  for (size_t i = 0; i < kept; ++i) {
    total += weight(candidates[i], options.temperature);
  }
  double left = uniform() * total;
  for (size_t i = 0; i < kept; ++i) {
    left -= weight(at(i), options.temperature);
    if (left < 0) {
      return candidates[i].token;
    }
  }
  return at(0).token;
}

}  // namespace rabit
