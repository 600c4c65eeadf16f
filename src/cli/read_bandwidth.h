// How fast memory can be read: what kernels that go through all weights once are held against.
#pragma once

#include <cstddef>
#include <memory>

#include "base/threads.h"
#include "rabit/result.h"

namespace rabit::cli {

/// Half a GiB of memory, or four times the last-level caches where that is more, and threads to
/// read it.
class ReadBandwidth {
 public:
  /// Errors: memory that cannot be had.
  static Result<ReadBandwidth> make(int threads);

  /// Reads all of it once, every thread its part; bytes a second.
  double measure();

 private:
  struct Free {
    void operator()(void* p) const;
  };
  int64_t bytes_ = 0;
  std::unique_ptr<std::byte, Free> data_;
  std::unique_ptr<ThreadPool> pool_;
};

}  // namespace rabit::cli
