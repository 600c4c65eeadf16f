// A text as windows of equal length, and the orders in which training sees them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "rabit/result.h"

namespace rabit::train {

/// (count, seq_len) int64 on the host: whole windows that do not overlap. Errors: a text shorter
/// than one, a token outside the vocabulary.
Result<at::Tensor> cut_windows(std::span<const int32_t> tokens, int64_t seq_len, int64_t vocab);

/// Fisher-Yates on our own generator: the same order of [0, count) on every machine.
std::vector<int64_t> shuffled(int64_t count, uint64_t seed);

/// The windows in that order.
at::Tensor shuffle_windows(const at::Tensor& windows, uint64_t seed);

/// Windows in endless epochs, each a shuffle of its own, addressed by step: a run that is continued
/// sees what it would have seen.
class WindowOrder {
 public:
  WindowOrder(int64_t windows, uint64_t seed) : windows_(windows), seed_(seed) {}
  /// Indices of the windows of `step`, (batch) int64 on the host.
  at::Tensor batch(int64_t step, int64_t batch);

 private:
  int64_t windows_;
  uint64_t seed_;
  int64_t epoch_ = -1;
  std::vector<int64_t> order_;  // of epoch_
};

}  // namespace rabit::train
