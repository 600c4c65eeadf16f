// A fixed pool of worker threads for loops over independent ranges.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace rabit {

/// Threads that the process may really use: its CPU affinity, capped by a cgroup CPU quota.
int usable_threads();

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
