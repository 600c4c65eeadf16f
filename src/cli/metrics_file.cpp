#include "cli/metrics_file.h"

#include <nlohmann/json.hpp>

#include "base/files.h"

namespace rabit::cli {
namespace {

using nlohmann::json;

// The place of a line in a run's course: blocks, then steps. None: no line of ours.
std::pair<int, int64_t> place_of(const json& line) {
  const auto number = [&](const char* name) {
    return line.contains(name) && line[name].is_number_integer() ? line[name].get<int64_t>() : -1;
  };
  const std::string phase = line.is_object() ? line.value("phase", json("")).dump() : "";
  return phase == "\"block\""     ? std::pair{0, number("block")}
         : phase == "\"distill\"" ? std::pair{1, number("step")}
                                  : std::pair{2, int64_t{0}};
}

json parse_line(const std::string& text) { return json::parse(text, nullptr, false); }

}  // namespace

Status MetricsFile::check(std::span<const std::filesystem::path> inputs) const {
  const std::string option = "--metrics " + path_.string();
  RABIT_CHECK(check_written(option, path_, inputs));
  std::ifstream before(path_);
  std::string line;
  if (before && std::getline(before, line) && place_of(parse_line(line)).first == 2) {
    return Error{option + ": is there and holds no metrics; name another file, or remove it"};
  }
  return {};
}

Status MetricsFile::open(const json& first) {
  std::string kept;
  if (std::ifstream before(path_); resumed_ && before) {
    // What comes after the checkpoint comes again, and the last line may be half of one.
    for (std::string line; std::getline(before, line);) {
      const auto place = place_of(parse_line(line));
      if (place.first == 2 || place >= place_of(first)) {
        break;
      }
      kept += line + "\n";
    }
  }
  RABIT_CHECK(write_file(path_, kept));
  file_.open(path_, std::ios::app);
  return {};
}

Status MetricsFile::add(const json& line) {
  if (failed_) {
    return {};
  }
  const auto written = [&]() -> Status {
    if (!file_.is_open()) {
      RABIT_CHECK(open(line));
    }
    file_ << line.dump(-1, ' ', false, json::error_handler_t::replace) << std::endl;
    return file_ ? Status() : Error{"--metrics " + path_.string() + ": cannot be written any more"};
  };
  const Status status = written();
  failed_ = !status;
  return status;
}

}  // namespace rabit::cli
