// What the tests of kernels share: values, guards behind outputs, the comparator, and the suite
// that runs for every table of this machine. Tolerances: a sum of n products in float32, in any
// order, is off by at most about sqrt(n) * eps * ||w|| * ||x|| with rounding errors of random sign;
// kSafety covers their spread.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"
#include "kernels/api/kernels.h"

namespace rabit {

inline constexpr double kEpsilon = 0x1p-24;
inline constexpr double kSafety = 4;
inline constexpr float kGuard = 12345.678F;
inline constexpr int64_t kGuards = 16;

using Floats = std::vector<float>;

inline std::mt19937& generator() {
  static std::mt19937 engine(7);
  return engine;
}

inline Floats normals(int64_t count, float scale = 1.0F) {
  std::normal_distribution<float> normal(0, scale);
  Floats values(static_cast<size_t>(count));
  for (float& value : values) {
    value = normal(generator());
  }
  return values;
}

inline std::vector<uint16_t> to_halves(const Floats& values) {
  std::vector<uint16_t> halves;
  for (const float value : values) {
    halves.push_back(float_to_half(value));
  }
  return halves;
}

/// `count` outputs with guards behind them.
inline Floats guarded(int64_t count) {
  return Floats(static_cast<size_t>(count + kGuards), kGuard);
}

inline bool guards_hold(const Floats& values) {
  for (size_t i = values.size() - kGuards; i < values.size(); ++i) {
    if (values[i] != kGuard) {
      return false;
    }
  }
  return true;
}

/// Scratch of exactly the size that was asked for, aligned as promised, guarded.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : floats_(floats) {
    const auto bytes = static_cast<size_t>((floats + kGuards + 15) / 16 * 64);
    data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
    for (int64_t i = 0; i < floats; ++i) {
      data_[i] = std::numeric_limits<float>::quiet_NaN();  // nothing may be read before written
    }
    std::fill(data_ + floats, data_ + floats + kGuards, kGuard);
  }
  ~Scratch() {
    for (int64_t i = floats_; i < floats_ + kGuards; ++i) {
      EXPECT_EQ(data_[i], kGuard) << "scratch overrun";
    }
    std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() { return data_; }

 private:
  int64_t floats_;
  float* data_;
};

/// A copy of what kernels read, at the end of memory after which nothing may be read.
class Fenced {
 public:
  Fenced(const void* from, int64_t bytes) {
    const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    const auto size = static_cast<size_t>(bytes);
    mapped_ = (size + page - 1) / page * page + page;
    start_ = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED) {
      std::abort();
    }
    std::byte* end = static_cast<std::byte*>(start_) + mapped_ - page;
    ::mprotect(end, page, PROT_NONE);
    data_ = end - size;
    if (size > 0) {
      std::memcpy(data_, from, size);
    }
  }
  ~Fenced() { ::munmap(start_, mapped_); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_);
  }

 private:
  size_t mapped_;
  void* start_;
  std::byte* data_;
};

/// Largest |got - want| over tolerance; infinity for anything that is not finite.
inline double worst(const float* got, const float* want, const double* tolerance, int64_t count) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double off = std::abs(static_cast<double>(got[i]) - want[i]);
    if (!std::isfinite(off)) {
      return std::numeric_limits<double>::infinity();
    }
    largest = std::max(largest, off / tolerance[i]);
  }
  return largest;
}

class KernelTest : public testing::TestWithParam<const KernelTable*> {
 protected:
  const KernelTable& table() const { return *GetParam(); }
};

inline std::string table_name(const testing::TestParamInfo<const KernelTable*>& info) {
  std::string name(info.param->name);
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

}  // namespace rabit
