// One run from start to end: checks, plan, phases, packing, log.

#include "train/quantize.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/resource.h>

#include <cmath>
#include <cstdlib>
#include <optional>

#include "base/files.h"
#include "base/interrupt.h"
#include "eval/diagnostics.h"
#include "eval/perplexity.h"
#include "train/guard.h"
#include "train/memory_plan.h"
#include "train/path_diagnosis.h"
#include "train/session.h"
#include "train/shards.h"
#include "train/torch_logits.h"

namespace rabit::train {
namespace {

using nlohmann::json;

// End-to-end distillation gets at most this share of a bounded run on a GPU, and none on a CPU,
// where the block-by-block phase teaches more a second (docs/training.md).
constexpr double kDistillShare = 0.7;
constexpr int64_t kDefaultDistillTokens = 4'000'000;

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

// The device of this process: of several on one machine each has its own GPU.
Result<at::Device> own_device(const QuantizeOptions& options) {
  RABIT_ASSIGN(const Place place, Place::from_environment());
  if (!place.alone() && options.device.rfind("cuda:", 0) == 0) {
    return Error{
        fmt::format("--device {}: of several processes each takes the one of its number; "
                    "give --device cuda",
                    options.device)};
  }
  return pick_device(!place.alone() && options.device == "cuda"
                         ? fmt::format("cuda:{}", place.local_rank)
                         : options.device);
}

Status write_log(const json& log, const std::filesystem::path& out) {
  std::filesystem::path path = out;
  path += ".json";
  return write_file(path, log.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
}

Status evaluate(TrainSession& session, const HeldOut& held_out) {
  if (held_out.tokens.empty()) {
    return {};
  }
  if (!held_out.sha256.empty()) {
    session.log["perplexity"]["text_sha256"] = held_out.sha256;
  }
  for (const bool student : {false, true}) {
    TorchLogits source(session.teacher, student ? &session.student : nullptr);
    const char* name = student ? "student" : "teacher";
    RABIT_ASSIGN(
        const PerplexityResult result,
        perplexity(source, held_out.tokens, {held_out.ctx, 0},
                   [&](const PerplexityResult& so_far, int64_t windows) {
                     if (session.observer.progress) {
                       session.observer.progress({std::string("perplexity, ") + name,
                                                  so_far.windows, windows, so_far.mean_nll});
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

// Every layer's paths, on windows from the end of the shuffled text: where there is enough of it,
// none that the start was fitted to.
Status diagnose_student(TrainSession& session) {
  const QuantizeOptions& options = session.options;
  if (options.diagnose_tokens == 0) {
    return {};
  }
  const int64_t windows =
      std::clamp<int64_t>(options.diagnose_tokens / options.seq_len, 1, session.windows.distinct());
  const int64_t blocks = session.config().layers;
  const auto reader = [&](int64_t layer) -> Result<BlockPaths> {
    return block_paths(whole_block(session.student.blocks[static_cast<size_t>(layer)]));
  };
  RABIT_ASSIGN(
      const auto layers,
      diagnose(session.teacher, blocks, reader,
               session.windows.distinct_range(session.windows.distinct() - windows, windows),
               [&](int64_t done) {
                 if (session.observer.progress) {
                   session.observer.progress({"diagnosis", done, blocks, NAN, 0.0});
                 }
               }));
  session.log["diagnostics"] = to_json(layers);
  session.log["diagnostics"]["tokens"] = windows * options.seq_len;
  return {};
}

// Gives the student these latents, if any, and returns those that it had.
std::vector<at::Tensor> swap_latents(const Student& student,
                                     const std::vector<at::Tensor>& values) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> before;
  if (!values.empty()) {
    const std::vector<at::Tensor> matrices = latents(student.blocks);
    for (size_t i = 0; i < matrices.size(); ++i) {
      before.push_back(matrices[i].detach().clone());
      at::Tensor matrix = matrices[i];
      matrix.copy_(values[i]);
    }
  }
  return before;
}

// Tokens of end-to-end distillation.
int64_t planned_tokens(const QuantizeOptions& options, at::Device device) {
  if (options.tokens >= 0) {
    return options.tokens;
  }
  return options.minutes > 0.0 && device.is_cpu() ? 0 : kDefaultDistillTokens;
}

// Before hours of training rather than after them: the packed file must fit, checkpoints should.
Status check_room(const QuantizeOptions& options, const GgufFile& model, const ModelConfig& config,
                  const PathPlan& bits, int64_t distill_tokens, const std::filesystem::path& out,
                  const TrainObserver& observer) {
  const PlanSize plan = plan_size(config, bits);
  uint64_t linear = 0;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    for (const Role role : kRoles) {
      const LinearShape shape = linear_shape(config, role);
      const int64_t paths = bits.paths(layer, role);
      const int64_t latents = has_independent_latents(options.method) ? paths : 1;
      linear += static_cast<uint64_t>(latents * shape.d_out * shape.d_in);
    }
  }
  auto packed = static_cast<uint64_t>(static_cast<double>(plan.weights) / 8.0 *
                                      std::max(plan.bits_per_weight(), options.target_bpw));
  for (const char* name : {"token_embd.weight", "output.weight"}) {
    if (const TensorInfo* tensor = model.find_tensor(name)) {
      const auto values = static_cast<uint64_t>(tensor->elements());
      packed += options.embedding == EmbeddingType::kF16 ? 2 * values : values / 32 * 34;
    }
  }
  // Latents; where there is distillation, one momentum or two, and the average.
  const uint64_t copies =
      distill_tokens == 0
          ? 1
          : 2 + (options.optimizer == Optimizer::kAdamW ? 1 : 0) + (options.ema > 0.0 ? 1 : 0);
  const uint64_t checkpoint = linear * copies * 4;
  std::error_code unknown;
  const auto folder = out.has_parent_path() ? out.parent_path() : std::filesystem::path(".");
  const auto space = std::filesystem::space(folder, unknown);
  if (unknown) {
    return {};
  }
  const auto megabytes = [](uint64_t bytes) { return static_cast<double>(bytes) / 1e6; };
  if (space.available < packed) {
    return Error{
        fmt::format("-o {}: its disk has {:.0f} MB free and the packed model needs about "
                    "{:.0f}; make room or write elsewhere",
                    out.string(), megabytes(space.available), megabytes(packed))};
  }
  // The last checkpoints stay until the next is whole.
  const uint64_t needed = static_cast<uint64_t>(options.keep_checkpoints + 1) * checkpoint;
  if (space.available < packed + needed) {
    observer.message(
        fmt::format("warning: {:.0f} MB are free on the disk of {}, and checkpoints "
                    "need up to {:.0f}: some may not be written",
                    megabytes(space.available), out.string(), megabytes(needed)));
  }
  return {};
}

// What the run will need on a GPU, before it needs it.
Status check_memory(const QuantizeOptions& options, const ModelConfig& config, const PathPlan& bits,
                    const TextWindows& windows, at::Device device, at::ScalarType compute,
                    int processes, const TrainObserver& observer) {
  // Only what goes through the fused operations has been measured.
  const bool taps = options.gamma > 0.0 && options.gamma_on == GammaOn::kLayers;
  if (!device.is_cuda() || compute != at::kBFloat16 || taps) {
    return {};
  }
  (void)at::empty({1}, device);  // wakes it
  const int64_t calib = std::min(options.calib_tokens, windows.distinct_tokens());
  const int64_t distilled = planned_tokens(options, device);
  const auto phases = plan_memory(config, bits, options, calib, distilled, processes);
  const auto [free, total] = c10::getDeviceAllocator(device.type())->getMemoryInfo(device.index());
  const auto gigabytes = [](auto bytes) { return static_cast<double>(bytes) / 1e9; };
  for (const MemoryPhase& phase : phases) {
    observer.message(fmt::format("memory of {}: {}", device.str(), phase.describe()));
  }
  const int64_t needed = peak_bytes(phases);
  const auto available = static_cast<int64_t>(free);
  if (needed <= available) {
    return {};
  }
  const auto fitting =
      options_within(config, bits, options, calib, distilled, available, processes);
  return Error{fmt::format(
      "{} has {:.1f} GB free of {:.1f}, and this run needs about {:.1f}; {}", device.str(),
      gigabytes(free), gigabytes(total), gigabytes(needed),
      fitting ? "it would fit with " + *fitting : std::string("no setting known would fit"))};
}

// What earlier phases have left in the allocator's hands, the next may use in other sizes.
void release_memory(at::Device device) {
  if (device.is_cuda()) {
    c10::getDeviceAllocator(device.type())->emptyCache();
  }
}

// What one process alone can do.
Status check_together(const QuantizeOptions& options, const ModelConfig& config, int processes) {
  const auto alone = [&](const char* what, const char* instead) {
    return Error{
        fmt::format("{}: of one process alone, here are {}; {}", what, processes, instead)};
  };
  if (options.minutes > 0.0) {
    return alone("--minutes", "give --tokens and --calib-tokens");
  }
  if (options.target_bpw > 0.0) {
    return alone("--target-bpw", "let one process search, and give its plan as --bits");
  }
  if (options.alpha_search) {
    return alone("--alpha-search", "let one process search, and give --alpha-in and --alpha-out");
  }
  if (options.batch % processes != 0) {
    return Error{fmt::format("--batch {}: {} processes cannot share it equally; give a multiple",
                             options.batch, processes)};
  }
  if (options.warm_epochs > 0.0 && options.warm_batch % processes != 0) {
    return Error{
        fmt::format("--warm-batch {}: {} processes cannot share it equally; give a multiple",
                    options.warm_batch, processes)};
  }
  return check_shares(config, processes);
}

// Whether all processes have the same bytes; `own` of each equally long.
bool same_everywhere(const TrainSession& session, const std::string& own) {
  const at::Tensor mine = at::empty({static_cast<int64_t>(own.size())}, at::kByte);
  std::copy(own.begin(), own.end(), mine.mutable_data_ptr<uint8_t>());
  const at::Tensor of_first = mine.to(session.teacher.device, at::kByte, false, /*copy=*/true);
  session.ranks->broadcast(of_first);
  return at::equal(of_first.to(at::kCPU), mine);
}

// Each process needs some of the windows, in whole batches where blocks are trained.
Status check_windows(const QuantizeOptions& options, const TextWindows& windows, int processes) {
  const int64_t count = std::min(windows.distinct(), options.calib_tokens / options.seq_len);
  const bool trains = options.warm_epochs > 0.0;
  if (count >= (trains ? options.warm_batch : processes)) {
    return {};
  }
  return Error{fmt::format(
      "--calib-tokens {}: {} windows are too few for {} processes{}", options.calib_tokens, count,
      processes, trains ? fmt::format(" and --warm-batch {}", options.warm_batch) : std::string())};
}

// All processes must have been asked for the same, and see the folder that they write to.
Status compare_runs(const TrainSession& session, const HeldOut& held_out,
                    const std::filesystem::path& out) {
  json own = {{"settings", session.log["settings"]},
              {"source", session.log["source"]["sha256"]},
              {"compute", session.log["compute"]},
              {"held out", {held_out.sha256, held_out.ctx}},
              {"metrics", static_cast<bool>(session.observer.metrics)},
              {"run", {session.options.dry_run, session.options.resume}}};
  own["settings"].erase("threads");
  for (const json& file : session.log["data"]["files"]) {
    own["texts"].push_back(file["sha256"]);
  }
  const bool same = same_everywhere(
      session, sha256_hex(own.dump(-1, ' ', false, json::error_handler_t::replace)));
  if (session.anywhere(!same)) {
    return Error{!same ? "another model, other texts or other settings than process 0 has"
                       : "not all processes have the same model, texts and settings"};
  }
  std::filesystem::path lock = out;
  lock += ".lock";
  std::error_code unknown;
  const bool sees = std::filesystem::exists(lock, unknown);
  if (session.anywhere(!sees)) {
    return Error{!sees
                     ? fmt::format("-o {}: not in a folder that process 0 writes to", out.string())
                     : fmt::format("-o {}: not all processes see its folder", out.string())};
  }
  return {};
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
    const std::string at = fmt::format("{:12}{:12}", resumed.blocks_done,
                                       resumed.distilling ? resumed.distill.step : -1);
    if (session.ranks && session.anywhere(!same_everywhere(session, at))) {
      return Error{"not all processes have the same checkpoint"};
    }
  }

  const auto timed = [&](const char* phase, const auto& body) -> Status {
    const Clock clock;
    const Status status = without_exceptions(body);
    session.log["phase_seconds"][phase] = clock.elapsed();
    return status;
  };
  const int64_t layers = session.config().layers;
  const int64_t distill_tokens = planned_tokens(options, session.teacher.device);
  const bool bounded = options.minutes > 0.0;
  const bool distilled = session.log.value("distill_planned", int64_t{0}) >= distill_tokens;
  const bool blocks_left = !resumed.distilling && resumed.blocks_done < layers;
  const int64_t planned_steps = distill_steps(options, distill_tokens);
  if (resumed.distilling && !session.log.contains("distill_planned") &&
      resumed.distill.step > planned_steps) {
    return Error{
        fmt::format("--tokens {}: {} has {} tokens behind it; give at least as many, best what it "
                    "was begun with",
                    distill_tokens, session.checkpoint_path.string(),
                    resumed.distill.step * options.batch * options.seq_len)};
  }
  if (blocks_left) {
    const bool weighted =
        options.alpha_out > 0.0 || (!options.error_feedback && options.alpha_in > 0.0);
    if (options.alpha_search || (weighted && options.method != Method::kDbllm)) {
      RABIT_CHECK(measure_importance(session));
    }
    const bool searching = options.alpha_search || options.target_bpw > 0.0;
    if (searching && options.dry_run) {
      session.observer.message("the search of settings is left out of a dry run");
    } else if (searching && !session.log.contains("searched")) {
      RABIT_CHECK(timed("search", [&] { return search_settings(session); }));
      save_or_say(session, 0, nullptr);  // it may have taken long
    }
  }
  // What distillation will take, unless a student is in memory already: a second would not fit.
  double distill_seconds = 0.0;
  if (!distilled && resumed.blocks_done == 0) {
    RABIT_ASSIGN(distill_seconds, measure_distill(session, distill_tokens));
    release_memory(session.teacher.device);
    const auto tokens = static_cast<double>(distill_steps(options, distill_tokens) * options.batch *
                                            options.seq_len);
    session.observer.message(
        fmt::format("measured: distillation from {} tokens takes {:.0f} s ({:.0f} tokens/s)",
                    distill_tokens, distill_seconds, tokens / distill_seconds));
  }
  const double spent = session.spent = session.clock.elapsed();
  // A bound that loading has used up already is still one: 0 would mean none.
  const double left =
      bounded ? std::max(1e-3, options.minutes * 60.0 - kFinishSeconds - spent) : 0.0;
  const double distill_share =
      distilled ? 0.0
                : (distill_seconds > 0.0 ? std::min(kDistillShare, distill_seconds / left)
                                         : kDistillShare);
  session.warm_share = 1.0 - distill_share;
  session.clock = Clock(left * session.warm_share);
  const Clock phases(left);
  const auto within = [&](double share) {
    return bounded ? fmt::format(" within {:.0f} s", left * share) : std::string();
  };
  if (blocks_left) {
    session.observer.message(fmt::format(
        "plan: {} blocks from {}{} tokens, {}, warm start of {} epochs{}{}",
        layers - resumed.blocks_done, bounded ? "at most " : "",
        std::min(options.calib_tokens, session.windows.distinct_tokens()),
        options.error_feedback ? "error feedback" : "no error feedback", options.warm_epochs,
        options.warm_blocks > 0
            ? fmt::format(" for the last {}", std::min(options.warm_blocks, layers))
            : std::string(),
        within(session.warm_share)));
  }
  if (!distilled) {
    session.observer.message(fmt::format("plan: {} tokens end to end{}", distill_tokens,
                                         within(blocks_left ? distill_share : 1.0)));
  }
  if (options.calib_tokens > session.windows.distinct_tokens()) {
    session.observer.message(
        fmt::format("the text has {} tokens in whole windows, fewer than "
                    "--calib-tokens {}: all are taken",
                    session.windows.distinct_tokens(), options.calib_tokens));
  }
  if (options.dry_run && !blocks_left) {
    return {};
  }
  if (blocks_left) {
    RABIT_CHECK(timed("blocks", [&] { return warm_start(session, resumed.blocks_done); }));
    if (options.dry_run) {
      return {};
    }
    release_memory(session.teacher.device);
    // Whatever may come, this is kept; of several processes none can save what all had.
    const double took = session.log["phase_seconds"]["blocks"].get<double>();
    if (!distilled || session.ranks || took > options.checkpoint_minutes * 60.0) {
      save_or_say(session, layers, nullptr);
    }
  }
  // Distillation that time ended is as complete as one that ran out of steps.
  if (!distilled) {
    session.clock = Clock(bounded ? std::max(1.0, phases.left()) : 0.0);
    RABIT_CHECK(
        timed("distillation", [&] { return distill(session, distill_tokens, resumed.distill); }));
    resumed.distilling = true;
    session.log["distill_planned"] = distill_tokens;
  }
  if (resumed.distilling) {
    session.log["distill_tokens"] = resumed.distill.step * options.batch * options.seq_len;
  }
  // The average of the latents gives the signs; what was trained comes back if this fails.
  const std::vector<at::Tensor> trained = swap_latents(session.student, resumed.distill.average);
  bool packed = false;
  const auto finish = [&]() -> Status {
    RABIT_CHECK(timed("evaluation", [&] { return evaluate(session, held_out); }));
    RABIT_CHECK(timed("packing", [&] { return write_packed_model(session, model, out); }));
    packed = true;
    // The model is there; what can be learnt about it must not cost its log.
    if (session.ranks && session.first()) {  // nor may what happens to another process
      RABIT_CHECK(write_log(session.log, out));
    }
    const Status told = timed("diagnosis", [&] { return diagnose_student(session); });
    if (!told) {
      session.observer.message("no diagnosis: " + told.error().message);
    }
    session.log["memory"] = peak_memory(session.teacher.device);
    session.log["seconds"] = session.seconds();
    if (session.first()) {
      RABIT_CHECK(write_log(session.log, out));
    }
    return session.ranks ? told : Status();  // others may wait in what this one has left
  };
  if (const Status status = finish(); !status) {
    const std::string what = status.error().message + (packed ? "; the packed model is whole" : "");
    if (session.ranks) {
      return Error{what + "; go on from the last checkpoint with --resume",
                   status.error().interrupted};
    }
    // Training is done: whatever ended the rest, it must not have been in vain.
    swap_latents(session.student, trained);
    const Status saved =
        save_checkpoint(session, layers, resumed.distilling ? &resumed.distill : nullptr);
    const std::string checkpoint = session.checkpoint_path.string();
    std::error_code unknown;
    const bool older = std::filesystem::exists(session.checkpoint_path, unknown);
    if (!saved) {
      return Error{
          what + "; " +
          (older ? "only an earlier state is in " + checkpoint : "what was trained is lost") +
          ": " + saved.error().message};
    }
    return Error{what + "; " + checkpoint + " holds what was trained, go on with --resume",
                 status.error().interrupted};
  }
  if (session.first()) {
    remove_checkpoints(session.checkpoint_path);
  }
  return {};
}

}  // namespace

json peak_memory(at::Device device) {
  json out;
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
    out["host_bytes"] = static_cast<int64_t>(usage.ru_maxrss) * 1024;
  }
  if (device.is_cuda()) {
    const auto stats = c10::getDeviceAllocator(device.type())->getDeviceStats(device.index());
    out["device_bytes"] = stats.reserved_bytes.front().peak;
    out["device_allocated_bytes"] = stats.allocated_bytes.front().peak;
  }
  return out;
}

Result<std::shared_ptr<Ranks>> join_processes(
    const QuantizeOptions& options, std::function<void(const std::string&)> lost,
    const std::function<void(const std::string&)>& waiting) {
  RABIT_ASSIGN(const Place place, Place::from_environment());
  if (place.alone()) {
    return std::shared_ptr<Ranks>();
  }
  RABIT_ASSIGN(const at::Device device, own_device(options));
  return Ranks::join(place, device, std::move(lost), waiting);
}

void leave_processes(const std::shared_ptr<Ranks>& ranks, const Status& status) {
  if (ranks) {
    ranks->leave(status ? std::string() : status.error().message);
  }
}

namespace {

Status quantize_with(const std::shared_ptr<Ranks>& ranks, const GgufFile& model,
                     const TrainingText& text, const HeldOut& held_out,
                     const std::filesystem::path& out, const QuantizeOptions& options,
                     const TrainObserver& observer) {
  const Clock clock;
  const int processes = ranks ? ranks->size() : 1;
  const bool first = !ranks || ranks->first();
  std::optional<HoldInterrupts> together;
  if (ranks) {
    together.emplace();  // all stop at the same places
    observer.message(fmt::format("{} processes", processes));
  }
  std::optional<FileLock> lock;
  if (first) {
    RABIT_CHECK(check_run(options, out, std::array{model.path()}));
    RABIT_ASSIGN(FileLock taken, FileLock::take(out));
    lock.emplace(std::move(taken));
  }
  RABIT_ASSIGN(const at::Device device, own_device(options));
  const at::ScalarType compute = pick_compute(options.compute, device);
  RABIT_ASSIGN(const Place place, Place::from_environment());
  const int threads = options.threads > 0 ? static_cast<int>(options.threads)
                                          : std::max(1, pick_threads(0) / place.local_size);
  at::set_num_threads(threads);

  RABIT_ASSIGN(const ModelConfig config, read_model_config(model));
  if (options.seq_len > config.context_length) {
    return Error{fmt::format("--seq-len {}: the model was trained for at most {} positions",
                             options.seq_len, config.context_length)};
  }
  RABIT_ASSIGN(const PathPlan bits, PathPlan::parse(options.bits));
  if (bits.last_layer() >= config.layers) {
    return Error{fmt::format("--bits {}: names block {}, the model's are 0 to {}", options.bits,
                             bits.last_layer(), config.layers - 1)};
  }
  if (const double base = plan_size(config, bits).bits_per_weight();
      options.target_bpw > 0.0 && options.target_bpw < base) {
    return Error{
        fmt::format("--target-bpw {}: --bits {} alone takes {:.4f} bits a weight, scales "
                    "counted; give more",
                    options.target_bpw, options.bits, base)};
  }
  if (PathPlan most = bits; options.target_bpw > 0.0) {
    for (int64_t layer = 0; layer < config.layers; ++layer) {
      for (const Role role : kRoles) {
        const int64_t paths = bits.paths(layer, role) + kMostExtraPaths;
        most.set(layer, role, std::min(quant::kMaxPaths, paths));
      }
    }
    if (const double all = plan_size(config, most).bits_per_weight(); options.target_bpw > all) {
      return Error{
          fmt::format("--target-bpw {}: with {} paths more everywhere, {} at most, it would "
                      "be {:.4f}; give less, or more --bits",
                      options.target_bpw, kMostExtraPaths, quant::kMaxPaths, all)};
    }
  }
  RABIT_CHECK(check_held_out(held_out, config.vocab_size));
  if (first) {
    RABIT_CHECK(
        check_room(options, model, config, bits, planned_tokens(options, device), out, observer));
  }
  if (ranks) {
    RABIT_CHECK(check_together(options, config, processes));
  }
  RABIT_ASSIGN(const auto weights, parse_weights(options.data_weights));
  RABIT_ASSIGN(TextWindows windows,
               TextWindows::cut(text, weights, options.seq_len, config.vocab_size,
                                static_cast<uint64_t>(options.seed)));
  if (ranks) {
    RABIT_CHECK(check_windows(options, windows, processes));
  }
  Network teacher;
  RABIT_CHECK(without_exceptions([&]() -> Status {
    RABIT_CHECK(check_memory(options, config, bits, windows, device, compute, processes, observer));
    RABIT_ASSIGN(teacher,
                 load_network(model, device, compute, options.share_original ? ranks : nullptr));
    return {};
  }));

  std::filesystem::path checkpoint = out;
  checkpoint += ".ckpt";
  TrainSession session{
      model, options, observer,  std::move(teacher), {}, std::move(windows), ThreadPool(threads),
      clock, json(),  checkpoint};
  session.student.blocks.resize(static_cast<size_t>(config.layers));
  if (options.train_norms) {
    add_output_norm(session.teacher, session.student);
  }
  session.log["settings"] = describe(options);
  auto idle = idle_settings(options, planned_tokens(options, device));
  if (!ranks && options.share_original) {
    idle.emplace_back("--share-original");
  }
  if (!idle.empty()) {
    observer.message(fmt::format("note: without effect in this run: {}", fmt::join(idle, ", ")));
  }
  json files = json::array();
  for (const TokenSource& source : text.sources) {
    files.push_back({{"name", source.name},
                     {"sha256", source.sha256},
                     {"documents", source.documents},
                     {"tokens", source.tokens.size()}});
  }
  session.log["data"] = {{"files", files}, {"tokens", text.tokens()}};
  RABIT_ASSIGN(const std::string digest, sha256_file(model.path()));
  session.log["source"] = {{"name", model.path().filename().string()}, {"sha256", digest}};
  session.log["compute"] = compute == at::kBFloat16 ? "bf16" : "f32";
  session.log["threads"] = threads;
  session.log["processes"] = processes;
  session.log["resumed"] = options.resume;
  session.log["warm_start"] = json::array();
  session.log["distill"] = json::array();
  session.ranks = ranks;
  if (ranks) {
    RABIT_CHECK(compare_runs(session, held_out, out));
  }
  RABIT_CHECK(run(session, model, held_out, out));
  if (options.dry_run && device.is_cuda()) {
    const auto bytes = peak_memory(device)["device_bytes"].get<double>();
    observer.message(
        fmt::format("measured: {:.2f} GB held on {} at most", bytes / 1e9, device.str()));
  }
  return {};
}

}  // namespace

Status quantize(const GgufFile& model, const TrainingText& text, const HeldOut& held_out,
                const std::filesystem::path& out, const QuantizeOptions& options,
                const TrainObserver& caller, const std::shared_ptr<Ranks>& ranks) {
  TrainObserver observer = caller;
  if (!observer.message) {
    observer.message = [](const std::string&) {};
  }
  const Status done = without_exceptions(
      [&] { return quantize_with(ranks, model, text, held_out, out, options, observer); });
  if (!ranks) {
    return done;
  }
  if (done || done.error().interrupted) {  // all at the same place
    ranks->part();
    return done;
  }
  ranks->leave(done.error().message);
  return Error{
      fmt::format("process {} of {}: {}", ranks->rank(), ranks->size(), done.error().message)};
}

}  // namespace rabit::train
