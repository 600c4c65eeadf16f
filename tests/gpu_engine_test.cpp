// Models on a GPU: their logits against those of the CPU in F32, and against themselves (input in
// pieces, truncation, one token at a time); greedy text; refusals. Over the emulator, too, where
// everything but speed is the same.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "base/interrupt.h"
#include "engine/gpu.h"
#include "gpu_test.h"
#include "io/gguf.h"
#include "model/random_model.h"
#include "rabit/engine.h"
#include "tiny_model.h"

namespace rabit {
namespace {

// Rounding to F16 moves each input of a product, and each dense or unpacked weight, by 2^-12 of its
// size as a root mean square. A block has about ten such roundings behind each other, whose errors
// are independent: about 2^-12 sqrt(10 * layers) of the norm, 1.1e-3 for two layers, where every
// step keeps relative errors as they are. Attention does not: a score of size s turns a relative
// error e into a change s * e of its weight, and scores are up to 10 in these models. So the bound
// is that by ten.
constexpr double kBound = 1e-2;

const EngineOptions kExact = {2, true, ""};
EngineOptions on_gpu() {
  EngineOptions options;
  options.threads = 2;
  options.device = "cuda";
  return options;
}

class GpuEngine : public GpuTest {
 protected:
  GpuEngine() {
    folder_ = std::filesystem::temp_directory_path() /
              ("rabit_gpu_engine_" + std::to_string(::getpid()) + "_" +
               testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(folder_);
  }
  ~GpuEngine() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path path(const std::string& name) const { return folder_ / name; }

  static std::unique_ptr<Session> session(const std::filesystem::path& path, int64_t capacity,
                                          const EngineOptions& options = on_gpu()) {
    auto model = Model::load(path, options);
    EXPECT_TRUE(model) << (model ? "" : model.error().message);
    auto session = Session::create(*model, capacity);
    EXPECT_TRUE(session) << (session ? "" : session.error().message);
    return std::move(session).value();
  }

  static std::vector<Floats> all_logits(Session& session, std::span<const int32_t> tokens,
                                        int64_t vocab) {
    std::vector<Floats> rows;
    const Status status =
        session.forward_all(tokens, [&](int64_t first, int64_t count, const float* logits) {
          EXPECT_EQ(first, static_cast<int64_t>(rows.size()));
          for (int64_t i = 0; i < count; ++i) {
            rows.emplace_back(logits + i * vocab, logits + (i + 1) * vocab);
          }
        });
    EXPECT_TRUE(status) << (status ? "" : status.error().message);
    return rows;
  }

  static void expect_near(const std::vector<Floats>& got, const std::vector<Floats>& want) {
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_LE(relative_error(got[i], want[i]), kBound) << "position " << i;
    }
  }

  std::filesystem::path folder_;
};

TEST_F(GpuEngine, EqualsTheCpuInF32) {
  for (const bool tied : {false, true}) {
    for (const int64_t paths : {0, 1, 2, 4}) {
      SCOPED_TRACE((tied ? "tied, paths " : "paths ") + std::to_string(paths));
      const SmallModel small(3, tied, paths);
      small.write(path("model.gguf"));
      const int64_t vocab = small.sizes.vocab;
      const std::vector<int32_t> tokens = random_tokens(60, 4, vocab);
      const auto exact = session(path("model.gguf"), 64, kExact);
      const auto one = session(path("model.gguf"), 64);
      expect_near(all_logits(*one, tokens, vocab), all_logits(*exact, tokens, vocab));
    }
  }
}

// Layers with different paths beside each other, and dense ones between packed ones.
TEST_F(GpuEngine, MixedLayers) {
  SmallModel small(11, true, 1), larger(11, true, 4);
  for (const char* name : {"attn_q", "attn_k", "attn_output", "ffn_up"}) {
    const std::string layer = std::string("blk.1.") + name;
    small.dense[layer] = larger.dense[layer];
    small.signs[layer] = larger.signs[layer];
    small.rows[layer] = larger.rows[layer];
    small.columns[layer] = larger.columns[layer];
  }
  small.left_dense = {"blk.0.attn_k", "blk.0.ffn_down", "blk.1.attn_v", "blk.1.ffn_gate"};
  small.write(path("mixed.gguf"));
  const int64_t vocab = small.sizes.vocab;
  const std::vector<int32_t> tokens = random_tokens(40, 6, vocab);
  const auto exact = session(path("mixed.gguf"), 64, kExact);
  const auto mixed = session(path("mixed.gguf"), 64);
  expect_near(all_logits(*mixed, tokens, vocab), all_logits(*exact, tokens, vocab));
}

// Heads that are no multiple of anything, layers that fill no tile, a head in Q8_0.
TEST_F(GpuEngine, OddSizes) {
  ModelConfig config;
  config.architecture = "llama";
  config.layers = 2;
  config.heads = 6;
  config.kv_heads = 2;
  config.head_dim = 16;
  config.d_model = 96;
  config.d_ff = 288;
  config.vocab_size = 203;
  config.context_length = 128;
  // Rows that are no whole tiles of bytes, and rows that are.
  for (const int64_t d_model : {96, 256}) {
    config.d_model = d_model;
    config.heads = d_model == 96 ? 6 : 16;
    ASSERT_TRUE(write_random_model(path("blocks.gguf"), config, 3));
    const std::vector<int32_t> tokens = random_tokens(44, 3, config.vocab_size);
    const auto one = session(path("blocks.gguf"), 128);
    const std::vector<Floats> want =
        all_logits(*session(path("blocks.gguf"), 128, kExact), tokens, config.vocab_size);
    expect_near(all_logits(*one, tokens, config.vocab_size), want);
    one->truncate(40);
    for (size_t i = 40; i < 44; ++i) {
      const auto got = one->forward(std::span(tokens).subspan(i, 1));
      ASSERT_TRUE(got) << got.error().message;
      EXPECT_LE(relative_error(*got, want[i]), kBound) << d_model << ", position " << i;
    }
  }
  const TinySizes odd = {.width = 30, .heads = 3, .kv_heads = 1, .hidden = 43, .vocab = 31};
  for (const int64_t paths : {0, 2}) {
    SmallModel(5, false, paths, odd).write(path("odd.gguf"));
    const std::vector<int32_t> some = random_tokens(40, 3, odd.vocab);
    expect_near(all_logits(*session(path("odd.gguf"), 40), some, odd.vocab),
                all_logits(*session(path("odd.gguf"), 40, kExact), some, odd.vocab));
  }
}

// Keys and values in bytes: a prompt, tokens by themselves, a token of each of several sequences.
TEST_F(GpuEngine, CachesOfBytes) {
  ModelConfig config;
  config.architecture = "llama";
  config.layers = 2;
  config.heads = 8;
  config.kv_heads = 2;
  config.head_dim = 32;
  config.d_model = 256;
  config.d_ff = 288;
  config.vocab_size = 203;
  config.context_length = 128;
  const auto written = write_random_model(path("model.gguf"), config, 2);
  ASSERT_TRUE(written) << (written ? "" : written.error().message);
  const std::vector<int32_t> tokens = random_tokens(44, 3, config.vocab_size);
  EngineOptions on_cpu = {.threads = 2, .cache_q8_0 = true}, bytes = on_gpu();
  bytes.cache_q8_0 = true;
  const std::vector<Floats> want =
      all_logits(*session(path("model.gguf"), 64, on_cpu), tokens, config.vocab_size);
  const auto model = Model::load(path("model.gguf"), bytes);
  ASSERT_TRUE(model) << (model ? "" : model.error().message);
  std::vector<std::unique_ptr<Session>> all;
  std::vector<Session*> each;
  for (int i = 0; i < 3; ++i) {
    auto own = Session::create(*model, 64);
    ASSERT_TRUE(own);
    each.push_back(own->get());
    all.push_back(std::move(*own));
    expect_near(all_logits(*each.back(), tokens, config.vocab_size), want);
  }
  // Fewer digits than halves have: the option does something.
  const std::vector<Floats> halves =
      all_logits(*session(path("model.gguf"), 64), tokens, config.vocab_size);
  EXPECT_GT(relative_error(halves.back(), want.back()), 1e-3);
  for (Session* own : each) {
    own->truncate(40);
  }
  for (size_t i = 40; i < 44; ++i) {
    const auto logits = Session::forward_each(each, std::vector<int32_t>(3, tokens[i]));
    ASSERT_TRUE(logits) << (logits ? "" : logits.error().message);
    for (size_t j = 0; j < 3; ++j) {
      const auto own = logits->subspan(j * config.vocab_size, config.vocab_size);
      EXPECT_LE(relative_error(Floats(own.begin(), own.end()), want[i]), kBound) << i << " " << j;
    }
  }
  each[0]->truncate(40);
  for (size_t i = 40; i < 44; ++i) {
    const auto logits = each[0]->forward(std::span(&tokens[i], 1));
    ASSERT_TRUE(logits) << (logits ? "" : logits.error().message);
    EXPECT_LE(relative_error(Floats(logits->begin(), logits->end()), want[i]), kBound) << i;
  }
  EXPECT_EQ(whole_tokens(*each[0]), 4);
}

TEST_F(GpuEngine, SplittingTheInputChangesLittle) {
  const SmallModel small(7, true, 2);
  small.write(path("model.gguf"));
  const int64_t vocab = small.sizes.vocab;
  const std::vector<int32_t> tokens = random_tokens(150, 8, vocab);
  const std::vector<Floats> want =
      all_logits(*session(path("model.gguf"), 150, kExact), tokens, vocab);
  for (const std::vector<int64_t>& pieces :
       {std::vector<int64_t>{100, 50}, {1, 64, 1, 84}, {13, 7, 130}}) {
    const auto split = session(path("model.gguf"), 150);
    int64_t at = 0;
    for (const int64_t piece : pieces) {
      const auto got = split->forward(std::span(tokens).subspan(at, piece));
      ASSERT_TRUE(got) << got.error().message;
      at += piece;
      EXPECT_EQ(split->position(), at);
      EXPECT_LE(relative_error(*got, want[at - 1]), kBound) << at;
    }
  }
  const auto single = session(path("model.gguf"), 150);
  for (int64_t i = 0; i < 40; ++i) {
    const auto got = single->forward(std::span(tokens).subspan(i, 1));
    ASSERT_TRUE(got);
    EXPECT_LE(relative_error(*got, want[i]), kBound) << i;
  }
}

TEST_F(GpuEngine, MoreThanOneChunk) {
  const TinySizes sizes = {.layers = 1, .width = 16, .heads = 2, .kv_heads = 1, .hidden = 24};
  SmallModel(8, true, 1, sizes).write(path("model.gguf"));
#ifdef RABIT_CUDA_EMULATOR
  constexpr int64_t kTokens = 1100;  // where memory is short, see below
#else
  constexpr int64_t kTokens = 4200;
#endif
  const std::vector<int32_t> tokens = random_tokens(kTokens, 8, sizes.vocab);
  const std::vector<Floats> want =
      all_logits(*session(path("model.gguf"), kTokens, kExact), tokens, sizes.vocab);
#ifdef RABIT_CUDA_EMULATOR
  const size_t before = emulator::memory_size();
  emulator::memory_size() = emulator::memory_used() + (450 << 10);
#endif
  const auto one = session(path("model.gguf"), kTokens);
#ifdef RABIT_CUDA_EMULATOR
  emulator::memory_size() = before;
#endif
  expect_near(all_logits(*one, tokens, sizes.vocab), want);
  one->truncate(20);
  const auto last = one->forward(std::span(tokens).subspan(20));
  ASSERT_TRUE(last);
  EXPECT_EQ(one->position(), kTokens);
  EXPECT_LE(relative_error(*last, want.back()), kBound);
}

TEST_F(GpuEngine, TruncateForgets) {
  const SmallModel small(9, true, 0);
  small.write(path("model.gguf"));
  const int64_t vocab = small.sizes.vocab;
  const std::vector<int32_t> tokens = random_tokens(50, 10, vocab);
  const auto one = session(path("model.gguf"), 64);
  const std::vector<Floats> want = all_logits(*one, tokens, vocab);
  one->truncate(20);
  EXPECT_EQ(one->position(), 20);
  ASSERT_TRUE(one->forward(random_tokens(30, 11, vocab)));
  one->truncate(20);
  expect_near(all_logits(*one, std::span(tokens).subspan(20), vocab),
              {want.begin() + 20, want.end()});
  one->truncate(1000);  // there is nothing to forget there
  EXPECT_EQ(one->position(), 50);
  one->truncate(-3);
  EXPECT_EQ(one->position(), 0);
  EXPECT_EQ(all_logits(*one, tokens, vocab), want) << "the same work, the same bits";
}

// Sizes that the kernel for whole tokens takes, and how many tokens a test runs so: each takes the
// emulator a second.
const TinySizes kWhole = {.width = 64, .heads = 4, .kv_heads = 2, .hidden = 96};
#ifdef RABIT_CUDA_EMULATOR
constexpr int64_t kWholeSteps = 4;
#else
constexpr int64_t kWholeSteps = 64;
#endif

/// Whether the first GPU runs whole tokens.
bool runs_whole_tokens() {
  const auto info = gpu::use_device(0);
  return info && info->major >= 8 && info->cooperative;
}

TEST_F(GpuEngine, WholeTokens) {
  for (const auto& [tied, paths] : {std::pair{true, 0}, {false, 1}, {true, 2}, {false, 4}}) {
    SCOPED_TRACE((tied ? "tied, paths " : "paths ") + std::to_string(paths));
    SmallModel(3, tied, paths, kWhole).write(path("model.gguf"));
    const std::vector<int32_t> tokens = random_tokens(kWholeSteps, 4, kWhole.vocab);
    const std::vector<Floats> want =
        all_logits(*session(path("model.gguf"), kWholeSteps, kExact), tokens, kWhole.vocab);
    const auto one = session(path("model.gguf"), kWholeSteps);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const auto got = one->forward(std::span(tokens).subspan(i, 1));
      ASSERT_TRUE(got) << got.error().message;
      EXPECT_LE(relative_error(*got, want[i]), kBound) << "position " << i;
      EXPECT_EQ(one->position(), static_cast<int64_t>(i) + 1);
    }
    EXPECT_EQ(whole_tokens(*one), runs_whole_tokens() ? kWholeSteps : 0);
  }
}

// Each way leaves in the cache what the other reads; positions and refusals are the same.
TEST_F(GpuEngine, WholeTokensBetweenOthers) {
  SmallModel(13, true, 2, kWhole).write(path("model.gguf"));
  const std::vector<int32_t> tokens = random_tokens(90, 4, kWhole.vocab);
  const std::vector<Floats> want =
      all_logits(*session(path("model.gguf"), 90, kExact), tokens, kWhole.vocab);
  const auto one = session(path("model.gguf"), 90);
  const auto forward = [&](size_t first, size_t count) {
    const auto got = one->forward(std::span(tokens).subspan(first, count));
    ASSERT_TRUE(got) << got.error().message;
    EXPECT_LE(relative_error(*got, want[first + count - 1]), kBound) << first << ", " << count;
  };
  const auto forward_all = [&](size_t first, size_t count) {
    expect_near(all_logits(*one, std::span(tokens).subspan(first, count), kWhole.vocab),
                {want.begin() + static_cast<int64_t>(first),
                 want.begin() + static_cast<int64_t>(first + count)});
  };
  forward(0, 1), forward(1, 70), forward(71, 1), forward_all(72, 1), forward_all(73, 4);
  forward(77, 1), forward(78, 11), forward_all(89, 1);
  EXPECT_EQ(one->position(), 90);
  EXPECT_FALSE(one->forward(std::vector<int32_t>{1}));
  one->truncate(40);
  EXPECT_FALSE(one->forward(std::vector<int32_t>{static_cast<int32_t>(kWhole.vocab)}));
  set_interrupted(true);
  const auto interrupted = one->forward(std::vector<int32_t>{1});
  set_interrupted(false);
  EXPECT_TRUE(!interrupted && interrupted.error().interrupted);
  EXPECT_EQ(one->position(), 40);
  forward(40, 1), forward_all(41, 1), forward(42, 30), forward(72, 1);
  EXPECT_EQ(whole_tokens(*one), runs_whole_tokens() ? 8 : 0);

  one->truncate(0);
  const auto first = one->forward(std::span(tokens).first(1));
  ASSERT_TRUE(first);
  const Floats before(first->begin(), first->end());
  one->truncate(0);
  const auto again = one->forward(std::span(tokens).first(1));
  ASSERT_TRUE(again);
  EXPECT_TRUE(std::equal(again->begin(), again->end(), before.begin()))
      << "the same work, the same bits";
}

TEST_F(GpuEngine, TwoSessionsOfAModel) {
  const SmallModel small(9, true, 2);
  small.write(path("model.gguf"));
  const int64_t vocab = small.sizes.vocab;
  const std::vector<int32_t> tokens = random_tokens(30, 10, vocab);
  const auto model = Model::load(path("model.gguf"), on_gpu());
  ASSERT_TRUE(model) << model.error().message;
  EXPECT_TRUE((*model)->on_gpu());
  EXPECT_EQ((*model)->kernels(), "cuda");
  EXPECT_NE((*model)->device(), "");
  EXPECT_GT((*model)->weight_bytes(), 0U);
  const auto one = Session::create(*model, 32), other = Session::create(*model, 64);
  ASSERT_TRUE(one && other);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const auto got = (*one)->forward(std::span(tokens).subspan(i, 1));
    ASSERT_TRUE(got);
    const Floats first(got->begin(), got->end());
    const auto same = (*other)->forward(std::span(tokens).subspan(i, 1));
    ASSERT_TRUE(same);
    EXPECT_EQ(relative_error(*same, first), 0);
  }
}

TEST_F(GpuEngine, SeveralSessionsAtOnce) {
  for (const int64_t paths : {0, 2}) {
    SCOPED_TRACE("paths " + std::to_string(paths));
    SmallModel(9, true, paths, kWhole).write(path("model.gguf"));
    const int64_t vocab = kWhole.vocab;
    const auto model = Model::load(path("model.gguf"), on_gpu());
    ASSERT_TRUE(model) << model.error().message;
    constexpr size_t kSessions = 5, kSteps = 3;
    std::vector<std::unique_ptr<Session>> owned;
    std::vector<std::vector<int32_t>> tokens;
    std::vector<std::vector<Floats>> want;
    for (size_t i = 0; i < kSessions; ++i) {  // each behind a prompt of its own, in its own room
      const auto prompt = static_cast<int64_t>(1 + 3 * i);
      tokens.push_back(random_tokens(prompt + static_cast<int64_t>(kSteps), 20 + i, vocab));
      want.push_back(all_logits(*session(path("model.gguf"), 32, kExact), tokens[i], vocab));
      auto one = Session::create(*model, prompt + static_cast<int64_t>(kSteps));
      ASSERT_TRUE(one);
      ASSERT_TRUE((*one)->forward(std::span(tokens[i]).first(static_cast<size_t>(prompt))));
      owned.push_back(std::move(*one));
    }
    std::vector<Session*> all;
    std::vector<int32_t> next(kSessions);
    for (const auto& one : owned) {
      all.push_back(one.get());
    }
    for (size_t step = 0; step < kSteps; ++step) {
      for (size_t i = 0; i < kSessions; ++i) {
        next[i] = tokens[i][1 + 3 * i + step];
      }
      // All, or as few as go one after the other.
      for (size_t first = 0; first < kSessions;) {
        const size_t count = step == 1 && first == 0 ? 2 : kSessions - first;
        const auto got = Session::forward_each(std::span(all).subspan(first, count),
                                               std::span(next).subspan(first, count));
        ASSERT_TRUE(got) << got.error().message;
        ASSERT_EQ(got->size(), count * static_cast<size_t>(vocab));
        for (size_t i = 0; i < count; ++i) {
          const size_t own = first + i;
          EXPECT_EQ(all[own]->position(), static_cast<int64_t>(2 + 3 * own + step));
          EXPECT_LE(relative_error(
                        got->subspan(i * static_cast<size_t>(vocab), static_cast<size_t>(vocab)),
                        want[own][static_cast<size_t>(all[own]->position() - 1)]),
                    kBound)
              << own << ", " << step;
        }
        first += count;
      }
    }
    // Full now: nothing moves.
    EXPECT_FALSE(Session::forward_each(all, next));
    for (size_t i = 0; i < kSessions; ++i) {
      all[i]->truncate(1);
    }
    next[kSessions - 1] = static_cast<int32_t>(vocab);
    EXPECT_FALSE(Session::forward_each(all, next));
    next[kSessions - 1] = 0;
    set_interrupted(true);
    const auto interrupted = Session::forward_each(all, next);
    set_interrupted(false);
    EXPECT_TRUE(!interrupted && interrupted.error().interrupted);
    const auto other = session(path("model.gguf"), 4);
    std::vector<Session*> mixed = all;
    mixed[1] = other.get();
    const auto of_two_models = Session::forward_each(mixed, next);
    ASSERT_FALSE(of_two_models);
    EXPECT_EQ(of_two_models.error().message,
              "sessions of several models cannot take a token at once");
    mixed[1] = mixed[0];
    EXPECT_FALSE(Session::forward_each(mixed, next));
    EXPECT_FALSE(Session::forward_each(all, std::span(next).first(2)));
    EXPECT_FALSE(Session::forward_each({}, {}));
    for (const Session* one : all) {
      EXPECT_EQ(one->position(), 1);
    }
  }
}

/// Greedy tokens after a prompt, and by how much the first of each was ahead of the second, of the
/// norm of the logits.
struct Greedy {
  std::vector<int32_t> tokens;
  std::vector<double> lead;
};
Greedy generate(Session& session, std::vector<int32_t> next, int64_t count) {
  Greedy out;
  for (int64_t i = 0; i < count; ++i) {
    const auto logits = session.forward(next);
    EXPECT_TRUE(logits);
    const auto top = std::max_element(logits->begin(), logits->end());
    double second = -INFINITY, norm = 0;
    for (auto it = logits->begin(); it != logits->end(); ++it) {
      second = it != top ? std::max<double>(second, *it) : second;
      norm += static_cast<double>(*it) * *it;
    }
    out.lead.push_back((*top - second) / std::sqrt(norm));
    next = {static_cast<int32_t>(top - logits->begin())};
    out.tokens.push_back(next[0]);
  }
  return out;
}

/// The same text, or another from where the two likeliest tokens lie so near to each other that the
/// bound allows either.
void expect_same_text(const Greedy& got, const Greedy& want) {
  const auto [at, ignored] =
      std::mismatch(want.tokens.begin(), want.tokens.end(), got.tokens.begin());
  if (at != want.tokens.end()) {
    const auto i = at - want.tokens.begin();
    EXPECT_LT(want.lead[static_cast<size_t>(i)], 2 * kBound) << "from token " << i << " on";
  }
}

TEST_F(GpuEngine, GreedyTextOfSmallModels) {
  const auto compare = [&](const TinySizes& sizes, int64_t paths, int64_t count) {
    SmallModel(21, false, paths, sizes).write(path("model.gguf"));
    const std::vector<int32_t> prompt = random_tokens(9, 5, sizes.vocab);
    expect_same_text(generate(*session(path("model.gguf"), 80), prompt, count),
                     generate(*session(path("model.gguf"), 80, kExact), prompt, count));
  };
  for (const int64_t paths : {0, 2}) {
    compare(TinySizes(), paths, 64);
    compare(kWhole, paths, kWholeSteps);
  }
}

// What the device chooses from its logits is what the host chooses from them.
TEST_F(GpuEngine, DrawsWhatTheHostDraws) {
  ModelConfig config;
  config.architecture = "llama";
  config.layers = 1;
  config.heads = config.kv_heads = 1;
  config.head_dim = config.d_model = config.d_ff = 32;
  config.vocab_size = 4500;  // several slices, the last not full
  config.context_length = 64;
  const auto written = write_random_model(path("model.gguf"), config, 1);
  ASSERT_TRUE(written) << (written ? "" : written.error().message);
  const auto whole = session(path("model.gguf"), 32), chosen = session(path("model.gguf"), 32);
  const std::vector<SamplingOptions> all = {
      {.temperature = 0},
      {.seed = 3},
      {.temperature = 2, .top_k = 7, .top_p = 1, .min_p = 0, .seed = 4},
      {.temperature = 1, .top_k = 256, .top_p = 0.9F, .seed = 5},
      {.temperature = 1, .top_k = 0, .seed = 6},
      {.temperature = 1, .top_k = 4000, .min_p = 0, .seed = 7}};
  for (const SamplingOptions& options : all) {
    Sampler of_host(options), of_device(options);
    whole->truncate(0), chosen->truncate(0);
    std::vector<int32_t> tokens = {1, 2, 3};
    for (int i = 0; i < 3; ++i) {
      const auto logits = whole->forward(tokens);
      ASSERT_TRUE(logits) << (logits ? "" : logits.error().message);
      const auto token = chosen->next(tokens, of_device);
      ASSERT_TRUE(token) << (token ? "" : token.error().message);
      ASSERT_EQ(*token, of_host.sample(*logits)) << "top-k " << options.top_k << ", " << i;
      tokens = {*token};
    }
    EXPECT_EQ(chosen->position(), 5);
  }
  Sampler greedy({.temperature = 0});
  EXPECT_FALSE(chosen->next(std::vector<int32_t>{4500}, greedy));
  EXPECT_EQ(chosen->position(), 5);
}

TEST_F(GpuEngine, Refusals) {
  const SmallModel small(12, true, 2);
  small.write(path("model.gguf"));
  const auto refused = [&](const EngineOptions& options) {
    const auto model = Model::load(path("model.gguf"), options);
    EXPECT_FALSE(model);
    return model ? "" : model.error().message;
  };
  EngineOptions options = on_gpu();
  for (const char* name :
       {"gpu", "cuda:", "cuda:x", "cuda:1x", "cuda:-1", "CUDA", "cuda:99999999999"}) {
    options.device = name;
    EXPECT_NE(refused(options).find("no device is called '" + std::string(name) + "'"),
              std::string::npos);
  }
  options.device = "cuda:1000";
  EXPECT_NE(refused(options).find("there is no device cuda:1000; there are cuda:0 ("),
            std::string::npos);
  options = on_gpu();
  options.dense_as_f32 = true;
  EXPECT_NE(refused(options).find("on the CPU alone, not on cuda"), std::string::npos);
  options = on_gpu();
  options.cache_q8_0 = true;
  EXPECT_NE(refused(options).find("heads of a multiple of 32"), std::string::npos);
  options = on_gpu();
  options.kernels = "reference";
  EXPECT_NE(refused(options).find("on the CPU alone"), std::string::npos);
  EXPECT_FALSE(Model::load(path("missing.gguf"), on_gpu()));

  const auto model = Model::load(path("model.gguf"), on_gpu());
  ASSERT_TRUE(model);
  for (const int64_t capacity : {int64_t{0}, int64_t{-1}, int64_t{1} << 40, INT64_MAX}) {
    const auto none = Session::create(*model, capacity);
    ASSERT_FALSE(none);
    EXPECT_NE(none.error().message.find("context"), std::string::npos);
  }
  const auto one = Session::create(*model, 8);
  ASSERT_TRUE(one);
  ASSERT_TRUE((*one)->forward(std::vector<int32_t>{1, 2, 3}));
  for (const std::vector<int32_t>& bad : {std::vector<int32_t>{}, {-1}, {57}, {1, 2, 3, 4, 5, 6}}) {
    EXPECT_FALSE((*one)->forward(bad));
    EXPECT_FALSE((*one)->forward_all(bad, [](int64_t, int64_t, const float*) { FAIL(); }));
  }
  EXPECT_EQ((*one)->position(), 3);
  EXPECT_FALSE(Session::create(nullptr, 8));
}

TEST_F(GpuEngine, AnInterruptEndsAPassAndLeavesThePosition) {
  SmallModel(7, true, 2).write(path("model.gguf"));
  const auto one = session(path("model.gguf"), 20);
  const std::vector<int32_t> tokens = random_tokens(10, 8, TinySizes().vocab);
  ASSERT_TRUE(one->forward(tokens));
  set_interrupted(true);
  const auto next = one->forward(tokens);
  set_interrupted(false);
  EXPECT_TRUE(!next && next.error().interrupted);
  EXPECT_EQ(one->position(), 10);
}

/// A real model: RABIT_MODEL in the environment, since where this runs need not be where it was
/// built, or that of scripts/setup.sh.
class GpuRealModel : public GpuEngine {
 protected:
  static constexpr int64_t kPositions = 300;
  static constexpr double kError = 2e-2;  // thirty blocks: as engine_test has it of F16

  void SetUp() override {
#ifdef RABIT_CUDA_EMULATOR
    GTEST_SKIP() << "takes an emulator too long";
#endif
    GpuEngine::SetUp();
    const char* const given = std::getenv("RABIT_MODEL");
    model_ = given != nullptr && *given != 0 ? given : RABIT_MODEL;
    if (!std::filesystem::exists(model_)) {
      GTEST_SKIP() << model_ << " is missing, run scripts/setup.sh or name one by RABIT_MODEL";
    }
  }

  std::filesystem::path model_;
};

// Each token that the GPU writes is the CPU's, too, after the same text, or so close to it that the
// bound of logits explains it.
TEST_F(GpuRealModel, WritesTheTextOfTheCpu) {
  constexpr int64_t kTokens = 256;
  const auto one = session(model_, kPositions);
  std::vector<int32_t> text = {504, 3575, 282, 4649, 314};
  const size_t begin = text.size();
  const std::vector<int32_t> written = generate(*one, text, kTokens).tokens;
  text.insert(text.end(), written.begin(), written.end());
  EXPECT_EQ(whole_tokens(*one), runs_whole_tokens() ? kTokens - 1 : 0);
  const std::vector<Floats> logits = all_logits(*session(model_, kPositions, kExact), text, 49152);
  int64_t differ = 0;
  for (size_t i = begin; i < text.size(); ++i) {
    const Floats& before = logits[i - 1];
    const float most = *std::max_element(before.begin(), before.end());
    const float own = before[static_cast<size_t>(text[i])];
    double squares = 0;
    for (const float logit : before) {
      squares += static_cast<double>(logit) * logit;
    }
    differ += own < most ? 1 : 0;
    EXPECT_LE(most - own, kError * std::sqrt(squares / static_cast<double>(before.size())))
        << "token " << i - begin << " of the text";
  }
  std::printf("%lld of %lld tokens are not the CPU's\n", static_cast<long long>(differ),
              static_cast<long long>(kTokens));
}

TEST_F(GpuRealModel, LogitsOfAPrompt) {
  const auto file = GgufFile::open(model_);
  ASSERT_TRUE(file) << file.error().message;
  if ((*file)->find_meta("rabit.format_version") != nullptr) {
    GTEST_SKIP() << "the bound is for layers of floats";
  }
  const std::vector<int32_t> tokens = random_tokens(kPositions, 8, 49152);
  const std::vector<Floats> got = all_logits(*session(model_, kPositions), tokens, 49152);
  const std::vector<Floats> want = all_logits(*session(model_, kPositions, kExact), tokens, 49152);
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_LE(relative_error(got[i], want[i]), kError) << "position " << i;
  }
}

#ifdef RABIT_CUDA_EMULATOR
TEST_F(GpuEngine, AGpuWhereBlocksMayNotWaitForEachOther) {
  SmallModel(3, true, 2, kWhole).write(path("model.gguf"));
  emulator::cooperative() = false;
  const auto one = session(path("model.gguf"), 4);
  emulator::cooperative() = true;
  const auto whole = session(path("model.gguf"), 4);
  for (const int32_t token : random_tokens(2, 4, kWhole.vocab)) {
    const auto got = one->forward(std::span(&token, 1)),
               same = whole->forward(std::span(&token, 1));
    ASSERT_TRUE(got && same);
    EXPECT_LE(relative_error(*got, *same), kBound);
  }
  EXPECT_EQ(whole_tokens(*one), 0);
  EXPECT_EQ(whole_tokens(*whole), 2);
}

TEST_F(GpuEngine, ADeviceThatIsTooOldOrTooSmall) {
  const SmallModel small(12, true, 2);
  small.write(path("model.gguf"));
  EngineOptions options = on_gpu();
  options.device = "cuda:1";
  const auto old = Model::load(path("model.gguf"), options);
  ASSERT_FALSE(old);
  EXPECT_EQ(old.error().message,
            "cuda:1 (an old GPU) has compute capability 7.0, for which this rabit has no code: 7.5 "
            "is the oldest");
  const auto model = Model::load(path("model.gguf"), on_gpu());
  ASSERT_TRUE(model);
  const size_t before = emulator::memory_size();
  emulator::memory_size() = emulator::memory_used() + 10000;
  const auto no_pass = Session::create(*model, 1);
  emulator::memory_size() = before;
  ASSERT_FALSE(no_pass);
  EXPECT_EQ(no_pass.error().message.find("a pass of 64 tokens needs "), 0U)
      << no_pass.error().message;
  ASSERT_TRUE(Session::create(*model, 1));
  emulator::memory_size() = emulator::memory_used() + 10000;
  const auto none = Session::create(*model, 1000);
  const auto second = Model::load(path("model.gguf"), on_gpu());
  emulator::memory_size() = before;
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().message.find("a context of 1000 positions needs "), 0U)
      << none.error().message;
  EXPECT_NE(none.error().message.find(" MiB on cuda:0 (an emulated GPU), where 1 of "),
            std::string::npos);
  ASSERT_FALSE(second);
  EXPECT_NE(second.error().message.find("model.gguf needs "), std::string::npos);
}
#endif

}  // namespace
}  // namespace rabit
