// The parts of training, each against an oracle written here in double or without autograd: the
// coupled weight and its gradients, the distillation loss and the optimizers.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "tiny_model.h"
#include "train/fake_quant.h"
#include "train/host_tensor.h"
#include "train/kl_loss.h"
#include "train/optimizer.h"
#include "train/recompute.h"

namespace rabit::train {
namespace {

double relative(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor a = got.detach().to(at::kDouble), b = want.detach().to(at::kDouble);
  return ((a - b).norm() / b.norm()).item<double>();
}

/// Equal in every bit, so that 0 and -0 differ.
bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  const at::ScalarType bits = a.scalar_type() == at::kFloat ? at::kInt : at::kShort;
  return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() &&
         at::equal(a.detach().cpu().contiguous().view(bits),
                   b.detach().cpu().contiguous().view(bits));
}

at::Tensor random_matrix(int64_t rows, int64_t columns, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> draw;
  std::vector<float> values(static_cast<size_t>(rows * columns));
  for (float& v : values) {
    v = draw(random);
  }
  return to_tensor(values, {rows, columns});
}

/// A layer whose latent holds zeros of both signs, and values that leave a residual of exactly
/// zero.
StudentLinear planted_linear(int64_t d_out, int64_t d_in, int64_t paths, uint64_t seed) {
  std::vector<float> w = to_vector(random_matrix(d_out, d_in, seed) * 0.1);
  std::vector<float> g = to_vector(random_matrix(paths, d_out, seed + 1) * 0.02 + 0.1);
  const std::vector<float> h = to_vector(random_matrix(paths, d_in, seed + 2) * 0.2 + 1.0);
  for (int64_t i = 0; i < paths * d_out; ++i) {
    g[i] = std::ldexp(g[i], -static_cast<int>(i / d_out));
  }
  for (int64_t i = 0; i < d_out * d_in; ++i) {
    const float p = g[i / d_in] * h[i % d_in];
    const float q = paths > 1 ? g[d_out + i / d_in] * h[d_in + i % d_in] : 0.0F;
    const float planted[] = {0.0F, -0.0F, p, -p, p + q, -p - q};
    if (i % 11 < 6) {
      w[i] = planted[i % 11];
    }
  }
  const auto leaf = [](at::Tensor tensor) { return tensor.set_requires_grad(true); };
  return {{d_out, d_in, paths},
          leaf(to_tensor(w, {d_out, d_in})),
          leaf(to_tensor(g, {paths, d_out})),
          leaf(to_tensor(h, {paths, d_in}))};
}

struct Size {
  int64_t d_out, d_in;
};
constexpr Size kSizes[] = {{1, 1}, {3, 17}, {37, 33}, {65, 31}, {270, 100}};

at::Tensor quant_forward(const StudentLinear& linear) {
  const std::vector<float> w = to_vector(linear.latent);
  const quant::Scales scales = host_scales(linear);
  std::vector<float> out(w.size());
  quant::coupled_forward(linear.shape, w.data(), scales.g.data(), scales.h.data(), 0,
                         linear.shape.d_out, out.data());
  return to_tensor(out, {linear.shape.d_out, linear.shape.d_in});
}

TEST(FakeQuant, EqualsQuantToTheBit) {
  for (int64_t paths = 1; paths <= 4; ++paths) {
    for (const auto& [d_out, d_in] : kSizes) {
      const StudentLinear linear = planted_linear(d_out, d_in, paths, 7);
      const at::Tensor want = quant_forward(linear);
      const at::Tensor got = fake_quant_weight(linear, at::kFloat);
      EXPECT_TRUE(same_bits(got, want)) << paths << ": " << d_out << " x " << d_in;
      EXPECT_TRUE(same_bits(coupled_weight_by_operations(linear, at::kFloat), want))
          << paths << ": " << d_out << " x " << d_in;
      for (const auto& half : {fake_quant_weight(linear, at::kBFloat16),
                               coupled_weight_by_operations(linear, at::kBFloat16)}) {
        EXPECT_TRUE(same_bits(half, want.to(at::kBFloat16))) << paths << ": " << d_out;
      }
      // The comparison must see one sign.
      StudentLinear other = linear;
      other.latent = (-linear.latent.detach() - 1e-3).set_requires_grad(true);
      EXPECT_FALSE(same_bits(fake_quant_weight(other, at::kFloat), want));
    }
  }
}

TEST(FakeQuant, EqualsQuantOnTheGpu) {
  if (!at::globalContext().hasCUDA()) {
    GTEST_SKIP() << "no CUDA device, or a build without CUDA";
  }
  for (int64_t paths = 1; paths <= 4; ++paths) {
    const StudentLinear linear = planted_linear(65, 31, paths, 9);
    const auto there = [](const at::Tensor& t) {
      return t.detach().to(at::kCUDA).set_requires_grad(true);
    };
    const StudentLinear gpu{linear.shape, there(linear.latent), there(linear.g), there(linear.h)};
    EXPECT_TRUE(same_bits(fake_quant_weight(gpu, at::kFloat), quant_forward(linear))) << paths;
  }
}

// Sum of G * What in double for given scales, under signs that the latent gave once and for all.
double held_objective(const StudentLinear& linear, const std::vector<uint32_t>& signs,
                      const std::vector<float>& upstream, const Doubles& g, const Doubles& h) {
  const auto& [d_out, d_in, paths] = linear.shape;
  const int64_t words = (d_in + 31) / 32;
  double total = 0;
  for (int64_t i = 0; i < paths; ++i) {
    for (int64_t r = 0; r < d_out; ++r) {
      for (int64_t c = 0; c < d_in; ++c) {
        const bool plus = (signs[(i * d_out + r) * words + c / 32] >> (c % 32)) & 1U;
        total += upstream[r * d_in + c] * (plus ? 1 : -1) * g[i * d_out + r] * h[i * d_in + c];
      }
    }
  }
  return total;
}

TEST(FakeQuant, Gradients) {
  for (const int64_t paths : {1, 2, 3, 4}) {
    for (const bool operations : {false, true}) {
      const StudentLinear linear = planted_linear(37, 21, paths, 20 + paths);
      const at::Tensor upstream = random_matrix(37, 21, 5);
      const at::Tensor out = operations ? coupled_weight_by_operations(linear, at::kFloat)
                                        : fake_quant_weight(linear, at::kFloat);
      out.backward(upstream);
      // Straight through, and nothing more: no path adds to it by way of the residual.
      EXPECT_TRUE(same_bits(linear.latent.grad(), upstream));

      const quant::Scales scales = host_scales(linear);
      const auto signs =
          quant::coupled_signs(linear.shape, to_vector(linear.latent).data(), scales);
      const std::vector<float> weights = to_vector(upstream);
      Doubles g(scales.g.begin(), scales.g.end()), h(scales.h.begin(), scales.h.end());
      const auto check = [&](Doubles& values, const at::Tensor& grad, const char* name) {
        Doubles want;
        for (double& value : values) {
          const double kept = value;
          const double step = 1e-3;
          value = kept + step;
          const double above = held_objective(linear, signs, weights, g, h);
          value = kept - step;
          const double below = held_objective(linear, signs, weights, g, h);
          value = kept;
          want.push_back((above - below) / (2 * step));
        }
        EXPECT_LE(relative_error(to_vector(grad), want), 1e-6)
            << name << ", " << paths << " paths, by operations: " << operations;
      };
      check(g, linear.g.grad(), "g");
      check(h, linear.h.grad(), "h");
    }
  }
}

at::Tensor divergence_in_double(const at::Tensor& student, const at::Tensor& teacher,
                                const at::Tensor& head) {
  const at::Tensor wide = head.to(at::kDouble);
  const at::Tensor log_t = at::log_softmax(at::matmul(teacher.to(at::kDouble), wide.t()), -1);
  const at::Tensor log_s = at::log_softmax(at::matmul(student, wide.t()), -1);
  return (log_t.exp() * (log_t - log_s)).sum(-1).mean();
}

// No token whose successor is known.
at::Tensor unknown(const at::Tensor& hidden) { return at::full({hidden.size(0)}, -1, at::kLong); }

TEST(DistillationLoss, EqualsAutogradInDouble) {
  for (const auto& [tokens, vocab] : {Size{1, 2}, Size{7, 33}, Size{64, 500}, Size{3, 4099}}) {
    const int64_t width = 24;
    const at::Tensor head = random_matrix(vocab, width, 1) * 0.3;
    const at::Tensor teacher = random_matrix(tokens, width, 2);
    const at::Tensor values = teacher + random_matrix(tokens, width, 3) * 0.5;
    const at::Tensor student = values.clone().set_requires_grad(true);
    const at::Tensor exact = values.to(at::kDouble).set_requires_grad(true);
    const at::Tensor got = distillation_loss(student, teacher, head, unknown(student)).loss;
    const at::Tensor want = divergence_in_double(exact, teacher, head);
    // Sums of probabilities that differ by rounding: absolute, a few epsilon of logits of size 5.
    EXPECT_NEAR(got.item<double>(), want.item<double>(), 3e-6 + 1e-5 * want.item<double>());
    EXPECT_GT(want.item<double>(), 1e-3);
    (got * 3.0).backward();  // an upstream factor must come through
    (want * 3.0).backward();
    EXPECT_LE(relative(student.grad(), exact.grad()), 2e-5) << tokens << " x " << vocab;
  }
}

TEST(DistillationLoss, EveryShareEqualsAutogradInDouble) {
  const int64_t width = 24, tokens = 11, vocab = 40;
  const at::Tensor head = random_matrix(vocab, width, 1) * 0.3;
  const at::Tensor teacher = random_matrix(tokens, width, 2);
  const at::Tensor values = teacher + random_matrix(tokens, width, 3) * 0.5;
  at::Tensor next = at::arange(tokens) * 3;
  next[4] = -1;
  next[tokens - 1] = -1;
  for (const LossShares& shares :
       {LossShares{1.0, 1.0, 0.0}, LossShares{0.3, 1.0, 0.0}, LossShares{0.0, 2.5, 0.0},
        LossShares{0.6, 0.5, 0.2}, LossShares{0.0, 1.0, 0.4}, LossShares{0.5, 3.0, 1.0}}) {
    const at::Tensor student = values.clone().set_requires_grad(true);
    const at::Tensor exact = values.to(at::kDouble).set_requires_grad(true);
    const auto [got, nll] = distillation_loss(student, teacher, head, next, shares);
    const at::Tensor wide = head.to(at::kDouble).t();
    const double t = shares.temperature;
    const at::Tensor logits = at::matmul(exact, wide);
    const at::Tensor log_s = at::log_softmax(logits / t, -1);
    const at::Tensor log_t = at::log_softmax(at::matmul(teacher.to(at::kDouble), wide) / t, -1);
    const at::Tensor forward = (log_t.exp() * (log_t - log_s)).sum(-1).mean();
    const at::Tensor reverse = (log_s.exp() * (log_s - log_t)).sum(-1).mean();
    const auto entropy_of = [&](const at::Tensor& at_one) {
      at::Tensor sum = at::zeros({}, at::kDouble);
      int64_t known = 0;
      for (int64_t i = 0; i < tokens; ++i) {
        if (const auto target = next[i].item<int64_t>(); target >= 0) {
          sum = sum - at::log_softmax(at_one[i], -1)[target];
          ++known;
        }
      }
      return sum / static_cast<double>(known);
    };
    const at::Tensor entropy = entropy_of(logits);
    const at::Tensor want = (forward * (1 - shares.reverse) + reverse * shares.reverse) * (t * t) *
                                (1 - shares.cross_entropy) +
                            entropy * shares.cross_entropy;
    const double of_teacher = entropy_of(at::matmul(teacher.to(at::kDouble), wide)).item<double>();
    EXPECT_NEAR(nll[0].item<double>(), entropy.item<double>(), 1e-5 * entropy.item<double>());
    EXPECT_NEAR(nll[1].item<double>(), of_teacher, 1e-5 * of_teacher);
    EXPECT_FALSE(nll.requires_grad());
    EXPECT_NEAR(got.item<double>(), want.item<double>(), 3e-6 + 1e-5 * want.item<double>());
    (got * 2.0).backward();
    (want * 2.0).backward();
    EXPECT_LE(relative(student.grad(), exact.grad()), 3e-5)
        << shares.reverse << " " << t << " " << shares.cross_entropy;
  }
}

TEST(DistillationLoss, ZeroForEqualsAndNeverNegative) {
  const at::Tensor head = random_matrix(50, 16, 4), hidden = random_matrix(9, 16, 5);
  const at::Tensor same = hidden.clone().set_requires_grad(true);
  const at::Tensor zero = distillation_loss(same, hidden, head, unknown(same)).loss;
  zero.backward();
  EXPECT_EQ(zero.item<double>(), 0.0);
  EXPECT_EQ(same.grad().abs().max().item<double>(), 0.0);
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const double size = std::pow(10.0, static_cast<double>(seed % 5) - 3.0);
    const at::Tensor near = hidden + random_matrix(9, 16, 100 + seed) * size;
    EXPECT_GE(distillation_loss(near, hidden, head, unknown(near)).loss.item<double>(), -1e-6)
        << size;
  }
}

TEST(DistillationLoss, ChunksAddUp) {
  constexpr int64_t kTokens = 37, kVocab = 300;
  const at::Tensor head = random_matrix(kVocab, 16, 6), teacher = random_matrix(kTokens, 16, 7);
  const at::Tensor values = random_matrix(kTokens, 16, 8);
  at::Tensor next = at::arange(kTokens, at::kLong);
  next.slice(0, 3, kTokens, 5).fill_(-1);
  const LossShares shares{.reverse = 0.3, .temperature = 1.5, .cross_entropy = 0.2};
  const auto with = [&](int64_t chunk_logits) {
    const at::Tensor student = values.clone().set_requires_grad(true);
    const auto [loss, nll] = distillation_loss(student, teacher, head, next, shares, chunk_logits);
    loss.backward();
    return std::tuple{loss.item<double>(), nll, student.grad()};
  };
  const auto [loss, nll, grad] = with(kTokens * kVocab);
  for (const int64_t chunk_logits : {int64_t{1}, kVocab, 2 * kVocab - 1, 5 * kVocab, 36 * kVocab}) {
    const auto [chunked_loss, chunked_nll, chunked_grad] = with(chunk_logits);
    EXPECT_NEAR(chunked_loss, loss, 1e-6 * loss) << chunk_logits;
    EXPECT_LE(relative(chunked_nll, nll), 1e-6) << chunk_logits;
    EXPECT_LE(relative(chunked_grad, grad), 1e-6) << chunk_logits;
  }
}

double quintic(double s) {
  for (int step = 0; step < 5; ++step) {
    s = 3.4445 * s - 4.7750 * std::pow(s, 3) + 2.0315 * std::pow(s, 5);
  }
  return s;
}

// U f(S / |S|) V^T, f the iteration on numbers: what Newton-Schulz is in exact arithmetic.
at::Tensor orthogonalized_in_double(const at::Tensor& x) {
  const auto [u, s, v] = at::linalg_svd(x.to(at::kDouble), /*full_matrices=*/false);
  const at::Tensor level = s / s.norm();
  at::Tensor mapped = at::empty_like(level);
  for (int64_t i = 0; i < s.numel(); ++i) {
    mapped[i] = quintic(level[i].item<double>());
  }
  return at::matmul(u * mapped, v);
}

TEST(Orthogonalize, EqualsTheIterationOnSingularValues) {
  const at::Tensor random = random_matrix(40, 96, 1);
  const auto [u, s, v] = at::linalg_svd(random, false);
  const at::Tensor spread = at::logspace(0, -2, 40, 10.0, at::kFloat);
  const at::Tensor ill = at::matmul(u * spread, v);  // condition number 100
  const at::Tensor batch = at::stack({random, random_matrix(40, 96, 2) * 1e-3, ill});
  const at::Tensor got = orthogonalize(batch);
  for (int64_t i = 0; i < batch.size(0); ++i) {
    EXPECT_LE(relative(got[i], orthogonalized_in_double(batch[i])), 2e-4) << i;
    const at::Tensor values = at::linalg_svdvals(got[i].to(at::kDouble));
    EXPECT_GE(values.min().item<double>(), 0.67) << i;
    EXPECT_LE(values.max().item<double>(), 1.21) << i;
  }
  EXPECT_FALSE(orthogonalize(at::zeros({1, 4, 6})).isnan().any().item<bool>());
}

void set_gradients(const std::vector<at::Tensor>& parameters, uint64_t seed) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    at::Tensor p = parameters[i];
    p.mutable_grad() = to_tensor(
        to_vector(random_matrix(p.size(0), p.numel() / p.size(0), seed + i * 31)), p.sizes());
  }
}

at::Tensor leaf(const at::Tensor& values) { return values.clone().set_requires_grad(true); }

TEST(MuonOptimizer, EqualsOneMatrixWrittenOut) {
  for (const auto& [d_out, d_in] : {Size{24, 80}, Size{80, 24}, Size{32, 32}}) {
    const at::Tensor start = random_matrix(d_out, d_in, 3);
    const std::vector<at::Tensor> parameters = {leaf(start)};
    Muon muon(parameters);
    at::Tensor want = start.to(at::kDouble), momentum = at::zeros_like(want);
    double moved = 0;
    for (int step = 0; step < 3; ++step) {
      set_gradients(parameters, 40 + step);
      const at::Tensor grad = parameters[0].grad().to(at::kDouble);
      momentum = 0.95 * momentum + 0.05 * grad;
      const at::Tensor direction = 0.05 * grad + 0.95 * momentum;
      const double rate = 0.01 * (step + 1);
      const at::Tensor update = orthogonalized_in_double(direction) * rate * 0.2 *
                                std::sqrt(static_cast<double>(std::max(d_out, d_in)));
      want = want - update;
      moved += update.norm().item<double>();
      muon.step(rate);
      EXPECT_FALSE(parameters[0].grad().defined());
      // The iteration runs in bfloat16: eps 2^-8, over five steps.
      const at::Tensor off = parameters[0].detach().to(at::kDouble) - want;
      EXPECT_LE(off.norm().item<double>(), 0.03 * moved) << d_out << " x " << d_in;
    }
  }
}

TEST(MuonOptimizer, MomentumInBf16IsNearlyThatInFloat) {
  const at::Tensor start = random_matrix(24, 80, 3);
  const std::vector<at::Tensor> wide = {leaf(start)}, narrow = {leaf(start)};
  Muon in_float(wide), in_bf16(narrow, 0.95, at::kBFloat16);
  for (int step = 0; step < 20; ++step) {
    set_gradients(wide, 40 + step);
    set_gradients(narrow, 40 + step);
    in_float.step(0.01);
    in_bf16.step(0.01);
  }
  const at::Tensor moved = wide[0].detach() - start;
  EXPECT_EQ(in_bf16.state()[0].scalar_type(), at::kBFloat16);
  // A rounding of 2^-9 a step, of which twenty count.
  EXPECT_LE(relative(in_bf16.state()[0].to(at::kFloat), in_float.state()[0]), 0.02);
  EXPECT_LE((narrow[0].detach() - wide[0].detach()).norm().item<double>(),
            0.05 * moved.norm().item<double>());
}

TEST(MuonOptimizer, GroupsChangeNothing) {
  const std::vector<at::Tensor> starts = {random_matrix(24, 40, 1), random_matrix(40, 24, 2),
                                          random_matrix(24, 40, 3), random_matrix(24, 24, 4)};
  std::vector<at::Tensor> together;
  for (const auto& start : starts) {
    together.push_back(leaf(start));
  }
  Muon muon(together);
  set_gradients(together, 50);
  std::vector<at::Tensor> grads;
  for (const auto& parameter : together) {
    grads.push_back(parameter.grad().clone());
  }
  muon.step(0.02);
  for (size_t i = 0; i < starts.size(); ++i) {
    // A square matrix is not turned before the iteration.
    for (const bool transposed : {false, i < 3}) {
      const auto turned = [&](const at::Tensor& t) {
        return transposed ? t.t().contiguous() : t.clone();
      };
      std::vector<at::Tensor> alone = {leaf(turned(starts[i]))};
      Muon single(alone);
      alone[0].mutable_grad() = turned(grads[i]);
      single.step(0.02);
      const at::Tensor moved = turned(together[i].detach()) - turned(starts[i]);
      EXPECT_LE(relative(alone[0].detach() - turned(starts[i]), moved), 1e-6) << i << transposed;
    }
  }
}

TEST(AdamWOptimizer, EqualsScalarsInDouble) {
  AdamW::Options options;
  options.weight_decay = 0.1;
  const std::vector<at::Tensor> parameters = {leaf(random_matrix(3, 5, 1)),
                                              leaf(random_matrix(2, 7, 2))};
  AdamW adam(parameters, options);
  Doubles want, mean(29), square(29);
  for (const auto& parameter : parameters) {
    for (const float v : to_vector(parameter)) {
      want.push_back(v);
    }
  }
  for (int step = 1; step <= 5; ++step) {
    set_gradients(parameters, 60 + step);
    Doubles grad;
    for (const auto& parameter : parameters) {
      for (const float v : to_vector(parameter.grad())) {
        grad.push_back(v);
      }
    }
    const double rate = 0.01 * step;
    for (size_t i = 0; i < want.size(); ++i) {
      mean[i] = 0.9 * mean[i] + 0.1 * grad[i];
      square[i] = 0.95 * square[i] + 0.05 * grad[i] * grad[i];
      const double m = mean[i] / (1 - std::pow(0.9, step));
      const double s = square[i] / (1 - std::pow(0.95, step));
      want[i] -= rate * 0.1 * want[i];
      want[i] -= rate * m / (std::sqrt(s) + 1e-8);
    }
    adam.step(rate);
    std::vector<float> got = to_vector(parameters[0]);
    const std::vector<float> rest = to_vector(parameters[1]);
    got.insert(got.end(), rest.begin(), rest.end());
    EXPECT_LE(relative_error(got, want), 1e-6) << step;
    EXPECT_FALSE(parameters[1].grad().defined());
  }
}

TEST(AdamWOptimizer, MomentsInBf16AreNearlyThoseInFloat) {
  const at::Tensor a = random_matrix(24, 80, 3), b = random_matrix(8, 40, 4);
  const std::vector<at::Tensor> wide = {leaf(a), leaf(b)}, narrow = {leaf(a), leaf(b)};
  AdamW::Options options;
  options.moments = at::kBFloat16;
  AdamW in_float(wide, {}), in_bf16(narrow, options);
  for (int step = 0; step < 20; ++step) {
    set_gradients(wide, 40 + step);
    set_gradients(narrow, 40 + step);
    in_float.step(0.01);
    in_bf16.step(0.01);
  }
  const AdamW::State state = in_bf16.state();
  EXPECT_EQ(state.mean.scalar_type(), at::kBFloat16);
  EXPECT_EQ(state.square.scalar_type(), at::kBFloat16);
  // Roundings of 2^-9 a step, of which ten and twenty count.
  EXPECT_LE(relative(state.mean.to(at::kFloat), in_float.state().mean), 0.02);
  EXPECT_LE(relative(state.square.to(at::kFloat), in_float.state().square), 0.02);
  for (size_t i = 0; i < 2; ++i) {
    const at::Tensor start = i == 0 ? a : b;
    EXPECT_LE((narrow[i].detach() - wide[i].detach()).norm().item<double>(),
              0.05 * (wide[i].detach() - start).norm().item<double>());
    EXPECT_FALSE(narrow[i].grad().defined());
  }
  // As a checkpoint gives it back.
  const std::vector<at::Tensor> more = {leaf(narrow[0].detach()), leaf(narrow[1].detach())};
  AdamW again(more, options);
  again.load_state({state.mean.to(at::kFloat), state.square.to(at::kFloat), state.steps});
  set_gradients(narrow, 99);
  set_gradients(more, 99);
  in_bf16.step(0.01);
  again.step(0.01);
  EXPECT_TRUE(same_bits(narrow[0], more[0]));
  EXPECT_TRUE(same_bits(narrow[1], more[1]));
}

TEST(Optimizers, SavedStateContinuesIdentically) {
  const at::Tensor a = random_matrix(16, 24, 1), b = random_matrix(24, 16, 2);
  const std::vector<at::Tensor> first = {leaf(a), leaf(b)};
  Muon muon(first);
  AdamW adam(first, {});
  const auto both = [](Muon& m, AdamW& w, const std::vector<at::Tensor>& p, uint64_t seed) {
    set_gradients(p, seed);
    m.step(0.01);
    set_gradients(p, seed + 1000);
    w.step(0.01);
  };
  both(muon, adam, first, 1);
  both(muon, adam, first, 2);
  const std::vector<at::Tensor> second = {leaf(first[0].detach()), leaf(first[1].detach())};
  Muon muon2(second);
  AdamW adam2(second, {});
  std::vector<at::Tensor> momentum;
  for (const auto& m : muon.state()) {
    momentum.push_back(m.clone());
  }
  muon2.load_state(momentum);
  adam2.load_state({adam.state().mean.clone(), adam.state().square.clone(), adam.state().steps});
  const std::vector<at::Tensor> fresh = {leaf(first[0].detach()), leaf(first[1].detach())};
  Muon muon3(fresh);
  AdamW adam3(fresh, {});
  both(muon, adam, first, 3);
  both(muon2, adam2, second, 3);
  both(muon3, adam3, fresh, 3);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(same_bits(first[i], second[i])) << i;
    EXPECT_FALSE(same_bits(first[i], fresh[i])) << "the state makes no difference: " << i;
  }
}

TEST(Recompute, BuildsTheGraphInTheBackwardPassAlone) {
  const at::Tensor w = leaf(random_matrix(4, 4, 1)), v = leaf(random_matrix(4, 4, 2));
  for (const bool input_has_gradient : {true, false}) {
    at::Tensor x = random_matrix(3, 4, 3);
    if (input_has_gradient) {
      x = leaf(x);
    }
    int calls = 0, graphs = 0;
    const auto body = [&](const at::Tensor& in) {
      ++calls;
      graphs += at::GradMode::is_enabled() ? 1 : 0;
      return at::matmul(at::tanh(at::matmul(in, w)), v) + in;
    };
    const auto gradients = [&](const at::Tensor& y) {
      y.square().sum().backward();
      std::vector<at::Tensor> out;
      for (const at::Tensor& t : {w, v, x}) {
        out.push_back(t.grad().defined() ? t.grad().clone() : at::Tensor());
        t.mutable_grad().reset();
      }
      return out;
    };
    const auto want = gradients(body(x));
    calls = graphs = 0;
    const at::Tensor y = recomputed(body, x, w);
    EXPECT_EQ(calls, 1);
    EXPECT_EQ(graphs, 0);
    const auto got = gradients(y);
    EXPECT_EQ(calls, 2);
    EXPECT_EQ(graphs, 1);
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_EQ(got[i].defined(), want[i].defined()) << i;
      EXPECT_TRUE(!want[i].defined() || at::equal(got[i], want[i])) << i;
    }
  }
}

TEST(Optimizers, GradientNorm) {
  std::vector<at::Tensor> parameters = {leaf(at::zeros({2, 2})), leaf(at::zeros({1, 3})),
                                        leaf(at::zeros({4, 4}))};
  parameters[0].mutable_grad() = to_tensor({1, -2, 3, 4}, {2, 2});
  parameters[1].mutable_grad() = to_tensor({5, -6, 7}, {1, 3});  // the third has no gradient
  EXPECT_NEAR(gradient_norm(parameters).item<double>(), std::sqrt(140.0), 1e-6);
  scale_gradients(parameters, 0.5);
  EXPECT_NEAR(gradient_norm(parameters).item<double>(), std::sqrt(35.0), 1e-6);
  parameters[1].mutable_grad()[0][1] = NAN;
  EXPECT_TRUE(std::isnan(gradient_norm(parameters).item<double>()));
  clear_gradients(parameters);
  EXPECT_FALSE(parameters[0].grad().defined());
}

TEST(Optimizers, GradientsOfScalesAreClippedToTheNormGiven) {
  for (const double clip : {0.5, 100.0}) {
    const at::Tensor latent = leaf(random_matrix(3, 4, 1)), scale = leaf(random_matrix(2, 5, 2));
    QuantizeOptions options;
    options.clip = clip;
    Trainer trainer(options, {latent}, {scale});
    const at::Tensor slope = random_matrix(2, 5, 3) * 4.0;
    const at::Tensor loss = (scale * slope).sum() + latent.sum();
    trainer.accumulate(loss);
    const auto taken = trainer.step(loss, 0.0, 0.0);
    ASSERT_TRUE(taken);
    const double norm = slope.norm().item<double>();
    EXPECT_GT(norm, 2.0);
    EXPECT_NEAR(taken->gradient_norm, norm, 1e-5 * norm);
    // The first mean of AdamW is a tenth of the gradient that it was given.
    const at::Tensor want = slope * (0.1 * std::min(1.0, clip / norm));
    EXPECT_LE(relative(trainer.state().scales.mean.view({2, 5}), want), 1e-6);
  }
}

TEST(Optimizers, CosineSchedule) {
  EXPECT_EQ(cosine_schedule(0.0, 0.1), 0.0);
  EXPECT_NEAR(cosine_schedule(0.05, 0.1), 0.5, 1e-12);
  EXPECT_NEAR(cosine_schedule(0.1, 0.1), 1.0, 1e-12);
  EXPECT_NEAR(cosine_schedule(0.55, 0.1), 0.5, 1e-12);
  EXPECT_NEAR(cosine_schedule(1.0, 0.1), 0.0, 1e-12);
  EXPECT_EQ(cosine_schedule(0.0, 0.0), 1.0);
  EXPECT_NEAR(cosine_schedule(7.0, 0.1), 0.0, 1e-12);
  EXPECT_EQ(cosine_schedule(-1.0, 0.1), 0.0);
  for (int i = 1; i <= 100; ++i) {
    const double before = cosine_schedule((i - 1) / 100.0, 0.1),
                 now = cosine_schedule(i / 100.0, 0.1);
    EXPECT_TRUE(i <= 10 ? now > before : now < before) << i;
  }
}

}  // namespace
}  // namespace rabit::train
