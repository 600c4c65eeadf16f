// Path diagnostics against their definitions, written out over the values in two passes.

#include "eval/diagnostics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace rabit {
namespace {

using Values = std::vector<double>;

double mean_product(const Values& a, const Values& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    sum += a[i] * b[i];
  }
  return sum / static_cast<double>(a.size());
}

double correlation(Values a, Values b) {
  for (Values* v : {&a, &b}) {
    const double mean = mean_product(*v, Values(v->size(), 1.0));
    for (double& x : *v) {
      x -= mean;
    }
  }
  return mean_product(a, b) / std::sqrt(mean_product(a, a) * mean_product(b, b));
}

struct Signals {
  std::vector<Values> values;  // y, then the paths

  Signals(int64_t paths, int64_t count, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> draw(0.3, 1.0);
    for (int64_t s = 0; s <= paths; ++s) {
      Values signal;
      for (int64_t i = 0; i < count; ++i) {
        const double shared = s == 0 ? 0.0 : 0.6 * values[0][static_cast<size_t>(i)];
        signal.push_back(static_cast<float>(shared + draw(random) / static_cast<double>(s + 1)));
      }
      values.push_back(std::move(signal));
    }
  }

  Values residual(int64_t after) const {
    Values out = values[0];
    for (int64_t j = 1; j <= after; ++j) {
      for (size_t i = 0; i < out.size(); ++i) {
        out[i] -= values[static_cast<size_t>(j)][i];
      }
    }
    return out;
  }

  std::vector<float> part(size_t begin, size_t end) const {
    std::vector<float> out;
    for (const Values& signal : values) {
      for (size_t i = begin; i < end; ++i) {
        out.push_back(static_cast<float>(signal[i]));
      }
    }
    return out;
  }
};

TEST(PathMoments, EqualTheirDefinitions) {
  for (int64_t paths = 1; paths <= 4; ++paths) {
    const Signals signals(paths, 500, 7 + static_cast<uint64_t>(paths));
    PathMoments moments(paths);
    moments.add(180, signals.part(0, 180));  // parts add up
    moments.add(320, signals.part(180, 500));
    EXPECT_EQ(moments.count(), 500);
    const double whole = mean_product(signals.values[0], signals.values[0]);
    for (int64_t i = 1; i <= paths; ++i) {
      const Values& y = signals.values[static_cast<size_t>(i)];
      EXPECT_NEAR(moments.residual_alignment(i), correlation(signals.residual(i - 1), y), 1e-9);
      const Values left = signals.residual(i);
      EXPECT_NEAR(moments.relative_error(i), mean_product(left, left) / whole, 1e-9);
      for (int64_t j = 1; j <= paths; ++j) {
        EXPECT_NEAR(moments.path_correlation(i, j),
                    correlation(y, signals.values[static_cast<size_t>(j)]), 1e-9);
      }
    }
    EXPECT_NEAR(moments.relative_error(0), 1.0, 1e-12);
    const auto parts = moments.decomposition();
    EXPECT_NEAR(parts.error(), moments.relative_error(paths), 1e-9);
    EXPECT_NEAR(parts.residual, moments.relative_error(paths - 1), 1e-9);
    const Values& last = signals.values.back();
    EXPECT_NEAR(parts.last, mean_product(last, last) / whole, 1e-9);
  }
}

TEST(PathMoments, TellRedundantPathsFromCorrectingOnes) {
  // y = 1, 2, ...; a second path that repeats the first, and one that gives what it left.
  std::vector<float> repeating, correcting;
  for (const double share : {1.0, 0.8}) {
    for (int i = 0; i < 100; ++i) {
      const auto value = static_cast<float>(share * (i % 10 - 4.5 + (share < 1.0 ? i % 3 : 0)));
      repeating.push_back(value);
      correcting.push_back(value);
    }
  }
  for (int i = 0; i < 100; ++i) {
    repeating.push_back(repeating[static_cast<size_t>(100 + i)]);
    correcting.push_back(correcting[static_cast<size_t>(i)] -
                         correcting[static_cast<size_t>(100 + i)]);
  }
  PathMoments redundant(2), residual(2);
  redundant.add(100, repeating);
  residual.add(100, correcting);
  EXPECT_NEAR(redundant.path_correlation(1, 2), 1.0, 1e-9);
  EXPECT_NEAR(residual.residual_alignment(2), 1.0, 1e-9);
  EXPECT_NEAR(residual.relative_error(2), 0.0, 1e-9);
  EXPECT_GT(redundant.relative_error(2), residual.relative_error(2));
}

TEST(PathMoments, ConstantsAndNothing) {
  PathMoments empty(2);
  EXPECT_EQ(empty.path_correlation(1, 2), 0.0);
  EXPECT_EQ(empty.relative_error(2), 0.0);
  PathMoments constant(2);
  constant.add(3, std::vector<float>{1, 2, 3, 5, 5, 5, 0, 0, 0});
  EXPECT_EQ(constant.path_correlation(1, 2), 0.0);
  EXPECT_EQ(constant.residual_alignment(2), 0.0);
}

}  // namespace
}  // namespace rabit
