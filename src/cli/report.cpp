// `rabit report`: the page of a run, from its log.

#include <array>
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

Status check_page(const std::string& option, const std::string& page) {
  std::error_code unknown;
  if (std::filesystem::is_regular_file(page, unknown)) {
    RABIT_ASSIGN(const std::string before, read_file(page));
    if (!before.empty() && before.rfind("<!doctype html", 0) != 0) {
      return Error{option + ": is there and no page; name another file, or remove it"};
    }
  }
  RABIT_CHECK(AtomicFile::create(page));  // dropped: leaves nothing
  return {};
}

namespace {

struct Arguments {
  std::string log, out;
};

Status run(const Arguments& arguments) {
  RABIT_ASSIGN(const std::string text, read_file(arguments.log));
  const auto log = parse_json(text);
  if (!log) {
    return Error{arguments.log + ": " + log.error().message +
                 "; give the OUT.json of a rabit quantize run"};
  }
  const std::string out = arguments.out.empty() ? arguments.log + ".html" : arguments.out;
  const std::array<std::filesystem::path, 1> inputs = {arguments.log};
  RABIT_CHECK(check_written("-o " + out, out, inputs));
  RABIT_CHECK(check_page("-o " + out, out));
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
  command->add_option("LOG", arguments->log, "OUT.json of a rabit quantize run")
      ->required()
      ->type_name("FILE");
  command->add_option("-o,--output", arguments->out, "HTML file to write (default: LOG.html)")
      ->type_name("FILE");
  command->footer(
      "The page needs no network and no other file.\n\n"
      "Examples:\n"
      "  rabit report model.2bit.gguf.json -o report.html");
  return {command, [arguments] { return run(*arguments); }};
}

}  // namespace rabit::cli
