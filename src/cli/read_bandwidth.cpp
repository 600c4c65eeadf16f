// Reads a block of memory much larger than caches, in as many threads, and counts the bytes.
#include "cli/read_bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cli/common.h"

namespace rabit::cli {
namespace {

constexpr int64_t kLeastBytes = int64_t{512} << 20;
constexpr int64_t kLine = 64;
constexpr int64_t kBlock = int64_t{4} << 20;  // that a thread reads at a time, whole huge pages
// The fastest of the ways that were tried, on machines with one and with two threads: streams side
// by side, and requests for what comes this much later in each.
constexpr int kStreams = 4;
constexpr int64_t kAhead = 2048;

uint64_t read(const std::byte* from, int64_t bytes) {
  typedef uint64_t Pair __attribute__((vector_size(16), may_alias));
  const int64_t part = bytes / kStreams;
  Pair sums[kStreams][kLine / sizeof(Pair)] = {};
  for (int64_t at = 0; at < part; at += kLine) {
#pragma GCC unroll 4
    for (int stream = 0; stream < kStreams; ++stream) {
      const std::byte* line = from + stream * part + at;
      __builtin_prefetch(line + kAhead);
      const auto* pairs = reinterpret_cast<const Pair*>(line);
#pragma GCC unroll 4
      for (size_t i = 0; i < kLine / sizeof(Pair); ++i) {
        sums[stream][i] += pairs[i];
      }
    }
  }
  uint64_t all = 0;
  for (const auto& stream : sums) {
    for (const Pair& pair : stream) {
      all += pair[0] + pair[1];
    }
  }
  return all;
}

}  // namespace

void ReadBandwidth::Free::operator()(void* p) const { std::free(p); }

Result<ReadBandwidth> ReadBandwidth::make(int threads) {
  ReadBandwidth bandwidth;
  const int64_t blocks = (4 * last_level_caches() + kBlock - 1) / kBlock;
  bandwidth.bytes_ = std::max(kLeastBytes, blocks * kBlock);
  const auto bytes = static_cast<size_t>(bandwidth.bytes_);
  bandwidth.data_.reset(static_cast<std::byte*>(std::aligned_alloc(kBlock, bytes)));
  if (bandwidth.data_ == nullptr) {
    return Error{"not enough memory to measure how fast it is read"};
  }
  ::madvise(bandwidth.data_.get(), bytes, MADV_HUGEPAGE);  // advice: may fail harmlessly
  bandwidth.pool_ = std::make_unique<ThreadPool>(threads);
  bandwidth.pool_->parallel_for(bandwidth.bytes_, kBlock, [&](int64_t begin, int64_t end, int) {
    std::memset(bandwidth.data_.get() + begin, 1, static_cast<size_t>(end - begin));
  });
  return bandwidth;
}

double ReadBandwidth::measure() {
  std::atomic<uint64_t> sink{0};
  const double started = now_seconds();
  // Each taken by the next free thread, as products are.
  std::atomic<int64_t> next{0};
  pool_->parallel_for(pool_->size(), 1, [&](int64_t, int64_t, int) {
    uint64_t sum = 0;
    for (int64_t at = next.fetch_add(kBlock); at < bytes_; at = next.fetch_add(kBlock)) {
      sum += read(data_.get() + at, kBlock);
    }
    sink += sum;
  });
  const double seconds = now_seconds() - started;
  const uint64_t once = static_cast<uint64_t>(bytes_) / 8 * 0x0101010101010101U;  // every byte
  return sink.load() == once && seconds > 0 ? static_cast<double>(bytes_) / seconds : 0;
}

}  // namespace rabit::cli
