#include "train/block_times.h"

#include <algorithm>

namespace rabit::train {
namespace {

double seconds_per_window(const BlockSeconds& cost, const BlockWork& work) {
  const double training =
      work.trained > 0 ? static_cast<double>(work.trained) * cost.train + cost.head : 0.0;
  return static_cast<double>(work.blocks + work.replayed) * cost.pass + work.epochs * training;
}

}  // namespace

double seconds_for(const BlockSeconds& cost, const BlockWork& work, double windows) {
  return work.paths * cost.fit + windows * seconds_per_window(cost, work);
}

int64_t affordable_windows(const BlockSeconds& cost, const BlockWork& work, double seconds) {
  constexpr double kMost = 1e15;  // where a window costs nothing
  const double left = std::max(0.0, seconds - work.paths * cost.fit);
  const double each = seconds_per_window(cost, work);
  return static_cast<int64_t>(left < each * kMost ? left / each : kMost);
}

double Middle::value() const {
  std::array<double, 5> sorted = last_;
  const auto count = std::min<int64_t>(count_, static_cast<int64_t>(sorted.size()));
  const auto middle = sorted.begin() + std::max<int64_t>(0, count - 1) / 2;
  std::nth_element(sorted.begin(), middle, sorted.begin() + count);
  return count == 0 ? 0.0 : *middle;
}

BlockTimes::BlockTimes(const BlockSeconds& measured) {
  fit.add(measured.fit);
  pass.add(measured.pass);
  train.add(measured.train);
  head.add(measured.head);
}

}  // namespace rabit::train
