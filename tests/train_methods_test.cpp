// The methods: how each derives its signs, what it trains and what it holds, and that the coupled
// one ends below the others on a tiny model.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "io/dequant.h"
#include "train/fake_quant.h"
#include "train_run.h"

namespace rabit::train {
namespace {

constexpr int64_t kOut = 20, kIn = 45;

at::Tensor normal(at::IntArrayRef sizes, int64_t seed) {
  at::manual_seed(seed);
  return at::randn(sizes);
}

StudentLinear start_of(Method method, int64_t paths) {
  at::Tensor g = normal({paths, kOut}, 1).abs() * 0.01 + 0.08;
  for (int64_t i = 0; i < paths; ++i) {
    g[i] *= std::ldexp(1.0, -static_cast<int>(i));
  }
  const at::Tensor h = normal({paths, kIn}, 2).abs() * 0.1 + 1.0;
  return make_student_linear(method, normal({kOut, kIn}, 3) * 0.1, g, h, at::kCPU);
}

TEST(Methods, AllStartFromTheSameWeight) {
  for (const int64_t paths : {1, 2, 3}) {
    const StudentLinear coupled = start_of(Method::kRabit, paths);
    const at::Tensor want = fake_quant_weight(coupled, at::kFloat);
    for (const Method method : {Method::kStandard, Method::kMbok}) {
      const StudentLinear other = start_of(method, paths);
      ASSERT_TRUE(other.independent());
      EXPECT_TRUE(at::equal(fake_quant_weight(other, at::kFloat), want));
      EXPECT_EQ(student_signs(other), student_signs(coupled));
    }
  }
}

TEST(Methods, IndependentPathsAreSumsOfScaledSigns) {
  StudentLinear linear = start_of(Method::kStandard, 3);
  {
    const at::NoGradGuard no_grad;
    linear.latent.copy_(normal({3, kOut, kIn}, 8));
    linear.latent[0][2][3] = 0.0;
    linear.latent[1][2][4] = -0.0;
  }
  const at::Tensor what = fake_quant_weight(linear, at::kFloat);
  const at::Tensor upstream = normal({kOut, kIn}, 9);
  what.backward(upstream);
  const auto words = student_signs(linear);
  for (int64_t r = 0; r < kOut; ++r) {
    for (int64_t c = 0; c < kIn; ++c) {
      double sum = 0.0;
      for (int64_t i = 0; i < 3; ++i) {
        const bool positive = !(linear.latent[i][r][c].item<float>() < 0.0F);
        const size_t word = static_cast<size_t>((i * kOut + r) * 2 + c / 32);
        ASSERT_EQ((words[word] >> (c % 32) & 1U) != 0U, positive);
        sum +=
            (positive ? 1.0 : -1.0) * linear.g[i][r].item<double>() * linear.h[i][c].item<double>();
      }
      ASSERT_NEAR(what[r][c].item<double>(), sum, 1e-6);
    }
  }
  // Straight through for every latent; each path's scales by its own signs.
  const at::Tensor signs = at::where(linear.latent.detach() < 0, -1.0, 1.0).to(at::kFloat);
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(at::equal(linear.latent.grad()[i], upstream));
    const at::Tensor signed_grad = upstream * signs[i];
    EXPECT_TRUE(
        at::allclose(linear.g.grad()[i], at::mv(signed_grad, linear.h.detach()[i]), 1e-4, 1e-5));
    EXPECT_TRUE(at::allclose(linear.h.grad()[i], at::mv(signed_grad.t(), linear.g.detach()[i]),
                             1e-4, 1e-5));
  }
}

TEST(Methods, MbokTrainsTheLastLatentAndAllScales) {
  const StudentLinear linear = start_of(Method::kMbok, 3);
  const at::Tensor upstream = normal({kOut, kIn}, 9);
  fake_quant_weight(linear, at::kFloat).backward(upstream);
  EXPECT_EQ(linear.latent.grad()[0].abs().max().item<float>(), 0.0F);
  EXPECT_EQ(linear.latent.grad()[1].abs().max().item<float>(), 0.0F);
  EXPECT_TRUE(at::equal(linear.latent.grad()[2], upstream));
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_GT(linear.g.grad()[i].abs().max().item<float>(), 0.0F);
  }
}

TEST(PathPlans, ParseAndRefuse) {
  const auto paths = [](const char* text, int64_t layer, Role role) {
    const auto plan = PathPlan::parse(text);
    EXPECT_TRUE(plan) << text;
    return plan ? plan->paths(layer, role) : -1;
  };
  EXPECT_EQ(paths("3", 7, Role::kFfnUp), 3);
  EXPECT_EQ(paths("ffn_down=3", 0, Role::kFfnDown), 3);
  EXPECT_EQ(paths("ffn_down=3", 0, Role::kAttnQ), 2);
  EXPECT_EQ(paths("1,attn=4,attn_q=2", 5, Role::kAttnQ), 2);
  EXPECT_EQ(paths("1,attn=4,attn_q=2", 5, Role::kAttnOutput), 4);
  EXPECT_EQ(paths("2,0-3=4,29.attn_v=3", 3, Role::kFfnGate), 4);
  EXPECT_EQ(paths("2,0-3=4,29.attn_v=3", 4, Role::kFfnGate), 2);
  EXPECT_EQ(paths("2,0-3=4,29.attn_v=3", 29, Role::kAttnV), 3);
  EXPECT_EQ(paths("ffn=3,1", 0, Role::kFfnUp), 1) << "the last item wins";
  EXPECT_EQ(PathPlan::parse("2,0-3=4,29.attn_v=3")->last_layer(), 29);
  EXPECT_EQ(PathPlan::parse("2")->last_layer(), -1);
  for (const char* bad :
       {"",        "0",      "5",      "x",        "1.5",      "2,",    ",2",   "attn",
        "attn=",   "attn=0", "attn=5", "=2",       "head=2",   "3-1=2", "-1=2", "1-=2",
        "1-2-3=2", "0x1=2",  "1.=2",   "1.head=2", "999999=2", "2 ,1"}) {
    const auto plan = PathPlan::parse(bad);
    ASSERT_FALSE(plan) << bad;
    EXPECT_NE(plan.error().message.find("--bits"), std::string::npos);
  }
}

class TrainMethods : public TrainRun {
 protected:
  TrainMethods() {
    options_.seq_len = kWindow;
    options_.warm_epochs = 0;
    options_.tokens = 150 * 4 * kWindow;
    options_.latent_lr = 2e-3;
    options_.scale_lr = 1e-3;
    held_out_ = {};
  }

  /// Mean divergence over the last tenth of the steps.
  double trained(const char* name, const QuantizeOptions& options) {
    succeeds(name, options);
    const json steps = log(name)["distill"];
    double sum = 0.0;
    const size_t tail = steps.size() / 10;
    for (size_t i = steps.size() - tail; i < steps.size(); ++i) {
      sum += steps[i]["kl"].get<double>() / static_cast<double>(tail);
    }
    return sum;
  }
};

TEST_F(TrainMethods, CoupledEndsBelowTheOthers) {
  options_.error_feedback = false;
  const double coupled = trained("rabit.gguf", options_);
  for (const auto& [name, method] :
       {std::pair{"standard", Method::kStandard}, std::pair{"mbok", Method::kMbok},
        std::pair{"dbllm", Method::kDbllm}}) {
    options_.method = method;
    const double other = trained((std::string(name) + ".gguf").c_str(), options_);
    EXPECT_LT(coupled, other) << name;
    const auto file = GgufFile::open(path(std::string(name) + ".gguf"));
    EXPECT_EQ(*(*file)->get_string("rabit.method"), name);
  }
  options_.method = Method::kOnebit;
  options_.bits = "1";
  EXPECT_LT(coupled, trained("onebit.gguf", options_));
}

TEST_F(TrainMethods, DbllmHoldsTheColumnScales) {
  options_.method = Method::kDbllm;
  options_.error_feedback = false;
  options_.tokens = 20 * 4 * kWindow;
  succeeds("out.gguf", options_);
  const auto file = GgufFile::open(path("out.gguf"));
  const auto scales = dequantize(*(*file)->find_tensor("blk.1.ffn_up.col_scale"));
  ASSERT_TRUE(scales);
  // Packing moves a power of two between rows and columns, one for a path.
  const size_t columns = scales->size() / 2;
  for (size_t i = 0; i < scales->size(); ++i) {
    EXPECT_EQ((*scales)[i], (*scales)[i / columns * columns]);
  }
}

TEST_F(TrainMethods, EveryKindOfTrainingGoesOnAfterAnInterrupt) {
  options_.tokens = 6 * 4 * kWindow;
  for (const auto& [method, optimizer] :
       {std::pair{Method::kStandard, Optimizer::kMuon}, std::pair{Method::kMbok, Optimizer::kAdamW},
        std::pair{Method::kRabit, Optimizer::kAdamW}}) {
    options_.method = method;
    options_.optimizer = optimizer;
    options_.ema = method == Method::kRabit ? 0.9 : 0.0;
    succeeds("whole.gguf", options_);
    goes_on_to("whole.gguf", "distil", 3 * 4 * kWindow);
  }
}

TEST_F(TrainMethods, TheAverageGivesTheSigns) {
  options_.tokens = 30 * 4 * kWindow;
  options_.latent_lr = 3e-2;  // so that the last steps still turn signs
  succeeds("last.gguf", options_);
  options_.ema = 0.9;
  succeeds("average.gguf", options_);
  const auto signs = [&](const char* name) {
    const auto file = GgufFile::open(path(name));
    const auto data = (*file)->find_tensor("blk.1.ffn_up.sign")->data;
    return std::vector<std::byte>(data.begin(), data.end());
  };
  EXPECT_NE(signs("average.gguf"), signs("last.gguf"));
  // Training itself is not touched by the average.
  EXPECT_EQ(log("average.gguf")["distill"].back()["kl"], log("last.gguf")["distill"].back()["kl"]);
}

TEST_F(TrainMethods, BitsByRoleAndBlock) {
  options_.tokens = 4 * kWindow;
  options_.bits = "2,ffn_down=3,1.attn=1";
  succeeds("out.gguf", options_);
  const auto file = GgufFile::open(path("out.gguf"));
  EXPECT_EQ((*file)->find_tensor("blk.0.ffn_down.sign")->ne.back(), 3);
  EXPECT_EQ((*file)->find_tensor("blk.0.attn_q.row_scale")->ne.back(), 2);
  EXPECT_EQ((*file)->find_tensor("blk.1.attn_q.row_scale")->elements(), 64);
  EXPECT_EQ((*file)->find_meta("rabit.paths"), nullptr);
  fails(
      "no.gguf",
      [&] {
        QuantizeOptions o = options_;
        o.bits = "2,3.attn=1";
        return o;
      }(),
      "names block 3, the model's are 0 to 2");
}

TEST_F(TrainMethods, CombinationsThatAreNone) {
  options_.method = Method::kOnebit;
  fails("no.gguf", options_, "give --bits 1");
  options_.method = Method::kDbllm;
  fails("no.gguf", options_, "--no-error-feedback");
}

}  // namespace
}  // namespace rabit::train
