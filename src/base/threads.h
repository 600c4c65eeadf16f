// A fixed pool of worker threads for loops over independent ranges.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

namespace rabit {

/// Threads that the process can make good use of: one for each core among the CPUs of its affinity
/// (two hardware threads of a core read memory no faster than one), at most what CPU quotas of its
/// control groups, versions 1 and 2, allow.
int usable_threads();
/// The same for these CPUs, with /proc and /sys found in `root`.
int usable_threads(const std::vector<int>& cpus, const std::filesystem::path& root);

/// The calling thread and `threads - 1` workers (fewer, if the system refuses to start as many: see
/// size()) run one loop at a time. Not re-entrant.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  /// Splits [0, count) into at most size() contiguous ranges whose bounds are multiples of
  /// `grain` and calls body(begin, end, thread) for each, thread in [0, size()). Returns when all
  /// have. The split depends on (count, grain, size()) alone. Of exceptions that bodies throw (out
  /// of memory), one is thrown on.
  void parallel_for(int64_t count, int64_t grain,
                    const std::function<void(int64_t, int64_t, int)>& body);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace rabit
