// What a run will hold on a GPU: parts counted by hand, peaks that were measured, and settings that
// fit where the given ones do not.
#include "train/memory_plan.h"

#include <gtest/gtest.h>

#include <sstream>

namespace rabit::train {
namespace {

ModelConfig smollm_135m() {
  ModelConfig config;
  config.layers = 30;
  config.d_model = 576;
  config.heads = 9;
  config.kv_heads = 3;
  config.head_dim = 64;
  config.d_ff = 1536;
  config.vocab_size = 49152;
  config.context_length = 8192;
  config.tied_head = true;
  return config;
}

ModelConfig llama_7b() {
  ModelConfig config;
  config.layers = 32;
  config.d_model = 4096;
  config.heads = config.kv_heads = 32;
  config.head_dim = 128;
  config.d_ff = 11008;
  config.vocab_size = 32000;
  config.context_length = 4096;
  return config;
}

int64_t part(const MemoryPhase& phase, const std::string& what) {
  for (const MemoryPart& one : phase.parts) {
    if (one.what == what) {
      return one.bytes;
    }
  }
  ADD_FAILURE() << what;
  return 0;
}

TEST(MemoryPlan, PartsByHand) {
  ModelConfig config;
  config.layers = 2;
  config.d_model = 8;
  config.heads = 2;
  config.kv_heads = 1;
  config.head_dim = 4;
  config.d_ff = 16;
  config.vocab_size = 10;
  const int64_t block = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 16;
  const int64_t extents = (8 + 8) + 2 * (4 + 8) + (8 + 8) + 3 * (8 + 16);
  const int64_t norms = 5 * 8;
  QuantizeOptions options;
  options.seq_len = 32;
  options.batch = 4;
  auto phases = plan_memory(config, *PathPlan::parse("3"), options, 1024, 128);
  ASSERT_EQ(phases.size(), 2U);
  const MemoryPhase start = phases[0], end = phases[1];  // phases are planned anew below
  EXPECT_EQ(part(start, "original"), 2 * (2 * block + 2 * 80) + 4 * norms);
  EXPECT_EQ(part(start, "streams of the text"), 1024 * 3 * 4 * 8);  // of a block's training
  options.warm_epochs = 0;
  const auto untrained = plan_memory(config, *PathPlan::parse("3"), options, 1024, 0);
  EXPECT_EQ(part(untrained[0], "streams of the text"), 1024 * (4 * 4 * 8 + 2 * 2 * 8));
  EXPECT_EQ(part(untrained[0], "a layer's fit"), 6 * 4 * 16 * 16);
  const int64_t leaves = 4 * 2 * (block + 3 * extents);
  EXPECT_EQ(part(end, "latents and scales"), leaves);
  EXPECT_EQ(part(end, "optimizer"), 2 * leaves);
  EXPECT_EQ(part(end, "weights of the paths"), 2 * 2 * block);
  int64_t sum = 0;
  for (const MemoryPart& one : end.parts) {
    sum += one.bytes;
  }
  EXPECT_EQ(end.bytes(), sum);
  const int64_t a_token = 2 * (4 * 8 + 4 + 2 * 8) + 2 * (8 + 2 * 4) + 2 * 8 + 4 * 2 + 6 * 16;
  EXPECT_EQ(part(end, "activations, then gradients"), std::max<int64_t>(leaves, 2 * 128 * a_token));
  options.micro_batch = 2;
  EXPECT_EQ(part(plan_memory(config, *PathPlan::parse("3"), options, 0, 128)[0], "gradients"),
            leaves);
  EXPECT_EQ(peak_bytes(phases), std::max(start.bytes(), end.bytes()));
  EXPECT_NE(end.describe().find("distillation 0.00 GB: original 0.00, "), std::string::npos)
      << end.describe();

  options.method = Method::kStandard;  // a latent a path
  options.optimizer = Optimizer::kMuon;
  options.momentum = MomentumType::kBF16;
  options.ema = 0.9;
  phases = plan_memory(config, *PathPlan::parse("3"), options, 0, 128);
  ASSERT_EQ(phases.size(), 1U);
  EXPECT_EQ(part(phases[0], "latents and scales"), 4 * 2 * 3 * (block + extents));
  EXPECT_EQ(part(phases[0], "optimizer"), 2 * 2 * 3 * block + 8 * 2 * 3 * extents);
  EXPECT_EQ(part(phases[0], "average of the latents"), 4 * 2 * 3 * block);
  EXPECT_TRUE(plan_memory(config, *PathPlan::parse("3"), options, 0, 0).empty());

  // Of two processes each has half of what is trained, and of the windows.
  options = QuantizeOptions();
  options.seq_len = 32;
  options.batch = 4;
  const MemoryPhase half = plan_memory(config, *PathPlan::parse("3"), options, 0, 128, 2)[0];
  EXPECT_EQ(part(half, "original"), part(end, "original"));
  EXPECT_EQ(part(half, "latents and scales"), leaves / 2);
  EXPECT_EQ(part(half, "optimizer"), leaves);
  EXPECT_EQ(part(half, "activations, then gradients"),
            std::max<int64_t>(leaves / 2, 2 * 64 * a_token));
  EXPECT_EQ(part(half, "exchanges"), block * (2 * 2 + 3 * 4) + 2 * block);
  options.share_original = true;  // half of it, and three blocks under way
  const MemoryPhase shared = plan_memory(config, *PathPlan::parse("3"), options, 0, 128, 2)[0];
  EXPECT_EQ(part(shared, "original"), 2 * (block + 3 * block + 2 * 80) + 4 * norms);
}

// Device memory of runs on an H200 (docs/results/training.md).
TEST(MemoryPlan, WhatWasMeasured) {
  const auto expect_near = [](const QuantizeOptions& options, int64_t calib, int64_t distilled,
                              double gigabytes) {
    const auto phases =
        plan_memory(smollm_135m(), *PathPlan::parse("2"), options, calib, distilled);
    EXPECT_NEAR(static_cast<double>(peak_bytes(phases)) / 1e9 / gigabytes, 1.0, 0.05) << gigabytes;
  };
  QuantizeOptions options;
  expect_near(options, 262144, 0, 4.542);
  expect_near(options, 1048576, 4'000'000, 15.240);
  expect_near(options, 32768, 983040, 11.943);
  options.micro_batch = 8;
  expect_near(options, 32768, 655360, 7.598);
  options.micro_batch = 4;
  options.recompute = true;
  expect_near(options, 32768, 327680, 2.745);
  options.micro_batch = 0;
  expect_near(options, 32768, 655360, 3.435);
  options.recompute = false;
  options.optimizer = Optimizer::kMuon;
  expect_near(options, 32768, 655360, 11.610);
}

// As a command line would.
void apply(const std::string& written, QuantizeOptions& options, int64_t& calib) {
  std::istringstream words(written);
  for (std::string word; words >> word;) {
    std::string value;
    if (word == "--recompute") {
      options.recompute = true;
    } else if (word == "--share-original") {
      options.share_original = true;
    } else if (word == "--micro-batch") {
      words >> options.micro_batch;
    } else if (word == "--calib-tokens") {
      words >> calib;
    } else if (word == "--optimizer") {
      words >> value;
      EXPECT_EQ(value, "muon");
      options.optimizer = Optimizer::kMuon;
    } else if (word == "--momentum") {
      words >> value;
      EXPECT_EQ(value, "bf16");
      options.momentum = MomentumType::kBF16;
    } else {
      ADD_FAILURE() << word;
    }
  }
}

// Eight H200: 70 billion weights fit where every process has a part of all.
TEST(MemoryPlan, SeventyBillionOnEight) {
  ModelConfig config;
  config.layers = 80;
  config.d_model = 8192;
  config.heads = 64;
  config.kv_heads = 8;
  config.head_dim = 128;
  config.d_ff = 28672;
  config.vocab_size = 32000;
  config.context_length = 4096;
  QuantizeOptions options;
  options.seq_len = 4096;
  options.warm_batch = options.batch = 8;
  const int64_t limit = 140'000'000'000, calib = 1 << 20, distilled = 4'000'000;
  const PathPlan bits = *PathPlan::parse("2");
  EXPECT_FALSE(options_within(config, bits, options, calib, distilled, limit));
  const auto written = options_within(config, bits, options, calib, distilled, limit, 8);
  ASSERT_TRUE(written);
  EXPECT_EQ(written->rfind("--share-original", 0), 0U) << *written;
  int64_t tokens = calib;
  apply(*written, options, tokens);
  EXPECT_LE(peak_bytes(plan_memory(config, bits, options, tokens, distilled, 8)), limit);
}

TEST(MemoryPlan, SettingsThatFit) {
  const PathPlan bits = *PathPlan::parse("2");
  int found = 0, without = 0;
  for (const auto& config : {smollm_135m(), llama_7b()}) {
    QuantizeOptions options;
    options.seq_len = config.layers == 32 ? 4096 : 1024;
    const int64_t calib = 262144, distilled = 4'000'000;
    for (double bytes = 1e9; bytes < 400e9; bytes *= 1.3) {
      const auto limit = static_cast<int64_t>(bytes);
      const auto written = options_within(config, bits, options, calib, distilled, limit);
      if (!written) {
        ++without;
        EXPECT_GT(peak_bytes(plan_memory(config, bits, options, calib, distilled)), limit);
        continue;
      }
      ++found;
      QuantizeOptions fitting = options;
      int64_t less = calib;
      apply(*written, fitting, less);
      EXPECT_LE(peak_bytes(plan_memory(config, bits, fitting, less, distilled)), limit) << *written;
    }
  }
  EXPECT_GT(found, 10);
  EXPECT_GT(without, 2);
  const auto fits_as_it_is =
      options_within(smollm_135m(), bits, {}, 1024, 1'000'000, int64_t{1} << 40);
  EXPECT_EQ(fits_as_it_is, "");
}

}  // namespace
}  // namespace rabit::train
