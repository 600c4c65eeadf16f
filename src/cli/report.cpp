// `rabit report`: the page of a run, from its log.

#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/json.h"
#include "cli/common.h"
#include "report/run_report.h"

namespace rabit::cli {

Status write_report(const nlohmann::json& log, const std::string& out) {
  RABIT_ASSIGN(const std::string page, run_report(log));
  return write_file(out, page);
}

namespace {

struct Arguments {
  std::string log, out;
};

Status run(const Arguments& arguments) {
  RABIT_ASSIGN(const std::string text, read_text_file(arguments.log));
  const auto log = parse_json(text);
  if (!log) {
    return Error{arguments.log + ": " + log.error().message + "; give the OUT.json of a run"};
  }
  const std::string out = arguments.out.empty() ? arguments.log + ".html" : arguments.out;
  std::error_code unknown;
  if (std::filesystem::equivalent(arguments.log, out, unknown)) {
    return Error{"-o " + out + ": it would replace the log itself; give another name"};
  }
  if (const Status written = write_report(*log, out); !written) {
    return Error{arguments.log + ": " + written.error().message};
  }
  write_stderr("wrote " + one_line(out) + "\n");
  return {};
}

}  // namespace

Command add_report(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command =
      app.add_subcommand("report", "Make the page of a run from its log, as quantize does");
  command->add_option("LOG", arguments->log, "OUT.json of a rabit quantize run")->required();
  command->add_option("-o,--output", arguments->out, "HTML file to write (default: LOG.html)");
  command->footer(
      "The page needs no network and no other file.\n\n"
      "Examples:\n"
      "  rabit report model.2bit.gguf.json -o report.html");
  return {command, [arguments] { return run(*arguments); }};
}

}  // namespace rabit::cli
