// Several sessions, a token each, one after the other.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rabit/engine.h"

namespace rabit {

/// Logits to `logits`, (sessions, vocab). If one fails, none has moved.
inline Status forward_in_turn(std::span<Session* const> sessions, std::span<const int32_t> tokens,
                              std::vector<float>& logits) {
  logits.clear();
  for (size_t i = 0; i < sessions.size(); ++i) {
    const auto own = sessions[i]->forward(tokens.subspan(i, 1));
    if (!own) {
      for (size_t j = 0; j < i; ++j) {
        sessions[j]->truncate(sessions[j]->position() - 1);
      }
      return own.error();
    }
    logits.insert(logits.end(), own->begin(), own->end());
  }
  return {};
}

}  // namespace rabit
