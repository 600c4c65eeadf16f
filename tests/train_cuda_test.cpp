// The phases on a GPU against the same on the CPU, both in float32. Shown as skipped where there is
// no GPU that torch can use.

#include <ATen/Context.h>

#include <algorithm>
#include <cmath>

#include "train/diagnose.h"
#include "train_run.h"

namespace rabit::train {
namespace {

class TrainCuda : public TrainRun {
 protected:
  void SetUp() override {
    if (!at::globalContext().hasCUDA()) {
      GTEST_SKIP() << "no GPU that torch can use";
    }
  }

  /// The log of a run on each device.
  std::pair<json, json> on_both(QuantizeOptions options) {
    options.device = "cpu";
    succeeds("cpu.gguf", options);
    options.device = "cuda";
    succeeds("cuda.gguf", options);
    return {log("cpu.gguf"), log("cuda.gguf")};
  }
};

void expect_near(const json& got, const json& wanted, double share, const std::string& what) {
  EXPECT_NEAR(got.get<double>(), wanted.get<double>(), share * std::abs(wanted.get<double>()))
      << what;
}

TEST_F(TrainCuda, EveryPhaseGivesWhatTheCpuGives) {
  for (const Method method : {Method::kRabit, Method::kStandard, Method::kMbok}) {
    options_.method = method;
    const auto [cpu, cuda] = on_both(options_);
    const json &blocks = cpu["warm_start"], &steps = cpu["distill"];
    ASSERT_EQ(blocks.size(), cuda["warm_start"].size());
    ASSERT_EQ(steps.size(), cuda["distill"].size());
    // Later ones start from signs that sums in another order may have turned.
    for (size_t i = 0; i < blocks[0]["fit_errors"].size(); ++i) {
      expect_near(cuda["warm_start"][0]["fit_errors"][i], blocks[0]["fit_errors"][i], 0.02,
                  "fit error " + std::to_string(i));
    }
    expect_near(cuda["warm_start"][0]["loss_first"], blocks[0]["loss_first"], 0.02, "warm start");
    for (size_t i = 0; i < blocks.size(); ++i) {
      expect_near(cuda["warm_start"][i]["output_error"], blocks[i]["output_error"], 0.1,
                  "block " + std::to_string(i));
    }
    for (size_t i : {size_t{0}, steps.size() - 1}) {
      expect_near(cuda["distill"][i]["loss"], steps[i]["loss"], 0.25, "distillation");
    }
    const auto cross_entropy = [](const json& log, const char* of) -> json {
      return std::log(log["perplexity"][of]["perplexity"].get<double>());
    };
    expect_near(cross_entropy(cuda, "teacher"), cross_entropy(cpu, "teacher"), 1e-5, "teacher");
    // Error feedback amplifies a rounding into another student; each must be what it was measured
    // as.
    expect_near(std::log(engine_perplexity(path("cuda.gguf"), held_out_)),
                cross_entropy(cuda, "student"), 3e-3, "student");
  }
}

TEST_F(TrainCuda, EveryKindOfTrainingRuns) {
  options_.ema = 0.9;
  options_.train_norms = true;
  options_.gamma = 0.3;
  options_.reverse_kl = 0.5;
  options_.cross_entropy = 0.2;
  options_.temperature = 2.0;
  for (const GammaOn where : {GammaOn::kBlocks, GammaOn::kLayers}) {
    options_.gamma_on = where;
    const auto [cpu, cuda] = on_both(options_);
    expect_near(cuda["distill"].back()["loss"], cpu["distill"].back()["loss"], 0.1, "loss");
  }
}

// What bf16 alone goes through: the fused operations, against float32 on the CPU.
TEST_F(TrainCuda, FusedOperationsInBf16GiveWhatFloatsGive) {
  options_.error_feedback = false;
  options_.warm_epochs = 0;
  options_.train_norms = true;
  options_.cross_entropy = 0.2;
  options_.device = "cpu";
  succeeds("cpu.gguf", options_);
  const json want = log("cpu.gguf");
  options_.device = "cuda";
  options_.compute = Compute::kBF16;
  for (const bool recompute : {false, true}) {
    for (const int64_t micro_batch : {0, 1}) {
      for (const MomentumType momentum : {MomentumType::kF32, MomentumType::kBF16}) {
        options_.recompute = recompute;
        options_.micro_batch = micro_batch;
        options_.momentum = momentum;
        succeeds("cuda.gguf", options_);
        const json got = log("cuda.gguf");
        expect_near(got["distill"][0]["loss"], want["distill"][0]["loss"], 0.02, "first");
        expect_near(got["distill"][0]["scale_grad_norm"], want["distill"][0]["scale_grad_norm"],
                    0.05, "gradient");
        expect_near(got["distill"].back()["loss"], want["distill"].back()["loss"], 0.1, "last");
      }
    }
  }
}

TEST_F(TrainCuda, SensitivitiesInBf16AreThoseOfFloats) {
  options_.warm_epochs = 0;
  options_.tokens = 0;
  options_.target_bpw = 3.6;
  options_.device = "cpu";
  succeeds("cpu.gguf", options_);
  options_.device = "cuda";
  options_.compute = Compute::kBF16;
  succeeds("cuda.gguf", options_);
  const json want = log("cpu.gguf")["searched"]["sensitivity"],
             got = log("cuda.gguf")["searched"]["sensitivity"];
  for (size_t i = 0; i < want.size(); ++i) {
    expect_near(got[i]["divergences"][0], want[i]["divergences"][0], 0.3, want[i]["layer"]);
  }
}

TEST_F(TrainCuda, CountsTheSignsThatTurn) {
  options_.device = "cuda";
  std::vector<double> shares;
  TrainObserver observer;
  observer.metrics = [&](const json& line) {
    if (line["phase"] == "distill") {
      shares.push_back(line["signs_turned"]);
    }
  };
  succeeds("out.gguf", options_, observer);
  ASSERT_EQ(shares.size(), 6U);
  EXPECT_GT(*std::max_element(shares.begin(), shares.end()), 0.0);
  EXPECT_LT(*std::max_element(shares.begin(), shares.end()), 0.2);
}

TEST_F(TrainCuda, DistillationWithoutAStartThatMayDiffer) {
  options_.error_feedback = false;
  options_.warm_epochs = 0;
  for (const auto& [method, bits] :
       {std::pair{Method::kRabit, "2"}, std::pair{Method::kRabit, "4"},
        std::pair{Method::kDbllm, "2"}, std::pair{Method::kOnebit, "1"}}) {
    options_.method = method;
    options_.bits = bits;
    const auto [cpu, cuda] = on_both(options_);
    expect_near(cuda["distill"][0]["loss"], cpu["distill"][0]["loss"], 1e-3, bits);
    const auto lost = [](const json& log) -> json {
      const json& perplexity = log["perplexity"];
      return std::log(perplexity["student"]["perplexity"].get<double>() /
                      perplexity["teacher"]["perplexity"].get<double>());
    };
    expect_near(lost(cuda), lost(cpu), 0.02, std::string("at the end, ") + bits);
  }
}

TEST_F(TrainCuda, InterruptedAndResumed) {
  options_.device = "cuda";
  succeeds("whole.gguf", options_);
  interrupted_run("part.gguf", options_, interrupt_at("distil", 3 * 4 * kWindow), true);
  options_.resume = true;
  succeeds("part.gguf", options_);
  const json whole = log("whole.gguf")["distill"], part = log("part.gguf")["distill"];
  ASSERT_EQ(part.size(), whole.size());
  expect_near(part.back()["loss"], whole.back()["loss"], 0.1, "loss");
}

TEST_F(TrainCuda, SearchesFindWhatTheCpuFinds) {
  options_.warm_epochs = 0;
  options_.tokens = 0;
  options_.target_bpw = 3.6;
  const auto [cpu, cuda] = on_both(options_);
  const json &ours = cuda["searched"]["sensitivity"], &theirs = cpu["searched"]["sensitivity"];
  ASSERT_EQ(ours.size(), theirs.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    EXPECT_EQ(ours[i]["layer"], theirs[i]["layer"]);
    expect_near(ours[i]["divergences"][0], theirs[i]["divergences"][0], 0.05, ours[i]["layer"]);
  }
  options_.target_bpw = 0;
  options_.error_feedback = false;
  options_.alpha_search = true;
  const auto [by_cpu, by_cuda] = on_both(options_);
  EXPECT_EQ(by_cuda["searched"]["alpha_in"], by_cpu["searched"]["alpha_in"]);
}

TEST_F(TrainCuda, DiagnosesWhatTheCpuDiagnoses) {
  options_.tokens = 0;
  succeeds("out.gguf", options_);
  const auto student = GgufFile::open(path("out.gguf"));
  ASSERT_TRUE(student);
  DiagnoseOptions options;
  options.threads = 1;
  options.compute = Compute::kF32;
  options.seq_len = kWindow;
  const auto diagnosis = [&](const char* device) {
    options.device = device;
    return diagnose_file(**student, *model_, tokens_, options, [](int64_t, int64_t) {});
  };
  const auto cpu = diagnosis("cpu"), cuda = diagnosis("cuda");
  ASSERT_TRUE(cpu) << cpu.error().message;
  ASSERT_TRUE(cuda) << cuda.error().message;
  ASSERT_EQ((*cpu)["layers"].size(), (*cuda)["layers"].size());
  for (size_t i = 0; i < (*cpu)["layers"].size(); ++i) {
    const json &ours = (*cuda)["layers"][i], &theirs = (*cpu)["layers"][i];
    for (const char* figure : {"path_correlation", "weight_error", "output_error"}) {
      EXPECT_NEAR(ours[figure].get<double>(), theirs[figure].get<double>(), 1e-3) << figure;
    }
  }
}

}  // namespace
}  // namespace rabit::train
