// Sampling: distributions, bounds, hostile logits.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
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

}  // namespace
}  // namespace rabit
