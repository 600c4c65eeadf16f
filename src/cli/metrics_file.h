// The file of `rabit quantize --metrics`: JSON Lines that grow while a run trains.
#pragma once

#include <filesystem>
#include <fstream>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>

#include "rabit/result.h"

namespace rabit::cli {

class MetricsFile {
 public:
  /// `resumed`: the run goes on, and what it wrote before stays but for lines that come again.
  MetricsFile(std::filesystem::path path, bool resumed)
      : path_(std::move(path)), resumed_(resumed) {}

  /// The file can be written, and what is there of that name holds metrics. Writes nothing.
  Status check(std::span<const std::filesystem::path> inputs) const;

  /// Appends the line and flushes it. Errors: a full disk; the file is left alone from then on.
  Status add(const nlohmann::json& line);

 private:
  Status open(const nlohmann::json& first);

  std::filesystem::path path_;
  bool resumed_, failed_ = false;
  std::ofstream file_;
};

}  // namespace rabit::cli
