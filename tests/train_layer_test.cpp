// The fit of one layer under the second moment of its inputs: targets and scales against their
// normal equations in double, the whole against the sum of its parts.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/threads.h"
#include "random_tensors.h"
#include "tiny_model.h"
#include "train/layer_fit.h"

namespace rabit::train {
namespace {

constexpr int64_t kOut = 24, kIn = 40;

/// Inputs near a space of a third of their dimensions. (tokens, kIn)
at::Tensor correlated_inputs(int64_t tokens, int64_t seed) {
  return at::matmul(normal({tokens, kIn / 3}, seed), normal({kIn / 3, kIn}, seed + 1)) +
         0.2 * normal({tokens, kIn}, seed + 2);
}

at::Tensor moment_of(const at::Tensor& x) {
  return at::matmul(x.t(), x) / static_cast<double>(x.size(0));
}

/// tr(E H E^T) in double.
double quadratic(const at::Tensor& error, const at::Tensor& moment) {
  const at::Tensor e = error.to(at::kDouble);
  return (at::matmul(e, moment.to(at::kDouble)) * e).sum().item<double>();
}

at::Tensor what_of(const LayerFit& fit, int64_t paths) {
  const quant::Shape shape = {kOut, kIn, paths};
  at::Tensor what = at::empty({kOut, kIn});
  quant::coupled_forward(shape, fit.latent.const_data_ptr<float>(), fit.scales.g.data(),
                         fit.scales.h.data(), 0, kOut, what.mutable_data_ptr<float>());
  return what;
}

TEST(BestTarget, SolvesItsNormalEquations) {
  const at::Tensor x = correlated_inputs(500, 1), y = normal({500, kOut}, 5);
  const at::Tensor weight = normal({kOut, kIn}, 6), moment = moment_of(x);
  const at::Tensor cross = at::matmul(y.t(), x) / 500.0;
  for (const double damp : {0.01, 1.0}) {
    const auto target = best_target(weight, cross, moment, damp, "layer");
    ASSERT_TRUE(target);
    // Gradient of mean |y - T x|^2 + lambda |T - W|^2.
    const double lambda = damp * moment.diagonal().mean().item<double>();
    const at::Tensor t = target->to(at::kDouble);
    const at::Tensor gradient =
        at::matmul(t, moment.to(at::kDouble)) - cross + (t - weight) * lambda;
    EXPECT_LE(gradient.norm().item<double>(), 1e-4 * cross.norm().item<double>());
  }
  // What the weight gives already is left as it is.
  const auto same = best_target(weight, at::matmul(weight, moment), moment, 0.01, "layer");
  ASSERT_TRUE(same);
  EXPECT_LE((*same - weight).norm().item<double>(), 1e-4 * weight.norm().item<double>());
}

TEST(BestTarget, RefusesInputsThatSayNothing) {
  const at::Tensor zero = at::zeros({kIn, kIn}), weight = normal({kOut, kIn}, 6);
  const auto target = best_target(weight, at::zeros({kOut, kIn}), zero, 0.01, "blk.3.attn_q");
  ASSERT_FALSE(target);
  EXPECT_NE(target.error().message.find("blk.3.attn_q"), std::string::npos);
  EXPECT_FALSE(damped(at::full({kIn, kIn}, NAN), 0.01, "layer"));
}

TEST(RefitScales, IsAStationaryPointOfTheError) {
  for (const int64_t paths : {1, 2, 3, 4}) {
    const at::Tensor moment = *damped(moment_of(correlated_inputs(400, 9)), 0.01, "layer");
    const at::Tensor target = normal({kOut, kIn}, 10);
    const at::Tensor b = at::where(normal({paths, kOut, kIn}, 11) < 0, -1.0, 1.0).to(at::kFloat);
    const at::Tensor rows = normal({kOut}, 12).abs() + 0.5;
    for (const bool weighted : {false, true}) {
      at::Tensor g = at::ones({paths, kOut}), h = at::ones({paths, kIn});
      const auto error_of = [&](const at::Tensor& gg, const at::Tensor& hh) {
        at::Tensor error = target - (gg.unsqueeze(2) * b * hh.unsqueeze(1)).sum(0);
        return quadratic(weighted ? error * rows.sqrt().unsqueeze(1) : error, moment);
      };
      const double before = error_of(g, h);
      refit_scales(b, target, moment, weighted ? rows : at::Tensor(), 60, g, h);
      const double after = error_of(g, h);
      EXPECT_LT(after, 0.95 * before);
      // Moving one scale either way can only cost, up to the ridge.
      for (const double step : {-1e-2, 1e-2}) {
        for (int64_t i = 0; i < paths; ++i) {
          at::Tensor moved = g.clone();
          moved[i][3] += step;
          EXPECT_GE(error_of(moved, h), after * (1 - 2e-4)) << "g of path " << i;
          moved = h.clone();
          moved[i][7] += step;
          EXPECT_GE(error_of(g, moved), after * (1 - 2e-4)) << "h of path " << i;
        }
      }
    }
  }
}

TEST(FitLayer, EveryPartLowersTheErrorThatItReports) {
  ThreadPool pool(2);
  const at::Tensor x = correlated_inputs(600, 21);
  const LayerProblem problem{"layer", normal({kOut, kIn}, 24) * 0.1, moment_of(x), {}};
  for (const int64_t paths : {1, 2, 3, 4}) {
    QuantizeOptions options;
    options.ef_order = ColumnOrder::kNatural;
    options.ef_rounds = 0;
    options.ef_sweeps = 0;
    double last = INFINITY;
    for (const auto& [rounds, sweeps] : {std::pair{0, 0}, std::pair{0, 5}, std::pair{3, 5}}) {
      options.ef_rounds = rounds;
      options.ef_sweeps = sweeps;
      for (const ColumnOrder order : {ColumnOrder::kNatural, ColumnOrder::kDiagonal}) {
        options.ef_order = order;
        const auto fit = fit_layer(problem, paths, options, pool);
        ASSERT_TRUE(fit);
        const at::Tensor h = *damped(problem.moment, options.ef_damp, "layer");
        const double error =
            quadratic(problem.target - what_of(*fit, paths), h) / quadratic(problem.target, h);
        EXPECT_NEAR(fit->error, error, 1e-4 * error) << "columns back in their order";
        if (order == ColumnOrder::kNatural) {
          EXPECT_LT(fit->error, last) << rounds << " rounds, " << sweeps << " sweeps";
          last = fit->error;
        }
      }
    }
    // Far better than rounding each weight on its own.
    const std::vector<float> ones(kIn, 1.0F);
    LayerFit plain{problem.target,
                   quant::fit_scales({kOut, kIn, paths}, problem.target.const_data_ptr<float>(), {},
                                     ones, {8, 12}, pool),
                   0.0};
    const at::Tensor h = *damped(problem.moment, options.ef_damp, "layer");
    EXPECT_LT(last, 0.5 * quadratic(problem.target - what_of(plain, paths), h) /
                        quadratic(problem.target, h));
  }
}

TEST(FitLayer, RowsAreFittedByTheirImportance) {
  ThreadPool pool(1);
  const at::Tensor x = correlated_inputs(600, 31);
  std::vector<float> importance(kOut, 0.2F);
  std::fill(importance.begin(), importance.begin() + kOut / 4, 3.0F);
  LayerProblem problem{"layer", normal({kOut, kIn}, 34) * 0.1, moment_of(x), {}};
  QuantizeOptions options;
  const at::Tensor h = *damped(problem.moment, options.ef_damp, "layer");
  const auto error_of_first = [&] {
    const auto fit = fit_layer(problem, 2, options, pool);
    EXPECT_TRUE(fit);
    return quadratic((problem.target - what_of(*fit, 2)).narrow(0, 0, kOut / 4), h);
  };
  const double without = error_of_first();
  problem.out = importance;
  EXPECT_LT(error_of_first(), without);
}

}  // namespace
}  // namespace rabit::train
