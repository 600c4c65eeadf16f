// `rabit run`: continues a prompt. The text goes to stdout as it is made, everything else to
// stderr.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "base/files.h"
#include "base/interrupt.h"
#include "cli/common.h"
#include "cli/engine_flags.h"
#include "cli/size_report.h"
#include "rabit/engine.h"

namespace rabit::cli {
namespace {

struct RunOptions {
  std::string model, prompt, prompt_file;
  int64_t predict = 128, threads = 0, ctx = 0, top_k = 40, seed = -1;
  double temperature = 0.8, top_p = 0.95, min_p = 0.05;
  bool ignore_eos = false, special = false, json = false, no_display_prompt = false;
  EngineFlags engine;
};

/// Hands text on in whole UTF-8 characters: a token may hold part of one. Bytes that can never
/// become a character go out as they are, for the text must equal the tokens.
class Utf8Stream {
 public:
  /// What can be shown once `bytes` have come too.
  std::string push(std::string_view bytes) {
    held_ += bytes;
    const size_t open = open_tail();
    std::string out = held_.substr(0, held_.size() - open);
    held_.erase(0, out.size());
    return out;
  }
  std::string finish() { return std::exchange(held_, {}); }

 private:
  /// Bytes at the end that begin a character whose rest may still come.
  size_t open_tail() const {
    for (size_t back = 1; back <= std::min<size_t>(3, held_.size()); ++back) {
      const auto byte = static_cast<unsigned char>(held_[held_.size() - back]);
      if ((byte & 0xC0) == 0x80) {
        continue;  // a continuation byte: look further back for its lead
      }
      const size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
      return length > back ? back : 0;
    }
    return 0;
  }

  std::string held_;
};

struct Outcome {
  std::string text, stop_reason;
  int64_t generated = 0, steps = 0;  // tokens; passes for them, none for the first
  double prompt_seconds = 0, generation_seconds = 0;
  bool interrupted = false;
};

Result<std::string> read_stdin() {
  std::string bytes;
  char block[65536];
  while (true) {
    const ssize_t got = ::read(STDIN_FILENO, block, sizeof block);
    RABIT_CHECK(check_interrupt());
    if (got == 0) {
      return text_of(bytes, "standard input");
    }
    if (got > 0) {
      bytes.append(block, static_cast<size_t>(got));
    } else if (errno != EINTR) {
      return Error{std::string("cannot read standard input: ") + std::strerror(errno)};
    }
  }
}

Result<std::string> read_prompt(const RunOptions& options) {
  if (options.prompt_file == "-") {
    return read_stdin();
  }
  if (!options.prompt_file.empty()) {
    return read_text_file(options.prompt_file);
  }
  if (options.prompt.empty()) {
    throw CLI::ValidationError("no prompt, or an empty one: give -p TEXT or -f FILE");
  }
  if (const size_t bad = first_invalid_utf8(options.prompt); bad != options.prompt.size()) {
    return Error{fmt::format("the prompt is not UTF-8 (byte {})", bad)};
  }
  return options.prompt;
}

/// Positions to reserve: what was asked for, or just what the prompt and -n need.
Result<int64_t> choose_ctx(const RunOptions& options, int64_t trained, int64_t prompt_tokens) {
  const int64_t needed = prompt_tokens + std::max<int64_t>(options.predict, 0);
  int64_t ctx = options.ctx;
  if (ctx == 0) {
    ctx = options.predict < 0 ? trained : std::min(trained, needed);
  }
  warn_of_context(trained, ctx);
  if (prompt_tokens >= ctx) {
    return Error{
        fmt::format("the prompt has {} and the context holds {}: shorten it or take a larger -c",
                    counted(prompt_tokens, "token"), ctx)};
  }
  if (options.ctx == 0 && needed > ctx) {
    note(
        fmt::format("warning: generation stops at the {} positions that the model was trained for; "
                    "-c {} takes all that -n asks for",
                    ctx, needed));
  }
  return ctx;
}

Result<Outcome> generate(Session& session, const Tokenizer& tokenizer, Sampler& sampler,
                         std::span<const int32_t> prompt, int64_t ctx, const RunOptions& options) {
  Outcome outcome;
  double started = now_seconds();
  RABIT_ASSIGN(int32_t token, session.next(prompt, sampler));
  outcome.prompt_seconds = now_seconds() - started;

  Utf8Stream stream;
  const auto show = [&](const std::string& text) -> Status {
    outcome.text += text;
    return options.json ? Status() : write_stdout(text);
  };
  started = now_seconds();
  outcome.stop_reason = "length";
  while (options.predict < 0 || outcome.generated < options.predict) {
    if (token == tokenizer.spec().eos_id && !options.ignore_eos) {
      outcome.stop_reason = "eos";
      break;
    }
    ++outcome.generated;
    RABIT_CHECK(show(stream.push(tokenizer.decode(std::span(&token, 1), options.special))));
    if (outcome.generated == options.predict) {
      break;
    }
    if (session.position() >= ctx) {
      outcome.stop_reason = "context";
      break;
    }
    const auto next = session.next(std::span(&token, 1), sampler);
    if (!next && next.error().interrupted) {  // what there is of the text is still reported
      outcome.interrupted = true;
      outcome.stop_reason = "interrupted";
      break;
    }
    RABIT_ASSIGN(token, next);
    ++outcome.steps;
  }
  RABIT_CHECK(show(stream.finish()));
  outcome.generation_seconds = now_seconds() - started;
  return outcome;
}

double per_second(int64_t count, double seconds) {
  return seconds > 0 ? static_cast<double>(count) / seconds : 0;
}

Status report(const RunOptions& options, const GgufFile& file, const Model& model,
              const Outcome& outcome, const std::string& prompt, int64_t prompt_tokens, int64_t ctx,
              uint64_t seed) {
  const double prompt_rate = per_second(prompt_tokens, outcome.prompt_seconds);
  const double rate = per_second(outcome.steps, outcome.generation_seconds);
  if (!options.json) {
    note(fmt::format(
        "prompt {}, {:.2f} tokens/s; generation {}, {:.2f} tokens/s; {}; {}{}",
        counted(prompt_tokens, "token"), prompt_rate, counted(outcome.generated, "token"), rate,
        outcome.interrupted ? "interrupted" : "stopped by " + outcome.stop_reason,
        options.temperature > 0 ? fmt::format("seed {}, ", seed) : "", runs_on(model)));
    return {};
  }
  return write_stdout(json_text({{"prompt", prompt},
                                 {"text", outcome.text},
                                 {"prompt_tokens", prompt_tokens},
                                 {"generated_tokens", outcome.generated},
                                 {"stop_reason", outcome.stop_reason},
                                 {"prompt_tokens_per_second", prompt_rate},
                                 {"tokens_per_second", rate},
                                 {"seed", seed},
                                 {"temperature", options.temperature},
                                 {"top_k", options.top_k},
                                 {"top_p", options.top_p},
                                 {"min_p", options.min_p},
                                 {"ctx", ctx},
                                 {"threads", model.threads()},
                                 {"kernels", model.kernels()},
                                 {"device", model.device()},
                                 {"model", options.model},
                                 {"model_sha256", file.sha256()}}));
}

Status run(const RunOptions& options) {
  RABIT_ASSIGN(const std::string prompt, read_prompt(options));
  RABIT_ASSIGN(const auto file, GgufFile::open(options.model));
  RABIT_ASSIGN(const auto tokenizer, load_tokenizer(*file));
  std::vector<int32_t> tokens = tokenizer->encode(prompt, options.special);
  if (tokenizer->spec().add_bos) {
    tokens.insert(tokens.begin(), static_cast<int32_t>(tokenizer->spec().bos_id));
  }
  if (tokens.empty()) {
    return Error{"the prompt has no tokens: give a longer one"};
  }

  RABIT_ASSIGN(const auto model, load_model(options.model, options.engine, options.threads));
  const auto prompt_tokens = static_cast<int64_t>(tokens.size());
  RABIT_ASSIGN(const int64_t ctx, choose_ctx(options, model->context_length(), prompt_tokens));
  RABIT_ASSIGN(const auto session, Session::create(model, ctx));

  const uint64_t seed =
      options.seed < 0 ? std::random_device()() : static_cast<uint64_t>(options.seed);
  Sampler sampler({.temperature = static_cast<float>(options.temperature),
                   .top_k = options.top_k,
                   .top_p = static_cast<float>(options.top_p),
                   .min_p = static_cast<float>(options.min_p),
                   .seed = seed});
  if (!options.json && !options.no_display_prompt) {
    RABIT_CHECK(write_stdout(prompt));
  }
  RABIT_ASSIGN(const Outcome outcome,
               generate(*session, *tokenizer, sampler, tokens, ctx, options));
  if (!options.json) {
    RABIT_CHECK(write_stdout("\n"));
  }
  RABIT_CHECK(report(options, *file, *model, outcome, prompt, prompt_tokens, ctx, seed));
  if (outcome.interrupted) {
    return Error{"interrupted", true};
  }
  return {};
}

}  // namespace

Command add_run(CLI::App& app) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* sub = app.add_subcommand("run", "Continue a prompt");
  sub->add_option("-m,--model", options->model, "GGUF model, packed or ordinary")
      ->required()
      ->type_name("FILE");
  CLI::Option* prompt =
      sub->add_option("-p,--prompt", options->prompt, "Text to continue, taken as it is")
          ->type_name("TEXT");
  sub->add_option("-f,--file", options->prompt_file,
                  "File with the text to continue; -: standard input")
      ->type_name("FILE")
      ->excludes(prompt);
  add_integer(sub, "-n,--predict", options->predict, -1, 1 << 24,
              "Tokens to generate; -1: until the end of text or a full context")
      ->check([](const std::string& text) {
        return text == "0" ? std::string("0 tokens is nothing to do: give 1 or more, or -1") : "";
      });
  add_threads(sub, options->threads);
  add_number(sub, "--temp", options->temperature, 0, 100, "Temperature; 0: the likeliest token");
  add_integer(sub, "--top-k", options->top_k, 0, 1 << 24, "Draw from the K likeliest; 0: all");
  add_number(sub, "--top-p", options->top_p, 0, 1, "Draw from the likeliest that sum to P; 1: all");
  add_number(sub, "--min-p", options->min_p, 0, 1,
             "Leave out what is less likely than P times the likeliest; 0: nothing");
  add_integer(sub, "-s,--seed", options->seed, -1, INT64_MAX,
              "Seed of the draws; -1: a random one");
  add_integer(sub, "-c,--ctx-size", options->ctx, 0, 1 << 24,
              "Positions to reserve; 0: as many as prompt and -n need, at most those of training");
  sub->add_flag("--ignore-eos", options->ignore_eos, "Go on after the end-of-text token");
  sub->add_flag("--special", options->special,
                "Read special tokens in the prompt, and show those generated");
  sub->add_flag("--no-display-prompt", options->no_display_prompt, "Print the continuation only");
  add_engine_flags(sub, options->engine);
  sub->add_flag("--json", options->json, "Print one JSON object at the end instead of the text");
  sub->footer(
      "Examples:\n"
      "  rabit run -m model.gguf -p \"The capital of France is\" -n 32\n"
      "  rabit run -m model.gguf -p \"Once upon a time\" -n 64 --temp 0 -t 2\n"
      "  rabit run -m model.gguf -f prompt.txt -n 16 -s 1 --top-k 20 --json\n"
      "  rabit run -m model.gguf -f - -n 16 < prompt.txt");
  return {sub, [options] { return run(*options); }};
}

}  // namespace rabit::cli
