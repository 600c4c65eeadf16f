// Whole runs of train::quantize on a tiny model: what comes out, that it is repeatable, and that a
// run which was interrupted anywhere goes on to the very same file.

#include "train_run.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "io/dequant.h"
#include "train/torch_logits.h"

namespace rabit::train {
namespace {

TEST_F(TrainRun, PackedFileScoresAsTheStudent) {
  for (int64_t paths = 1; paths <= 4; ++paths) {
    for (const EmbeddingType embedding : {EmbeddingType::kF16, EmbeddingType::kQ8_0}) {
      QuantizeOptions options = options_;
      options.bits = std::to_string(paths);
      options.embedding = embedding;
      if (paths == 3) {  // norms that are far from the original's
        options.train_norms = true;
        options.scale_lr = 3e-2;
      }
      const bool half = embedding == EmbeddingType::kF16;
      const std::string name = std::to_string(paths) + (half ? "h.gguf" : "q.gguf");
      succeeds(name, options);
      const double student = log(name)["perplexity"]["student"]["perplexity"];
      const double packed = engine_perplexity(path(name), held_out_);
      // Rounded to F16 are the scales, and to F16 or Q8_0 the embedding.
      // By the mean loss: so small a random model turns these roundings into up to 1 % of its
      // perplexity, a real one into 0.01 %.
      EXPECT_NEAR(std::log(packed) / std::log(student), 1.0, half ? 3e-4 : 3e-3) << name;
      const double teacher = log(name)["perplexity"]["teacher"]["perplexity"];
      EXPECT_NEAR(engine_perplexity(path("model.gguf"), held_out_) / teacher, 1.0, 1e-4);
      EXPECT_GT(std::fabs(student / teacher - 1.0), 1e-3) << "the student is the teacher";

      const auto file = GgufFile::open(path(name));
      ASSERT_TRUE(file);
      EXPECT_EQ((*file)->find_tensor("token_embd.weight")->type,
                half ? TensorType::kF16 : TensorType::kQ8_0);
      EXPECT_EQ(*(*file)->get_int("rabit.paths"), paths);
      EXPECT_EQ(*(*file)->get_int("rabit.train.tokens"), options.tokens);
      EXPECT_EQ(*(*file)->get_string("rabit.source.sha256"), *sha256_file(path("model.gguf")));
    }
  }
}

TEST_F(TrainRun, MorePathsComeCloser) {
  double before = 1e30;
  options_.tokens = 0;
  for (int64_t paths = 1; paths <= 4; ++paths) {
    options_.bits = std::to_string(paths);
    succeeds("out.gguf", options_);
    const double error = log("out.gguf")["warm_start"][2]["output_error"];
    EXPECT_LT(error, before) << paths;
    before = error;
  }
}

TEST_F(TrainRun, SameSeedSameBytes) {
  for (const bool error_feedback : {true, false}) {
    options_.error_feedback = error_feedback;
    options_.alpha_out = 0.5;
    options_.gamma = 0.1;
    succeeds("a.gguf", options_);
    succeeds("b.gguf", options_);
    EXPECT_EQ(bytes("a.gguf"), bytes("b.gguf"));
    QuantizeOptions other = options_;
    other.seed = 2;
    succeeds("c.gguf", other);
    EXPECT_NE(bytes("a.gguf"), bytes("c.gguf"));
  }
}

TEST_F(TrainRun, LogHasSettingsAndLosses) {
  succeeds("out.gguf", options_);
  const json told = log("out.gguf");
  for (const Setting& setting : settings()) {
    if (!setting.key.empty()) {
      EXPECT_TRUE(told["settings"].contains(std::string(setting.key))) << setting.key;
    }
  }
  EXPECT_EQ(told["settings"], describe(options_));
  EXPECT_EQ(told["resumed"], false);
  EXPECT_EQ(told["settings"]["calib_tokens"], options_.calib_tokens);
  EXPECT_EQ(told["data"]["files"][0]["sha256"], std::string(64, 'a'));
  EXPECT_EQ(told["data"]["tokens"], kTokens);
  EXPECT_EQ(told["warm_start"].size(), 3U);
  EXPECT_EQ(told["distill"].size(), 6U);
  EXPECT_EQ(told["distill_tokens"], options_.tokens);
  EXPECT_EQ(told["perplexity"]["student"]["tokens_scored"], 4 * (kWindow - 1));
  for (const auto& block : told["warm_start"]) {
    EXPECT_EQ(block["steps"], 8);  // two epochs of 16 windows, four a step
    EXPECT_GT(block["output_error"].get<double>(), 0.0);
  }
  const auto file = GgufFile::open(path("out.gguf"));
  ASSERT_TRUE(file);
  EXPECT_EQ(json::parse(*(*file)->get_string("rabit.train.settings")), told["settings"]);
}

TEST_F(TrainRun, DistillationHelps) {
  options_.warm_epochs = 0;
  options_.tokens = 100 * 4 * kWindow;
  options_.latent_lr = 2e-3;
  options_.scale_lr = 1e-3;
  succeeds("out.gguf", options_);
  const json steps = log("out.gguf")["distill"];
  ASSERT_EQ(steps.size(), 100U);
  const auto mean = [&](size_t begin) {
    double sum = 0.0;
    for (size_t i = begin; i < begin + 10; ++i) {
      sum += steps[i]["loss"].get<double>() / 10;
    }
    return sum;
  };
  EXPECT_LT(mean(90), 0.8 * mean(0));
}

TEST_F(TrainRun, OneStepTrains) {
  options_.warm_epochs = 0;
  options_.tokens = 0;
  succeeds("none.gguf", options_);
  options_.tokens = 4 * kWindow;
  succeeds("one.gguf", options_);
  const std::string scales = "blk.0.attn_q.row_scale";
  const auto read = [&](const char* name) {
    const auto file = GgufFile::open(path(name));
    const auto data = (*file)->find_tensor(scales)->data;
    return std::vector<std::byte>(data.begin(), data.end());
  };
  EXPECT_NE(read("one.gguf"), read("none.gguf"));
}

TEST_F(TrainRun, LeavesAnEarlierRunsCheckpointAlone) {
  interrupted_run("out.gguf", options_, interrupt_at("warm start", 2), true);
  const std::string kept = bytes("out.gguf.ckpt");
  fails("out.gguf", options_, "add --resume to go on from it, or remove it");
  EXPECT_TRUE(bytes("out.gguf.ckpt") == kept);
}

TEST_F(TrainRun, TrainingBlocksHelps) {
  options_.error_feedback = false;  // after it, a block this small has little left to learn
  options_.tokens = 0;
  options_.warm_epochs = 20;
  succeeds("warm.gguf", options_);
  const json blocks = log("warm.gguf")["warm_start"];
  for (const auto& block : blocks) {
    EXPECT_LT(block["loss_last"].get<double>(), 0.9 * block["loss_first"].get<double>());
    if (block != blocks.back()) {  // whose loss is of the head
      EXPECT_LT(block["output_error"].get<double>(), block["loss_first"].get<double>());
    }
  }
}

TEST_F(TrainRun, TheLastBlockAloneLearnsFromTheHead) {
  options_.tokens = 0;
  options_.warm_epochs = 0;
  succeeds("none.gguf", options_);
  options_.warm_epochs = 20;
  options_.warm_blocks = 1;
  options_.train_norms = true;
  succeeds("last.gguf", options_);
  const json blocks = log("last.gguf")["warm_start"];
  EXPECT_EQ(blocks[0]["steps"], 0);
  EXPECT_EQ(blocks[1]["steps"], 0);
  EXPECT_LT(blocks[2]["loss_last"].get<double>(), 0.9 * blocks[2]["loss_first"].get<double>());
  const auto perplexity = [&](const char* name) {
    return log(name)["perplexity"]["student"]["perplexity"].get<double>();
  };
  EXPECT_LT(perplexity("last.gguf"), perplexity("none.gguf"));
  const auto none = GgufFile::open(path("none.gguf")), last = GgufFile::open(path("last.gguf"));
  const auto data = [](const auto& file, const char* name) {
    const auto bytes = (*file)->find_tensor(name)->data;
    return std::vector<std::byte>(bytes.begin(), bytes.end());
  };
  for (const char* same :
       {"blk.0.ffn_down.sign", "blk.1.ffn_down.sign", "blk.1.attn_norm.weight"}) {
    EXPECT_EQ(data(none, same), data(last, same)) << same;
  }
  for (const char* other :
       {"blk.2.ffn_down.sign", "blk.2.attn_norm.weight", "output_norm.weight"}) {
    EXPECT_NE(data(none, other), data(last, other)) << other;
  }
  // What the norm has learnt goes with the block that it was trained with.
  goes_on_to("last.gguf", "warm start", 2);
  goes_on_to("last.gguf", "warm start", 3);
}

TEST_F(TrainRun, ErrorFeedbackFollowsTheTeachersStream) {
  options_.warm_epochs = 0;
  options_.tokens = 0;
  const auto error_of = [&](EfTarget target) {
    options_.ef_target = target;
    succeeds("out.gguf", options_);
    return log("out.gguf")["warm_start"].back()["output_error"];
  };
  EXPECT_TRUE(error_of(EfTarget::kWeight).is_null()) << "there is no teacher's stream";
  const double output = error_of(EfTarget::kOutput), stream = error_of(EfTarget::kStream);
  EXPECT_LT(stream, 0.8 * output);
}

TEST_F(TrainRun, InterruptedRunsGoOnToTheSameFile) {
  succeeds("whole.gguf", options_);
  const std::string want = bytes("whole.gguf");
  struct Stop {
    const char* phase;
    int64_t done;
  };
  const int64_t step = options_.batch * kWindow;
  for (const auto& [phase, done] :
       {Stop{"warm start", 1}, Stop{"warm start", 2}, Stop{"warm start", 3}, Stop{"distil", step},
        Stop{"distil", 4 * step}, Stop{"distil", 6 * step}, Stop{"perplexity, teacher", 2},
        Stop{"perplexity, student", 1}, Stop{"perplexity of the student", 0}}) {
    SCOPED_TRACE(std::string(phase) + " " + std::to_string(done));
    interrupted_run("whole2.gguf", options_, interrupt_at(phase, done), true);
    QuantizeOptions resume = options_;
    resume.resume = true;
    // Once more, at once: what was done must still be there.
    interrupted_run("whole2.gguf", resume, interrupt_at("resuming: ", 0), true);
    std::vector<std::string> phases;
    TrainObserver observer;
    observer.progress = [&](const TrainProgress& p) { phases.push_back(p.phase); };
    succeeds("whole2.gguf", resume, observer);
    EXPECT_TRUE(bytes("whole2.gguf") == want);
    EXPECT_EQ(log("whole2.gguf")["warm_start"].size(), 3U);
    EXPECT_EQ(log("whole2.gguf")["distill"].size(), 6U);
    EXPECT_EQ(log("whole2.gguf")["distill_tokens"], options_.tokens);
    EXPECT_EQ(log("whole2.gguf")["resumed"], true);
    const auto count = std::count(phases.begin(), phases.end(), "distil");
    EXPECT_EQ(count, std::string(phase) == "distil"       ? 6 - done / step
                     : std::string(phase) == "warm start" ? 6
                                                          : 0);
    std::filesystem::remove(path("whole2.gguf"));
    std::filesystem::remove(path("whole2.gguf.json"));
  }
}

TEST_F(TrainRun, InterruptedWithoutDistillation) {
  options_.tokens = 0;
  for (const bool error_feedback : {true, false}) {
    options_.error_feedback = error_feedback;
    succeeds("whole.gguf", options_);
    for (const auto& [phase, done] : std::vector<std::pair<std::string, int64_t>>{
             {"warm start", 1}, {"warm start", 3}, {"perplexity of the student", 0}}) {
      goes_on_to("whole.gguf", phase, done);
    }
  }
}

TEST_F(TrainRun, InterruptedBeforeAnythingIsDone) {
  interrupted_run("out.gguf", options_, interrupt_at("plan: ", 0), false);
  options_.error_feedback = false;
  interrupted_run("out.gguf", options_, interrupt_at("importance", 3), false);
  set_interrupted(true);
  interrupted_run("out.gguf", options_, {}, false);
}

TEST_F(TrainRun, InterruptedInsideABlock) {
  options_.tokens = 0;
  options_.warm_epochs = 10;
  succeeds("whole.gguf", options_);
  // From another thread at a moment of the second block that differs from machine to machine.
  std::thread clock;
  TrainObserver observer;
  observer.progress = [&](const TrainProgress& p) {
    if (p.done == 1) {
      clock = std::thread([] {
        std::this_thread::sleep_for(std::chrono::milliseconds(30));
        set_interrupted(true);
      });
    }
  };
  const Status status = quantize("part.gguf", options_, observer);
  clock.join();
  set_interrupted(false);
  ASSERT_FALSE(status);
  EXPECT_TRUE(status.error().interrupted);
  options_.resume = true;
  succeeds("part.gguf", options_);
  EXPECT_TRUE(bytes("part.gguf") == bytes("whole.gguf"));
}

TEST_F(TrainRun, WhatFollowsTrainingMayFailWithoutLosingIt) {
  // A folder in the place of the file to be written stands for a disk that fails.
  TrainObserver observer;
  observer.message = [&](const std::string& line) {
    if (line.rfind("perplexity of the student", 0) == 0) {
      std::filesystem::create_directories(path("out.gguf.unverified") / "full");
    }
  };
  const Status status = quantize("out.gguf", options_, observer);
  ASSERT_FALSE(status);
  EXPECT_NE(status.error().message.find("holds what was trained, go on with --resume"),
            std::string::npos)
      << status.error().message;
  EXPECT_FALSE(status.error().interrupted);
  EXPECT_TRUE(std::filesystem::exists(path("out.gguf.ckpt")));
  std::filesystem::remove_all(path("out.gguf.unverified"));
  options_.resume = true;
  succeeds("out.gguf", options_);
}

/// Another value that the setting may have.
void change(const Setting& setting, QuantizeOptions& options) {
  if (const auto* integer = std::get_if<Setting::Integer>(&setting.value)) {
    int64_t& value = options.*integer->member;
    value += value == integer->low ? 1 : -1;
  } else if (const auto* number = std::get_if<Setting::Number>(&setting.value)) {
    double& value = options.*number->member;
    value += (number->high - value) * 1e-3;
  } else if (const auto* flag = std::get_if<Setting::Flag>(&setting.value)) {
    options.*flag->member = !(options.*flag->member);
  } else if (const auto* text = std::get_if<Setting::Text>(&setting.value)) {
    options.*text->member = setting.option == "--data-field" ? "body" : "3";
  } else if (const auto* choice = std::get_if<Setting::Choice>(&setting.value)) {
    choice->set(options, (choice->get(options) + 1) % static_cast<int>(choice->names.size()));
  }
}

TEST_F(TrainRun, OtherSettingsDoNotResume) {
  interrupted_run("out.gguf", options_, interrupt_at("warm start", 2), true);
  options_.resume = true;
  int tried = 0;
  for (const Setting& setting : settings()) {
    if (setting.may_change) {
      continue;
    }
    QuantizeOptions other = options_;
    change(setting, other);
    ASSERT_NE(describe(other), describe(options_)) << setting.option;
    fails("out.gguf", other, std::string(setting.option));
    EXPECT_TRUE(std::filesystem::exists(path("out.gguf.ckpt"))) << setting.option;
    ++tried;
  }
  EXPECT_GT(tried, 15);
  const TrainingText kept = text_;
  text_.sources[0].sha256 = std::string(64, 'b');
  fails("out.gguf", options_, "other texts of --data");
  text_ = kept;
  write_model(SmallModel(11, true, 0, kSizes));
  fails("out.gguf", options_, "another MODEL");
  write_model(SmallModel(1, true, 0, kSizes));
  succeeds("out.gguf", options_);
}

TEST_F(TrainRun, BadCheckpoints) {
  options_.optimizer = Optimizer::kMuon;
  options_.resume = true;
  fails("out.gguf", options_, "no checkpoint to resume from");
  options_.resume = false;
  interrupted_run("out.gguf", options_, interrupt_at("distil", 2 * options_.batch * kWindow), true);
  options_.resume = true;
  const std::string whole = bytes("out.gguf.ckpt");
  const auto put = [&](const std::string& content) {
    auto file = AtomicFile::create(path("out.gguf.ckpt"));
    ASSERT_TRUE(file);
    ASSERT_TRUE(file->write(content));
    ASSERT_TRUE(file->commit());
  };
  for (const size_t size :
       {size_t{0}, size_t{3}, size_t{100}, size_t{5000}, whole.size() / 2, whole.size() - 1}) {
    put(whole.substr(0, size));
    fails("out.gguf", options_, "out.gguf.ckpt");
  }
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string changed = whole;
    const size_t at = changed.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    changed.replace(at, to.size(), to);
    put(changed);
    fails("out.gguf", options_, "");
  };
  with("rabit.checkpoint.fingerprint", "rabit.checkpoint.fingerprinx");
  with("{\"data\"", "[[[[[[[");
  with("blk.1.attn_k.momentum", "blk.1.attn_k.momentux");
  with("adam.scales.square", "adam.scales.squarx");
  with("blk.2.ffn_down.latent", "blk.2.ffn_down.latenx");
  const std::string blocks = "rabit.checkpoint.blocks_done";
  with(blocks + std::string("\x04\0\0\0", 4), blocks + std::string("\x04\0\0\0\x02", 5));
  with(blocks + std::string("\x04\0\0\0", 4), blocks + std::string("\x04\0\0\0\x09", 5));
  put(whole);
  succeeds("out.gguf", options_);
}

TEST_F(TrainRun, LossesThatAreNotFiniteEndTheRun) {
  // Squares past float's range in the first block's teacher, of weights as large as they may be.
  SmallModel large(1, false, 0, kSizes);
  for (const char* name : {"blk.0.ffn_norm.weight", "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight",
                           "blk.0.ffn_down.weight"}) {
    std::vector<float>& values = large.dense[name];
    float largest = 0.0F;
    for (const float v : values) {
      largest = std::max(largest, std::fabs(v));
    }
    for (float& v : values) {
      v *= 65000.0F / largest;
    }
  }
  write_model(large);
  QuantizeOptions options = options_;
  options.error_feedback = false;
  options.alpha_in = 0;
  fails("out.gguf", options, "block 0: the loss or its gradient is not finite in 5 steps running");
  // Where only distillation sees them.
  held_out_ = {};
  options.warm_epochs = 0;
  options.gamma = 1.0;
  fails("out.gguf", options, "not finite in 5 steps running; lower --latent-lr");
  // Weights that are not finite do not even begin.
  SmallModel broken(1, false, 0, kSizes);
  broken.dense["output.weight"][5] = std::numeric_limits<float>::infinity();
  write_model(broken);
  fails("other.gguf", options_, "tensor output.weight holds values that are not finite");
}

TEST_F(TrainRun, DevicesThatAreNotThere) {
  const auto with = [&](const std::string& device, const std::string& says) {
    QuantizeOptions options = options_;
    options.device = device;
    fails("out.gguf", options, says);
  };
  for (const char* device :
       {"tpu", "", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:123456", "cpu:0"}) {
    with(device, "not a device; use cpu, cuda or cuda:N");
  }
  if (at::globalContext().hasCUDA()) {
    with("cuda:99", "CUDA device");
  } else {
    with("cuda", "no GPU can be used");
    with("cuda:99", "no GPU can be used");
  }
}

TEST_F(TrainRun, BadInput) {
  const auto with = [&](const auto& change, const std::string& says) {
    QuantizeOptions options = options_;
    const TrainingText text = text_;
    const HeldOut held_out = held_out_;
    change(options);
    fails("out.gguf", options, says);
    text_ = text;
    held_out_ = held_out;
  };
  with([](auto& o) { o.seq_len = 65; }, "at most 64 positions");
  with([](auto& o) { o.seq_len = 15; }, "--seq-len");
  with([](auto& o) { o.bits = "0"; }, "--bits");
  with([](auto& o) { o.bits = "5"; }, "--bits");
  with([](auto& o) { o.warm_latent_lr = 11; }, "--warm-latent-lr");
  with([](auto& o) { o.scale_lr = NAN; }, "--scale-lr");
  with([](auto& o) { o.batch = 0; }, "--batch");
  const auto with_text = [&](const auto& change, const std::string& says) {
    with(
        [&](auto&) {
          std::vector<int32_t> tokens = tokens_;
          change(tokens);
          text_ = {{source_of(std::move(tokens), "text.txt", "")}};
        },
        says);
  };
  with_text([](auto& tokens) { tokens.resize(kWindow - 1); }, "less than one window of 32");
  with_text([](auto& tokens) { tokens.clear(); }, "less than one window of 32");
  with_text([](auto& tokens) { tokens[70] = 80; }, "token 70 of the text is 80");
  with_text([](auto& tokens) { tokens[0] = -1; }, "token 0 of the text is -1");
  with([](auto& o) { o.data_weights = "1,2"; }, "2 weights for 1 sources");
  with([](auto& o) { o.data_weights = "0.001"; }, "leaves not one of the 40 windows");
  with([](auto& o) { o.data_weights = "1,"; }, "'' is not a number");
  with([](auto& o) { o.data_field = ""; }, "--data-field");
  with([&](auto&) { held_out_.tokens.resize(kWindow - 1); }, "held-out text has 31 tokens");
  with([&](auto&) { held_out_.tokens[3] = 80; }, "held-out text has the token 80");
  std::filesystem::create_directories(path("folder"));
  const Status folder = quantize("folder", options_);
  ASSERT_FALSE(folder);
  EXPECT_NE(folder.error().message.find("is a folder"), std::string::npos);
  const Status itself = quantize("model.gguf", options_);
  ASSERT_FALSE(itself);
  EXPECT_NE(itself.error().message.find("would overwrite the input"), std::string::npos);
  write_model(SmallModel(1, true, 2, kSizes));
  with([](auto&) {}, "packed already");
}

TEST_F(TrainRun, OneWindowIsEnough) {
  tokens_.resize(kWindow + 5);
  set_text(tokens_);
  succeeds("out.gguf", options_);
}

TEST_F(TrainRun, BlocksThatAddNothing) {
  SmallModel identity(1, true, 0, kSizes);
  for (const char* name : {"blk.0.attn_output.weight", "blk.0.ffn_down.weight",
                           "blk.2.attn_output.weight", "blk.2.ffn_down.weight"}) {
    std::fill(identity.dense[name].begin(), identity.dense[name].end(), 0.0F);
  }
  write_model(identity);
  succeeds("out.gguf", options_);
  const double student = log("out.gguf")["perplexity"]["student"]["perplexity"];
  EXPECT_NEAR(std::log(engine_perplexity(path("out.gguf"), held_out_)) / std::log(student), 1.0,
              3e-3);
}

TEST_F(TrainRun, TimeBound) {
  options_.minutes = 0.2;
  fails("out.gguf", options_, "at least 15 s are needed");
  options_.minutes = 0.25 + 1e-5;
  fails("out.gguf", options_, "too short for this machine, which needs about 0.");
  options_.minutes = 0.35;  // six seconds beyond what is kept for packing
  options_.calib_tokens = kTokens;
  options_.warm_epochs = 300;  // more than there is time for
  options_.tokens = -1;        // on a CPU with a bound: none
  const Clock clock;
  succeeds("out.gguf", options_);
  EXPECT_LE(clock.elapsed(), 0.35 * 60 - 15 + 4);
  const json told = log("out.gguf");
  EXPECT_FALSE(told.contains("distill_tokens"));
  for (const auto& block : told["warm_start"]) {
    EXPECT_GT(block["steps"].get<int>(), 0);
  }
  options_.warm_blocks = 1;
  const Clock last_only;
  succeeds("last.gguf", options_);
  EXPECT_LE(last_only.elapsed(), 0.35 * 60 - 15 + 4);
  EXPECT_EQ(log("last.gguf")["warm_start"][1]["steps"], 0);
  // Steps in a time are the machine's affair; how much of it a block gets is ours.
  EXPECT_GT(log("last.gguf")["warm_start"][2]["train_seconds"].get<double>(),
            1.2 * told["warm_start"][2]["train_seconds"].get<double>())
      << "it has the others' time";
  options_.warm_blocks = 0;
  options_.tokens = int64_t{1} << 40;
  options_.warm_epochs = 1;
  const Clock both;
  succeeds("both.gguf", options_);
  EXPECT_LE(both.elapsed(), 0.35 * 60 - 15 + 4);
  EXPECT_GE(both.elapsed(), 3.0) << "distillation goes on as long as it may";
  EXPECT_LT(log("both.gguf")["distill_tokens"].get<int64_t>(), options_.tokens);
}

TEST_F(TrainRun, TimeThatRanOutIsNoReasonToTrainAgain) {
  options_.minutes = 0.29;
  options_.tokens = int64_t{1} << 40;
  interrupted_run("out.gguf", options_, interrupt_at("perplexity, teacher", 1), true);
  options_.resume = true;
  std::vector<std::string> phases;
  TrainObserver observer;
  observer.progress = [&](const TrainProgress& p) { phases.push_back(p.phase); };
  succeeds("out.gguf", options_, observer);
  EXPECT_EQ(std::count(phases.begin(), phases.end(), "distil"), 0);
  EXPECT_GT(log("out.gguf")["distill_tokens"].get<int64_t>(), 0);
}

TEST_F(TrainRun, PackingRefusesWhatIsNotTheStudent) {
  const TrainObserver observer;
  auto network = load_network(*model_, at::kCPU, at::kFloat);
  ASSERT_TRUE(network);
  TrainSession session{*model_, options_, observer,      std::move(network).value(),
                       {},      {},       ThreadPool(1), Clock()};
  session.log = {{"settings", json::object()},
                 {"source", {{"sha256", ""}}},
                 {"data", {{"files", json::array()}}}};
  session.student.blocks.resize(3);
  session.options.error_feedback = false;
  for (int64_t layer = 0; layer < 3; ++layer) {
    ASSERT_TRUE(start_block(session, layer, {}, {}, false));
  }
  ASSERT_TRUE(write_packed_model(session, *model_, path("good.gguf")));
  StudentLinear& linear = session.student.at(1, Role::kFfnUp);
  const StudentLinear kept = linear;
  // In memory in another order than its sizes say: training reads other signs there than packing.
  linear.latent = kept.latent.detach().t().contiguous().t().set_requires_grad(true);
  const Status lost = write_packed_model(session, *model_, path("lost.gguf"));
  ASSERT_FALSE(lost);
  EXPECT_NE(lost.error().message.find("blk.1.ffn_up: the packed signs are not those"),
            std::string::npos)
      << lost.error().message;
  linear = kept;
  linear.g = (kept.g.detach() * INFINITY).set_requires_grad(true);
  const Status infinite = write_packed_model(session, *model_, path("lost.gguf"));
  ASSERT_FALSE(infinite);
  EXPECT_NE(infinite.error().message.find("blk.1.ffn_up"), std::string::npos);
  for (const char* left : {"lost.gguf", "lost.gguf.unverified"}) {
    EXPECT_FALSE(std::filesystem::exists(path(left))) << left;
  }
  // Scales of zero give levels of zero of either sign, which are no different signs.
  linear.g = at::zeros_like(kept.g).set_requires_grad(true);
  const Status zero = write_packed_model(session, *model_, path("zero.gguf"));
  EXPECT_TRUE(zero) << zero.error().message;
}

}  // namespace
}  // namespace rabit::train
