// Sampling: distributions, bounds, hostile logits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "rabit/engine.h"

namespace rabit {
namespace {

using Floats = std::vector<float>;

TEST(SamplerTest, GreedyTakesTheFirstLargest) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  Sampler sampler({.temperature = 0});
  EXPECT_EQ(sampler.sample(Floats{1, 5, 5, 2}), 1);
  EXPECT_EQ(sampler.sample(Floats{nan, 1, nan, 2, nan}), 3);
  for (const float temperature : {0.0F, 0.8F, nan, inf, 1e-30F}) {
    Sampler any({.temperature = temperature});
    EXPECT_EQ(any.sample(Floats{nan, nan}), 0);
    EXPECT_EQ(any.sample(Floats{-inf, -inf}), 0);
    EXPECT_EQ(any.sample(Floats{1, inf, 3}), 1);
    const int32_t token = any.sample(Floats{nan, 1, -inf, 2});
    EXPECT_TRUE(token == 1 || token == 3);
  }
  EXPECT_EQ(sampler.sample({}), 0);
}

TEST(SamplerTest, SameSeedSameTokens) {
  const Floats logits = {0, 0.1F, 0.2F, 0.3F, 0.4F};
  Sampler a({.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 42});
  Sampler b({.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 42});
  Sampler c({.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 43});
  int different = 0;
  for (int i = 0; i < 200; ++i) {
    const int32_t token = a.sample(logits);
    EXPECT_EQ(token, b.sample(logits));
    different += token != c.sample(logits);
  }
  EXPECT_GT(different, 50);
}

/// How often each token is drawn out of 20,000.
std::vector<double> frequencies(const SamplingOptions& options, const Floats& logits) {
  Sampler sampler(options);
  std::vector<double> counts(logits.size());
  for (int i = 0; i < 20000; ++i) {
    counts[sampler.sample(logits)] += 1.0 / 20000;
  }
  return counts;
}

TEST(SamplerTest, DrawsFromTheDistribution) {
  const Floats logits = {std::log(0.1F), std::log(0.5F), std::log(0.3F), std::log(0.1F)};
  const SamplingOptions all = {.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 1};
  const auto expect = [&](const SamplingOptions& options, const std::vector<double>& want) {
    const std::vector<double> got = frequencies(options, logits);
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_NEAR(got[i], want[i], 0.015) << i;  // four standard deviations of a half
    }
  };
  expect(all, {0.1, 0.5, 0.3, 0.1});
  SamplingOptions options = all;
  options.top_k = 2;
  expect(options, {0, 0.625, 0.375, 0});
  options = all;
  options.top_p = 0.85F;  // 0.5 + 0.3 < 0.85: one of the equal ones, the first, joins
  expect(options, {0.1 / 0.9, 0.5 / 0.9, 0.3 / 0.9, 0});
  options = all;
  options.min_p = 0.3F;  // 0.1 < 0.3 * 0.5
  expect(options, {0, 0.625, 0.375, 0});
  options = all;
  options.temperature = 0.5F;  // squares of the probabilities
  expect(options, {0.01 / 0.36, 0.25 / 0.36, 0.09 / 0.36, 0.01 / 0.36});
}

/// The token that a uniform number in [0, 1) draws, from all candidates in order.
int32_t drawn(const SamplingOptions& options, const Floats& logits, double uniform) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (options.top_k > 0) {
    order.resize(std::min<size_t>(order.size(), options.top_k));
  }
  const auto weight = [&](int32_t token, double temperature) {
    return std::exp((static_cast<double>(logits[token]) - logits[order[0]]) / temperature);
  };
  double total = 0, sum = 0;
  for (const int32_t token : order) {
    total += weight(token, 1);
  }
  size_t kept = 0;
  while (kept < order.size() && (kept == 0 || options.top_p >= 1 || sum < options.top_p * total)) {
    sum += weight(order[kept++], 1);
  }
  while (kept > 1 && weight(order[kept - 1], 1) < options.min_p) {
    --kept;
  }
  total = 0;
  for (size_t i = 0; i < kept; ++i) {
    total += weight(order[i], options.temperature);
  }
  double left = uniform * total;
  for (size_t i = 0; i < kept; ++i) {
    left -= weight(order[i], options.temperature);
    if (left < 0) {
      return order[i];
    }
  }
  return order[0];
}

TEST(SamplerTest, TheLikeliestDecide) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (const SamplingOptions& options :
       {SamplingOptions{.temperature = 0},
        {.seed = 1},
        {.temperature = 1.5F, .top_k = 3, .top_p = 0.8F, .min_p = 0, .seed = 2}}) {
    Sampler all(options), few(options);
    const int64_t deciding = few.deciding();
    EXPECT_EQ(deciding, options.temperature == 0 ? 1 : options.top_k);
    for (int i = 0; i < 50; ++i) {
      Floats logits(200), likely;
      for (float& logit : logits) {
        logit = std::round(4 * normal(random)) / 4;  // some are equal
      }
      std::vector<int32_t> tokens(logits.size());
      std::iota(tokens.begin(), tokens.end(), 0);
      std::stable_sort(tokens.begin(), tokens.end(),
                       [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
      tokens.resize(static_cast<size_t>(deciding) + 5);
      std::shuffle(tokens.begin(), tokens.end(), random);
      for (const int32_t token : tokens) {
        likely.push_back(logits[token]);
      }
      likely.push_back(-std::numeric_limits<float>::infinity());
      tokens.push_back(-1);
      EXPECT_EQ(few.sample(likely, tokens), all.sample(logits));
    }
  }
  EXPECT_EQ(Sampler({.top_k = 0}).deciding(), 0);
  EXPECT_EQ(Sampler({.top_k = -1}).deciding(), 0);
  EXPECT_EQ(Sampler({.temperature = 0}).sample({}, {}), 0);
}

TEST(SamplerTest, DrawsWhatAFullSortDraws) {
  std::mt19937_64 random(5);
  for (const float spread : {0.0F, 0.1F, 1.0F, 4.0F}) {
    for (const int64_t top_k : {0, 1, 40, 300, 5000}) {
      for (const float top_p : {0.0F, 0.5F, 0.95F, 1.0F}) {
        for (const float min_p : {0.0F, 0.05F, 1.0F}) {
          const SamplingOptions options = {
              .temperature = 0.8F, .top_k = top_k, .top_p = top_p, .min_p = min_p, .seed = 9};
          Sampler sampler(options);
          std::mt19937_64 same(options.seed);
          for (int i = 0; i < 5; ++i) {
            Floats logits(2000);
            for (float& logit : logits) {  // with some that are equal
              logit = spread * static_cast<float>(random() % 1024) / 100;
            }
            const double uniform = static_cast<double>(same() >> 11) * 0x1p-53;
            EXPECT_EQ(sampler.sample(logits), drawn(options, logits, uniform))
                << spread << " " << top_k << " " << top_p << " " << min_p;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace rabit
