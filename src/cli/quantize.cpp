// `rabit quantize`: a pretrained model in, a packed model out.

#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/interrupt.h"
#include "cli/common.h"
#ifdef RABIT_TRAIN
#include "train/quantize.h"
#endif

namespace rabit::cli {

#ifndef RABIT_TRAIN

Command add_quantize(CLI::App& app) {
  CLI::App* command = app.add_subcommand("quantize", "Quantize a model (not in this build)");
  command->allow_extras();
  return {command, [] {
            return Status(
                Error{"quantize: this build has no training (it was configured with "
                      "-DRABIT_TRAIN=OFF); run scripts/setup.sh and build the release "
                      "preset"});
          }};
}

#else

namespace {

struct Arguments {
  std::string model, out, method = "rabit", compute = "auto", embedding = "q8_0", eval_text;
  std::vector<std::string> data;
  int64_t eval_ctx = 2048, threads = 0, seed = 1;
  bool no_error_feedback = false, json = false;
  train::QuantizeOptions options;
};

constexpr char kDocumentEnd[] = "<|endoftext|>";

// Documents are separated by lines that hold only <|endoftext|>; the token of that name, or the
// end-of-sequence token, takes the line's place. All other text is plain text.
void append_documents(const Tokenizer& tokenizer, const std::string& text,
                      std::vector<int32_t>& ids) {
  const std::string line = std::string(kDocumentEnd) + "\n";
  const std::vector<int32_t> parsed = tokenizer.encode(kDocumentEnd, true);
  const int32_t end_id =
      parsed.size() == 1 ? parsed[0] : static_cast<int32_t>(tokenizer.spec().eos_id);
  size_t begin = 0;
  while (begin < text.size()) {
    size_t end = begin;
    size_t next = std::string::npos;
    for (;; ++end) {
      end = text.find(line, end);
      if (end == std::string::npos) {
        break;
      }
      if (end == 0 || text[end - 1] == '\n') {
        next = end + line.size();
        break;
      }
    }
    const auto document = tokenizer.encode(
        std::string_view(text).substr(begin, end == std::string::npos ? end : end - begin), false);
    ids.insert(ids.end(), document.begin(), document.end());
    if (next == std::string::npos) {
      break;
    }
    if (end_id >= 0) {
      ids.push_back(end_id);
    }
    begin = next;
  }
}

Status check_writable(const std::filesystem::path& out) {
  if (out.empty()) {
    return Error{"-o is empty; name the packed file to write"};
  }
  const std::filesystem::path folder = out.has_parent_path() ? out.parent_path() : ".";
  if (!std::filesystem::is_directory(folder)) {
    return Error{"-o " + out.string() + ": no such folder: " + folder.string()};
  }
  std::filesystem::path probe = out;
  probe += ".probe";
  RABIT_ASSIGN(const AtomicFile file, AtomicFile::create(probe));  // dropped: leaves nothing
  if (std::filesystem::is_directory(out)) {
    return Error{"-o " + out.string() + ": is a folder; name a file"};
  }
  return {};
}

// What a run writes must replace nothing that it reads, and its log must have a place.
Status check_apart(const Arguments& arguments) {
  std::vector<std::string> inputs = arguments.data;
  inputs.push_back(arguments.eval_text);
  for (const char* ending : {"", ".json", ".ckpt"}) {
    const std::string written = arguments.out + ending;
    if (std::filesystem::is_directory(written)) {
      return Error{"-o " + arguments.out + ": " + written + " is a folder; name another file"};
    }
    for (const auto& input : inputs) {
      std::error_code absent;
      if (std::filesystem::equivalent(written, input, absent) && !absent) {
        return Error{"-o " + arguments.out + ": would overwrite the input " + input +
                     "; name another file"};
      }
    }
  }
  return {};
}

Status run(const Arguments& arguments) {
  train::QuantizeOptions options = arguments.options;
  options.compute = arguments.compute == "bf16"  ? train::Compute::kBF16
                    : arguments.compute == "f32" ? train::Compute::kF32
                                                 : train::Compute::kAuto;
  options.embedding =
      arguments.embedding == "f16" ? train::EmbeddingType::kF16 : train::EmbeddingType::kQ8_0;
  options.error_feedback = !arguments.no_error_feedback;
  options.threads = static_cast<int>(arguments.threads);
  options.seed = static_cast<uint64_t>(arguments.seed);
  RABIT_CHECK(check_writable(arguments.out));
  RABIT_CHECK(check_apart(arguments));
  RABIT_ASSIGN(const auto model, GgufFile::open(arguments.model));
  RABIT_ASSIGN(const auto tokenizer, load_tokenizer(*model));
  train::TrainingText text;
  for (const auto& path : arguments.data) {
    RABIT_ASSIGN(const std::string content, read_text_file(path));
    append_documents(*tokenizer, content, text.tokens);
    text.files.push_back(std::filesystem::path(path).filename().string());
    text.digests.push_back(sha256_hex(content));
    RABIT_CHECK(check_interrupt());
  }
  train::HeldOut held_out;
  if (!arguments.eval_text.empty()) {
    RABIT_ASSIGN(const std::string content, read_text_file(arguments.eval_text));
    held_out.tokens = tokens_of_text(*tokenizer, content);
    held_out.ctx = arguments.eval_ctx;
  }

  std::unique_ptr<Progress> progress;
  std::string phase;
  train::TrainObserver observer;
  observer.progress = [&](const train::TrainProgress& p) {
    if (p.phase != phase) {
      if (progress) {
        progress->finish();
      }
      progress = std::make_unique<Progress>(phase = p.phase, p.done);
    }
    std::vector<std::string> details;
    if (!std::isnan(p.loss)) {
      details.push_back(fmt::format("loss {:.4f}", p.loss));
    }
    if (p.tokens_per_second > 0.0) {
      details.push_back(fmt::format("{:.0f} tokens/s", p.tokens_per_second));
    }
    progress->update(p.done, p.total, fmt::format("{}", fmt::join(details, ", ")));
  };
  observer.message = [&](const std::string& line) {
    if (progress) {
      progress->finish();
      progress.reset();
      phase.clear();
    }
    fmt::print(stderr, "{}\n", line);
  };
  observer.message(fmt::format("{} tokens of training text", text.tokens.size()));
  std::filesystem::path checkpoint = arguments.out;
  checkpoint += ".ckpt";
  std::error_code absent;
  const auto before = std::filesystem::last_write_time(checkpoint, absent);
  const Status status = train::quantize(*model, text, held_out, arguments.out, options, observer);
  if (progress) {
    progress->finish();
  }
  if (!status) {
    std::error_code gone;
    const auto after = std::filesystem::last_write_time(checkpoint, gone);
    const bool holds_this_run = !gone && (options.resume || absent || after != before);
    if (status.error().interrupted && holds_this_run) {
      return Error{"interrupted; " + checkpoint.string() +
                       " holds what was done, go on with the same command and --resume",
                   true};
    }
    if (status.error().interrupted) {
      return Error{"interrupted before anything was finished; nothing was written", true};
    }
    return status;
  }
  if (options.dry_run) {
    return {};
  }
  if (arguments.json) {
    RABIT_ASSIGN(const std::string log, read_file(arguments.out + ".json"));
    RABIT_CHECK(write_stdout(log));
  }
  fmt::print(stderr, "wrote {} ({:.1f} MB), log in {}.json\n", arguments.out,
             static_cast<double>(std::filesystem::file_size(arguments.out)) / 1e6, arguments.out);
  return {};
}

}  // namespace

Command add_quantize(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  auto& a = *arguments;
  auto& o = a.options;
  constexpr int64_t kMany = int64_t{1} << 40;
  CLI::App* command = app.add_subcommand(
      "quantize",
      "Turn a pretrained model into stacked +-1 matrices and train them to behave like it");
  command->add_option("MODEL", a.model, "GGUF file of the original model")->required();
  command
      ->add_option("-o,--output", a.out, "Packed GGUF file to write; OUT.json gets the run's log")
      ->required();
  command
      ->add_option("--data", a.data,
                   "UTF-8 text files to train on; documents end at lines that hold only "
                   "<|endoftext|>")
      ->required();
  command->add_option("--method", a.method, "How the paths are trained: rabit (coupled)")
      ->capture_default_str()
      ->check(CLI::IsMember({"rabit"}));
  add_integer(command, "--bits", o.paths, 1, 4, "Binary paths, one bit a weight each");

  auto* length = command->add_option_group("How long");
  add_number(length, "--minutes", o.minutes, 0, 1e6, "Bound on the whole run's time; 0: none");
  add_integer(length, "--tokens", o.tokens, -1, kMany,
              "Tokens of end-to-end distillation; -1: 4 million, or 0 on a CPU with --minutes");
  add_integer(length, "--calib-tokens", o.calib_tokens, 1, kMany,
              "Tokens for error feedback and the block-by-block warm start");
  add_number(length, "--warm-epochs", o.warm_epochs, 0, 1e4,
             "Passes over them for each block; 0: no warm start");

  auto* where = command->add_option_group("Where");
  where->add_option("--device", o.device, "cpu, cuda or cuda:N")->capture_default_str();
  add_threads(where, a.threads);
  where->add_option("--compute", a.compute, "Arithmetic of the products: auto, bf16 or f32")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "bf16", "f32"}));
  where->add_flag("--dry-run", o.dry_run, "Load, measure the speed, say the plan, and stop");
  where->add_flag("--resume", o.resume, "Go on from OUT.ckpt, which an interrupted run left");
  add_number(where, "--checkpoint-minutes", o.checkpoint_minutes, 0.01, 1e6,
             "Time between checkpoints");

  auto* start = command->add_option_group("Start");
  start->add_flag("--no-error-feedback", a.no_error_feedback,
                  "Fit the scales by importance alone, without error feedback");
  add_number(start, "--ef-damp", o.ef_damp, 1e-8, 1e3,
             "Damping of the inputs' second moment, in parts of its mean diagonal");
  add_number(start, "--alpha-in", o.alpha_in, 0, 4, "Exponent of the columns' importance");
  add_number(start, "--alpha-out", o.alpha_out, 0, 4,
             "Exponent of the rows' importance (only with --no-error-feedback)");
  add_integer(start, "--init-sweeps", o.init_sweeps, 1, 1000, "Gauss-Seidel sweeps of SVID");
  add_integer(start, "--als-steps", o.als_steps, 0, 1000, "Least-squares refits of the scales");

  auto* training = command->add_option_group("Training");
  add_integer(training, "--seq-len", o.seq_len, 16, int64_t{1} << 20, "Tokens a window");
  add_integer(training, "--seed", a.seed, 0, std::numeric_limits<int64_t>::max(),
              "Seed of every random choice");
  add_integer(training, "--warm-batch", o.warm_batch, 1, 1 << 20,
              "Windows a step in the warm start");
  add_number(training, "--warm-muon-lr", o.warm_muon_lr, 0, 10, "Muon's rate in the warm start");
  add_number(training, "--warm-scale-lr", o.warm_scale_lr, 0, 10,
             "The scales' rate in the warm start");
  add_integer(training, "--batch", o.batch, 1, 1 << 20, "Windows a step end to end");
  add_number(training, "--muon-lr", o.muon_lr, 0, 10, "Muon's rate end to end");
  add_number(training, "--scale-lr", o.scale_lr, 0, 10, "The scales' rate end to end");
  add_number(training, "--warmup", o.warmup, 0, 0.9, "Share of a phase with rising rates");
  add_number(training, "--gamma", o.gamma, 0, 1e6,
             "Weight of the blocks' normalised error end to end");
  add_number(training, "--clip", o.clip, 1e-9, 1e9, "Largest norm of the scales' gradients");

  auto* output = command->add_option_group("Output");
  output->add_option("--embedding", a.embedding, "Type of embedding and head: q8_0 or f16")
      ->capture_default_str()
      ->check(CLI::IsMember({"q8_0", "f16"}));
  output->add_option("--eval", a.eval_text,
                     "Text to measure teacher and student on after training, with torch; its time "
                     "comes on top of --minutes");
  add_integer(output, "--eval-ctx", a.eval_ctx, 2, int64_t{1} << 20, "Window of --eval");
  output->add_flag("--json", a.json, "Print the run's log as one JSON object");
  command->footer(
      "Examples:\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --minutes 10\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --device cuda --tokens "
      "4000000\n"
      "  rabit quantize model.gguf -o model.3bit.gguf --data text.txt --bits 3 --warm-epochs 0 "
      "--tokens 0\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --dry-run\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --resume");
  return {command, [arguments] { return run(*arguments); }};
}

#endif

}  // namespace rabit::cli
