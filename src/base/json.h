// JSON from files: hostile input.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string_view>

#include "rabit/result.h"

namespace rabit {

/// Errors: no JSON; nested deeper than a stack may be asked to follow (64).
Result<nlohmann::json> parse_json(std::string_view text);

}  // namespace rabit
