// Memory for weights, caches and workspaces: aligned to a cache line, not initialised, on huge
// pages where the system has them (a matrix of hundreds of megabytes misses the TLB at every row
// else).
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "rabit/result.h"

namespace rabit {

class Buffer {
 public:
  Buffer() = default;

  /// `count` elements of `element` bytes. Errors: memory that cannot be had.
  static Result<Buffer> make(uint64_t count, uint64_t element, const char* what) {
    constexpr uint64_t kHuge = uint64_t{2} << 20;
    uint64_t bytes = 0;
    if (!__builtin_mul_overflow(count, element, &bytes) && bytes < (uint64_t{1} << 62)) {
      const uint64_t alignment = bytes >= kHuge ? kHuge : 64;
      bytes = (bytes + alignment - 1) / alignment * alignment;
      Buffer buffer;
      buffer.data_.reset(std::aligned_alloc(alignment, bytes > 0 ? bytes : alignment));
      if (buffer.data_ != nullptr) {
        if (alignment == kHuge) {
          ::madvise(buffer.data_.get(), bytes, MADV_HUGEPAGE);  // advice: may fail harmlessly
        }
        return buffer;
      }
    }
    return Error{"not enough memory for " + std::string(what) + ": " + std::to_string(count) +
                 " elements of " + std::to_string(element) + " bytes"};
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

}  // namespace rabit
