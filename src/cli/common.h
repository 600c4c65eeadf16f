// What the subcommands share: loading a tokenizer, messages, progress, exit codes.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>

#include "io/gguf.h"
#include "rabit/result.h"
#include "text/tokenizer.h"

namespace rabit::cli {

/// One subcommand: its parser, and what runs when it was named.
struct Command {
  CLI::App* app = nullptr;
  std::function<Status()> run;
};

Command add_bench(CLI::App& app);
Command add_eval(CLI::App& app);
Command add_inspect(CLI::App& app);
Command add_quantize(CLI::App& app);
Command add_run(CLI::App& app);

/// The tokenizer that a GGUF file carries in `tokenizer.ggml.*`.
Result<std::shared_ptr<Tokenizer>> load_tokenizer(const GgufFile& file);

/// A progress line on stderr: redrawn in place on a terminal, else one plain line at most every
/// ten seconds and at the end.
class Progress {
 public:
  explicit Progress(std::string what);
  void update(int64_t done, int64_t total, const std::string& detail);
  void finish();

 private:
  std::string what_;
  double started_ = 0, last_ = 0;
  bool terminal_ = false, drawn_ = false;
};

}  // namespace rabit::cli
