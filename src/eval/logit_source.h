// What every evaluation asks of a model, whichever program part runs it.
#pragma once

#include <cstdint>
#include <span>

#include "rabit/result.h"

namespace rabit {

class LogitSource {
 public:
  virtual ~LogitSource() = default;
  virtual int64_t vocab_size() const = 0;
  /// -log p(tokens[i+1] | tokens[0..i]) in nats into nll[i], for i in [0, tokens.size()-1). The
  /// tokens are one context that starts from nothing.
  virtual Status score(std::span<const int32_t> tokens, std::span<double> nll) = 0;
};

}  // namespace rabit
