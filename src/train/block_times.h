// How long phases 1 and 2 take, and how much text the time that is left pays for.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace rabit::train {

/// Seconds that one block takes.
struct BlockSeconds {
  double fit = 0.0;    // scales and error feedback, whatever the text's length: for each path
  double pass = 0.0;   // for each window: second moments, and both streams through the block
  double train = 0.0;  // for each window and epoch
  double head = 0.0;   // the same, on top, in the last block
};

/// Blocks still to come.
struct BlockWork {
  int64_t blocks = 0;
  int64_t trained = 0;   // of them, the last ones
  int64_t replayed = 0;  // finished ones that the streams have to go through again
  double paths = 0.0;    // of all blocks together, each counted by the mean over its layers
  double epochs = 0.0;
};

/// Seconds for the work from so many windows.
double seconds_for(const BlockSeconds& cost, const BlockWork& work, double windows);

/// Windows that so many seconds pay for; 0 where they do not even pay for the fits.
int64_t affordable_windows(const BlockSeconds& cost, const BlockWork& work, double seconds);

/// The middle of the last five values, for a shared machine may be away for a while.
class Middle {
 public:
  void add(double value) { last_[static_cast<size_t>(count_++) % last_.size()] = value; }
  double value() const;  // 0 before any

 private:
  std::array<double, 5> last_{};
  int64_t count_ = 0;
};

/// What blocks have taken lately.
struct BlockTimes {
  Middle fit, pass, train, head;  // as in BlockSeconds

  explicit BlockTimes(const BlockSeconds& measured);
  BlockSeconds now() const { return {fit.value(), pass.value(), train.value(), head.value()}; }
};

}  // namespace rabit::train
