// The engine: against a forward pass in double written here from the equations, on small random
// models; against itself (split input, decoding, truncation, packed and reconstructed weights); and
// against transformers' logits of the real model.
#include "rabit/engine.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/interrupt.h"
#include "engine/model.h"
#include "few_stacks.h"
#include "kernels/api/kernels.h"
#include "model/random_model.h"
#include "tiny_model.h"

// Counts what is allocated, for the promise that a token allocates nothing: by new, and as a Buffer
// does.
static std::atomic<int64_t> g_allocations{0};
extern "C" void* aligned_alloc(size_t alignment, size_t size) noexcept {
  ++g_allocations;
  void* p = nullptr;
  return ::posix_memalign(&p, alignment, size) == 0 ? p : nullptr;
}
[[gnu::noinline]] void* operator new(size_t size) {
  ++g_allocations;
  if (void* p = std::malloc(size > 0 ? size : 1); p != nullptr) {
    return p;
  }
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace rabit {
namespace {

// The sizes of every model here.
constexpr TinySizes kSizes;
constexpr int64_t kVocab = kSizes.vocab, kWidth = kSizes.width;

std::vector<int32_t> random_tokens(int64_t count, uint64_t seed) {
  return rabit::random_tokens(count, seed, kVocab);
}

class Engine : public testing::Test {
 protected:
  Engine() {
    folder_ = std::filesystem::temp_directory_path() /
              ("rabit_engine_" + std::to_string(::getpid()) + "_" +
               testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(folder_);
  }
  ~Engine() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path path(const std::string& name) const { return folder_ / name; }

  static std::unique_ptr<Session> session(const std::filesystem::path& path, int64_t capacity,
                                          const EngineOptions& options = {2, true, ""}) {
    auto model = Model::load(path, options);
    EXPECT_TRUE(model) << (model ? "" : model.error().message);
    auto session = Session::create(*model, capacity);
    EXPECT_TRUE(session) << (session ? "" : session.error().message);
    return std::move(session).value();
  }

  static std::vector<Floats> all_logits(Session& session, std::span<const int32_t> tokens,
                                        int64_t vocab = kVocab) {
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

  std::filesystem::path folder_;
};

TEST_F(Engine, EqualsForwardInDouble) {
  std::vector<const KernelTable*> tables = cpu_kernels();
  tables.push_back(&reference_kernels());
  for (const bool tied : {false, true}) {
    for (const int64_t paths : {0, 2}) {
      const SmallModel small(3, tied, paths);
      small.write(path("model.gguf"));
      const std::vector<int32_t> tokens = random_tokens(60, 4);
      const std::vector<Doubles> want = forward_in_double(small, tokens);
      for (const KernelTable* table : tables) {
        const std::string name(table->name);
        const auto exact = session(path("model.gguf"), 60, {2, true, name});
        const auto rounded = session(path("model.gguf"), 60, {1, false, name});
        const std::vector<Floats> got = all_logits(*exact, tokens);
        const std::vector<Floats> halves = all_logits(*rounded, tokens);
        ASSERT_EQ(got.size(), want.size());
        for (size_t i = 0; i < want.size(); ++i) {
          EXPECT_LE(relative_error(got[i], want[i]), 2e-5) << name << " position " << i;
          EXPECT_LE(relative_error(halves[i], want[i]), 1e-2) << name << " position " << i;
        }
      }
    }
  }
}

TEST_F(Engine, PackedEqualsItsReconstruction) {
  for (const int64_t paths : {1, 3, 4}) {
    const SmallModel small(5, false, paths);
    small.write(path("packed.gguf"));
    small.write(path("dense.gguf"), true);
    const std::vector<int32_t> tokens = random_tokens(40, 6);
    const auto packed = session(path("packed.gguf"), 64), dense = session(path("dense.gguf"), 64);
    const std::vector<Floats> got = all_logits(*packed, tokens), want = all_logits(*dense, tokens);
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_LE(relative_error(got[i], want[i]), 2e-5) << paths << " " << i;
    }
    const auto got_next = packed->forward(std::vector<int32_t>{1});
    const auto want_next = dense->forward(std::vector<int32_t>{1});
    EXPECT_LE(relative_error(*got_next, *want_next), 2e-5);
  }
}

ModelConfig two_layers(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t d_ff) {
  ModelConfig config;
  config.architecture = "llama";
  config.layers = 2;
  config.d_model = heads * head_dim;
  config.heads = heads;
  config.kv_heads = kv_heads;
  config.head_dim = head_dim;
  config.d_ff = d_ff;
  config.vocab_size = 200;
  config.context_length = 128;
  return config;
}

TEST_F(Engine, ATokenAllocatesNothing) {
  const ModelConfig config = two_layers(8, 4, 128, 2816);
  ASSERT_TRUE(write_random_model(path("model.gguf"), config, 2));
  const std::vector<int32_t> tokens =
      rabit::random_tokens(kPartPositions + 10, 3, config.vocab_size);
  for (const int threads : {1, 2, 5}) {
    for (const bool small_cache : {false, true}) {
      const auto some =
          session(path("model.gguf"), kPartPositions + 20, {threads, false, "", small_cache});
      ASSERT_TRUE(Buffer::make(1, 1, "a test"));
      int64_t before = g_allocations;
      ASSERT_TRUE(Buffer::make(1, 1, "a test"));
      ASSERT_EQ(g_allocations, ++before);
      ASSERT_TRUE(some->forward(std::span(tokens).first(90)));
      ASSERT_TRUE(some->forward(std::span(tokens).subspan(90, 1)));
      ASSERT_TRUE(some->forward(std::span(tokens).subspan(91)));  // more than a part of positions
      ASSERT_TRUE(some->forward(std::span(tokens).first(1)));
      EXPECT_EQ(g_allocations, before) << threads;
    }
  }
}

// The kernels of this machine, with a count of what they are asked for.
std::atomic<int64_t> g_prepared{0}, g_attentions{0};
void count_and_prepare(const LinearWeights& w, const float* x, int64_t tokens, void* input,
                       int64_t word_begin, int64_t word_end) {
  g_prepared += tokens;
  cpu_kernels().front()->prepare(w, x, tokens, input, word_begin, word_end);
}
void count_and_attend(const AttentionInput& in, int64_t head_begin, int64_t head_end,
                      int64_t token_begin, int64_t token_end, float* scratch, float* out) {
  ++g_attentions;
  cpu_kernels().front()->attention(in, head_begin, head_end, token_begin, token_end, scratch, out);
}

// Every thread has something to do, and little twice: each that makes a part of a token's input
// ready looks at all of the token.
TEST_F(Engine, WorkIsSharedByManyThreads) {
  const ModelConfig config = two_layers(8, 2, 64, 1024);
  ASSERT_TRUE(write_random_model(path("model.gguf"), config, 2));
  const std::vector<int32_t> prompt = rabit::random_tokens(100, 3, config.vocab_size);
  KernelTable table = *cpu_kernels().front();
  if (table.prepare == nullptr) {
    GTEST_SKIP() << "no input to prepare here";
  }
  table.prepare = count_and_prepare;
  table.attention = count_and_attend;
  const int64_t threads = 8, inputs = 7 * config.layers;
  std::vector<Floats> got;
  for (const int64_t count : {int64_t{1}, threads}) {
    const auto model = Model::load(path("model.gguf"), {static_cast<int>(count)});
    ASSERT_TRUE(model);
    static_cast<LoadedModel&>(**model).table = &table;
    const auto s = Session::create(*model, 200);
    ASSERT_TRUE(s);
    for (const int64_t tokens : {1, 3, 5, 8, 12, 32}) {
      g_prepared = 0;
      ASSERT_TRUE((*s)->forward(std::span(prompt).first(tokens)));
      const int64_t ranges = tokens < count ? (count + tokens - 1) / tokens : 1;
      EXPECT_LE(g_prepared, inputs * tokens * ranges + count) << tokens;  // and the head's
    }
    (*s)->truncate(0);
    g_attentions = 0;
    const auto logits = (*s)->forward(prompt);
    ASSERT_TRUE(logits);
    EXPECT_GE(g_attentions, config.layers * 2 * count);
    got.emplace_back(logits->begin(), logits->end());
  }
  EXPECT_EQ(got[0], got[1]);
}

// Attention of few tokens is cut over positions: bit for bit the same for any number of threads,
// and up to rounding that of many tokens, which is not cut.
TEST_F(Engine, PositionsInPartsAreTheSameForAnyNumberOfThreads) {
  const SmallModel small(17, true, 2, {.width = 64, .heads = 2, .kv_heads = 1, .context = 2000});
  small.write(path("model.gguf"));
  const std::vector<int32_t> tokens = random_tokens(2 * kPartPositions + 30, 8);
  const auto capacity = static_cast<int64_t>(tokens.size());
  const std::vector<Floats> whole = all_logits(*session(path("model.gguf"), capacity), tokens);
  std::vector<std::string> tables = {"reference"};
  for (const KernelTable* table : cpu_kernels()) {
    tables.emplace_back(table->name);
  }
  for (const std::string& table : tables) {
    for (const auto& [as_f32, small_cache] :
         {std::pair{true, false}, {false, false}, {false, true}}) {
      if (table == "reference" && !as_f32) {
        continue;  // as F32, only slower
      }
      SCOPED_TRACE(table + (as_f32 ? " F32" : small_cache ? " Q8_0" : " F16"));
      std::vector<Floats> want;
      for (const int threads : {1, 2, 3, 4, 5}) {
        if (table == "reference" && threads > 2) {
          break;
        }
        const auto s = session(path("model.gguf"), capacity, {threads, as_f32, table, small_cache});
        ASSERT_TRUE(s->forward(std::span(tokens).first(kPartPositions - 2)));
        std::vector<Floats> got;
        const auto add = [&](int64_t count) {
          const auto next = s->forward(std::span(tokens).subspan(s->position(), count));
          ASSERT_TRUE(next);
          got.emplace_back(next->begin(), next->end());
          if (as_f32) {
            EXPECT_LE(relative_error(*next, whole[s->position() - 1]), 2e-5) << s->position();
          }
        };
        for (int i = 0; i < 4; ++i) {
          add(1);
        }
        add(2);
        ASSERT_TRUE(s->forward(
            std::span(tokens).subspan(s->position(), 2 * kPartPositions - 1 - s->position())));
        for (const int64_t count : {1, 1, 1, 20}) {
          add(count);
        }
        if (want.empty()) {
          want = got;
        }
        EXPECT_EQ(got, want) << threads;
      }
    }
  }
}

// What products need in memory is that of the largest layer, wherever it is.
TEST_F(Engine, LayersOfDifferentPaths) {
  SmallModel small(11, true, 1), larger(11, true, 4);
  for (const char* name :
       {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}) {
    const std::string layer = std::string("blk.1.") + name;
    small.dense[layer] = larger.dense[layer];
    small.signs[layer] = larger.signs[layer];
    small.rows[layer] = larger.rows[layer];
    small.columns[layer] = larger.columns[layer];
  }
  small.write(path("packed.gguf"));
  small.write(path("dense.gguf"), true);
  const std::vector<int32_t> tokens = random_tokens(40, 6);
  const std::vector<Floats> want = all_logits(*session(path("dense.gguf"), 64), tokens);
  for (const KernelTable* table : cpu_kernels()) {
    for (const bool as_f32 : {false, true}) {
      const auto mixed = session(path("packed.gguf"), 64, {2, as_f32, std::string(table->name)});
      const std::vector<Floats> got = all_logits(*mixed, tokens);
      for (size_t i = 0; i < want.size(); ++i) {
        EXPECT_LE(relative_error(got[i], want[i]), as_f32 ? 2e-5 : 1e-2) << table->name << " " << i;
      }
    }
  }
}

// Packed layers beside dense ones that read the same, and a KV cache of Q8_0, with more tokens than
// kernels take together.
TEST_F(Engine, MixedLayersAndASmallCache) {
  SmallModel small(9, false, 2, {.width = 64, .heads = 2, .kv_heads = 1, .context = 128});
  const std::vector<int32_t> tokens = random_tokens(100, 8);
  small.write(path("packed.gguf"));
  const auto exact = session(path("packed.gguf"), 128);
  const std::vector<Floats> want = all_logits(*exact, tokens);
  small.left_dense = {"blk.0.attn_k", "blk.1.attn_q", "blk.1.attn_v", "blk.1.ffn_gate"};
  small.write(path("mixed.gguf"));
  for (const KernelTable* table : cpu_kernels()) {
    SCOPED_TRACE(table->name);
    for (const bool small_cache : {false, true}) {
      const auto mixed =
          session(path("mixed.gguf"), 128, {3, false, std::string(table->name), small_cache});
      const std::vector<Floats> got = all_logits(*mixed, tokens);
      for (size_t i = 0; i < want.size(); ++i) {
        EXPECT_LE(relative_error(got[i], want[i]), small_cache ? 3e-2 : 1e-2) << i;
      }
      mixed->truncate(60);
      for (size_t i = 60; i < 70; ++i) {
        const auto next = mixed->forward(std::span(tokens).subspan(i, 1));
        EXPECT_LE(relative_error(*next, want[i]), small_cache ? 3e-2 : 1e-2) << i;
      }
    }
  }
}

/// What rounding may move logits by, relative to their norm: independent errors of a model's
/// products by lookup and of its cache in F16, each relative to the rms of what is rounded.
double rounding_bound(const KernelTable& table, int64_t layers) {
  constexpr double kUniform = 0.289;    // rms of an error spread evenly over a step
  constexpr double kLargestToRms = 3;   // of sums of four columns, in a group of some hundred
  constexpr double kAmplification = 3;  // of an error on its way to the logits, and its spread
  const auto products = static_cast<double>(7 * layers + 1), kept = static_cast<double>(2 * layers);
  const double product =
      table.sign_order == WeightOrder::kByteTiles   ? kUniform * kLargestToRms / 2047
      : table.sign_order == WeightOrder::kTilePairs ? kUniform * 2 * kLargestToRms / 32765
                                                    : 0;  // floats; steps for each of four columns
  const double half = kUniform * 0x1p-10;
  return kAmplification * std::sqrt(products * product * product + kept * half * half);
}

// Packed layers and a head in Q8_0, by every table's kernels: few tokens, many, and one at a time.
TEST_F(Engine, KernelsAgreeOnAPackedModel) {
  const ModelConfig config = two_layers(6, 2, 16, 160);
  const std::vector<int32_t> tokens = rabit::random_tokens(70, 3, config.vocab_size);
  for (const int64_t paths : {1, 2, 4}) {
    const auto file = path("packed.gguf");
    ASSERT_TRUE(write_random_model(file, config, paths));
    for (const bool as_f32 : {false, true}) {
      const auto oracle = session(file, 128, {2, as_f32, "reference"});
      const std::vector<Floats> want = all_logits(*oracle, tokens, config.vocab_size);
      for (const KernelTable* table : cpu_kernels()) {
        SCOPED_TRACE(std::string(table->name) + ", paths " + std::to_string(paths));
        const double bound = as_f32 ? 2e-5 : rounding_bound(*table, config.layers);
        const auto many = session(file, 128, {3, as_f32, std::string(table->name)});
        const std::vector<Floats> got = all_logits(*many, tokens, config.vocab_size);
        const auto one = session(file, 128, {1, as_f32, std::string(table->name)});
        for (size_t i = 0; i < want.size(); ++i) {
          EXPECT_LE(relative_error(got[i], want[i]), bound) << i;
          const auto next = one->forward(std::span(tokens).subspan(i, 1));
          ASSERT_TRUE(next);
          EXPECT_LE(relative_error(*next, want[i]), bound) << i;
        }
      }
    }
  }
}

TEST_F(Engine, RefusesBlocksWithoutFiniteScales) {
  ModelConfig config;
  config.architecture = "llama";
  config.layers = 1;
  config.d_model = config.d_ff = 32;
  config.heads = config.kv_heads = 2;
  config.head_dim = 16;
  config.vocab_size = 20;
  config.context_length = 8;
  const auto file = path("blocks.gguf");
  ASSERT_TRUE(write_random_model(file, config, 1));
  ASSERT_TRUE(Model::load(file, {}));
  const auto size = static_cast<int64_t>(std::filesystem::file_size(file));
  const auto head = GgufFile::open(file).value()->find_tensor("output.weight")->data.size();
  for (const uint16_t scale : {0x7C00, 0x7E00, 0xFC00}) {
    // The head is the last tensor; its last block's scale.
    std::fstream out(file, std::ios::binary | std::ios::in | std::ios::out);
    out.seekp(size - static_cast<int64_t>(head + 31) / 32 * 32 + static_cast<int64_t>(head) - 34);
    out.write(reinterpret_cast<const char*>(&scale), sizeof scale);
    out.close();
    const auto refused = Model::load(file, {});
    ASSERT_FALSE(refused);
    EXPECT_NE(refused.error().message.find("output.weight: a scale is not finite"),
              std::string::npos);
  }
}

TEST_F(Engine, AnInterruptEndsAPassAndLeavesThePosition) {
  SmallModel(7, true, 2).write(path("model.gguf"));
  const auto s = session(path("model.gguf"), 700);
  const std::vector<int32_t> tokens = random_tokens(600, 8);  // more than one chunk
  const std::vector<Floats> want = all_logits(*s, tokens);
  s->truncate(3);
  set_interrupted(true);
  const auto next = s->forward(tokens);
  set_interrupted(false);
  EXPECT_TRUE(!next && next.error().interrupted);
  const Status all = s->forward_all(
      tokens, [](int64_t, int64_t, const float*) { set_interrupted(true); });  // after one chunk
  set_interrupted(false);
  EXPECT_TRUE(!all && all.error().interrupted);
  EXPECT_EQ(s->position(), 3);
  s->truncate(0);
  EXPECT_EQ(all_logits(*s, tokens), want);
}

// The portable kernels, with an interrupt in a forward pass's second chunk: the kernels of its
// first block ask to stop, the second block is not run.
int g_norms_left = 0;
void norm_and_interrupt(const float* x, const float* weight, int64_t tokens, int64_t d,
                        float epsilon, float* y) {
  if (--g_norms_left == 0) {
    set_interrupted(true);
  }
  cpu_kernels().back()->rms_norm(x, weight, tokens, d, epsilon, y);
}

TEST_F(Engine, AnInterruptInALaterChunkLeavesThePosition) {
  SmallModel(7, true, 2).write(path("model.gguf"));
  const std::vector<int32_t> tokens = random_tokens(700, 8);
  const EngineOptions options = {1, true, "portable"};
  const auto whole = session(path("model.gguf"), 700, options);
  const auto want = whole->forward(tokens);
  ASSERT_TRUE(want);

  const auto model = Model::load(path("model.gguf"), options);
  ASSERT_TRUE(model);
  KernelTable table = *cpu_kernels().back();
  table.rms_norm = norm_and_interrupt;
  static_cast<LoadedModel&>(**model).table = &table;
  const auto s = Session::create(*model, 700);
  ASSERT_TRUE(s);
  ASSERT_TRUE((*s)->forward(std::span(tokens).first(3)));
  g_norms_left = 2 * kSizes.layers + 1;  // two a block: the first of the second chunk
  const auto next = (*s)->forward(std::span(tokens).subspan(3));
  set_interrupted(false);
  EXPECT_EQ(g_norms_left, -1);  // the block's second norm is the last
  ASSERT_FALSE(next);
  EXPECT_TRUE(next.error().interrupted);
  EXPECT_EQ((*s)->position(), 3);
  const auto again = (*s)->forward(std::span(tokens).subspan(3));
  ASSERT_TRUE(again);
  EXPECT_LE(relative_error(*again, *want), 2e-5);
}

TEST_F(Engine, SplittingTheInputChangesNothing) {
  const SmallModel small(7, true, 2);
  small.write(path("model.gguf"));
  const std::vector<int32_t> tokens = random_tokens(700, 8);  // more than one chunk
  for (const bool as_f32 : {true, false}) {
    const double bound = as_f32 ? 2e-5 : rounding_bound(*cpu_kernels().front(), kSizes.layers);
    const EngineOptions options = {2, as_f32, ""};
    const auto whole = session(path("model.gguf"), 700, options);
    const std::vector<Floats> want = all_logits(*whole, tokens);
    ASSERT_EQ(want.size(), 700U);
    for (const std::vector<int64_t>& pieces :
         {std::vector<int64_t>{512, 188}, {1, 511, 1, 187}, {13, 600, 87}, {9, 8, 683}}) {
      const auto split = session(path("model.gguf"), 700, {1, as_f32, ""});
      int64_t at = 0;
      for (const int64_t piece : pieces) {
        const auto got = split->forward(std::span(tokens).subspan(at, piece));
        ASSERT_TRUE(got);
        at += piece;
        EXPECT_EQ(split->position(), at);
        EXPECT_LE(relative_error(*got, want[at - 1]), bound) << at;
      }
    }
    const auto single = session(path("model.gguf"), 700, options);
    for (int64_t i = 0; i < 100; ++i) {
      const auto got = single->forward(std::span(tokens).subspan(i, 1));
      ASSERT_TRUE(got);
      EXPECT_LE(relative_error(*got, want[i]), bound) << i;
    }
  }
}

// Pieces of more tokens than count as few go the same way as all of them: to the bit.
TEST_F(Engine, LargePiecesAreTheWholeToTheBit) {
  SmallModel(7, true, 2).write(path("model.gguf"));
  const std::vector<int32_t> tokens = random_tokens(700, 8);
  for (const KernelTable* table : cpu_kernels()) {
    for (const bool as_f32 : {true, false}) {
      const EngineOptions options = {2, as_f32, std::string(table->name)};
      const auto whole = session(path("model.gguf"), 700, options);
      const auto want = whole->forward(tokens);
      ASSERT_TRUE(want);
      const auto split = session(path("model.gguf"), 700, options);
      Floats got;
      for (const int64_t piece : {100, 49, 300, 251}) {
        const auto next = split->forward(std::span(tokens).subspan(split->position(), piece));
        ASSERT_TRUE(next);
        got.assign(next->begin(), next->end());
      }
      EXPECT_EQ(got, Floats(want->begin(), want->end())) << table->name << " " << as_f32;
    }
  }
}

TEST_F(Engine, SeveralSessionsAtOnceAreEachAlone) {
  for (const bool dense_as_f32 : {false, true}) {
    const SmallModel small(9, true, 2);
    small.write(path("model.gguf"));
    EngineOptions options;
    options.threads = 3;
    options.dense_as_f32 = dense_as_f32;
    const auto model = Model::load(path("model.gguf"), options);
    ASSERT_TRUE(model) << model.error().message;
    const int64_t vocab = small.sizes.vocab;
    constexpr size_t kSessions = 6, kSteps = 2;
    std::vector<std::unique_ptr<Session>> owned, alone;
    std::vector<Session*> all;
    for (size_t i = 0; i < kSessions; ++i) {  // the first has the least room
      const auto prompt = random_tokens(static_cast<int64_t>(1 + 2 * i), 30 + i);
      for (auto* const sessions : {&owned, &alone}) {
        auto one = Session::create(*model, static_cast<int64_t>(prompt.size() + kSteps));
        ASSERT_TRUE(one);
        ASSERT_TRUE((*one)->forward(prompt));
        sessions->push_back(std::move(*one));
      }
      all.push_back(owned.back().get());
    }
    std::vector<int32_t> next;
    for (size_t step = 0; step < kSteps; ++step) {
      next = random_tokens(kSessions, 50 + step);
      const auto got = Session::forward_each(all, next);
      ASSERT_TRUE(got) << got.error().message;
      const std::vector<float> logits(got->begin(), got->end());
      ASSERT_EQ(logits.size(), kSessions * static_cast<size_t>(vocab));
      for (size_t i = 0; i < kSessions; ++i) {
        const auto want = alone[i]->forward(std::span(next).subspan(i, 1));
        ASSERT_TRUE(want);
        EXPECT_EQ(all[i]->position(), alone[i]->position());
        EXPECT_TRUE(std::equal(want->begin(), want->end(),
                               logits.begin() + static_cast<int64_t>(i) * vocab))
            << i << ", " << step;
      }
    }
    EXPECT_FALSE(Session::forward_each(all, next)) << "they are full";
    for (Session* one : all) {
      one->truncate(1);
    }
    next.back() = static_cast<int32_t>(vocab);
    EXPECT_FALSE(Session::forward_each(all, next));
    next.back() = 0;
    set_interrupted(true);
    const auto interrupted = Session::forward_each(all, next);
    set_interrupted(false);
    EXPECT_TRUE(!interrupted && interrupted.error().interrupted);
    const auto other_model = Model::load(path("model.gguf"), options);
    ASSERT_TRUE(other_model);
    const auto other = Session::create(*other_model, 4);
    ASSERT_TRUE(other);
    std::vector<Session*> mixed = all;
    mixed[1] = other->get();
    EXPECT_FALSE(Session::forward_each(mixed, next)) << "two models";
    mixed[1] = mixed[0];
    EXPECT_FALSE(Session::forward_each(mixed, next)) << "one twice";
    EXPECT_FALSE(Session::forward_each(all, std::span(next).first(2)));
    EXPECT_FALSE(Session::forward_each({}, {}));
    for (const Session* one : all) {
      EXPECT_EQ(one->position(), 1);
    }
  }
}

TEST_F(Engine, TruncateForgets) {
  const SmallModel small(9, true, 0);
  small.write(path("model.gguf"));
  const std::vector<int32_t> tokens = random_tokens(50, 10);
  const auto one = session(path("model.gguf"), 64);
  const std::vector<Floats> want = all_logits(*one, tokens);
  one->truncate(20);
  EXPECT_EQ(one->position(), 20);
  ASSERT_TRUE(one->forward(random_tokens(30, 11)));
  one->truncate(20);
  const std::vector<Floats> got = all_logits(*one, std::span(tokens).subspan(20));
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_LE(relative_error(got[i], want[20 + i]), 2e-5);
  }
  one->truncate(1000);  // there is nothing to forget there
  EXPECT_EQ(one->position(), 50);
  one->truncate(-3);
  EXPECT_EQ(one->position(), 0);
}

TEST_F(Engine, RefusesBadInputAndKeepsItsState) {
  const SmallModel small(12, true, 0);
  small.write(path("model.gguf"));
  const auto one = session(path("model.gguf"), 8);
  const std::vector<int32_t> tokens = {1, 2, 3, 4, 5};
  const auto want_next = [&] {
    const auto fresh = session(path("model.gguf"), 8);
    (void)fresh->forward(tokens);
    const auto logits = fresh->forward(std::vector<int32_t>{6});
    return Floats(logits->begin(), logits->end());
  }();
  ASSERT_TRUE(one->forward(tokens));
  EXPECT_FALSE(one->forward({}));
  EXPECT_FALSE(one->forward(std::vector<int32_t>{1, static_cast<int32_t>(kVocab)}));
  EXPECT_FALSE(one->forward(std::vector<int32_t>{-1}));
  const auto long_input = one->forward(std::vector<int32_t>{1, 2, 3, 4});
  ASSERT_FALSE(long_input);
  EXPECT_NE(long_input.error().message.find("8 positions"), std::string::npos);
  EXPECT_FALSE(one->forward_all(std::vector<int32_t>{1, 2, 3, 4}, {}));
  EXPECT_EQ(one->position(), 5);
  const auto next = one->forward(std::vector<int32_t>{6});
  ASSERT_TRUE(next);
  EXPECT_EQ(Floats(next->begin(), next->end()), want_next);
}

TEST_F(Engine, RefusesBadOptionsAndFiles) {
  SmallModel small(13, true, 2);
  small.write(path("model.gguf"));
  EXPECT_FALSE(Model::load(path("missing.gguf"), {}));
  EXPECT_FALSE(Model::load(path("model.gguf"), {.threads = -1}));
  const auto unknown = Model::load(path("model.gguf"), {.kernels = "nonsense"});
  ASSERT_FALSE(unknown);
  EXPECT_NE(unknown.error().message.find("portable"), std::string::npos);
  const auto model = Model::load(path("model.gguf"), {.threads = 1});
  ASSERT_TRUE(model);
  EXPECT_EQ((*model)->vocab_size(), kVocab);
  EXPECT_EQ((*model)->context_length(), 64);
  EXPECT_EQ((*model)->threads(), 1);
  {
    const FewStacks few;
    const auto crowded = Model::load(path("model.gguf"), {.threads = 1000});
    ASSERT_FALSE(crowded);
    EXPECT_NE(crowded.error().message.find(" of 1000 threads can be started"), std::string::npos);
  }
  EXPECT_FALSE(Session::create(*model, 0));
  EXPECT_FALSE(Session::create(*model, int64_t{1} << 60));
  EXPECT_FALSE(Session::create(nullptr, 8));

  small.rows["blk.0.attn_q"][3] = 0x7C00;  // infinity
  small.write(path("scale.gguf"));
  const auto scale = Model::load(path("scale.gguf"), {});
  ASSERT_FALSE(scale);
  EXPECT_NE(scale.error().message.find("blk.0.attn_q.row_scale"), std::string::npos);

  SmallModel large(14, true, 0);
  large.dense["blk.1.ffn_up.weight"][7] = 1e6F;
  large.write(path("large.gguf"));
  EXPECT_FALSE(Model::load(path("large.gguf"), {}));
  EXPECT_TRUE(Model::load(path("large.gguf"), {.dense_as_f32 = true}));
  large.dense["blk.1.ffn_up.weight"][7] = std::numeric_limits<float>::quiet_NaN();
  large.write(path("nan.gguf"));
  EXPECT_FALSE(Model::load(path("nan.gguf"), {.dense_as_f32 = true}));

  const auto cache = Model::load(path("scale.gguf"), {.cache_q8_0 = true});
  ASSERT_FALSE(cache);
  EXPECT_NE(cache.error().message.find("heads of a multiple of 32, not 12"), std::string::npos);
}

TEST_F(Engine, WeightBytesAreThoseOfOneToken) {
  const SmallModel small(15, true, 2);
  small.write(path("model.gguf"));
  uint64_t want = kVocab * kWidth * 2;
  for (const auto& [name, words] : small.signs) {
    want += words.size() * 4 + (small.rows.at(name).size() + small.columns.at(name).size()) * 2;
  }
  EXPECT_EQ((*Model::load(path("model.gguf"), {}))->weight_bytes(), want);
}

TEST_F(Engine, EqualsTransformers) {
  if (!std::filesystem::exists(RABIT_MODEL)) {
    GTEST_SKIP() << RABIT_MODEL << " is missing";
  }
  std::ifstream in(RABIT_SOURCE_DIR "/tests/golden/logits.json");
  ASSERT_TRUE(in) << "tests/golden/logits.json is missing";
  const auto golden = nlohmann::json::parse(in);
  const auto tokens = golden["tokens"].get<std::vector<int32_t>>();
  const auto probes = golden["probe_ids"].get<std::vector<int64_t>>();
  const auto want = golden["logits"].get<std::vector<Doubles>>();
  const auto logsumexp = golden["logsumexp"].get<Doubles>();
  const auto argmax = golden["argmax"].get<std::vector<int64_t>>();
  const auto vocab = golden["vocab_size"].get<int64_t>();
  const auto check = [&](bool as_f32, double tolerance) {
    const auto one = session(RABIT_MODEL, static_cast<int64_t>(tokens.size()), {0, as_f32, ""});
    const std::vector<Floats> got = all_logits(*one, tokens, vocab);
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      Floats probed;
      for (const int64_t id : probes) {
        probed.push_back(got[i][id]);
      }
      ASSERT_LE(relative_error(probed, want[i]), tolerance) << "position " << i;
      const double log_sum = reference_kernels().cross_entropy(got[i].data(), vocab, 0) + got[i][0];
      ASSERT_NEAR(log_sum, logsumexp[i], tolerance * std::abs(logsumexp[i])) << "position " << i;
      if (as_f32) {
        const auto top = std::max_element(got[i].begin(), got[i].end()) - got[i].begin();
        // A tie within the tolerance may go either way.
        ASSERT_GE(got[i][argmax[i]], got[i][top] - tolerance * std::abs(got[i][top]));
      }
    }
  };
  check(true, 1e-4);
  check(false, 2e-2);
}

}  // namespace
}  // namespace rabit
