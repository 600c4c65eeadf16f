// How much text the time that is left pays for.

#include "train/block_times.h"

#include <gtest/gtest.h>

namespace rabit::train {
namespace {

TEST(BlockTimes, SecondsAreThoseOfTheParts) {
  const BlockSeconds cost{.fit = 2.0, .pass = 0.1, .train = 0.3, .head = 0.5};
  // Three blocks of 2, 2 and 4 paths, one of them trained twice over; five gone through before.
  const BlockWork work{.blocks = 3, .trained = 1, .replayed = 5, .paths = 8.0, .epochs = 2.0};
  EXPECT_DOUBLE_EQ(seconds_for(cost, work, 10.0), 16.0 + 10.0 * (8 * 0.1 + 2 * (0.3 + 0.5)));
  BlockWork untrained = work;
  untrained.trained = 0;
  EXPECT_DOUBLE_EQ(seconds_for(cost, untrained, 10.0), 16.0 + 10.0 * 0.8) << "no head then";
}

TEST(BlockTimes, AffordableIsTheInverse) {
  const BlockSeconds cost{.fit = 0.5, .pass = 0.25, .train = 0.5, .head = 1.0};
  for (const int64_t trained : {0, 1, 4}) {
    const BlockWork work{.blocks = 4, .trained = trained, .paths = 8.0, .epochs = 1.0};
    for (const int64_t windows : {1, 8, 50, 1000}) {
      const double seconds = seconds_for(cost, work, static_cast<double>(windows));
      EXPECT_EQ(affordable_windows(cost, work, seconds + 1e-6), windows);
      EXPECT_EQ(affordable_windows(cost, work, seconds - 1e-6), windows - 1);
    }
    EXPECT_EQ(affordable_windows(cost, work, 3.9), 0) << "not even the fits";
    EXPECT_EQ(affordable_windows(cost, work, -1.0), 0);
  }
  EXPECT_GT(affordable_windows({}, {.blocks = 1}, 1.0), int64_t{1} << 40) << "free";
}

TEST(BlockTimes, LateBlocksTakeFromTextAndTrainingAlike) {
  // 30 seconds were lost before the last two blocks, of which the last is trained for 60.
  const BlockSeconds cost{.fit = 4.0, .pass = 0.16, .train = 0.6, .head = 0.6};
  const BlockWork work{.blocks = 2, .trained = 1, .paths = 4.0, .epochs = 1.0};
  ASSERT_DOUBLE_EQ(seconds_for(cost, work, 50.0), 92.0);
  EXPECT_EQ(affordable_windows(cost, work, 62.0), 30);
}

TEST(BlockTimes, OnePauseChangesNothing) {
  BlockTimes times({.fit = 1.0, .pass = 0.1, .train = 0.2, .head = 0.3});
  EXPECT_EQ(times.now().head, 0.3);
  times.fit.add(60.0);
  EXPECT_EQ(times.now().fit, 1.0);
  for (int i = 0; i < 4; ++i) {
    times.fit.add(1.1);
    EXPECT_LE(times.now().fit, 1.1) << i;
  }
  for (int i = 0; i < 3; ++i) {
    times.pass.add(0.5);
  }
  EXPECT_EQ(times.now().pass, 0.5) << "slower for good";
  EXPECT_EQ(Middle().value(), 0.0);
}

}  // namespace
}  // namespace rabit::train
