// What every session asks of the tokens it is given.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "rabit/result.h"

namespace rabit {

/// Errors: no tokens, more of them than fit behind `position`, an id outside the vocabulary.
inline Status check_input(std::span<const int32_t> tokens, int64_t position, int64_t capacity,
                          int64_t vocab) {
  if (tokens.empty()) {
    return Error{"no tokens to run"};
  }
  const auto count = static_cast<int64_t>(tokens.size());
  if (count > capacity - position) {
    return Error{std::to_string(count) + " tokens after position " + std::to_string(position) +
                 " exceed the context of " + std::to_string(capacity) +
                 " positions; shorten the input or ask for a larger context"};
  }
  for (const int32_t token : tokens) {
    if (token < 0 || token >= vocab) {
      return Error{"token " + std::to_string(token) + " is outside the vocabulary of " +
                   std::to_string(vocab)};
    }
  }
  return {};
}

}  // namespace rabit
