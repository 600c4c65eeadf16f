// A fixture for whole runs of train::quantize on a tiny model.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/interrupt.h"
#include "cli/engine_logits.h"
#include "eval/perplexity.h"
#include "tiny_model.h"
#include "train/session.h"

namespace rabit::train {

using nlohmann::json;

inline constexpr TinySizes kSizes{
    .layers = 3, .width = 64, .heads = 4, .kv_heads = 2, .hidden = 96, .vocab = 80, .context = 64};
inline constexpr int64_t kWindow = 32, kTokens = 40 * kWindow;

/// Of a file, by the runtime.
inline double engine_perplexity(const std::filesystem::path& path, const HeldOut& held_out) {
  const auto model = Model::load(path, {1, true, ""});
  EXPECT_TRUE(model) << (model ? "" : model.error().message);
  const auto source = cli::EngineLogitSource::create(*model, held_out.ctx);
  EXPECT_TRUE(source);
  const auto result = perplexity(**source, held_out.tokens, {held_out.ctx, 0}, {});
  EXPECT_TRUE(result);
  return result->perplexity;
}

class TrainRun : public testing::Test {
 protected:
  TrainRun()
      : folder_(std::filesystem::temp_directory_path() /
                ("rabit_train_run_" + std::to_string(::getpid()) + "_" +
                 testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::filesystem::create_directories(folder_);
    write_model(SmallModel(1, true, 0, kSizes));
    set_text(random_tokens(kTokens, 2, kSizes.vocab));
    held_out_ = {random_tokens(4 * kWindow, 3, kSizes.vocab), kWindow};
    options_.threads = 1;
    options_.compute = Compute::kF32;
    options_.seq_len = kWindow;
    options_.calib_tokens = 16 * kWindow;
    options_.warm_epochs = 2;
    options_.warm_batch = 4;
    options_.batch = 4;
    options_.tokens = 6 * 4 * kWindow;  // six steps
  }
  ~TrainRun() override {
    set_interrupted(false);
    std::filesystem::remove_all(folder_);
  }

  void write_model(const SmallModel& small) {
    small.write(folder_ / "model.gguf");
    auto model = GgufFile::open(folder_ / "model.gguf");
    ASSERT_TRUE(model);
    model_ = std::move(model).value();
  }

  void set_text(std::vector<int32_t> tokens) {
    tokens_ = tokens;
    text_ = {{source_of(std::move(tokens), "text.txt", std::string(64, 'a'))}};
  }

  std::filesystem::path path(const std::string& name) const { return folder_ / name; }

  Status quantize(const std::string& name, const QuantizeOptions& options,
                  const TrainObserver& observer = {}) const {
    return train::quantize(*model_, text_, held_out_, path(name), options, observer);
  }

  /// Expects success, and nothing but the model and its log.
  void succeeds(const std::string& name, const QuantizeOptions& options,
                const TrainObserver& observer = {}) const {
    const Status status = quantize(name, options, observer);
    ASSERT_TRUE(status) << status.error().message;
    EXPECT_TRUE(std::filesystem::exists(path(name)));
    for (const char* left : {".ckpt", ".unverified", ".partial", ".unverified.partial"}) {
      EXPECT_FALSE(std::filesystem::exists(path(name + left))) << left;
    }
  }

  /// Expects one line that says `says`, and no model.
  void fails(const std::string& name, const QuantizeOptions& options, const std::string& says,
             const TrainObserver& observer = {}) const {
    const Status status = quantize(name, options, observer);
    ASSERT_FALSE(status) << says;
    EXPECT_FALSE(status.error().interrupted) << status.error().message;
    EXPECT_NE(status.error().message.find(says), std::string::npos) << status.error().message;
    EXPECT_EQ(status.error().message.find('\n'), std::string::npos) << status.error().message;
    for (const char* left : {"", ".unverified", ".partial", ".unverified.partial", ".json"}) {
      EXPECT_FALSE(std::filesystem::exists(path(name + left))) << says << left;
    }
  }

  std::string bytes(const std::string& name) const {
    const auto read = read_file(path(name));
    EXPECT_TRUE(read) << name;
    return read ? *read : std::string();
  }

  json log(const std::string& name) const { return json::parse(bytes(name + ".json")); }

  /// Sets the flag when `phase` reports `done`, or with `done` 0 when a message begins with it.
  static TrainObserver interrupt_at(const std::string& phase, int64_t done) {
    TrainObserver observer;
    observer.progress = [=](const TrainProgress& p) {
      if (p.phase == phase && p.done == done) {
        set_interrupted(true);
      }
    };
    observer.message = [=](const std::string& line) {
      if (done == 0 && line.rfind(phase, 0) == 0) {
        set_interrupted(true);
      }
    };
    return observer;
  }

  /// Runs until interrupted; expects no model, and a checkpoint or none.
  void interrupted_run(const std::string& name, const QuantizeOptions& options,
                       const TrainObserver& observer, bool checkpoint) const {
    const Status status = quantize(name, options, observer);
    set_interrupted(false);
    ASSERT_FALSE(status) << "not interrupted";
    EXPECT_TRUE(status.error().interrupted) << status.error().message;
    for (const char* left : {"", ".unverified", ".partial", ".ckpt.partial", ".json"}) {
      EXPECT_FALSE(std::filesystem::exists(path(name + left))) << left;
    }
    EXPECT_EQ(std::filesystem::exists(path(name + ".ckpt")), checkpoint);
  }

  /// Interrupted where it says and resumed, a run makes the very file `whole`.
  void goes_on_to(const std::string& whole, const std::string& phase, int64_t done) const {
    SCOPED_TRACE(phase + " " + std::to_string(done));
    interrupted_run("part.gguf", options_, interrupt_at(phase, done), true);
    QuantizeOptions resume = options_;
    resume.resume = true;
    succeeds("part.gguf", resume);
    EXPECT_TRUE(bytes("part.gguf") == bytes(whole));
    std::filesystem::remove(path("part.gguf"));
    std::filesystem::remove(path("part.gguf.json"));
  }

  std::filesystem::path folder_;
  std::shared_ptr<GgufFile> model_;
  std::vector<int32_t> tokens_;  // text_'s
  TrainingText text_;
  HeldOut held_out_;
  QuantizeOptions options_;
};

}  // namespace rabit::train
