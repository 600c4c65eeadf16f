// One run from start to end: checks, plan, phases, packing, log.

#include "train/quantize.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <fmt/format.h>

#include <cmath>

#include "base/files.h"
#include "base/interrupt.h"
#include "eval/perplexity.h"
#include "train/session.h"
#include "train/torch_logits.h"

namespace rabit::train {
namespace {

using nlohmann::json;

// Time kept back at the end of a bounded run for packing, checking and writing.
constexpr double kFinishSeconds = 15.0;
// End-to-end distillation gets this share of a bounded run on a GPU, and none on a CPU, where the
// block-by-block phase teaches more a second (docs/training.md).
constexpr double kDistillShare = 0.7;
constexpr int64_t kDefaultDistillTokens = 4'000'000;

Result<at::Device> pick_device(const std::string& name) {
  if (name == "cpu") {
    return at::Device(at::kCPU);
  }
  int index = 0;
  if (name != "cuda") {
    const bool form = name.rfind("cuda:", 0) == 0 && name.size() > 5 && name.size() < 8 &&
                      name.find_first_not_of("0123456789", 5) == std::string::npos;
    if (!form) {
      return Error{"--device " + name + ": not a device; use cpu, cuda or cuda:N"};
    }
    index = std::stoi(name.substr(5));
  }
  if (!at::globalContext().hasCUDA()) {
    return Error{"--device " + name +
                 ": no GPU can be used: this build has no CUDA support, or no driver or device was "
                 "found; use --device cpu, or build with the cuda preset on a machine with a GPU"};
  }
  const int devices = at::detail::getCUDAHooks().deviceCount();
  if (index >= devices) {
    return Error{fmt::format("--device {}: this machine has {} CUDA device{}, numbered from 0",
                             name, devices, devices == 1 ? "" : "s")};
  }
  return at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(index));
}

at::ScalarType pick_compute(Compute compute, at::Device device) {
  if (compute == Compute::kAuto) {
#if defined(__x86_64__)
    const bool fast_bf16 = device.is_cuda() || __builtin_cpu_supports("avx512bf16") != 0;
#else
    const bool fast_bf16 = device.is_cuda();
#endif
    return fast_bf16 ? at::kBFloat16 : at::kFloat;
  }
  return compute == Compute::kBF16 ? at::kBFloat16 : at::kFloat;
}

json describe(const QuantizeOptions& o) {
  const auto compute = [&] {
    return o.compute == Compute::kAuto ? "auto" : o.compute == Compute::kBF16 ? "bf16" : "f32";
  };
  return {{"paths", o.paths},
          {"device", o.device},
          {"threads", o.threads},
          {"compute", compute()},
          {"seed", o.seed},
          {"seq_len", o.seq_len},
          {"minutes", o.minutes},
          {"tokens", o.tokens},
          {"calib_tokens", o.calib_tokens},
          {"error_feedback", o.error_feedback},
          {"ef_damp", o.ef_damp},
          {"alpha_in", o.alpha_in},
          {"alpha_out", o.alpha_out},
          {"init_sweeps", o.init_sweeps},
          {"als_steps", o.als_steps},
          {"warm_epochs", o.warm_epochs},
          {"warm_batch", o.warm_batch},
          {"warm_muon_lr", o.warm_muon_lr},
          {"warm_scale_lr", o.warm_scale_lr},
          {"batch", o.batch},
          {"muon_lr", o.muon_lr},
          {"scale_lr", o.scale_lr},
          {"warmup", o.warmup},
          {"gamma", o.gamma},
          {"clip", o.clip},
          {"embedding", o.embedding == EmbeddingType::kQ8_0 ? "q8_0" : "f16"},
          {"checkpoint_minutes", o.checkpoint_minutes}};
}

Status check_options(const QuantizeOptions& o) {
  const auto range = [](const char* name, double value, double low, double high) -> Status {
    if (!(value >= low && value <= high)) {
      return Error{fmt::format("{} {}: must lie between {} and {}", name, value, low, high)};
    }
    return {};
  };
  RABIT_CHECK(range("--bits", static_cast<double>(o.paths), 1, quant::kMaxPaths));
  RABIT_CHECK(range("--seq-len", static_cast<double>(o.seq_len), 16, 1 << 20));
  RABIT_CHECK(range("--minutes", o.minutes, 0, 1e9));
  RABIT_CHECK(range("--calib-tokens", static_cast<double>(o.calib_tokens), 1, 1e15));
  RABIT_CHECK(range("--init-sweeps", static_cast<double>(o.init_sweeps), 1, 1e6));
  RABIT_CHECK(range("--als-steps", static_cast<double>(o.als_steps), 0, 1e6));
  RABIT_CHECK(range("--alpha-in", o.alpha_in, 0, 16));
  RABIT_CHECK(range("--alpha-out", o.alpha_out, 0, 16));
  RABIT_CHECK(range("--gamma", o.gamma, 0, 1e9));
  RABIT_CHECK(range("--clip", o.clip, 1e-12, 1e12));
  RABIT_CHECK(range("--ef-damp", o.ef_damp, 1e-8, 1e3));
  RABIT_CHECK(range("--warm-batch", static_cast<double>(o.warm_batch), 1, 1e6));
  RABIT_CHECK(range("--batch", static_cast<double>(o.batch), 1, 1e6));
  RABIT_CHECK(range("--warm-epochs", o.warm_epochs, 0, 1e4));
  RABIT_CHECK(range("--warmup", o.warmup, 0, 0.9));
  for (const auto& [name, rate] :
       {std::pair{"--muon-lr", o.muon_lr}, std::pair{"--scale-lr", o.scale_lr},
        std::pair{"--warm-muon-lr", o.warm_muon_lr},
        std::pair{"--warm-scale-lr", o.warm_scale_lr}}) {
    RABIT_CHECK(range(name, rate, 0, 10));
  }
  if (o.tokens > 0 && o.tokens < o.batch * o.seq_len) {
    return Error{
        fmt::format("--tokens {}: less than one step of {} windows of {}; give 0 or more "
                    "tokens, or a smaller --batch or --seq-len",
                    o.tokens, o.batch, o.seq_len)};
  }
  return {};
}

// (count, seq_len) int64: the text in windows that do not overlap.
Result<at::Tensor> cut_windows(const TrainingText& text, int64_t seq_len, int64_t vocab) {
  const int64_t count = static_cast<int64_t>(text.tokens.size()) / seq_len;
  if (count < 1) {
    return Error{
        fmt::format("the training text has {} tokens, less than one window of {}; give more "
                    "text or a smaller --seq-len",
                    text.tokens.size(), seq_len)};
  }
  at::Tensor windows = at::empty({count, seq_len}, at::kLong);
  int64_t* ids = windows.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count * seq_len; ++i) {
    ids[i] = text.tokens[static_cast<size_t>(i)];
    if (ids[i] < 0 || ids[i] >= vocab) {
      return Error{
          fmt::format("token {} of the training text is {}, outside the model's vocabulary "
                      "of {}",
                      i, ids[i], vocab)};
    }
  }
  return windows;
}

// Before hours of training rather than after them.
Status check_held_out(const HeldOut& held_out, int64_t vocab) {
  if (held_out.tokens.empty()) {
    return {};
  }
  if (held_out.ctx < 2 || static_cast<int64_t>(held_out.tokens.size()) < held_out.ctx) {
    return Error{
        fmt::format("the held-out text has {} tokens for windows of {}; give a longer text or "
                    "another window, of at least 2 tokens",
                    held_out.tokens.size(), held_out.ctx)};
  }
  for (const int32_t id : held_out.tokens) {
    if (id < 0 || id >= vocab) {
      return Error{fmt::format(
          "the held-out text has the token {}, outside the model's vocabulary of {}", id, vocab)};
    }
  }
  return {};
}

// A random sample of windows stands first: calibration takes them from the front.
at::Tensor shuffle_windows(const at::Tensor& windows, uint64_t seed) {
  const std::vector<int64_t> order = shuffled(windows.size(0), seed);
  at::Tensor picks = at::empty({windows.size(0)}, at::kLong);
  std::copy(order.begin(), order.end(), picks.mutable_data_ptr<int64_t>());
  return windows.index_select(0, picks);
}

Status write_log(const json& log, const std::filesystem::path& out) {
  std::filesystem::path path = out;
  path += ".json";
  RABIT_ASSIGN(AtomicFile file, AtomicFile::create(path));
  RABIT_CHECK(file.write(log.dump(2, ' ', false, json::error_handler_t::replace) + "\n"));
  return file.commit();
}

Status evaluate(TrainSession& session, const HeldOut& held_out) {
  if (held_out.tokens.empty()) {
    return {};
  }
  for (const bool student : {false, true}) {
    TorchLogits source(session.teacher, student ? &session.student.blocks : nullptr);
    const char* name = student ? "student" : "teacher";
    RABIT_ASSIGN(
        const PerplexityResult result,
        perplexity(
            source, held_out.tokens, {held_out.ctx, 0},
            [&](int64_t done, int64_t total, double nll) {
              if (session.observer.progress) {
                session.observer.progress({std::string("perplexity, ") + name, done, total, nll});
              }
            }));
    session.log["perplexity"][name] = {{"perplexity", result.perplexity},
                                       {"perplexity_stderr", result.perplexity_stderr},
                                       {"tokens_scored", result.tokens_scored},
                                       {"ctx", result.ctx},
                                       {"protocol", perplexity_protocol(result.ctx)}};
    session.observer.message(fmt::format("perplexity of the {} by torch: {:.4f} +- {:.4f}", name,
                                         result.perplexity, result.perplexity_stderr));
  }
  return {};
}

// torch reports what goes wrong, running out of memory above all, by exceptions.
template <typename Body>
Status without_exceptions(const Body& body) try {
  return body();
} catch (const c10::Error& error) {
  const std::string what = error.what_without_backtrace();
  return Error{"torch: " + what.substr(0, what.find('\n'))};
}

Status run(TrainSession& session, const GgufFile& model, const HeldOut& held_out,
           const std::filesystem::path& out) {
  const QuantizeOptions& options = session.options;
  Resumed resumed;
  if (options.resume) {
    RABIT_ASSIGN(resumed, load_checkpoint(session));
    session.observer.message(fmt::format("resuming: {} of {} blocks done, distillation step {}",
                                         resumed.blocks_done, session.config().layers,
                                         resumed.distill.step));
  }

  int64_t distill_tokens = options.tokens;
  const bool bounded = options.minutes > 0.0;
  if (distill_tokens < 0) {
    distill_tokens = bounded && session.teacher.device.is_cpu() ? 0 : kDefaultDistillTokens;
  }
  const double total = options.minutes * 60.0 - (bounded ? kFinishSeconds : 0.0);
  if (bounded && total <= 0.0) {
    return Error{fmt::format("--minutes {}: too short; at least {} s are needed to pack and check",
                             options.minutes, kFinishSeconds)};
  }
  const double spent = session.clock.elapsed();
  const double warm_share = distill_tokens > 0 ? 1.0 - kDistillShare : 1.0;
  session.warm_share = warm_share;
  // A bound that loading has used up already is still one: 0 would mean none.
  const double left = std::max(1e-3, total - spent);
  session.clock = Clock(bounded ? left * warm_share : 0.0);
  const Clock phases(bounded ? left : 0.0);
  session.observer.message(fmt::format(
      "plan: {} blocks from {}{} tokens, {}, warm start of {} epochs{}; then {} tokens end to "
      "end{}",
      session.config().layers, bounded ? "at most " : "",
      std::min(options.calib_tokens, session.windows.numel()),
      options.error_feedback ? "error feedback" : "no error feedback", options.warm_epochs,
      bounded ? fmt::format(" within {:.0f} s", session.clock.left()) : "", distill_tokens,
      bounded && distill_tokens > 0 ? fmt::format(" within {:.0f} s", phases.left() * kDistillShare)
                                    : ""));
  const int64_t layers = session.config().layers;
  if (options.dry_run && (resumed.distilling || resumed.blocks_done == layers)) {
    return {};
  }
  const bool distilled = session.log.value("distill_planned", int64_t{0}) >= distill_tokens;
  if (!resumed.distilling && resumed.blocks_done < layers) {
    RABIT_CHECK(warm_start(session, resumed.blocks_done));
    if (options.dry_run) {
      return {};
    }
    if (!distilled) {
      save_or_say(session, layers, nullptr);  // whatever distillation may meet, this is kept
    }
  }
  // Distillation that time ended is as complete as one that ran out of steps.
  if (!distilled) {
    session.clock = Clock(bounded ? std::max(1.0, phases.left()) : 0.0);
    RABIT_CHECK(distill(session, distill_tokens, resumed.distill));
    resumed.distilling = true;
    session.log["distill_planned"] = distill_tokens;
    session.log["distill_tokens"] = resumed.distill.step * options.batch * options.seq_len;
  }
  const auto finish = [&]() -> Status {
    RABIT_CHECK(without_exceptions([&] { return evaluate(session, held_out); }));
    RABIT_CHECK(without_exceptions([&] { return write_packed_model(session, model, out); }));
    session.log["seconds"] = phases.elapsed() + spent;
    return write_log(session.log, out);
  };
  if (const Status status = finish(); !status) {
    // Training is done: whatever ended the rest, it must not have been in vain.
    const Status saved =
        save_checkpoint(session, layers, resumed.distilling ? &resumed.distill : nullptr);
    if (!saved) {
      return Error{status.error().message +
                   "; and what was trained is lost: " + saved.error().message};
    }
    return status;
  }
  std::error_code ignored;
  std::filesystem::remove(session.checkpoint_path, ignored);
  return {};
}

}  // namespace

Status quantize(const GgufFile& model, const TrainingText& text, const HeldOut& held_out,
                const std::filesystem::path& out, const QuantizeOptions& options,
                const TrainObserver& caller) {
  const Clock clock;
  TrainObserver observer = caller;
  if (!observer.message) {
    observer.message = [](const std::string&) {};
  }
  RABIT_CHECK(check_options(options));
  RABIT_ASSIGN(const at::Device device, pick_device(options.device));
  const at::ScalarType compute = pick_compute(options.compute, device);
  const int threads = options.threads > 0 ? options.threads : usable_threads();
  at::set_num_threads(threads);

  RABIT_ASSIGN(const ModelConfig config, read_model_config(model));
  if (options.seq_len > config.context_length) {
    return Error{fmt::format("--seq-len {}: the model was trained for at most {} positions",
                             options.seq_len, config.context_length)};
  }
  RABIT_CHECK(check_held_out(held_out, config.vocab_size));
  // The rename at the end would replace even a device such as /dev/null.
  std::error_code unlike;
  if (std::filesystem::exists(out, unlike) && !std::filesystem::is_regular_file(out, unlike)) {
    return Error{"cannot write " + out.string() + ": it is not a regular file"};
  }
  if (std::filesystem::equivalent(model.path(), out, unlike)) {
    return Error{out.string() + ": is the original model itself; write to another file"};
  }
  RABIT_ASSIGN(const at::Tensor windows, cut_windows(text, options.seq_len, config.vocab_size));
  Network teacher;
  RABIT_CHECK(without_exceptions([&]() -> Status {
    RABIT_ASSIGN(teacher, load_network(model, device, compute));
    return {};
  }));

  std::filesystem::path checkpoint = out;
  checkpoint += ".ckpt";
  TrainSession session{model,
                       options,
                       observer,
                       std::move(teacher),
                       {},
                       shuffle_windows(windows, options.seed),
                       ThreadPool(threads),
                       clock,
                       json(),
                       checkpoint};
  session.student.blocks.resize(static_cast<size_t>(config.layers));
  session.log["settings"] = describe(options);
  json files = json::array();
  for (size_t i = 0; i < text.files.size(); ++i) {
    files.push_back({{"name", text.files[i]}, {"sha256", text.digests[i]}});
  }
  session.log["data"] = {{"files", files}, {"tokens", text.tokens.size()}};
  RABIT_ASSIGN(const std::string digest, sha256_file(model.path()));
  session.log["source"] = {{"name", model.path().filename().string()}, {"sha256", digest}};
  session.log["compute"] = compute == at::kBFloat16 ? "bf16" : "f32";
  session.log["threads"] = threads;
  session.log["resumed"] = options.resume;
  session.log["warm_start"] = json::array();
  session.log["distill"] = json::array();
  return without_exceptions([&] { return run(session, model, held_out, out); });
}

}  // namespace rabit::train
