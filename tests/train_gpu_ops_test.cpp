// The kernels of training under autograd, on the CPU (cuda_emulator.h), against the same in torch
// operations: what leaves the kernels' own tests is shapes, strides, and which gradient goes where.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <bit>

#include "random_tensors.h"
#include "train/fake_quant.h"
#include "train/gpu_ops.h"

namespace rabit::train {
namespace {

double off(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor g = got.to(at::kDouble), w = want.to(at::kDouble);
  return ((g - w).norm() / w.norm()).item<double>();
}

at::Tensor leaf(const at::Tensor& x) { return x.detach().clone().set_requires_grad(true); }

constexpr double kBf16 = 1.0 / 256;

TEST(GpuOps, CoupledWeightsAreThoseOfEachLayer) {
  std::vector<StudentLinear> layers;
  std::vector<CoupledLeaves> leaves;
  int64_t rows = 0;
  for (const int64_t d_out : {12, 5, 9}) {
    layers.push_back(make_student_linear(Method::kRabit, normal({d_out, 36}, d_out) * 0.1,
                                         normal({2, d_out}, 1).abs() * 0.05 + 0.02,
                                         normal({2, 36}, 2).abs() * 0.1 + 1.0, at::kCPU));
    const StudentLinear& last = layers.back();
    leaves.push_back({leaf(last.latent), leaf(last.g), leaf(last.h)});
    rows += d_out;
  }
  const at::Tensor upstream = normal({rows, 36}, 7);
  for (const at::ScalarType compute : {at::kFloat, at::kBFloat16}) {
    std::vector<at::Tensor> parts;
    for (const StudentLinear& layer : layers) {
      parts.push_back(fake_quant_weight(layer, compute));
    }
    const at::Tensor want = at::cat(parts), got = gpu_coupled_weights(leaves, compute);
    EXPECT_TRUE(at::equal(got, want));
    (want * upstream.to(compute)).sum().backward();
    (got * upstream.to(compute)).sum().backward();
    for (size_t i = 0; i < layers.size(); ++i) {
      EXPECT_TRUE(at::equal(leaves[i].latent.grad(), layers[i].latent.grad())) << i;
      EXPECT_LT(off(leaves[i].g.grad(), layers[i].g.grad()), 1e-6) << i;
      EXPECT_LT(off(leaves[i].h.grad(), layers[i].h.grad()), 1e-6) << i;
      for (const at::Tensor& x : {leaves[i].latent, leaves[i].g, leaves[i].h, layers[i].latent,
                                  layers[i].g, layers[i].h}) {
        x.mutable_grad().reset();
      }
    }
  }
}

TEST(GpuOps, NormsHaveTheGradientsOfTheFormula) {
  const at::Tensor x = leaf(normal({2, 5, 24}, 1)), weight = leaf(normal({24}, 2) * 0.2 + 1.0);
  const at::Tensor delta = leaf(normal({2, 5, 24}, 3).to(at::kBFloat16));
  const at::Tensor on_sum = normal({2, 5, 24}, 4), on_y = normal({2, 5, 24}, 5);
  const auto wide = [](const at::Tensor& t) { return leaf(t.to(at::kDouble)); };
  const at::Tensor x64 = wide(x), weight64 = wide(weight), delta64 = wide(delta);
  const at::Tensor want_sum = x64 + delta64;
  const at::Tensor want_y = at::rms_norm(want_sum, {24}, weight64, 1e-5);
  (want_sum * on_sum + want_y * on_y).sum().backward();
  const auto [sum, y] = gpu_add_norm(x, delta, weight, 1e-5);
  (sum * on_sum + y * on_y).sum().backward();
  EXPECT_LT(off(sum, want_sum), 1e-6);
  EXPECT_LT(off(y, want_y), kBf16);
  EXPECT_LT(off(x.grad(), x64.grad()), kBf16);
  EXPECT_LT(off(delta.grad(), delta64.grad()), 2 * kBf16);
  EXPECT_LT(off(weight.grad(), weight64.grad()), kBf16);
  // Where only one of the two is used, and where nothing but the weight asks for a gradient.
  const std::vector<at::Tensor> got = {x, delta, weight}, wanted = {x64, delta64, weight64};
  const auto clear = [&] {
    for (const auto* each : {&got, &wanted}) {
      for (const at::Tensor& t : *each) {
        t.mutable_grad().reset();
      }
    }
  };
  for (const bool use_sum : {true, false}) {
    clear();
    const at::Tensor sum_again = x64 + delta64;
    (use_sum ? sum_again * on_sum : at::rms_norm(sum_again, {24}, weight64, 1e-5) * on_y)
        .sum()
        .backward();
    const auto [one, other] = gpu_add_norm(x, delta, weight, 1e-5);
    (use_sum ? one * on_sum : other * on_y).sum().backward();
    for (size_t i = 0; i < got.size(); ++i) {
      if (!wanted[i].grad().defined()) {
        EXPECT_EQ(got[i].grad().abs().max().item<float>(), 0.0F) << use_sum << i;
        continue;
      }
      EXPECT_LT(off(got[i].grad(), wanted[i].grad()), 2 * kBf16) << use_sum << i;
    }
  }
  clear();
  (at::rms_norm((x64 + delta64).detach(), {24}, weight64, 1e-5) * on_y).sum().backward();
  (gpu_add_norm(x.detach(), delta.detach(), weight, 1e-5).second * on_y).sum().backward();
  EXPECT_LT(off(weight.grad(), weight64.grad()), kBf16);
  EXPECT_FALSE(x.grad().defined() || delta.grad().defined());
  clear();
  (at::rms_norm(x64, {24}, weight64.detach(), 1e-5) * on_y).sum().backward();
  (gpu_norm(x, weight.detach(), 1e-5) * on_y).sum().backward();
  EXPECT_LT(off(x.grad(), x64.grad()), kBf16);
}

TEST(GpuOps, KlIsThatOfTheOperations) {
  const int64_t tokens = 6, width = 16, vocab = 60;
  const at::Tensor head = normal({vocab, width}, 1).to(at::kBFloat16) * 0.3;
  const at::Tensor teacher = normal({tokens, width}, 2).to(at::kBFloat16);
  const at::Tensor student = leaf((teacher + normal({tokens, width}, 3) * 0.5).to(at::kBFloat16));
  at::Tensor next = at::arange(tokens) * 3;
  next[2] = -1;
  const LossShares shares{0.3, 2.0, 0.2};
  const auto [loss, nll] = distillation_loss(student, teacher, head, next, shares);
  loss.backward();
  const at::NoGradGuard no_grad;
  const at::Tensor logits = at::matmul(student, head.t());
  const at::Tensor sums =
      gpu_kl_backward(logits, at::matmul(teacher, head.t()), next, shares, 0.8 / 6.0, 0.2 / 5.0);
  const at::Tensor mean = sums.to(at::kDouble).sum(0);
  const double got = mean[0].item<double>() * 4.0 * 0.8 / 6.0 + mean[1].item<double>() * 0.2 / 5.0;
  EXPECT_NEAR(got, loss.item<double>(), 1e-5 * got);
  EXPECT_NEAR(mean[2].item<double>() / 5.0, nll[1].item<double>(), 1e-5);
  EXPECT_LT(off(at::matmul(logits, head), student.grad()), 3 * kBf16);
}

// A whole block, its operations in bf16 beside it: no further from float32 than they are.
TEST(GpuOps, BlocksAreThoseOfTheOperations) {
  ModelConfig config;
  config.d_model = 48;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 12;
  config.d_ff = 64;
  config.norm_epsilon = 1e-5F;
  config.rope_theta = 10000.0F;
  const Rotary rotary = make_rotary(config, 8, at::kCPU);
  const at::Tensor x = normal({2, 8, 48}, 1), upstream = normal({2, 8, 48}, 2);
  std::array<at::Tensor, kRoleCount> weights;
  for (const Role role : kRoles) {
    const LinearShape shape = linear_shape(config, role);
    weights[index_of(role)] =
        normal({shape.d_out, shape.d_in}, 10 + static_cast<int>(index_of(role))) * 0.15;
  }
  const at::Tensor attn_norm = normal({48}, 3) * 0.2 + 1.0, ffn_norm = normal({48}, 4) * 0.2 + 1.0;
  enum Way { kExact, kOperations, kKernels, kKernelsOfJoined };
  // Output, and gradients of stream, weights and norms.
  const auto run = [&](Way way) {
    const at::ScalarType compute = way == kExact ? at::kFloat : at::kBFloat16;
    std::vector<at::Tensor> leaves = {leaf(x), leaf(attn_norm), leaf(ffn_norm)};
    BlockWeights block{{}, leaves[1], leaves[2]};
    for (size_t i = 0; i < kRoleCount; ++i) {
      leaves.push_back(leaf(weights[i]));
      block.linear[i] = leaves.back().to(compute);
    }
    if (way == kKernelsOfJoined) {
      const auto join = [&](std::initializer_list<Role> roles) {
        std::vector<at::Tensor> parts;
        for (const Role role : roles) {
          parts.push_back(block.linear[index_of(role)]);
        }
        return at::cat(parts);
      };
      block.qkv = join({Role::kAttnQ, Role::kAttnK, Role::kAttnV});
      block.gate_up = join({Role::kFfnGate, Role::kFfnUp});
    }
    const at::Tensor y = way >= kKernels ? gpu_block_forward(config, block, rotary, leaves[0])
                                         : block_forward(config, block, rotary, leaves[0], compute);
    (y * upstream).sum().backward();
    std::vector<at::Tensor> out = {(y - leaves[0]).detach()};
    for (const at::Tensor& each : leaves) {
      out.push_back(each.grad());
    }
    return out;
  };
  const auto exact = run(kExact), operations = run(kOperations);
  for (const Way way : {kKernels, kKernelsOfJoined}) {
    const auto kernels = run(way);
    for (size_t i = 0; i < exact.size(); ++i) {
      EXPECT_LT(off(kernels[i], exact[i]), 1.5 * off(operations[i], exact[i]) + 1e-4) << i;
      EXPECT_LT(off(kernels[i], exact[i]), 0.03) << i;
    }
  }
}

TEST(GpuOps, AReplacedWeightIsTheOneThatCounts) {
  ModelConfig config;
  config.d_model = 16;
  config.heads = config.kv_heads = 2;
  config.head_dim = 8;
  config.d_ff = 24;
  config.norm_epsilon = 1e-5F;
  config.rope_theta = 10000.0F;
  const Rotary rotary = make_rotary(config, 4, at::kCPU);
  BlockWeights block{{}, at::ones({16}), at::ones({16})};
  for (const Role role : kRoles) {
    const LinearShape shape = linear_shape(config, role);
    block.linear[index_of(role)] = normal({shape.d_out, shape.d_in}, 5).to(at::kBFloat16) * 0.2;
  }
  const auto join = [&](std::span<const Role> roles) {
    std::vector<at::Tensor> parts;
    for (const Role role : roles) {
      parts.push_back(block.linear[index_of(role)]);
    }
    return at::cat(parts);
  };
  block.qkv = join(kJoinedQkv);
  block.gate_up = join(kJoinedGateUp);
  const at::Tensor x = normal({1, 4, 16}, 1);
  const at::Tensor before = gpu_block_forward(config, block, rotary, x);
  for (const Role role : kRoles) {
    BlockWeights other = block;
    other.replace(role, block.linear[index_of(role)] * 0.5);
    EXPECT_GT(off(gpu_block_forward(config, other, rotary, x), before), 1e-4)
        << static_cast<int>(role);
  }
}

TEST(GpuOps, SignsThatTurnAreCounted) {
  StudentLinear linear = make_student_linear(Method::kRabit, normal({9, 70}, 1) * 0.1,
                                             normal({2, 9}, 2).abs() * 0.05 + 0.02,
                                             normal({2, 70}, 3).abs() * 0.1 + 1.0, at::kCPU);
  const at::Tensor packed = at::zeros({2, 9, 3}, at::kInt);
  const auto look = [&] {
    return gpu_coupled_signs({linear.latent.detach(), linear.g.detach(), linear.h.detach()}, packed)
        .item<int64_t>();
  };
  (void)look();
  EXPECT_EQ(look(), 0);
  const std::vector<uint32_t> before = student_signs(linear);
  {
    const at::NoGradGuard no_grad;
    linear.latent.narrow(0, 2, 1).neg_();
  }
  const std::vector<uint32_t> now = student_signs(linear);
  int64_t turned = 0;
  for (size_t i = 0; i < now.size(); ++i) {
    turned += std::popcount(before[i] ^ now[i]);
  }
  EXPECT_GT(turned, 70);
  EXPECT_EQ(look(), turned);
}

}  // namespace
}  // namespace rabit::train
