// `rabit quantize`: a pretrained model in, a packed model out.

#include <fmt/format.h>

#include <cmath>
#include <fstream>
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
            return Status(Error{"quantize: this build has no training (it was configured with "
                                "-DRABIT_TRAIN=OFF); run scripts/setup.sh and build the release "
                                "preset"});
          }};
}

#else

namespace {

struct Arguments {
  std::string model, out, compute = "auto", embedding = "q8_0", eval_text;
  std::vector<std::string> data;
  int64_t eval_ctx = 2048;
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

Status run(const Arguments& arguments) {
  train::QuantizeOptions options = arguments.options;
  options.compute = arguments.compute == "bf16"  ? train::Compute::kBF16
                    : arguments.compute == "f32" ? train::Compute::kF32
                                                 : train::Compute::kAuto;
  options.embedding = arguments.embedding == "f16" ? train::EmbeddingType::kF16
                                                   : train::EmbeddingType::kQ8_0;
  options.error_feedback = !arguments.no_error_feedback;
  RABIT_CHECK(check_writable(arguments.out));
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
    held_out.tokens = tokenizer->encode(content, false);
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
      progress = std::make_unique<Progress>(phase = p.phase);
    }
    std::string detail;
    if (!std::isnan(p.loss)) {
      detail += fmt::format("loss {:.4f}", p.loss);
    }
    if (p.tokens_per_second > 0.0) {
      detail += fmt::format(", {:.0f} tokens/s", p.tokens_per_second);
    }
    if (p.eta_seconds >= 0.0) {
      detail += fmt::format(", {:.0f} s left", p.eta_seconds);
    }
    progress->update(p.done, p.total, detail);
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
  const Status status =
      train::quantize(*model, text, held_out, arguments.out, options, observer);
  if (progress) {
    progress->finish();
  }
  if (!status) {
    std::filesystem::path checkpoint = arguments.out;
    checkpoint += ".ckpt";
    if (status.error().interrupted && std::filesystem::exists(checkpoint)) {
      return Error{"interrupted; " + checkpoint.string() +
                       " holds what was done, go on with the same command and --resume",
                   true};
    }
    if (status.error().interrupted) {
      return Error{"interrupted before anything was finished; nothing was written", true};
    }
    return status;
  }
  if (arguments.json) {
    RABIT_ASSIGN(const std::string log, read_file(arguments.out + ".json"));
    fmt::print("{}", log);
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
  CLI::App* command = app.add_subcommand(
      "quantize", "Turn a pretrained model into stacked +-1 matrices and train them to behave like it");
  command->add_option("MODEL", a.model, "GGUF file of the original model")->required();
  command->add_option("-o,--output", a.out, "Packed GGUF file to write; OUT.json gets the log")
      ->required();
  command->add_option("--data", a.data,
                      "UTF-8 text files to train on; documents end at lines that hold only "
                      "<|endoftext|>")
      ->required();
  command->add_option("--bits", o.paths, "Binary paths, one bit a weight each: 1 to 4")
      ->capture_default_str();
  const auto group = [&](const char* name) { return command->add_option_group(name); };
  auto* length = group("How long");
  length->add_option("--minutes", o.minutes, "Bound on the whole run's time; 0: none")
      ->capture_default_str()->check(CLI::NonNegativeNumber);
  length->add_option("--tokens", o.tokens,
                     "Tokens of end-to-end distillation; -1: 4 million, or 0 on a CPU with --minutes")
      ->capture_default_str()->check(CLI::Range(int64_t{-1}, int64_t{1} << 50));
  length->add_option("--calib-tokens", o.calib_tokens,
                     "Tokens for error feedback and the block-by-block warm start")
      ->capture_default_str()->check(CLI::PositiveNumber);
  length->add_option("--warm-epochs", o.warm_epochs,
                     "Passes over them for each block; 0: no warm start")
      ->capture_default_str();
  auto* where = group("Where");
  where->add_option("--device", o.device, "cpu, cuda or cuda:N")->capture_default_str();
  where->add_option("-t,--threads", o.threads, "CPU threads; 0: all that the process may use")
      ->capture_default_str()->check(CLI::Range(0, 4096));
  where->add_option("--compute", a.compute, "Arithmetic of the products: auto, bf16 or f32")
      ->capture_default_str()->check(CLI::IsMember({"auto", "bf16", "f32"}));
  where->add_flag("--resume", o.resume, "Go on from OUT.ckpt, which an interrupted run left");
  where->add_option("--checkpoint-minutes", o.checkpoint_minutes, "Time between checkpoints")
      ->capture_default_str()->check(CLI::PositiveNumber);
  auto* start = group("Start");
  start->add_flag("--no-error-feedback", a.no_error_feedback,
                  "Fit the scales by importance alone, without error feedback");
  start->add_option("--ef-damp", o.ef_damp,
                    "Damping of the inputs' second moment, in parts of its mean diagonal")
      ->capture_default_str();
  start->add_option("--alpha-in", o.alpha_in, "Exponent of the columns' importance")
      ->capture_default_str()->check(CLI::Range(0.0, 4.0));
  start->add_option("--alpha-out", o.alpha_out,
                    "Exponent of the rows' importance (only with --no-error-feedback)")
      ->capture_default_str()->check(CLI::Range(0.0, 4.0));
  start->add_option("--init-sweeps", o.init_sweeps, "Gauss-Seidel sweeps of SVID")
      ->capture_default_str()->check(CLI::Range(1, 1000));
  start->add_option("--als-steps", o.als_steps, "Least-squares refits of the scales")
      ->capture_default_str()->check(CLI::Range(0, 1000));
  auto* training = group("Training");
  training->add_option("--seq-len", o.seq_len, "Tokens a window")->capture_default_str();
  training->add_option("--seed", o.seed, "Seed of every random choice")->capture_default_str();
  training->add_option("--warm-batch", o.warm_batch, "Windows a step in the warm start")
      ->capture_default_str();
  training->add_option("--warm-muon-lr", o.warm_muon_lr, "Muon's rate in the warm start")
      ->capture_default_str();
  training->add_option("--warm-scale-lr", o.warm_scale_lr, "The scales' rate in the warm start")
      ->capture_default_str();
  training->add_option("--batch", o.batch, "Windows a step end to end")->capture_default_str();
  training->add_option("--muon-lr", o.muon_lr, "Muon's rate end to end")->capture_default_str();
  training->add_option("--scale-lr", o.scale_lr, "The scales' rate end to end")
      ->capture_default_str();
  training->add_option("--warmup", o.warmup, "Share of a phase with rising rates")
      ->capture_default_str();
  training->add_option("--gamma", o.gamma, "Weight of the blocks' normalised error end to end")
      ->capture_default_str()->check(CLI::NonNegativeNumber);
  training->add_option("--clip", o.clip, "Largest norm of the scales' gradients")
      ->capture_default_str()->check(CLI::PositiveNumber);
  auto* output = group("Output");
  output->add_option("--embedding", a.embedding, "Type of embedding and head: q8_0 or f16")
      ->capture_default_str()->check(CLI::IsMember({"q8_0", "f16"}));
  output->add_option("--eval", a.eval_text,
                     "Text to measure teacher and student on after training, with torch");
  output->add_option("--eval-ctx", a.eval_ctx, "Window of --eval")
      ->capture_default_str()->check(CLI::Range(int64_t{2}, int64_t{1} << 20));
  output->add_flag("--json", a.json, "Print the run's log as one JSON object");
  command->footer(
      "Examples:\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --minutes 10\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --device cuda --tokens 4000000\n"
      "  rabit quantize model.gguf -o model.3bit.gguf --data text.txt --bits 3 --warm-epochs 0 "
      "--tokens 0\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --resume");
  return {command, [arguments] { return run(*arguments); }};
}

#endif

}  // namespace rabit::cli
