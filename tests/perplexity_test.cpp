// Perplexity against models whose losses are known, and the texts and models that it must refuse.
#include "eval/perplexity.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/interrupt.h"
#include "eval/divergence.h"

namespace rabit {
namespace {

/// The loss of a token is what `loss` says of its id; keeps the windows that it was asked for.
class KnownLosses : public LogitSource {
 public:
  explicit KnownLosses(std::function<double(int32_t)> loss) : loss_(std::move(loss)) {}
  int64_t vocab_size() const override { return 1000; }
  Status score(std::span<const int32_t> tokens, std::span<double> nll) override {
    if (fails) {
      return Error{"out of order"};
    }
    EXPECT_EQ(nll.size() + 1, tokens.size());
    firsts.push_back(tokens.front());
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      nll[i] = loss_(tokens[i + 1]);
    }
    return {};
  }
  std::vector<int32_t> firsts;
  bool fails = false;

 private:
  std::function<double(int32_t)> loss_;
};

std::vector<int32_t> counting(int64_t count) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

TEST(Perplexity, UniformModelHasTheVocabularySize) {
  KnownLosses model([](int32_t) { return std::log(50.0); });
  const auto result = perplexity(model, counting(100), {.ctx = 20}, {});
  ASSERT_TRUE(result);
  EXPECT_NEAR(result->perplexity, 50, 1e-9);
  EXPECT_NEAR(result->perplexity_stderr, 0, 1e-9);
  EXPECT_EQ(result->tokens_scored, 95);
  EXPECT_EQ(result->windows, 5);
}

TEST(Perplexity, WindowsDoNotOverlapAndTheShortLastIsDropped) {
  KnownLosses model([](int32_t) { return 1.0; });
  std::vector<std::pair<int64_t, int64_t>> seen;
  const auto result = perplexity(model, counting(29), {.ctx = 10},
                                 [&](const PerplexityResult& so_far, int64_t windows) {
                                   seen.emplace_back(so_far.windows, windows);
                                   EXPECT_DOUBLE_EQ(so_far.mean_nll, 1);
                                 });
  ASSERT_TRUE(result);
  EXPECT_EQ(model.firsts, (std::vector<int32_t>{0, 10}));
  EXPECT_EQ(result->tokens_scored, 18);
  EXPECT_EQ(result->tokens_total, 29);
  EXPECT_EQ(result->ctx, 10);
  EXPECT_EQ(seen, (std::vector<std::pair<int64_t, int64_t>>{{1, 2}, {2, 2}}));
}

TEST(Perplexity, MeanAndStandardError) {
  // Scored are 1, 2, 3 and 5, 6, 7: losses id / 10.
  KnownLosses model([](int32_t id) { return id / 10.0; });
  const auto result = perplexity(model, counting(8), {.ctx = 4}, {});
  ASSERT_TRUE(result);
  EXPECT_NEAR(result->mean_nll, 0.4, 1e-12);
  EXPECT_NEAR(result->perplexity, std::exp(0.4), 1e-12);
  // Squared deviations from 0.4: 0.09 + 0.04 + 0.01 + 0.01 + 0.04 + 0.09 = 0.28.
  EXPECT_NEAR(result->perplexity_stderr, std::exp(0.4) * std::sqrt(0.28 / 5 / 6), 1e-12);
}

TEST(Perplexity, MaxWindows) {
  KnownLosses model([](int32_t) { return 1.0; });
  EXPECT_EQ(perplexity(model, counting(50), {.ctx = 10, .max_windows = 2}, {})->windows, 2);
  EXPECT_EQ(perplexity(model, counting(50), {.ctx = 10, .max_windows = 9}, {})->windows, 5);
}

TEST(Perplexity, OneScoredTokenHasNoSpread) {
  KnownLosses model([](int32_t) { return 2.0; });
  const auto result = perplexity(model, counting(2), {.ctx = 2}, {});
  ASSERT_TRUE(result);
  EXPECT_EQ(result->perplexity_stderr, 0);
}

TEST(Perplexity, RefusesWhatCannotBeScored) {
  KnownLosses model([](int32_t) { return 1.0; });
  const auto short_text = perplexity(model, counting(9), {.ctx = 10}, {});
  ASSERT_FALSE(short_text);
  EXPECT_NE(short_text.error().message.find("9 tokens"), std::string::npos);
  EXPECT_FALSE(perplexity(model, {}, {.ctx = 10}, {}));
  EXPECT_FALSE(perplexity(model, counting(9), {.ctx = 1}, {}));
  EXPECT_FALSE(perplexity(model, counting(9), {.ctx = -5}, {}));
  EXPECT_TRUE(model.firsts.empty());

  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    KnownLosses broken([bad](int32_t id) { return id == 13 ? bad : 1.0; });
    const auto result = perplexity(broken, counting(20), {.ctx = 10}, {});
    ASSERT_FALSE(result);
    EXPECT_NE(result.error().message.find("token 13"), std::string::npos);
  }
  model.fails = true;
  const auto failed = perplexity(model, counting(20), {.ctx = 10}, {});
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().message, "out of order");
}

TEST(Perplexity, StopsAtAnInterrupt) {
  KnownLosses model([](int32_t id) { return 0.01 * id; });
  PerplexityResult last;
  const auto result =
      perplexity(model, counting(50), {.ctx = 10}, [&](const PerplexityResult& so_far, int64_t) {
        last = so_far;
        set_interrupted(so_far.windows == 2);
      });
  set_interrupted(false);
  ASSERT_FALSE(result);
  EXPECT_TRUE(result.error().interrupted);
  EXPECT_EQ(model.firsts.size(), 2U);
  // What was scored by then is what a text of that length gives.
  const auto whole = perplexity(model, counting(20), {.ctx = 10}, {});
  ASSERT_TRUE(whole);
  EXPECT_EQ(last.perplexity, whole->perplexity);
  EXPECT_EQ(last.perplexity_stderr, whole->perplexity_stderr);
  EXPECT_EQ(last.tokens_scored, 18);
}

TEST(Perplexity, ProtocolNamesTheWindow) {
  EXPECT_NE(perplexity_protocol(2048).find("2048"), std::string::npos);
}

TEST(Divergence, EqualsTheClosedForm) {
  // p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2), each with a constant added to its logits.
  const std::vector<float> p = {std::log(0.5F) + 7, std::log(0.25F) + 7, std::log(0.25F) + 7};
  const std::vector<float> q = {std::log(0.25F) - 3, std::log(0.25F) - 3, std::log(0.5F) - 3};
  EXPECT_NEAR(divergence_of(p, q, 1).kl, 0.5 * std::log(2.0) - 0.25 * std::log(2.0), 1e-6);
  EXPECT_EQ(divergence_of(p, p, 1).kl, 0);
  EXPECT_TRUE(std::isnan(divergence_of(p, std::vector<float>{NAN, 0, 0}, 1).kl));
  DivergenceResult result;
  result.add(divergence_of(p, p, 0));
  result.add(divergence_of(p, q, 2));
  EXPECT_EQ(result.positions, 2);
  EXPECT_EQ(result.same_top, 1);
  EXPECT_NEAR(result.mean_kl, 0.125 * std::log(2.0), 1e-6);
  EXPECT_NEAR(result.teacher_nll, 1.5 * std::log(2.0), 1e-6);
  EXPECT_NEAR(result.largest_kl, 0.25 * std::log(2.0), 1e-6);
}

}  // namespace
}  // namespace rabit
