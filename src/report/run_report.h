// The report of a run: one HTML page that needs nothing else, from the run's log.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "rabit/result.h"

namespace rabit {

/// The page for a log as `rabit quantize` writes it (docs/training.md, "The log"). What the log has
/// not got is left out. Errors: no log of a run.
Result<std::string> run_report(const nlohmann::json& log);

}  // namespace rabit
