// The methods: how each derives its signs, what it trains and what it holds, and that the coupled
// one ends below the others on a tiny model.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstring>

#include "io/dequant.h"
#include "random_tensors.h"
#include "train/diagnose.h"
#include "train/fake_quant.h"
#include "train/host_tensor.h"
#include "train_run.h"

namespace rabit::train {
namespace {

constexpr int64_t kOut = 20, kIn = 45;

StudentLinear start_of(Method method, int64_t paths) {
  at::Tensor g = normal({paths, kOut}, 1).abs() * 0.01 + 0.08;
  for (int64_t i = 0; i < paths; ++i) {
    g[i] *= std::ldexp(1.0, -static_cast<int>(i));
  }
  const at::Tensor h = normal({paths, kIn}, 2).abs() * 0.1 + 1.0;
  return make_student_linear(method, normal({kOut, kIn}, 3) * 0.1, g, h, at::kCPU);
}

TEST(Methods, AllStartFromTheSameWeight) {
  for (const int64_t paths : {1, 2, 3, 4}) {
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
  /// Packed signs of one layer of a file.
  std::vector<std::byte> signs(const char* name) const {
    const auto file = GgufFile::open(path(name));
    const auto data = (*file)->find_tensor("blk.1.ffn_up.sign")->data;
    return {data.begin(), data.end()};
  }

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
      sum += steps[i]["loss"].get<double>() / static_cast<double>(tail);
    }
    return sum;
  }
};

TEST_F(TrainMethods, CoupledEndsBelowTheOthers) {
  options_.error_feedback = false;
  const auto mean = [&](const std::string& name) {  // over windows in several orders
    constexpr int kSeeds = 3;
    double sum = 0.0;
    for (options_.seed = 1; options_.seed <= kSeeds; ++options_.seed) {
      sum += trained((name + ".gguf").c_str(), options_);
    }
    return sum / kSeeds;
  };
  const double coupled = mean("rabit");
  for (const auto& [name, method] :
       {std::pair{"standard", Method::kStandard}, std::pair{"mbok", Method::kMbok},
        std::pair{"dbllm", Method::kDbllm}}) {
    options_.method = method;
    EXPECT_LT(coupled, mean(name)) << name;
    const auto file = GgufFile::open(path(std::string(name) + ".gguf"));
    EXPECT_EQ(*(*file)->get_string("rabit.method"), name);
  }
  options_.method = Method::kOnebit;
  options_.bits = "1";
  EXPECT_LT(coupled, mean("onebit"));
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

TEST_F(TrainMethods, RecomputedBlocksGiveTheVerySameFile) {
  options_.train_norms = true;
  options_.tokens = 10 * 4 * kWindow;
  const auto both = [&] {
    options_.recompute = false;
    succeeds("kept.gguf", options_);
    options_.recompute = true;
    succeeds("again.gguf", options_);
    return std::pair{log("kept.gguf")["distill"], log("again.gguf")["distill"]};
  };
  const auto tensors = [&](const char* name) {
    const auto file = GgufFile::open(path(name));
    EXPECT_TRUE(file);
    std::string all;
    for (const TensorInfo& tensor : (*file)->tensors()) {
      all.append(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
    }
    return all;
  };
  (void)both();
  EXPECT_TRUE(tensors("kept.gguf") == tensors("again.gguf"));
  // What --gamma adds to a block's output is added to its gradient in another place.
  options_.gamma = 0.5;
  const auto [kept, again] = both();
  EXPECT_EQ(kept[0]["gamma_error"], again[0]["gamma_error"]);
  const double norm = kept[0]["scale_grad_norm"];
  EXPECT_NEAR(again[0]["scale_grad_norm"].get<double>(), norm, 1e-6 * norm);
  options_.gamma_on = GammaOn::kLayers;
  fails("layers.gguf", options_, "--recompute keeps no outputs of layers");
}

TEST_F(TrainMethods, StepsInPartsAreTheSameSteps) {
  options_.gamma = 0.5;
  options_.cross_entropy = 0.2;
  const auto losses = [&](const char* name) {
    succeeds(name, options_);
    std::vector<double> out;
    const json steps = log(name)["distill"];
    for (const json& step : steps) {
      out.insert(out.end(),
                 {step["loss"].get<double>(), step["text_nll"].get<double>(),
                  step["gamma_error"].get<double>(), step["scale_grad_norm"].get<double>()});
    }
    return out;
  };
  const std::vector<double> whole = losses("whole.gguf");
  for (const int64_t micro_batch : {1, 3}) {  // of 4
    options_.micro_batch = micro_batch;
    const std::vector<double> parts = losses("parts.gguf");
    ASSERT_EQ(parts.size(), whole.size());
    for (size_t i = 0; i < 4; ++i) {  // the first step: rounding alone
      EXPECT_NEAR(parts[i], whole[i], 1e-5 * whole[i]) << i;
    }
    EXPECT_NE(parts, whole) << "nothing was done in parts";
    // Later ones: a rounding turns a sign here and there.
    EXPECT_NEAR(parts[parts.size() - 4], whole[whole.size() - 4], 0.1 * whole[whole.size() - 4]);
  }
}

TEST_F(TrainMethods, TheAverageGivesTheSigns) {
  options_.tokens = 30 * 4 * kWindow;
  options_.latent_lr = 3e-2;  // so that the last steps still turn signs
  succeeds("last.gguf", options_);
  options_.ema = 0.9;
  succeeds("average.gguf", options_);
  EXPECT_NE(signs("average.gguf"), signs("last.gguf"));
  // Training itself is not touched by the average.
  EXPECT_EQ(log("average.gguf")["distill"].back()["loss"],
            log("last.gguf")["distill"].back()["loss"]);
}

// Step s takes the average towards the new latents by 1 - min(ema, (1 + s) / (10 + s)).
TEST_F(TrainMethods, TheAverageFollowsItsRecurrence) {
  options_.tokens = 6 * 4 * kWindow;
  options_.latent_lr = 1e-2;
  options_.ema = 0.35;  // reached in the fifth step: both branches count
  std::vector<float> average;
  for (int64_t steps = 1; steps < 6; ++steps) {
    interrupted_run("out.gguf", options_, interrupt_at("distil", steps * 4 * kWindow), true);
    const auto file = GgufFile::open(path("out.gguf.ckpt"));
    ASSERT_TRUE(file);
    const auto read = [&](const char* part) {
      return *dequantize(*(*file)->find_tensor(std::string("blk.1.ffn_up.") + part));
    };
    const std::vector<float> latent = read("latent"), now = read("average");
    const auto s = static_cast<double>(steps - 1);
    const double decay = std::min(0.35, (1.0 + s) / (10.0 + s));
    double moved = 0.0;
    for (size_t i = 0; i < average.size(); ++i) {
      ASSERT_NEAR(now[i], average[i] + (latent[i] - average[i]) * (1.0 - decay), 1e-6) << steps;
      moved = std::max(moved, static_cast<double>(std::fabs(now[i] - average[i])));
    }
    EXPECT_TRUE(average.empty() || moved > 1e-4);
    average = now;
    std::filesystem::remove(path("out.gguf.ckpt"));
  }
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

std::vector<float> values_of(const GgufFile& file, const std::string& name) {
  const auto values = dequantize(*file.find_tensor(name));
  EXPECT_TRUE(values) << name;
  return values ? *values : std::vector<float>();
}

TEST_F(TrainMethods, NormsAreTrainedAndPacked) {
  options_.tokens = 20 * 4 * kWindow;
  options_.scale_lr = 1e-2;
  held_out_ = {random_tokens(4 * kWindow, 3, kSizes.vocab), kWindow};
  succeeds("still.gguf", options_);
  options_.train_norms = true;
  succeeds("trained.gguf", options_);
  const auto still = GgufFile::open(path("still.gguf")),
             trained = GgufFile::open(path("trained.gguf"));
  for (const char* name :
       {"blk.0.attn_norm.weight", "blk.2.ffn_norm.weight", "output_norm.weight"}) {
    EXPECT_EQ(values_of(**still, name), values_of(*model_, name));
    EXPECT_NE(values_of(**trained, name), values_of(*model_, name));
  }
  goes_on_to("trained.gguf", "distil", 9 * 4 * kWindow);
  EXPECT_NE(values_of(**trained, "blk.1.attn_norm.weight"),
            values_of(**trained, "blk.1.ffn_norm.weight"));
}

TEST_F(TrainMethods, GammaBringsTheLayersOutputsCloser) {
  options_.tokens = 60 * 4 * kWindow;
  const auto error = [&](const char* name) {
    succeeds(name, options_);
    return log(name)["diagnostics"]["summary"]["output_error"]["median"].get<double>();
  };
  const double without = error("none.gguf");
  options_.gamma = 30.0;
  EXPECT_LT(error("blocks.gguf"), without);
  options_.gamma_on = GammaOn::kLayers;
  EXPECT_LT(error("layers.gguf"), without);
}

// What --gamma counts in the first step, by its definition from the student that it began with.
TEST_F(TrainMethods, GammaCountsTheNormalisedErrors) {
  options_.tokens = 4 * kWindow;
  options_.gamma = 0.3;
  for (const GammaOn on : {GammaOn::kBlocks, GammaOn::kLayers}) {
    options_.gamma_on = on;
    interrupted_run("out.gguf", options_, interrupt_at("checkpoint: ", 0), true);
    const Network teacher = *load_network(*model_, at::kCPU, at::kFloat);
    const auto file = GgufFile::open(path("out.gguf.ckpt"));
    const auto begun = student_of_checkpoint(**file, teacher.config, *sha256_file(model_->path()));
    ASSERT_TRUE(begun) << begun.error().message;
    std::filesystem::remove(path("out.gguf.ckpt"));
    succeeds("out.gguf", options_);

    struct Seen : LinearTap {
      std::vector<at::Tensor> outputs;
      void see(Role, const at::Tensor&, const at::Tensor& y) override { outputs.push_back(y); }
    };
    const at::NoGradGuard no_grad;
    const auto windows = TextWindows::cut(text_, {}, kWindow, kSizes.vocab, 1);
    ASSERT_TRUE(windows);
    const at::Tensor ids = windows->pick(WindowOrder(windows->count(), 7920).batch(0, 4));
    const Rotary rotary = make_rotary(teacher.config, kWindow, at::kCPU);
    at::Tensor x = embed(teacher, ids), y = x;
    double sum = 0.0;
    int64_t places = 0;
    const auto add = [&](const at::Tensor& of_student, const at::Tensor& of_teacher) {
      const at::Tensor t = of_teacher.to(at::kDouble), s = of_student.to(at::kDouble);
      sum += ((s - t).square().sum(-1) / t.square().sum(-1)).mean().item<double>();
      ++places;
    };
    for (size_t b = 0; b < teacher.blocks.size(); ++b) {
      Seen of_student, of_teacher;
      x = block_forward(teacher.config,
                        student_weights(begun->student.blocks[b], teacher.blocks[b], at::kFloat),
                        rotary, x, at::kFloat, &of_student);
      y = block_forward(teacher.config, teacher.blocks[b], rotary, y, at::kFloat, &of_teacher);
      if (on == GammaOn::kBlocks) {
        add(x, y);
      } else {
        for (size_t i = 0; i < kRoleCount; ++i) {
          add(of_student.outputs[i], of_teacher.outputs[i]);
        }
      }
    }
    const double logged = log("out.gguf")["distill"][0]["gamma_error"].get<double>();
    EXPECT_NEAR(logged, sum / static_cast<double>(places), 1e-5 * logged);
    EXPECT_GT(logged, 1e-3);
    std::filesystem::remove(path("out.gguf"));
    std::filesystem::remove(path("out.gguf.json"));
  }
}

// Path moments of the first projection, whose inputs are the same for teacher and student, by the
// definitions: y = W x, y_i = g_i * (B_i (h_i * x)) in double.
TEST_F(TrainMethods, DiagnosisOfAPackedFileIsWhatItSays) {
  options_.tokens = 10 * 4 * kWindow;
  options_.bits = "2,ffn_down=1";
  succeeds("out.gguf", options_);
  const auto packed = GgufFile::open(path("out.gguf"));
  const std::vector<int32_t> tokens = random_tokens(3 * kWindow + 5, 9, kSizes.vocab);
  DiagnoseOptions diagnose;
  diagnose.seq_len = kWindow;
  diagnose.threads = 1;
  diagnose.compute = Compute::kF32;
  const auto found = diagnose_file(**packed, *model_, tokens, diagnose, [](int64_t, int64_t) {});
  ASSERT_TRUE(found) << found.error().message;
  EXPECT_EQ((*found)["tokens"], 3 * kWindow);
  EXPECT_EQ((*found)["layers"].size(), 21U);

  const int64_t width = kSizes.width;
  const at::Tensor w = to_tensor(values_of(*model_, "blk.0.attn_q.weight"), {width, width});
  const at::Tensor g = to_tensor(values_of(**packed, "blk.0.attn_q.row_scale"), {2, width});
  const at::Tensor h = to_tensor(values_of(**packed, "blk.0.attn_q.col_scale"), {2, width});
  const TensorInfo* sign = (*packed)->find_tensor("blk.0.attn_q.sign");
  std::vector<uint32_t> signs(sign->data.size() / 4);
  std::memcpy(signs.data(), sign->data.data(), sign->data.size());
  const auto network = load_network(*model_, at::kCPU, at::kFloat);
  at::Tensor ids = at::empty({3, kWindow}, at::kLong);
  std::copy(tokens.begin(), tokens.begin() + 3 * kWindow, ids.mutable_data_ptr<int64_t>());
  const at::Tensor x =
      norm(network->config, embed(*network, ids), network->blocks[0].attn_norm, at::kFloat)
          .flatten(0, 1)
          .to(at::kDouble);
  const at::Tensor y = at::matmul(x, w.to(at::kDouble).t());
  std::vector<at::Tensor> paths;
  at::Tensor what = at::zeros_like(w);
  for (int64_t i = 0; i < 2; ++i) {
    at::Tensor path = at::outer(g[i], h[i]);
    for (int64_t r = 0; r < width; ++r) {
      for (int64_t c = 0; c < width; ++c) {
        const size_t word = static_cast<size_t>((i * width + r) * (width / 32) + c / 32);
        if ((signs[word] >> (c % 32) & 1U) == 0U) {
          path[r][c] *= -1;
        }
      }
    }
    what += path;
    paths.push_back(at::matmul(x, path.to(at::kDouble).t()));
  }
  const auto correlation = [](const at::Tensor& a, const at::Tensor& b) {
    const at::Tensor da = a - a.mean(), db = b - b.mean();
    return ((da * db).sum() / (da.norm() * db.norm())).item<double>();
  };
  const auto share = [](const at::Tensor& a, const at::Tensor& b) {
    return (a.square().sum() / b.square().sum()).item<double>();
  };
  const json& layer = (*found)["layers"][0];
  EXPECT_EQ(layer["layer"], "blk.0.attn_q");
  EXPECT_NEAR(layer["path_correlation"].get<double>(), correlation(paths[0], paths[1]), 1e-5);
  EXPECT_NEAR(layer["residual_alignment"].get<double>(), correlation(y - paths[0], paths[1]), 1e-5);
  EXPECT_NEAR(layer["output_error"].get<double>(), share(y - paths[0] - paths[1], y), 1e-5);
  EXPECT_NEAR(layer["own_error"].get<double>(), layer["output_error"].get<double>(), 1e-9);
  EXPECT_NEAR(layer["running_alignment"].get<double>(), layer["residual_alignment"].get<double>(),
              1e-9);
  EXPECT_NEAR(layer["weight_error"].get<double>(), share(w - what, w), 1e-5);
  EXPECT_EQ((*found)["layers"][6]["path_correlation"], nullptr) << "one path correlates with none";
  // Deeper, the student's inputs are its own.
  EXPECT_NE((*found)["layers"][20]["own_error"], (*found)["layers"][20]["output_error"]);

  // What the run says of its own student are the same layers, up to the rounding of the scales.
  const json own = log("out.gguf")["diagnostics"];
  for (size_t i = 0; i < 21; ++i) {
    EXPECT_EQ(own["layers"][i]["layer"], (*found)["layers"][i]["layer"]);
    EXPECT_NEAR(own["layers"][i]["weight_error"].get<double>(),
                (*found)["layers"][i]["weight_error"].get<double>(), 1e-3);
    const auto turned = own["layers"][i]["turned_signs"],
               noted = (*found)["layers"][i]["turned_signs"];
    ASSERT_EQ(turned.size(), noted.size());
    for (size_t p = 0; p < turned.size(); ++p) {
      EXPECT_NEAR(turned[p].get<double>(), noted[p].get<double>(), 1e-6);
    }
  }
}

TEST_F(TrainMethods, DiagnosisOfACheckpointIsThatOfItsStudent) {
  options_.tokens = 10 * 4 * kWindow;
  options_.train_norms = true;
  interrupted_run("out.gguf", options_, interrupt_at("distil", 5 * 4 * kWindow), true);
  const auto checkpoint = GgufFile::open(path("out.gguf.ckpt"));
  const std::vector<int32_t> tokens = random_tokens(3 * kWindow, 9, kSizes.vocab);
  DiagnoseOptions diagnose;
  diagnose.seq_len = kWindow;
  diagnose.threads = 1;
  diagnose.compute = Compute::kF32;
  const auto of = [&](const GgufFile& file) {
    auto found = diagnose_file(file, *model_, tokens, diagnose, [](int64_t, int64_t) {});
    EXPECT_TRUE(found) << found.error().message;
    return found ? *found : json();
  };
  const json saved = of(**checkpoint);
  EXPECT_EQ(saved["blocks"], 3);
  double turned = 0.0;
  for (const json& layer : saved["layers"]) {
    turned += layer["turned_signs"][1].get<double>();
  }
  EXPECT_GT(turned, 0.0);
  // The run ends where it was interrupted, so to say: no step is left, and its file is that
  // student.
  QuantizeOptions rest = options_;
  rest.resume = true;
  rest.tokens = 5 * 4 * kWindow;
  succeeds("out.gguf", rest);
  const json packed = of(**GgufFile::open(path("out.gguf")));
  for (size_t i = 0; i < 21; ++i) {
    for (const char* key : {"path_correlation", "residual_alignment", "output_error"}) {
      EXPECT_NEAR(saved["layers"][i][key].get<double>(), packed["layers"][i][key].get<double>(),
                  5e-3)
          << i << key;
    }
  }
  // Another teacher is refused.
  write_model(SmallModel(2, true, 0, kSizes));
  const auto other =
      diagnose_file(**GgufFile::open(path("out.gguf")), *model_, tokens, diagnose, {});
  ASSERT_FALSE(other);
  EXPECT_NE(other.error().message.find("another model"), std::string::npos);
  const auto plain = diagnose_file(*model_, *model_, tokens, diagnose, {});
  ASSERT_FALSE(plain);
  EXPECT_NE(plain.error().message.find("is not packed"), std::string::npos);
}

TEST_F(TrainMethods, NothingIsTurnedWithoutTraining) {
  options_.tokens = 0;
  succeeds("out.gguf", options_);
  for (const json& layer : log("out.gguf")["diagnostics"]["layers"]) {
    EXPECT_EQ(layer["turned_signs"], json::array({0.0, 0.0}));
  }
}

TEST_F(TrainMethods, BitsGoWhereTheyHelp) {
  options_.tokens = 0;
  succeeds("base.gguf", options_);
  const double base = log("base.gguf")["bits_per_weight"].get<double>();
  options_.target_bpw = base * 1.25;
  succeeds("mixed.gguf", options_);
  const json mixed = log("mixed.gguf");
  const auto bits = mixed["bits_per_weight"].get<double>();
  EXPECT_LE(bits, options_.target_bpw);
  EXPECT_GT(bits, base * 1.2) << "the target is nearly spent";
  const auto file = GgufFile::open(path("mixed.gguf"));
  // The plan again from what was measured: one step at a time, the most divergence for a bit.
  struct Layer {
    std::vector<double> divergences;
    double weights;
    double extra;  // bits of a path more
    int64_t more = 0;
    int64_t packed;
  };
  std::vector<Layer> layers;
  double used = 0.0, weights = 0.0;
  for (const json& layer : mixed["searched"]["sensitivity"]) {
    const TensorInfo* sign = (*file)->find_tensor(layer["layer"].get<std::string>() + ".sign");
    const TensorInfo* columns =
        (*file)->find_tensor(layer["layer"].get<std::string>() + ".col_scale");
    const auto d_out = static_cast<double>(sign->ne[1]), d_in = static_cast<double>(columns->ne[0]);
    layers.push_back({layer["divergences"].get<std::vector<double>>(), d_out * d_in,
                      d_out * d_in + 16.0 * (d_out + d_in), 0, sign->ne[2] - 2});
    ASSERT_EQ(layers.back().divergences.size(), 3U);
    EXPECT_GT(layers.back().divergences[0], 0.0);
    used += 2.0 * layers.back().extra;
    weights += d_out * d_in;
  }
  while (true) {
    double best = 0.0;
    Layer* chosen = nullptr;
    int64_t by = 0;
    for (Layer& layer : layers) {
      for (int64_t more = 1; layer.more + more <= 2; ++more) {
        const double cost = static_cast<double>(more) * layer.extra;
        const auto now = static_cast<size_t>(layer.more),
                   then = static_cast<size_t>(layer.more + more);
        const double worth = (layer.divergences[now] - layer.divergences[then]) / cost;
        if (worth > best && used + cost <= options_.target_bpw * weights) {
          best = worth;
          chosen = &layer;
          by = more;
        }
      }
    }
    if (chosen == nullptr) {
      break;
    }
    chosen->more += by;
    used += static_cast<double>(by) * chosen->extra;
  }
  int64_t more = 0;
  for (const Layer& layer : layers) {
    EXPECT_EQ(layer.packed, layer.more);
    more += layer.more;
  }
  EXPECT_GT(more, 0);
  EXPECT_EQ(PathPlan::parse(mixed["searched"]["bits"])->text(), mixed["searched"]["bits"]);
  // A continuation keeps what was found.
  options_.tokens = 6 * 4 * kWindow;
  succeeds("whole.gguf", options_);
  goes_on_to("whole.gguf", "distil", 3 * 4 * kWindow);
  options_.target_bpw = 1.0;
  fails("no.gguf", options_, "--target-bpw 1");
}

TEST_F(TrainMethods, ExponentsAreSearched) {
  options_.error_feedback = false;
  options_.alpha_search = true;
  options_.tokens = 6 * 4 * kWindow;
  succeeds("whole.gguf", options_);
  const json found = log("whole.gguf")["searched"];
  double least = 1e30;
  for (const json& tried : found["alphas_tried"]) {
    least = std::min(least, tried["divergence"].get<double>());
  }
  EXPECT_GE(found["alphas_tried"].size(), 8U);
  for (const json& tried : found["alphas_tried"]) {
    const bool taken =
        tried["alpha_in"] == found["alpha_in"] && tried["alpha_out"] == found["alpha_out"];
    EXPECT_EQ(taken, tried["divergence"].get<double>() == least);
  }
  goes_on_to("whole.gguf", "distil", 3 * 4 * kWindow);
  // What is found is what the options say when given by hand.
  QuantizeOptions by_hand = options_;
  by_hand.alpha_search = false;
  by_hand.alpha_in = found["alpha_in"];
  by_hand.alpha_out = found["alpha_out"];
  succeeds("by_hand.gguf", by_hand);
  EXPECT_EQ(signs("whole.gguf"), signs("by_hand.gguf"));
}

TEST(Settings, ComeBackFromTheirDescription) {
  QuantizeOptions options;
  options.method = Method::kMbok;
  options.bits = "3,ffn=2";
  options.ema = 0.5;
  options.train_norms = true;
  options.seed = 9;
  const auto back = from_description(describe(options));
  ASSERT_TRUE(back);
  EXPECT_EQ(describe(*back), describe(options));
  EXPECT_EQ(arguments_of(options),
            " --method mbok --bits 3,ffn=2 --seed 9 --ema 0.5 --train-norms");
  EXPECT_EQ(arguments_of({}), "");
  for (const auto& [key, wrong] :
       {std::pair{"method", json("x")}, std::pair{"method", json(1)}, std::pair{"bits", json(2)},
        std::pair{"seed", json("1")}, std::pair{"seed", json(-1)}, std::pair{"ema", json("x")},
        std::pair{"ema", json(2)}, std::pair{"train_norms", json(1)}}) {
    json description = describe(options);
    description[key] = wrong;
    EXPECT_FALSE(from_description(description)) << key << wrong;
  }
}

TEST_F(TrainMethods, CombinationsThatAreNone) {
  options_.method = Method::kOnebit;
  fails("no.gguf", options_, "give --bits 1");
  options_.method = Method::kDbllm;
  fails("no.gguf", options_, "--no-error-feedback");
}

}  // namespace
}  // namespace rabit::train
