#include "cli/common.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <set>

namespace rabit::cli {
namespace {

/// "1:05", "2:03:44".
std::string clock_text(double seconds) {
  const auto total = static_cast<int64_t>(std::lround(std::min(seconds, 1e9)));
  const int64_t hours = total / 3600, minutes = total / 60 % 60;
  return hours > 0 ? fmt::format("{}:{:02}:{:02}", hours, minutes, total % 60)
                   : fmt::format("{}:{:02}", minutes, total % 60);
}

std::string rate_text(double rate) {
  return rate >= 100 ? fmt::format("{:.0f}/s", rate)
                     : fmt::format("{:.{}f}/s", rate, rate >= 1 ? 1 : 3);
}

}  // namespace

Result<std::shared_ptr<Tokenizer>> load_tokenizer(const GgufFile& file) {
  TokenizerSpec spec;
  RABIT_ASSIGN(spec.model, file.get_string("tokenizer.ggml.model"));
  RABIT_ASSIGN(spec.tokens, file.get_strings("tokenizer.ggml.tokens"));
  // These may be absent from a file; what is there must be of the right type.
  if (file.find_meta("tokenizer.ggml.pre") != nullptr) {
    RABIT_ASSIGN(spec.pre, file.get_string("tokenizer.ggml.pre"));
  }
  if (file.find_meta("tokenizer.ggml.merges") != nullptr) {
    RABIT_ASSIGN(spec.merges, file.get_strings("tokenizer.ggml.merges"));
  }
  if (file.find_meta("tokenizer.ggml.token_type") != nullptr) {
    RABIT_ASSIGN(spec.token_types, file.get_ints("tokenizer.ggml.token_type"));
  } else {
    spec.token_types.assign(spec.tokens.size(), 1);
  }
  if (file.find_meta("tokenizer.ggml.bos_token_id") != nullptr) {
    RABIT_ASSIGN(spec.bos_id, file.get_int("tokenizer.ggml.bos_token_id"));
  }
  if (file.find_meta("tokenizer.ggml.eos_token_id") != nullptr) {
    RABIT_ASSIGN(spec.eos_id, file.get_int("tokenizer.ggml.eos_token_id"));
  }
  if (file.find_meta("tokenizer.ggml.add_bos_token") != nullptr) {
    RABIT_ASSIGN(spec.add_bos, file.get_bool("tokenizer.ggml.add_bos_token"));
  }
  const auto vocab = static_cast<int64_t>(spec.tokens.size());
  const std::string where = file.path().string() + ": ";
  if (spec.token_types.size() != spec.tokens.size()) {
    return Error{fmt::format("{}tokenizer.ggml.token_type has {} entries for {} tokens", where,
                             spec.token_types.size(), vocab)};
  }
  if (spec.bos_id >= vocab || spec.eos_id >= vocab) {
    return Error{
        fmt::format("{}a BOS or EOS id is outside the vocabulary of {} tokens", where, vocab)};
  }
  if (spec.add_bos && spec.bos_id < 0) {
    return Error{where + "the tokenizer asks for a BOS token but names none"};
  }
  auto tokenizer = Tokenizer::create(std::move(spec));
  if (!tokenizer) {
    return Error{where + tokenizer.error().message};
  }
  return tokenizer;
}

Status write_stdout(std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(STDOUT_FILENO, text.data(), text.size());
    if (written < 0) {
      if (errno == EINTR) {
        continue;
      }
      return Error{std::string("cannot write to standard output: ") + std::strerror(errno)};
    }
    text.remove_prefix(static_cast<size_t>(written));
  }
  return {};
}

Command not_in_this_build(CLI::App& app, const std::string& name) {
  CLI::App* command = app.add_subcommand(name, "(not in this build)");
  command->allow_extras();
  return {
      command, [name] {
        return Status(Error{name + ": this build has no training (it was configured with "
                                   "-DRABIT_TRAIN=OFF); run scripts/setup.sh and build the release "
                                   "preset"});
      }};
}

std::string one_line(std::string_view text) {
  std::string out(text);
  while (!out.empty() && std::isspace(static_cast<unsigned char>(out.back()))) {
    out.pop_back();
  }
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      c = ' ';
    }
  }
  return out;
}

std::string counted(int64_t count, const std::string& thing) {
  return fmt::format("{} {}{}", count, thing, count == 1 ? "" : "s");
}

void write_stderr(std::string_view text) {
  // Nobody is left to be told of a failure here, and none may end what is being done.
  (void)std::fwrite(text.data(), 1, text.size(), stderr);
  (void)std::fflush(stderr);
}

void note(const std::string& text) { write_stderr("rabit: " + one_line(text) + "\n"); }

void warn_of_context(int64_t trained, int64_t positions) {
  if (positions > trained) {
    note(fmt::format("warning: the model was trained for {} positions, {} go beyond them", trained,
                     positions));
  }
}

int64_t parse_integer(const std::string& option, const std::string& text, int64_t low,
                      int64_t high) {
  int64_t parsed = 0;
  const char* end = text.data() + text.size();
  const auto [stop, status] = std::from_chars(text.data(), end, parsed);
  if (status != std::errc() || stop != end || parsed < low || parsed > high) {
    throw CLI::ValidationError(
        option, fmt::format("'{}' is not a whole number from {} to {}", one_line(text), low, high));
  }
  return parsed;
}

CLI::Option* add_integer(CLI::App* app, const std::string& names, int64_t& value, int64_t low,
                         int64_t high, const std::string& help) {
  CLI::Option* option = app->add_option_function<std::string>(
      names,
      [&value, low, high, names](const std::string& text) {
        value = parse_integer(names, text, low, high);
      },
      help);
  return option->default_str(std::to_string(value))->type_name("N");
}

CLI::Option* add_number(CLI::App* app, const std::string& names, double& value, double low,
                        double high, const std::string& help) {
  CLI::Option* option = app->add_option_function<std::string>(
      names,
      [&value, low, high, names](const std::string& text) {
        double parsed = 0;
        const char* end = text.data() + text.size();
        const auto [stop, status] = std::from_chars(text.data(), end, parsed);
        if (status != std::errc() || stop != end || !(parsed >= low && parsed <= high)) {
          throw CLI::ValidationError(
              names, fmt::format("'{}' is not a number from {} to {}", one_line(text), low, high));
        }
        value = parsed;
      },
      help);
  return option->default_str(fmt::format("{}", value))->type_name("X");
}

std::function<std::string(const std::string&)> one_of(std::vector<std::string> values) {
  return [values = std::move(values)](const std::string& value) {
    return std::find(values.begin(), values.end(), value) != values.end()
               ? std::string()
               : fmt::format("'{}' is none of {}", one_line(value), fmt::join(values, ", "));
  };
}

void refuse_options_as_values(CLI::App* app) {
  std::set<std::string> names;
  std::vector<CLI::Option*> all = app->get_options();
  for (CLI::App* group : app->get_subcommands([](const CLI::App*) { return true; })) {
    const auto more = group->get_options();
    all.insert(all.end(), more.begin(), more.end());
  }
  for (const CLI::Option* option : all) {
    for (const std::string& name : option->get_snames()) {
      names.insert("-" + name);
    }
    for (const std::string& name : option->get_lnames()) {
      names.insert("--" + name);
    }
  }
  for (CLI::Option* option : all) {
    if (option->get_expected_max() > 0) {
      option->check([names](const std::string& value) {
        return names.contains(value) ? "needs a value before " + value : std::string();
      });
    }
  }
}

CLI::Option* add_threads(CLI::App* app, int64_t& value) {
  return add_integer(app, "-t,--threads", value, 0, 1024,
                     "Threads; 0: one for each core that the process may use");
}

std::vector<int32_t> tokens_of_text(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<int32_t> tokens = tokenizer.encode(text, /*parse_special=*/false);
  if (tokenizer.spec().add_bos) {
    tokens.insert(tokens.begin(), static_cast<int32_t>(tokenizer.spec().bos_id));
  }
  return tokens;
}

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Progress::Progress(std::string what, int64_t done)
    : what_(std::move(what)),
      first_(done),
      started_(now_seconds()),
      last_(started_),
      terminal_(isatty(STDERR_FILENO) != 0) {}

void Progress::update(int64_t done, int64_t total, const std::string& detail) {
  const double now = now_seconds(), elapsed = now - started_;
  const double rate = elapsed > 0 ? static_cast<double>(done - first_) / elapsed : 0;
  std::string line = fmt::format("{}: {}", what_, done);
  if (total > 0) {
    line += fmt::format("/{} ({}%)", total, 100 * done / total);
  }
  if (rate > 0 && total > 0) {
    line += fmt::format(", {}, ", rate_text(rate));
    line += done < total ? "ETA " + clock_text(static_cast<double>(total - done) / rate)
                         : "took " + clock_text(elapsed);
  }
  if (!detail.empty()) {
    line += ", " + detail;
  }
  // A terminal takes ten lines a second at most and the first at once, a log one in ten seconds.
  const bool due = now - last_ >= (terminal_ ? 0.1 : 10.0) || (terminal_ && !drawn_);
  if (!due && (total <= 0 || done < total)) {
    pending_ = line;
    return;
  }
  if (terminal_) {
    write_stderr("\r\x1b[K" + line);
  } else {
    write_stderr(line + "\n");
  }
  drawn_ = true;
  last_ = now;
  pending_.clear();
}

void Progress::finish() {
  if (terminal_) {
    if (!pending_.empty()) {
      write_stderr("\r\x1b[K" + pending_);
      drawn_ = true;
    }
    if (drawn_) {
      write_stderr("\n");
    }
  } else if (!pending_.empty()) {
    write_stderr(pending_ + "\n");
  }
  pending_.clear();
  drawn_ = false;
}

}  // namespace rabit::cli
