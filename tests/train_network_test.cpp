// The decoder in torch against a forward pass in double and against the packed runtime's engine;
// the start of a block's student, and the importances it may use.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>

#include "rabit/engine.h"
#include "tiny_model.h"
#include "train/host_tensor.h"
#include "train/layer_fit.h"
#include "train/session.h"
#include "train/torch_logits.h"

namespace rabit::train {
namespace {

class TrainNetwork : public testing::Test {
 protected:
  TrainNetwork()
      : folder_(std::filesystem::temp_directory_path() /
                ("rabit_train_network_" + std::to_string(::getpid()) + "_" +
                 testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::filesystem::create_directories(folder_);
  }
  ~TrainNetwork() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path write(const SmallModel& small) const {
    small.write(folder_ / "model.gguf");
    return folder_ / "model.gguf";
  }

  static Network load(const std::filesystem::path& path) {
    const auto file = GgufFile::open(path);
    EXPECT_TRUE(file);
    auto network = load_network(**file, at::kCPU, at::kFloat);
    EXPECT_TRUE(network) << (network ? "" : network.error().message);
    return std::move(network).value();
  }

  std::filesystem::path folder_;
};

at::Tensor ids_of(const std::vector<int32_t>& tokens, int64_t sequences) {
  at::Tensor ids = at::empty({static_cast<int64_t>(tokens.size())}, at::kLong);
  std::copy(tokens.begin(), tokens.end(), ids.mutable_data_ptr<int64_t>());
  return ids.view({sequences, -1});
}

// The tokens as windows, in their order.
TextWindows cut(std::vector<int32_t> tokens, int64_t length, int64_t vocab) {
  auto windows = TextWindows::cut({{source_of(std::move(tokens), "text.txt", "")}}, {}, length,
                                  vocab, std::nullopt);
  EXPECT_TRUE(windows);
  return std::move(*windows);
}

at::Tensor logits_of(const Network& network, const at::Tensor& ids) {
  const at::NoGradGuard no_grad;
  const Rotary rotary = make_rotary(network.config, ids.size(1), at::kCPU);
  at::Tensor x = embed(network, ids);
  for (const auto& block : network.blocks) {
    x = block_forward(network.config, block, rotary, x, at::kFloat);
  }
  return at::matmul(norm(network.config, x, network.output_norm, at::kFloat), network.head.t());
}

TEST_F(TrainNetwork, EqualsForwardInDouble) {
  for (const int64_t kv_heads : {1, 2, 4}) {
    TinySizes sizes;
    sizes.kv_heads = kv_heads;
    const SmallModel small(3, kv_heads == 2, 0, sizes);
    const Network network = load(write(small));
    const std::vector<int32_t> a = random_tokens(40, 1, sizes.vocab),
                               b = random_tokens(40, 2, sizes.vocab);
    std::vector<int32_t> both = a;
    both.insert(both.end(), b.begin(), b.end());
    const at::Tensor logits = logits_of(network, ids_of(both, 2));
    for (const int64_t sequence : {0, 1}) {
      const std::vector<Doubles> want = forward_in_double(small, sequence == 0 ? a : b);
      for (size_t i = 0; i < want.size(); ++i) {
        const at::Tensor row = logits[sequence][static_cast<int64_t>(i)];
        EXPECT_LE(relative_error(to_vector(row), want[i]), 1e-4)
            << kv_heads << " kv heads, sequence " << sequence << ", position " << i;
      }
    }
  }
}

TEST_F(TrainNetwork, ScoresAsTheEngineDoes) {
  const SmallModel small(4, false, 0);
  const std::filesystem::path path = write(small);
  const Network network = load(path);
  const std::vector<int32_t> tokens = random_tokens(60, 5, small.sizes.vocab);
  std::vector<double> got(tokens.size() - 1);
  TorchLogits source(network, nullptr);
  EXPECT_EQ(source.vocab_size(), small.sizes.vocab);
  ASSERT_TRUE(source.score(tokens, got));

  const auto model = Model::load(path, {1, true, ""});
  ASSERT_TRUE(model);
  const auto session = Session::create(*model, 60);
  ASSERT_TRUE(session);
  std::vector<double> want;
  const auto sink = [&](int64_t first, int64_t count, const float* logits) {
    for (int64_t i = 0; i < count && first + i + 1 < 60; ++i) {
      const float* row = logits + i * small.sizes.vocab;
      double sum = 0;
      for (int64_t v = 0; v < small.sizes.vocab; ++v) {
        sum += std::exp(static_cast<double>(row[v]));
      }
      want.push_back(std::log(sum) - row[tokens[static_cast<size_t>(first + i + 1)]]);
    }
  };
  ASSERT_TRUE((*session)->forward_all(tokens, sink));
  ASSERT_EQ(want.size(), got.size());
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_NEAR(got[i], want[i], 1e-4) << i;
  }
}

TEST_F(TrainNetwork, RefusesPackedModels) {
  const auto file = GgufFile::open(write(SmallModel(5, true, 2)));
  ASSERT_TRUE(file);
  const auto network = load_network(**file, at::kCPU, at::kFloat);
  ASSERT_FALSE(network);
  EXPECT_NE(network.error().message.find("packed already"), std::string::npos);
}

double block_error(const TrainSession& session, const StudentBlock& student, const at::Tensor& x) {
  const at::NoGradGuard no_grad;
  const Rotary rotary = make_rotary(session.config(), x.size(1), at::kCPU);
  const BlockWeights& teacher = session.teacher.blocks[0];
  const at::Tensor want = block_forward(session.config(), teacher, rotary, x, at::kFloat);
  const at::Tensor got = block_forward(
      session.config(), student_weights(student, teacher, at::kFloat), rotary, x, at::kFloat);
  return ((got - want).square().sum() / (want - x).square().sum()).item<double>();
}

class TrainStart : public TrainNetwork {
 protected:
  TrainStart() {
    session_.student.blocks.resize(2);
    session_.windows = cut(random_tokens(20 * 32, 9, small_.sizes.vocab), 32, small_.sizes.vocab);
    // Inputs that lie near a space of 8 dimensions of 48, as those of real layers lie near few.
    at::manual_seed(1);
    const at::Tensor mix = at::randn({8, small_.sizes.width});
    x_ = at::matmul(at::randn({24, 32, 8}), mix) + 0.1 * at::randn({24, 32, small_.sizes.width});
  }

  const SmallModel small_{6, true, 0};
  const std::shared_ptr<GgufFile> file_ = GgufFile::open(write(small_)).value();
  const TrainObserver observer_{{}, [](const std::string&) {}};
  TrainSession session_{*file_, {}, observer_, load(write(small_)), {}, {}, ThreadPool(1), Clock()};
  at::Tensor x_;  // (24, 32, d_model)
};

TEST_F(TrainStart, ErrorFeedbackLowersTheErrorOfABlock) {
  ASSERT_TRUE(start_block(session_, 0, x_, x_, false));
  const double with = block_error(session_, session_.student.blocks[0], x_);
  session_.options.error_feedback = false;
  ASSERT_TRUE(start_block(session_, 0, x_, x_, false));
  const double without = block_error(session_, session_.student.blocks[0], x_);
  EXPECT_LT(with, 0.8 * without);
  EXPECT_GT(with, 0.0);
}

TEST_F(TrainStart, StreamsAfterTheBlockAreThoseOfAForwardPass) {
  const at::Tensor teacher_x = x_ + 0.05 * at::randn_like(x_), before = x_.clone();
  const auto found = start_block(session_, 1, x_, teacher_x, true);
  ASSERT_TRUE(found);
  EXPECT_TRUE(at::equal(x_, before));
  const Rotary rotary = make_rotary(session_.config(), x_.size(1), at::kCPU);
  const BlockWeights& teacher = session_.teacher.blocks[1];
  const at::NoGradGuard no_grad;
  const BlockWeights student = student_weights(session_.student.blocks[1], teacher, at::kFloat);
  for (const auto& [got, weights, from] :
       {std::tuple{found->student, student, x_}, std::tuple{found->teacher, teacher, teacher_x}}) {
    const at::Tensor want = block_forward(session_.config(), weights, rotary, from, at::kFloat);
    EXPECT_LT(((got - want).norm() / want.norm()).item<double>(), 1e-6);
  }
  const auto trained_later = start_block(session_, 1, x_, teacher_x, false);
  ASSERT_TRUE(trained_later);
  EXPECT_FALSE(trained_later->student.defined());
  session_.options.error_feedback = false;
  const auto none = start_block(session_, 1, x_, teacher_x, true);
  ASSERT_TRUE(none);
  EXPECT_FALSE(none->student.defined() || none->teacher.defined());
}

TEST_F(TrainStart, TheTeachersInputsGiveTheMomentWhereAskedFor) {
  session_.options.ef_inputs = EfInputs::kTeacher;
  session_.options.ef_target = EfTarget::kWeight;
  session_.options.ef_rounds = 0;
  const at::Tensor teacher_x = at::matmul(x_, at::randn({48, 48}) * 0.2);
  ASSERT_TRUE(start_block(session_, 0, x_, teacher_x, false));
  const BlockWeights& weights = session_.teacher.blocks[0];
  const auto scales_from = [&](const at::Tensor& stream) {
    const at::Tensor x =
        norm(session_.config(), stream, weights.attn_norm, at::kFloat).flatten(0, 1);
    const LayerProblem problem{"q",
                               weights.linear[index_of(Role::kAttnQ)],
                               at::matmul(x.t(), x) / static_cast<double>(x.size(0)),
                               {}};
    const auto fit = fit_layer(problem, 2, session_.options, session_.pool);
    EXPECT_TRUE(fit);
    return to_tensor(fit->scales.g, {2, weights.linear[index_of(Role::kAttnQ)].size(0)});
  };
  const at::Tensor got = session_.student.blocks[0][Role::kAttnQ].g.detach();
  const auto off = [&](const at::Tensor& g) {
    return ((got - g).norm() / g.norm()).item<double>();
  };
  EXPECT_LT(off(scales_from(teacher_x)), 1e-4);
  EXPECT_GT(off(scales_from(x_)), 1e-2);
}

TEST_F(TrainStart, EveryShareReachesTheHeadsLoss) {
  session_.options.reverse_kl = 0.3;
  session_.options.temperature = 2.5;
  session_.options.cross_entropy = 0.2;
  session_.student.output_norm = session_.teacher.output_norm * 1.1;
  const at::Tensor student = x_.narrow(0, 0, 3), teacher = x_.narrow(0, 4, 3);
  const at::Tensor ids = session_.windows.distinct_range(0, 3);
  const auto hidden = [&](const at::Tensor& x, const at::Tensor& weight) {
    return norm(session_.config(), x, weight, at::kFloat).flatten(0, 1);
  };
  at::Tensor next = at::full({3 * 32}, -1, at::kLong);
  for (int64_t window = 0; window < 3; ++window) {
    for (int64_t t = 0; t < 31; ++t) {
      next[window * 32 + t] = ids[window][t + 1];
    }
  }
  const auto loss_with = [&](const LossShares& shares) {
    return distillation_loss(hidden(student, session_.student.output_norm),
                             hidden(teacher, session_.teacher.output_norm), session_.teacher.head,
                             next, shares)
        .loss.item<double>();
  };
  const double got =
      head_loss(session_, session_.student, student, teacher, ids).loss.item<double>();
  const double want = loss_with({.reverse = 0.3, .temperature = 2.5, .cross_entropy = 0.2});
  EXPECT_NEAR(got, want, 1e-6 * want);
  EXPECT_GT(std::fabs(loss_with({.reverse = 0.2, .temperature = 2.5, .cross_entropy = 0.3}) - want),
            1e-3 * want);
}

TEST_F(TrainStart, Bf16InputsLoseNothingInTheirMoments) {
  session_.teacher.compute = at::kBFloat16;
  for (BlockWeights& block : session_.teacher.blocks) {
    for (at::Tensor& weight : block.linear) {
      weight = weight.to(at::kBFloat16);
    }
  }
  ASSERT_TRUE(start_block(session_, 0, x_, x_, true));
  EXPECT_EQ(at::globalContext().float32MatmulPrecision(), at::Float32MatmulPrecision::HIGHEST);
  session_.teacher = load(write(small_));
  const double in_bf16 = block_error(session_, session_.student.blocks[0], x_);
  ASSERT_TRUE(start_block(session_, 0, x_, x_, true));
  EXPECT_NEAR(in_bf16, block_error(session_, session_.student.blocks[0], x_), 0.1 * in_bf16);
}

TEST_F(TrainStart, MeasuringLeavesNothingBehind) {
  session_.options.seq_len = 32;
  session_.options.dry_run = true;
  session_.options.train_norms = true;
  add_output_norm(session_.teacher, session_.student);
  const at::Tensor norm = session_.student.output_norm.detach().clone();
  ASSERT_TRUE(warm_start(session_, 0));
  EXPECT_TRUE(at::equal(session_.student.output_norm, norm));
  EXPECT_FALSE(session_.student.output_norm.grad().defined());
  EXPECT_EQ(session_.options.ef_rounds, QuantizeOptions().ef_rounds) << "not the quick start's";
  EXPECT_FALSE(session_.student.blocks[0][Role::kAttnQ].latent.defined());
}

// Mean 1, with the floor that keeps dead columns.
Doubles normalised(Doubles values) {
  double mean = 0;
  for (const double v : values) {
    mean += v / static_cast<double>(values.size());
  }
  double after = 0;
  for (double& v : values) {
    v = std::max(v, mean * 1e-3);
    after += v / static_cast<double>(values.size());
  }
  for (double& v : values) {
    v /= after;
  }
  return values;
}

// -log p(target) of a final hidden state x (width) in double.
double loss_in_double(const SmallModel& small, const Doubles& x, int32_t target) {
  const Doubles logits = product(
      small.head(), normed(x, small.weight("output_norm.weight"), small.sizes.norm_epsilon));
  double sum = 0;
  for (const double v : logits) {
    sum += std::exp(v);
  }
  return std::log(sum) - logits[static_cast<size_t>(target)];
}

TEST_F(TrainNetwork, ImportanceIsWhatItSays) {
  const SmallModel small(7, false, 0);
  const int64_t width = small.sizes.width, length = 16, windows = 3;
  QuantizeOptions options;
  options.seq_len = length;
  options.alpha_in = 1.0;
  options.alpha_out = 1.0;
  const TrainObserver observer;
  const std::vector<int32_t> tokens = random_tokens(windows * length, 8, small.sizes.vocab);
  const auto file = GgufFile::open(write(small));
  ASSERT_TRUE(file);
  TrainSession session{**file,
                       options,
                       observer,
                       load(write(small)),
                       {},
                       cut(tokens, length, small.sizes.vocab),
                       ThreadPool(1),
                       Clock()};
  const Status measured = measure_importance(session);
  ASSERT_TRUE(measured) << measured.error().message;
  const auto importance = [&](size_t layer, Role role) {
    return importance_of(session.sums[layer], role, session.options);
  };

  // Inputs of the first projections: the normed embedding.
  Doubles in(static_cast<size_t>(width));
  for (const int32_t token : tokens) {
    const Floats& embedding = small.weight("token_embd.weight");
    const Doubles x(embedding.begin() + token * width, embedding.begin() + (token + 1) * width);
    const Doubles h = normed(x, small.weight("blk.0.attn_norm.weight"), small.sizes.norm_epsilon);
    for (size_t c = 0; c < in.size(); ++c) {
      in[c] += std::fabs(h[c]);
    }
  }
  for (const Role role : {Role::kAttnQ, Role::kAttnK, Role::kAttnV}) {
    EXPECT_LE(relative_error(importance(0, role).in, normalised(in)), 1e-5);
  }

  // Outputs of the last layer's last product: the loss of a position depends on that position's
  // stream alone, so finite differences there are the gradient.
  const Network& network = session.teacher;
  const Rotary rotary = make_rotary(network.config, length, at::kCPU);
  const at::NoGradGuard no_grad;
  at::Tensor stream = embed(network, ids_of(tokens, windows));
  for (const auto& block : network.blocks) {
    stream = block_forward(network.config, block, rotary, stream, at::kFloat);
  }
  Doubles out(static_cast<size_t>(width));
  for (int64_t w = 0; w < windows; ++w) {
    for (int64_t t = 0; t + 1 < length; ++t) {
      const std::vector<float> row = to_vector(stream[w][t]);
      Doubles x(row.begin(), row.end());
      const int32_t target = tokens[static_cast<size_t>(w * length + t + 1)];
      for (size_t c = 0; c < out.size(); ++c) {
        const double kept = x[c], step = 1e-4;
        x[c] = kept + step;
        const double above = loss_in_double(small, x, target);
        x[c] = kept - step;
        const double below = loss_in_double(small, x, target);
        x[c] = kept;
        out[c] += std::pow((above - below) / (2 * step), 2);
      }
    }
  }
  for (double& v : out) {
    v = std::sqrt(v);
  }
  EXPECT_LE(relative_error(importance(1, Role::kFfnDown).out, normalised(out)), 1e-4);
  EXPECT_GT(relative_error(importance(0, Role::kFfnDown).out, normalised(out)), 1e-2)
      << "the first block's must differ";
}

}  // namespace
}  // namespace rabit::train
