// What the subcommands share: loading a tokenizer, options, messages, progress, exit codes.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

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
Command add_diagnose(CLI::App& app);
Command add_eval(CLI::App& app);
Command add_inspect(CLI::App& app);
Command add_quantize(CLI::App& app);
Command add_report(CLI::App& app);
Command add_run(CLI::App& app);

/// A subcommand that needs libtorch, in a build without it: says so.
Command not_in_this_build(CLI::App& app, const std::string& name);

/// Writes the page of a run from its log. Errors: no log of a run, a file that cannot be written.
Status write_report(const nlohmann::json& log, const std::string& out);

/// A page can be written as `page`: its folder takes files, and what is there of that name is a
/// page or empty.
Status check_page(const std::string& option, const std::string& page);

/// What the program exits with.
enum ExitCode { kSuccess = 0, kFailure = 1, kUsageError = 2, kInterrupted = 130 };

/// The tokenizer that a GGUF file carries in `tokenizer.ggml.*`.
Result<std::shared_ptr<Tokenizer>> load_tokenizer(const GgufFile& file);

/// A text to be scored as a model reads it: tokenized once, special tokens as plain text, BOS only
/// if the model's own tokenizer asks for it.
std::vector<int32_t> tokens_of_text(const Tokenizer& tokenizer, std::string_view text);

/// Writes to stdout at once. Errors: a closed stdout, a full disk, a reader that went away.
Status write_stdout(std::string_view text);

/// `text` with every control character (newlines among them) made a space: fit for one line.
std::string one_line(std::string_view text);

/// "1 token", "2 tokens".
std::string counted(int64_t count, const std::string& thing);

/// Writes to stderr at once; a stderr that cannot be written is no error.
void write_stderr(std::string_view text);

/// A line on stderr that starts with "rabit: ".
void note(const std::string& text);

/// Warns where a run uses more positions than the model was trained for.
void warn_of_context(int64_t trained, int64_t positions);

/// A number option that takes whole decimal numbers within [low, high] and nothing else (CLI11's
/// own reading takes octal, saturates, and words the error less well). The default is `value`.
CLI::Option* add_integer(CLI::App* app, const std::string& names, int64_t& value, int64_t low,
                         int64_t high, const std::string& help);
/// The same for finite decimal fractions.
CLI::Option* add_number(CLI::App* app, const std::string& names, double& value, double low,
                        double high, const std::string& help);
/// Whole decimal number of `text` within [low, high], or CLI::ValidationError that names the
/// option.
int64_t parse_integer(const std::string& option, const std::string& text, int64_t low,
                      int64_t high);

/// A check that a value is one of these.
std::function<std::string(const std::string&)> one_of(std::vector<std::string> values);

/// Makes an error of a value that is the name of an option: one that was given without its value
/// would take the next option as such.
void refuse_options_as_values(CLI::App* app);

/// `-t/--threads`, 0 meaning all that the process may use.
CLI::Option* add_threads(CLI::App* app, int64_t& value);

/// Seconds of a clock that only goes forward.
double now_seconds();

/// A progress line on stderr: redrawn in place on a terminal, else one plain line at most every
/// ten seconds and at the end.
class Progress {
 public:
  /// `done`: what was finished before the clock started.
  explicit Progress(std::string what, int64_t done = 0);
  ~Progress() { finish(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  /// `total` 0: unknown.
  void update(int64_t done, int64_t total, const std::string& detail);
  void finish();

 private:
  std::string what_;
  int64_t first_;
  double started_ = 0, last_ = 0;
  bool terminal_ = false, drawn_ = false;
  std::string pending_;  // newest line when it has not been printed yet
};

}  // namespace rabit::cli
