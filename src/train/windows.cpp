#include "train/windows.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <numeric>
#include <random>

namespace rabit::train {

Result<at::Tensor> cut_windows(std::span<const int32_t> tokens, int64_t seq_len, int64_t vocab) {
  const int64_t count = static_cast<int64_t>(tokens.size()) / seq_len;
  if (count < 1) {
    return Error{
        fmt::format("the text has {} tokens, less than one window of {}; give more text "
                    "or a smaller --seq-len",
                    tokens.size(), seq_len)};
  }
  at::Tensor windows = at::empty({count, seq_len}, at::kLong);
  int64_t* ids = windows.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count * seq_len; ++i) {
    ids[i] = tokens[static_cast<size_t>(i)];
    if (ids[i] < 0 || ids[i] >= vocab) {
      return Error{fmt::format("token {} of the text is {}, outside the model's vocabulary of {}",
                               i, ids[i], vocab)};
    }
  }
  return windows;
}

std::vector<int64_t> shuffled(int64_t count, uint64_t seed) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(seed);
  for (int64_t i = count - 1; i > 0; --i) {
    std::swap(order[static_cast<size_t>(i)],
              order[static_cast<size_t>(random() % static_cast<uint64_t>(i + 1))]);
  }
  return order;
}

at::Tensor shuffle_windows(const at::Tensor& windows, uint64_t seed) {
  const std::vector<int64_t> order = shuffled(windows.size(0), seed);
  at::Tensor picks = at::empty({windows.size(0)}, at::kLong);
  std::copy(order.begin(), order.end(), picks.mutable_data_ptr<int64_t>());
  return windows.index_select(0, picks);
}

at::Tensor WindowOrder::batch(int64_t step, int64_t batch) {
  at::Tensor picks = at::empty({batch}, at::kLong);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t position = step * batch + i;
    if (position / windows_ != epoch_) {
      epoch_ = position / windows_;
      order_ = shuffled(windows_, seed_ + static_cast<uint64_t>(epoch_));
    }
    picks[i] = order_[static_cast<size_t>(position % windows_)];
  }
  return picks;
}

}  // namespace rabit::train
