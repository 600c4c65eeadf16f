// A text as windows of equal length, and the orders in which training sees them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "rabit/result.h"
#include "train/corpus.h"

namespace rabit::train {

/// Fisher-Yates on our own generator: the same order of [0, count) on every machine.
std::vector<int64_t> shuffled(int64_t count, uint64_t seed);

/// Whole windows that do not overlap. The tokens stay where they are. Without weights the sources
/// are one text, and an epoch sees every window once. With weights each source is cut alone, and an
/// epoch sees a window of a source of weight w about w times: weights that are no whole numbers
/// take other windows from epoch to epoch.
class TextWindows {
 public:
  TextWindows() = default;
  /// `weights` by source, or none. `seed`: of the order; none: as they stand. Errors: a text, or
  /// with weights a source, shorter than a window; a token outside the vocabulary; more weights
  /// than sources or fewer; a weight that leaves no window of its source.
  static Result<TextWindows> cut(TrainingText text, std::span<const double> weights,
                                 int64_t seq_len, int64_t vocab, std::optional<uint64_t> seed);

  int64_t seq_len() const { return seq_len_; }

  /// Windows of an epoch.
  int64_t count() const { return static_cast<int64_t>(order_.size()); }
  /// Windows at these places of the epochs one after the other, each of count() places:
  /// (places, seq_len) int64 on the host.
  at::Tensor pick(std::span<const int64_t> places) const;

  /// Different windows among those of the first epoch, in its order.
  int64_t distinct() const { return static_cast<int64_t>(distinct_.size()); }
  int64_t distinct_tokens() const { return distinct() * seq_len_; }
  /// Of these, some, or [begin, begin + count).
  at::Tensor pick_distinct(std::span<const int64_t> indices) const;
  at::Tensor distinct_range(int64_t begin, int64_t count) const;

 private:
  // Texts that are cut as one.
  struct Part {
    std::vector<std::span<const int32_t>> texts;
    int64_t windows = 0, drawn = 0;  // drawn: in an epoch
    std::vector<int64_t> order;      // that they are drawn in; empty: as they stand
  };
  struct Place {
    size_t part;
    int64_t window;
    auto operator<=>(const Place&) const = default;
  };
  Place find(int64_t place) const;
  void copy_window(int64_t place, int64_t* ids) const;

  TrainingText text_;
  std::vector<Part> parts_;
  std::vector<int64_t> order_;     // of an epoch's places before they are shuffled
  std::vector<int64_t> distinct_;  // places in the first epoch
  int64_t seq_len_ = 0;
};

/// Places in endless epochs, each a shuffle of its own, addressed by step: a run that is continued
/// sees what it would have seen.
class WindowOrder {
 public:
  WindowOrder(int64_t windows, uint64_t seed) : windows_(windows), seed_(seed) {}
  /// The places of `step`, `batch` of them: window + epoch * windows.
  std::vector<int64_t> batch(int64_t step, int64_t batch);

 private:
  int64_t windows_;
  uint64_t seed_;
  int64_t epoch_ = -1;
  std::vector<int64_t> order_;  // of epoch_
};

}  // namespace rabit::train
