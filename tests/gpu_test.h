// What the tests of the runtime on GPUs share. The same tests run on a GPU, skipped where there is
// none, and over the emulator.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "kernels/api/gpu.h"

namespace rabit {

/// Tests that need the first GPU.
class GpuTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto all = gpu::devices();
    if (!all) {
      GTEST_SKIP() << all.error().message;
    }
    const auto device = gpu::use_device(0);
    ASSERT_TRUE(device) << device.error().message;
    auto queue = gpu::Queue::make();
    ASSERT_TRUE(queue) << queue.error().message;
    queue_ = std::move(*queue);
  }
  gpu::Stream stream() const { return queue_.stream(); }

  gpu::Queue queue_;
};

/// An array on the device with guards behind it.
template <typename T>
class OnDevice {
 public:
  /// These values.
  OnDevice(const gpu::Queue& queue, const std::vector<T>& values) : queue_(&queue) {
    std::vector<T> all = values;
    all.resize(values.size() + kGuards);
    std::memset(static_cast<void*>(all.data() + values.size()), kGuardByte, kGuards * sizeof(T));
    fill(all);
  }
  /// `count` bytes of nothing in particular: NaN as floats, and as F16.
  OnDevice(const gpu::Queue& queue, int64_t count) : queue_(&queue) {
    std::vector<T> all(static_cast<size_t>(count) + kGuards);
    std::memset(all.data(), kGuardByte, all.size() * sizeof(T));
    fill(all);
  }
  T* data() const { return memory_.as<T>(); }

  std::vector<T> read() const {
    auto host = gpu::HostMemory::make(memory_.size(), "a test");
    EXPECT_TRUE(host);
    EXPECT_TRUE(queue_->download(*host, memory_.as<void>(), memory_.size()));
    const Status done = queue_->wait();
    EXPECT_TRUE(done) << (done ? "" : done.error().message);
    const T* const begin = host->template as<T>();
    const std::vector<T> values(begin, begin + memory_.size() / sizeof(T) - kGuards);
    const std::vector<char> guard(kGuards * sizeof(T), static_cast<char>(kGuardByte));
    EXPECT_EQ(std::memcmp(begin + values.size(), guard.data(), guard.size()), 0)
        << "written behind the end";
    return values;
  }

 private:
  static constexpr size_t kGuards = 64;
  static constexpr int kGuardByte = 0xFF;

  void fill(const std::vector<T>& all) {
    auto memory = gpu::Memory::make(all.size() * sizeof(T), "a test");
    ASSERT_TRUE(memory) << memory.error().message;
    memory_ = std::move(*memory);
    ASSERT_TRUE(queue_->upload(memory_.as<void>(), all.data(), memory_.size()));
  }

  const gpu::Queue* queue_;
  gpu::Memory memory_;
};

}  // namespace rabit
