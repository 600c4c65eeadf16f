#include "base/json.h"

#include <nlohmann/json.hpp>

namespace rabit {

Result<nlohmann::json> parse_json(std::string_view text) {
  constexpr int kDeepest = 64;
  bool too_deep = false;
  // The parser itself needs no stack, but what copies and prints its values does.
  const auto callback = [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    too_deep |= depth > kDeepest;
    return !too_deep;
  };
  auto value = nlohmann::json::parse(text, callback, /*allow_exceptions=*/false);
  if (too_deep) {
    return Error{"JSON nested deeper than 64"};
  }
  if (value.is_discarded()) {
    return Error{"not JSON"};
  }
  return value;
}

}  // namespace rabit
