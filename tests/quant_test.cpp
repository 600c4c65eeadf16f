// The mathematics of residual binarization against a float64 scalar oracle written here on its own.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "base/half.h"
#include "base/threads.h"
#include "quant/residual_binary.h"

namespace rabit::quant {
namespace {

struct Layer {
  Shape shape;
  std::vector<float> w;
  Scales scales;
};

std::vector<float> normal(std::mt19937_64& random, size_t count, float mean, float deviation) {
  std::normal_distribution<float> draw(mean, deviation);
  std::vector<float> out(count);
  for (auto& v : out) {
    v = draw(random);
  }
  return out;
}

Layer random_layer(int64_t d_out, int64_t d_in, int64_t paths, uint64_t seed) {
  std::mt19937_64 random(seed);
  Layer layer{
      {d_out, d_in, paths}, normal(random, static_cast<size_t>(d_out * d_in), 0.0F, 0.05F), {}};
  for (int64_t i = 0; i < paths; ++i) {
    const float size = 0.04F * std::pow(0.5F, static_cast<float>(i));
    for (const float v : normal(random, static_cast<size_t>(d_out), 1.0F, 0.2F)) {
      layer.scales.g.push_back(size * std::fabs(v));
    }
    for (const float v : normal(random, static_cast<size_t>(d_in), 1.0F, 0.2F)) {
      layer.scales.h.push_back(std::fabs(v));
    }
  }
  return layer;
}

// Signs of every path and What for one entry, residuals rounded to float as the definition says.
struct Entry {
  int sign[kMaxPaths];
  double value;
};
Entry oracle_entry(const Layer& layer, int64_t r, int64_t c) {
  Entry entry{};
  float residual = layer.w[r * layer.shape.d_in + c];
  for (int64_t i = 0; i < layer.shape.paths; ++i) {
    volatile float p =
        layer.scales.g[i * layer.shape.d_out + r] * layer.scales.h[i * layer.shape.d_in + c];
    entry.sign[i] = residual < 0.0F ? -1 : 1;
    entry.value += entry.sign[i] * static_cast<double>(p);
    volatile float next = residual - static_cast<float>(entry.sign[i]) * p;
    residual = next;
  }
  return entry;
}

std::vector<float> forward(const Layer& layer) {
  std::vector<float> out(layer.w.size());
  coupled_forward(layer.shape, layer.w.data(), layer.scales.g.data(), layer.scales.h.data(), 0,
                  layer.shape.d_out, out.data());
  return out;
}

// How the tests below compare a matrix with the oracle: all entries, a few ulp of the largest term.
bool matches_oracle(const Layer& layer, const std::vector<float>& w_hat) {
  for (int64_t r = 0; r < layer.shape.d_out; ++r) {
    for (int64_t c = 0; c < layer.shape.d_in; ++c) {
      const double expected = oracle_entry(layer, r, c).value;
      double size = 0.0;
      for (int64_t i = 0; i < layer.shape.paths; ++i) {
        size += std::fabs(static_cast<double>(layer.scales.g[i * layer.shape.d_out + r]) *
                          layer.scales.h[i * layer.shape.d_in + c]);
      }
      const double tolerance = 4.0 * std::numeric_limits<float>::epsilon() * size;
      if (!(std::fabs(w_hat[r * layer.shape.d_in + c] - expected) <= tolerance)) {
        return false;
      }
    }
  }
  return true;
}

// Lower Cholesky factor in double.
std::vector<double> cholesky(std::vector<double> a, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j; i < n; ++i) {
      for (int64_t k = 0; k < j; ++k) {
        a[i * n + j] -= a[i * n + k] * a[j * n + k];
      }
      a[i * n + j] = i == j ? std::sqrt(a[j * n + j]) : a[i * n + j] / a[j * n + j];
    }
    for (int64_t i = 0; i < j; ++i) {
      a[i * n + j] = 0.0;
    }
  }
  return a;
}

std::vector<double> inverse(const std::vector<double>& a, int64_t n) {
  const auto l = cholesky(a, n);
  std::vector<double> out(static_cast<size_t>(n * n));
  for (int64_t column = 0; column < n; ++column) {
    std::vector<double> x(static_cast<size_t>(n), 0.0);
    x[column] = 1.0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < i; ++k) {
        x[i] -= l[i * n + k] * x[k];
      }
      x[i] /= l[i * n + i];
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      for (int64_t k = i + 1; k < n; ++k) {
        x[i] -= l[k * n + i] * x[k];
      }
      x[i] /= l[i * n + i];
    }
    for (int64_t i = 0; i < n; ++i) {
      out[i * n + column] = x[i];
    }
  }
  return out;
}

class Paths : public testing::TestWithParam<int64_t> {};
INSTANTIATE_TEST_SUITE_P(All, Paths, testing::Values(1, 2, 3, 4));

TEST_P(Paths, ForwardMatchesOracleAtManySizes) {
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{1, 1},
                                      {3, 7},
                                      {5, 16},
                                      {4, 17},
                                      {7, 31},
                                      {6, 32},
                                      {9, 33},
                                      {2, 130},
                                      {64, 100}}) {
    const Layer layer = random_layer(rows, columns, GetParam(), 7 + rows * columns);
    EXPECT_TRUE(matches_oracle(layer, forward(layer))) << rows << " x " << columns;
  }
}

TEST_P(Paths, ForwardWritesOnlyItsRows) {
  const Layer layer = random_layer(9, 21, GetParam(), 3);
  std::vector<float> out(layer.w.size(), 123.0F);
  coupled_forward(layer.shape, layer.w.data(), layer.scales.g.data(), layer.scales.h.data(), 2, 5,
                  out.data());
  const auto whole = forward(layer);
  for (size_t e = 0; e < out.size(); ++e) {
    const bool inside = e >= 2 * 21 && e < 5 * 21;
    EXPECT_EQ(out[e], inside ? whole[e] : 123.0F);
  }
}

TEST_P(Paths, ComparatorRejectsWrongMatrices) {
  const Layer layer = random_layer(8, 40, GetParam(), 11);
  const auto right = forward(layer);
  ASSERT_TRUE(matches_oracle(layer, right));
  EXPECT_FALSE(matches_oracle(layer, std::vector<float>(right.size(), 0.0F)));
  auto flipped = right;
  flipped[77] = -flipped[77];
  EXPECT_FALSE(matches_oracle(layer, flipped));
  auto poisoned = right;
  poisoned[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(matches_oracle(layer, poisoned));
  Layer swapped = layer;
  std::swap(swapped.scales.h[0], swapped.scales.h[1]);
  EXPECT_FALSE(matches_oracle(layer, forward(swapped)));
  if (GetParam() > 1) {
    Layer dropped = layer;
    dropped.shape.paths -= 1;
    EXPECT_FALSE(matches_oracle(layer, forward(dropped)));
  }
}

TEST(Coupled, TiesZerosAndNegativeZeros) {
  // One row: W = +0, -0, exactly a level, exactly minus a level.
  const Shape shape{1, 4, 2};
  const std::vector<float> w = {0.0F, -0.0F, 0.5F, -0.5F};
  const Scales scales{{0.5F, 0.25F}, {1, 1, 1, 1, 1, 1, 1, 1}};
  std::vector<float> out(4);
  coupled_forward(shape, w.data(), scales.g.data(), scales.h.data(), 0, 1, out.data());
  // 0 -> +0.5, residual -0.5 -> -0.25. 0.5 -> +0.5, residual 0 -> +0.25. -0.5 -> -0.5, residual 0
  // (a tie) -> +0.25.
  EXPECT_EQ(out, (std::vector<float>{0.25F, 0.25F, 0.75F, -0.25F}));
  const auto signs = coupled_signs(shape, w.data(), scales);
  EXPECT_EQ(signs, (std::vector<uint32_t>{0b0111U, 0b1100U}));
}

TEST_P(Paths, SignsReconstructTheForwardToTheBit) {
  for (const int64_t columns : {1, 31, 32, 33, 64, 95}) {
    const Layer layer = random_layer(5, columns, GetParam(), 100 + columns);
    const auto signs = coupled_signs(layer.shape, layer.w.data(), layer.scales);
    EXPECT_EQ(reconstruct(layer.shape, signs, layer.scales.g, layer.scales.h), forward(layer));
    const int64_t words = (columns + 31) / 32;
    if (columns % 32 != 0) {
      for (size_t row = 0; row < signs.size() / words; ++row) {
        EXPECT_EQ(signs[row * words + words - 1] >> (columns % 32), 0U) << "padding bits";
      }
    }
  }
}

TEST_P(Paths, GradientsMatchFiniteDifferencesWithSignsHeld) {
  const Layer layer = random_layer(6, 37, GetParam(), 21);
  const auto [d_out, d_in, paths] = layer.shape;
  std::mt19937_64 random(5);
  const auto grad = normal(random, layer.w.size(), 0.0F, 1.0F);
  std::vector<float> dg(layer.scales.g.size()), dh(layer.scales.h.size(), 0.0F);
  // In two parts, as threads call it.
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 4}, {4, 6}}) {
    coupled_backward(layer.shape, layer.w.data(), layer.scales.g.data(), layer.scales.h.data(),
                     grad.data(), begin, end, dg.data(), dh.data());
  }
  // L = sum(grad * What) as a function of the scales in double, signs as they are now: exactly
  // linear in each scale, so a wide central difference has no truncation error.
  const auto loss = [&](const std::vector<double>& g, const std::vector<double>& h) {
    double sum = 0.0;
    for (int64_t r = 0; r < d_out; ++r) {
      for (int64_t c = 0; c < d_in; ++c) {
        const Entry entry = oracle_entry(layer, r, c);
        for (int64_t i = 0; i < paths; ++i) {
          sum += grad[r * d_in + c] * entry.sign[i] * g[i * d_out + r] * h[i * d_in + c];
        }
      }
    }
    return sum;
  };
  std::vector<double> g(layer.scales.g.begin(), layer.scales.g.end());
  std::vector<double> h(layer.scales.h.begin(), layer.scales.h.end());
  const auto check = [&](std::vector<double>& values, const std::vector<float>& gradient) {
    for (size_t e = 0; e < values.size(); ++e) {
      const double at = values[e];
      constexpr double kStep = 0.5;
      values[e] = at + kStep;
      const double up = loss(g, h);
      values[e] = at - kStep;
      const double down = loss(g, h);
      values[e] = at;
      const double expected = (up - down) / (2.0 * kStep);
      const double tolerance =
          64.0 * std::numeric_limits<float>::epsilon() * std::sqrt(static_cast<double>(d_in));
      EXPECT_NEAR(gradient[e], expected, tolerance * std::max(1.0, std::fabs(expected)));
    }
  };
  check(g, dg);
  check(h, dh);
}

TEST_P(Paths, FitIsNeverWorseThanPlainSvid) {
  ThreadPool pool(2);
  for (uint64_t seed = 0; seed < 6; ++seed) {
    std::mt19937_64 random(seed);
    Layer layer = random_layer(24 + static_cast<int64_t>(seed) * 7, 40 + static_cast<int64_t>(seed),
                               GetParam(), seed);
    for (int64_t c = 0; c < layer.shape.d_in; c += 5) {  // a few heavy columns
      for (int64_t r = 0; r < layer.shape.d_out; ++r) {
        layer.w[r * layer.shape.d_in + c] *= 6.0F;
      }
    }
    std::vector<float> s_out, s_in;
    if (seed % 2 == 1) {
      for (const float v : normal(random, static_cast<size_t>(layer.shape.d_out), 0.0F, 1.0F)) {
        s_out.push_back(std::exp(v));
      }
      for (const float v : normal(random, static_cast<size_t>(layer.shape.d_in), 0.0F, 1.0F)) {
        s_in.push_back(std::exp(v));
      }
    }
    const Scales plain = svid(layer.shape, layer.w.data());
    const Scales fitted = fit_scales(layer.shape, layer.w.data(), s_out, s_in, {}, pool);
    const double before = weighted_error(layer.shape, layer.w.data(), plain, s_out, s_in);
    const double after = weighted_error(layer.shape, layer.w.data(), fitted, s_out, s_in);
    EXPECT_LT(after, before * (1.0 + 1e-6));
    if (GetParam() > 1 || seed % 2 == 1) {  // one path without weights: SVID is the optimum
      EXPECT_LT(after, before * 0.999) << "seed " << seed;
    }
  }
}

TEST_P(Paths, ARefitSolvesTheNormalEquations) {
  ThreadPool pool(2);
  const int64_t d_out = 24, d_in = 40, k = GetParam();
  Layer layer = random_layer(d_out, d_in, k, 71);
  layer.scales = svid(layer.shape, layer.w.data());
  const auto sign = [&](int64_t i, int64_t r, int64_t c) {
    return static_cast<double>(oracle_entry(layer, r, c).sign[i]);
  };
  // g row by row from the h of SVID, then h column by column from these g, signs held, in double.
  std::vector<double> g(layer.scales.g.begin(), layer.scales.g.end());
  std::vector<double> h(layer.scales.h.begin(), layer.scales.h.end());
  const auto refit = [&](int64_t count, int64_t others, const auto& w, const auto& s,
                         const std::vector<double>& held, std::vector<double>& fitted) {
    for (int64_t at = 0; at < count; ++at) {
      std::vector<double> gram(static_cast<size_t>(k * k)), rhs(static_cast<size_t>(k));
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t e = 0; e < others; ++e) {
          rhs[i] += w(at, e) * s(i, at, e) * held[i * others + e];
          for (int64_t j = 0; j < k; ++j) {
            gram[i * k + j] +=
                s(i, at, e) * held[i * others + e] * s(j, at, e) * held[j * others + e];
          }
        }
      }
      const std::vector<double> solver = inverse(gram, k);
      for (int64_t i = 0; i < k; ++i) {
        fitted[i * count + at] = 0.0;
        for (int64_t j = 0; j < k; ++j) {
          fitted[i * count + at] += solver[i * k + j] * rhs[j];
        }
      }
    }
  };
  refit(
      d_out, d_in, [&](int64_t r, int64_t c) { return layer.w[r * d_in + c]; }, sign, h, g);
  refit(
      d_in, d_out, [&](int64_t c, int64_t r) { return layer.w[r * d_in + c]; },
      [&](int64_t i, int64_t c, int64_t r) { return sign(i, r, c); }, g, h);
  const Scales fitted = fit_scales(layer.shape, layer.w.data(), {}, {}, {1, 1}, pool);
  for (size_t e = 0; e < g.size(); ++e) {
    EXPECT_NEAR(fitted.g[e], g[e], 2e-4 * std::fabs(g[e]) + 1e-6) << "g " << e;
  }
  for (size_t e = 0; e < h.size(); ++e) {
    EXPECT_NEAR(fitted.h[e], h[e], 2e-4 * std::fabs(h[e]) + 1e-6) << "h " << e;
  }
  const auto error = [&](const Scales& scales) {
    return weighted_error(layer.shape, layer.w.data(), scales, {}, {});
  };
  if (k > 1) {
    const Scales twelve = fit_scales(layer.shape, layer.w.data(), {}, {}, {1, 12}, pool);
    EXPECT_LT(error(fitted), error(layer.scales));
    EXPECT_LT(error(twelve), 0.999 * error(fitted));
  }
}

TEST_P(Paths, SweepsGiveEachPathTheBestRankOneOfWhatTheOthersLeave) {
  ThreadPool pool(2);
  const int64_t d_out = 24, d_in = 40, k = GetParam();
  constexpr int kSweeps = 4, kPowerSteps = 300;
  const Layer layer = random_layer(d_out, d_in, k, 72);
  std::vector<double> g(static_cast<size_t>(k * d_out)), h(static_cast<size_t>(k * d_in));
  std::vector<double> residual(layer.w.begin(), layer.w.end());
  std::vector<double> signs(static_cast<size_t>(k * d_out * d_in));
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (int64_t i = 0; i < k; ++i) {
      const auto add = [&](double factor) {
        for (int64_t e = 0; e < d_out * d_in; ++e) {
          residual[e] += factor * signs[i * d_out * d_in + e] * g[i * d_out + e / d_in] *
                         h[i * d_in + e % d_in];
        }
      };
      add(1.0);  // nothing in the first sweep, where all is zero
      for (int64_t e = 0; e < d_out * d_in; ++e) {
        signs[i * d_out * d_in + e] = residual[e] < 0.0 ? -1.0 : 1.0;
      }
      std::fill_n(g.begin() + i * d_out, d_out, 1.0);
      for (int step = 0; step < kPowerSteps; ++step) {
        double g_norm = 0.0, h_norm = 0.0;
        for (int64_t r = 0; r < d_out; ++r) {
          g_norm += g[i * d_out + r] * g[i * d_out + r];
        }
        for (int64_t c = 0; c < d_in; ++c) {
          double sum = 0.0;
          for (int64_t r = 0; r < d_out; ++r) {
            sum += std::fabs(residual[r * d_in + c]) * g[i * d_out + r];
          }
          h[i * d_in + c] = sum / g_norm;
          h_norm += h[i * d_in + c] * h[i * d_in + c];
        }
        for (int64_t r = 0; r < d_out; ++r) {
          double sum = 0.0;
          for (int64_t c = 0; c < d_in; ++c) {
            sum += std::fabs(residual[r * d_in + c]) * h[i * d_in + c];
          }
          g[i * d_out + r] = sum / h_norm;
        }
      }
      add(-1.0);
    }
  }
  const auto error = [&](const Scales& scales) {
    return weighted_error(layer.shape, layer.w.data(), scales, {}, {});
  };
  const double oracle = error({{g.begin(), g.end()}, {h.begin(), h.end()}});
  const double swept = error(fit_scales(layer.shape, layer.w.data(), {}, {}, {kSweeps, 0}, pool));
  EXPECT_NEAR(swept, oracle, 1e-3 * oracle);
  if (k > 1) {
    EXPECT_LT(swept, 0.995 * error(svid(layer.shape, layer.w.data())));
  }
}

TEST(Fit, OnePathMatchesTheBestRankOneOfTheMagnitude) {
  // A matrix whose magnitude is exactly rank 1 is reproduced exactly.
  ThreadPool pool(1);
  const Shape shape{5, 9, 1};
  std::vector<float> w(45);
  std::mt19937_64 random(2);
  for (int64_t r = 0; r < 5; ++r) {
    for (int64_t c = 0; c < 9; ++c) {
      w[r * 9 + c] = (random() % 2 == 0 ? -1.0F : 1.0F) * static_cast<float>(r + 1) *
                     static_cast<float>(c + 2) * 0.01F;
    }
  }
  const Scales scales = fit_scales(shape, w.data(), {}, {}, {}, pool);
  double size = 0.0;
  for (const float v : w) {
    size += static_cast<double>(v) * v;
  }
  EXPECT_LT(weighted_error(shape, w.data(), scales, {}, {}), 1e-10 * size);
}

TEST(Fit, TwoBitScalesAreTheBestStepOfTheirGridInEveryRow) {
  constexpr int64_t kOut = 9, kIn = 37;
  Layer layer = random_layer(kOut, kIn, 2, 5);
  std::fill(layer.w.begin() + 3 * kIn, layer.w.begin() + 4 * kIn, 0.0F);
  layer.w[5 * kIn + 7] = 4.0F;  // far beyond the row's others
  layer.scales = two_bit_scales(kOut, kIn, layer.w.data());
  EXPECT_EQ(layer.scales.h, std::vector<float>(2 * kIn, 1.0F));
  const auto error_of_row = [&](int64_t r) {
    double error = 0.0;
    for (int64_t c = 0; c < kIn; ++c) {
      error += std::pow(layer.w[r * kIn + c] - oracle_entry(layer, r, c).value, 2);
    }
    return error;
  };
  for (int64_t r = 0; r < kOut; ++r) {
    const float step = layer.scales.g[r];
    ASSERT_EQ(layer.scales.g[kOut + r], 0.5F * step);
    const double error = error_of_row(r);
    float largest = 0.0F;
    for (int64_t c = 0; c < kIn; ++c) {
      largest = std::max(largest, std::fabs(layer.w[r * kIn + c]));
    }
    for (int k = 1; k <= 80; ++k) {
      layer.scales.g[r] = largest / 1.5F * static_cast<float>(k) / 80.0F;
      layer.scales.g[kOut + r] = 0.5F * layer.scales.g[r];
      EXPECT_GE(error_of_row(r), error * (1 - 1e-5)) << r << " " << k;
    }
    EXPECT_EQ(step == 0.0F, r == 3);
  }
}

TEST(Fit, ZeroMatrixGivesFiniteScales) {
  ThreadPool pool(1);
  const Shape shape{4, 8, 2};
  const std::vector<float> w(32, 0.0F);
  const Scales scales = fit_scales(shape, w.data(), {}, {}, {}, pool);
  for (const float v : scales.g) {
    EXPECT_TRUE(std::isfinite(v));
  }
  EXPECT_EQ(weighted_error(shape, w.data(), scales, {}, {}), 0.0);
}

TEST(Fit, DoesNotDependOnThreadsBeyondRounding) {
  const Layer layer = random_layer(50, 70, 2, 9);
  ThreadPool one(1), three(3);
  const auto error = [&](ThreadPool& pool) {
    return weighted_error(layer.shape, layer.w.data(),
                          fit_scales(layer.shape, layer.w.data(), {}, {}, {}, pool), {}, {});
  };
  EXPECT_NEAR(error(one) / error(three), 1.0, 1e-3);
}

// tr(E H ET), E = W - What: what error feedback lowers.
double output_error(const Shape& s, const std::vector<float>& w, const std::vector<float>& w_hat,
                    const std::vector<double>& h) {
  double total = 0.0;
  for (int64_t r = 0; r < s.d_out; ++r) {
    for (int64_t a = 0; a < s.d_in; ++a) {
      for (int64_t b = 0; b < s.d_in; ++b) {
        const double ea = static_cast<double>(w[r * s.d_in + a]) - w_hat[r * s.d_in + a];
        const double eb = static_cast<double>(w[r * s.d_in + b]) - w_hat[r * s.d_in + b];
        total += ea * h[a * s.d_in + b] * eb;
      }
    }
  }
  return total;
}

/// Damped second moment of x = mixing * noise, of little more than half the rank.
std::vector<double> moment_of_correlated_inputs(int64_t d_in, std::mt19937_64& random) {
  const auto mixing = normal(random, static_cast<size_t>(d_in * d_in), 0.0F, 1.0F);
  std::vector<double> h(static_cast<size_t>(d_in * d_in));
  double mean = 0.0;
  for (int64_t a = 0; a < d_in; ++a) {
    for (int64_t b = 0; b < d_in; ++b) {
      for (int64_t c = 0; c < d_in / 2 + 1; ++c) {
        h[a * d_in + b] += static_cast<double>(mixing[a * d_in + c]) * mixing[b * d_in + c];
      }
    }
    mean += h[a * d_in + a] / static_cast<double>(d_in);
  }
  for (int64_t a = 0; a < d_in; ++a) {
    h[a * d_in + a] += 0.01 * mean;
  }
  return h;
}

class ErrorFeedback : public testing::TestWithParam<std::pair<int64_t, int64_t>> {};
INSTANTIATE_TEST_SUITE_P(Sizes, ErrorFeedback,
                         testing::Values(std::pair<int64_t, int64_t>{5, 9},
                                         std::pair<int64_t, int64_t>{8, 64},
                                         std::pair<int64_t, int64_t>{6, 65},
                                         std::pair<int64_t, int64_t>{3, 200}));

TEST_P(ErrorFeedback, MatchesTheColumnByColumnOracleAndLowersTheOutputError) {
  const auto [d_out, d_in] = GetParam();
  for (const int64_t paths : {1, 2, 3, 4}) {
    Layer layer = random_layer(d_out, d_in, paths, 40 + d_in + paths);
    std::mt19937_64 random(8);
    const std::vector<double> h = moment_of_correlated_inputs(d_in, random);
    // Upper factor of the inverse: inverse = UT U, U = transpose of the lower one.
    const auto lower = cholesky(inverse(h, d_in), d_in);
    std::vector<float> u(static_cast<size_t>(d_in * d_in));
    for (int64_t a = 0; a < d_in; ++a) {
      for (int64_t b = 0; b < d_in; ++b) {
        u[a * d_in + b] = static_cast<float>(lower[b * d_in + a]);
      }
    }
    ThreadPool pool(2);
    Layer result = layer;
    error_feedback(layer.shape, result.w.data(), layer.scales, u.data(), pool);

    // The oracle, in double, one column at a time; levels follow the sign rule of the result's own
    // latent, so a rounding difference next to a threshold does not derail it.
    std::vector<double> open(layer.w.begin(), layer.w.end());
    const auto w_hat = forward(result);
    for (int64_t j = 0; j < d_in; ++j) {
      for (int64_t r = 0; r < d_out; ++r) {
        const double scale = std::fabs(open[r * d_in + j]) + 0.1;
        ASSERT_NEAR(result.w[r * d_in + j], open[r * d_in + j], 2e-3 * scale)
            << "latent at " << r << ", " << j;
        const double error = (open[r * d_in + j] - w_hat[r * d_in + j]) / u[j * d_in + j];
        for (int64_t c = j + 1; c < d_in; ++c) {
          open[r * d_in + c] -= error * u[j * d_in + c];
        }
      }
    }
    const double without = output_error(layer.shape, layer.w, forward(layer), h);
    const double with = output_error(layer.shape, layer.w, w_hat, h);
    EXPECT_LT(with, 0.9 * without) << d_out << " x " << d_in << ", paths " << paths;
  }
}

/// (T - What) H, in double.
std::vector<float> error_product(const Layer& layer, const std::vector<float>& target,
                                 const std::vector<double>& h) {
  const auto [d_out, d_in, paths] = layer.shape;
  const std::vector<float> w_hat = forward(layer);
  std::vector<float> out;
  for (int64_t r = 0; r < d_out; ++r) {
    for (int64_t c = 0; c < d_in; ++c) {
      double sum = 0.0;
      for (int64_t j = 0; j < d_in; ++j) {
        sum += (static_cast<double>(target[r * d_in + j]) - w_hat[r * d_in + j]) * h[j * d_in + c];
      }
      out.push_back(static_cast<float>(sum));
    }
  }
  return out;
}

TEST_P(ErrorFeedback, CoordinateDescentEndsWhereNoSingleWeightCanGain) {
  const auto [d_out, d_in] = GetParam();
  for (const int64_t paths : {1, 2, 3, 4}) {
    const Layer start = random_layer(d_out, d_in, paths, 50 + d_in + paths);
    const std::vector<float>& target = start.w;
    std::mt19937_64 random(9);
    const std::vector<double> h = moment_of_correlated_inputs(d_in, random);
    const std::vector<float> moment(h.begin(), h.end());
    std::vector<float> product = error_product(start, target, h);
    Layer end = start;
    ThreadPool pool(2);
    const int64_t changed = coordinate_descent(start.shape, moment.data(), start.scales, 100,
                                               product.data(), end.w.data(), pool);
    EXPECT_GT(changed, 0);
    const auto before = output_error(start.shape, target, forward(start), h);
    const std::vector<float> w_hat = forward(end);
    const auto after = output_error(end.shape, target, w_hat, h);
    EXPECT_LT(after, before);
    const std::vector<float> again = error_product(end, target, h);
    double size = 0.0;
    for (const float v : again) {
      size = std::max(size, std::fabs(static_cast<double>(v)));
    }
    for (size_t i = 0; i < again.size(); ++i) {
      ASSERT_NEAR(product[i], again[i], 1e-3 * size) << i;
    }
    // The level of every weight's best value, one at a time in double.
    for (int64_t r = 0; r < d_out; ++r) {
      for (int64_t c = 0; c < d_in; ++c) {
        Layer other = end;
        const double now = w_hat[r * d_in + c], product_here = again[r * d_in + c];
        const double diagonal = h[c * d_in + c];
        other.w[r * d_in + c] = static_cast<float>(now + product_here / diagonal);
        const double d = now - oracle_entry(other, r, c).value;
        const double change = 2.0 * d * product_here + d * d * diagonal;
        // The level that it has differs by the rounding of its sum.
        ASSERT_GE(change, std::fabs(d) < 1e-7 ? -1e-6 : -1e-4 * std::fabs(d) * size)
            << r << ", " << c;
      }
    }
  }
}

TEST_P(Paths, LatentsDrawnToOthersKeepTheirSigns) {
  const Layer before = random_layer(12, 70, GetParam(), 92);
  const Layer other = random_layer(12, 70, GetParam(), 93);
  const auto signs = coupled_signs(before.shape, before.w.data(), before.scales);
  for (const float margin : {0.0F, 0.1F, 100.0F}) {
    Layer drawn = before;
    draw_towards(drawn.shape, other.w.data(), drawn.scales, margin, drawn.w.data());
    EXPECT_EQ(coupled_signs(drawn.shape, drawn.w.data(), drawn.scales), signs) << margin;
    int64_t moved = 0;
    for (size_t i = 0; i < drawn.w.size(); ++i) {
      moved += drawn.w[i] != before.w[i] ? 1 : 0;
      if (margin == 0.0F) {
        ASSERT_LE(std::fabs(drawn.w[i] - other.w[i]), std::fabs(before.w[i] - other.w[i])) << i;
      }
    }
    EXPECT_GT(moved, 12 * 70 / 2) << margin;
  }
}

TEST_P(Paths, SettledLatentsKeepTheirSignsUnderNewScales) {
  const Layer before = random_layer(12, 70, GetParam(), 91);
  const auto signs = coupled_signs(before.shape, before.w.data(), before.scales);
  Layer after = before;
  for (auto& g : after.scales.g) {
    g *= 1.3F;
  }
  const auto moved = coupled_signs(after.shape, after.w.data(), after.scales);
  EXPECT_EQ(settle(after.shape, signs, after.scales, after.w.data()), 0);
  EXPECT_EQ(coupled_signs(after.shape, after.w.data(), after.scales), signs);
  if (GetParam() > 1) {
    EXPECT_NE(moved, signs) << "nothing had to be settled";
    // A second path three times the first: two paths still have every combination, for the first
    // takes all positive latents and the second splits them; of three, some cannot be had.
    for (int64_t r = 0; r < after.shape.d_out; ++r) {
      after.scales.g[after.shape.d_out + r] = 3.0F * after.scales.g[r];
    }
    const int64_t lost = settle(after.shape, signs, after.scales, after.w.data());
    EXPECT_EQ(lost > 0, GetParam() > 2);
    int64_t different = 0;
    const auto got = coupled_signs(after.shape, after.w.data(), after.scales);
    for (int64_t r = 0; r < after.shape.d_out; ++r) {
      for (int64_t c = 0; c < after.shape.d_in; ++c) {
        bool same = true;
        for (int64_t i = 0; i < after.shape.paths; ++i) {
          const size_t word = static_cast<size_t>((i * after.shape.d_out + r) * 3 + c / 32);
          same = same && ((got[word] ^ signs[word]) >> (c % 32) & 1U) == 0U;
        }
        different += same ? 0 : 1;
      }
    }
    EXPECT_EQ(different, lost);
  }
}

TEST_P(Paths, PackKeepsSignsAndScales) {
  Layer layer = random_layer(10, 45, GetParam(), 77);
  for (auto& v : layer.scales.h) {
    v *= 3e-5F;  // without moving a power of two these would be subnormal in F16
  }
  const auto packed =
      pack(layer.shape, coupled_signs(layer.shape, layer.w.data(), layer.scales), layer.scales);
  ASSERT_TRUE(packed.ok());
  EXPECT_EQ(packed->signs, coupled_signs(layer.shape, layer.w.data(), layer.scales));
  for (int64_t i = 0; i < GetParam(); ++i) {
    for (int64_t r = 0; r < 10; ++r) {
      for (int64_t c = 0; c < 45; ++c) {
        const double exact =
            static_cast<double>(layer.scales.g[i * 10 + r]) * layer.scales.h[i * 45 + c];
        const double stored = static_cast<double>(half_to_float(packed->row_scale[i * 10 + r])) *
                              half_to_float(packed->col_scale[i * 45 + c]);
        EXPECT_NEAR(stored, exact, std::fabs(exact) * 1.1e-3);
      }
    }
  }
}

TEST(Pack, RefusesScalesThatCannotBeHeld) {
  Layer layer = random_layer(3, 8, 2, 1);
  layer.scales.g[4] = std::numeric_limits<float>::infinity();
  EXPECT_FALSE(
      pack(layer.shape, coupled_signs(layer.shape, layer.w.data(), layer.scales), layer.scales)
          .ok());
  layer = random_layer(3, 8, 2, 1);
  layer.scales.h[9] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(
      pack(layer.shape, coupled_signs(layer.shape, layer.w.data(), layer.scales), layer.scales)
          .ok());
  layer = random_layer(3, 8, 1, 1);
  layer.scales.g[0] = 1e12F;
  const auto result =
      pack(layer.shape, coupled_signs(layer.shape, layer.w.data(), layer.scales), layer.scales);
  ASSERT_FALSE(result.ok());
  EXPECT_NE(result.error().message.find("65504"), std::string::npos);
}

TEST(Pack, CountsSignsAndScales) {
  EXPECT_EQ(packed_bits({576, 1536, 2}), 2 * (576 * 1536 + 16 * (576 + 1536)));
}

}  // namespace
}  // namespace rabit::quant
