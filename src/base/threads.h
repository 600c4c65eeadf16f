// A fixed pool of worker threads for loops over independent ranges.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

namespace rabit {

/// Threads that the process can make good use of: one for each core among the CPUs of its affinity
/// (two hardware threads of a core read memory no faster than one), at most what CPU quotas of its
/// control groups, versions 1 and 2, allow.
int usable_threads();
/// The same for these CPUs, with /proc and /sys found in `root`.
int usable_threads(const std::vector<int>& cpus, const std::filesystem::path& root);

/// Bytes of the last-level caches of the CPUs of the process's affinity, each once; 0: not known.
int64_t last_level_caches();
/// The same for these CPUs, with /sys found in `root`.
int64_t last_level_caches(const std::vector<int>& cpus, const std::filesystem::path& root);

/// A loop's body, (begin, end, thread), where it stands: nothing is copied or allocated.
class LoopBody {
 public:
  template <typename Body>
  LoopBody(const Body& body)
      : body_(&body), call_([](const void* it, int64_t begin, int64_t end, int thread) {
          (*static_cast<const Body*>(it))(begin, end, thread);
        }) {}
  void operator()(int64_t begin, int64_t end, int thread) const {
    call_(body_, begin, end, thread);
  }

 private:
  const void* body_;
  void (*call_)(const void*, int64_t, int64_t, int);
};

/// The calling thread and `threads - 1` workers (fewer, if the system or its memory allows no more:
/// see size()) run one loop at a time. Not re-entrant.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  /// Splits [0, count) into at most size() contiguous ranges whose bounds are multiples of
  /// `grain` and calls body(begin, end, thread) for each, thread in [0, size()). Returns when all
  /// have. The split depends on (count, grain, size()) alone; the caller also does, under their
  /// numbers, ranges of threads that are late. Of exceptions that bodies throw (out
  /// of memory), one is thrown on.
  void parallel_for(int64_t count, int64_t grain, LoopBody body);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace rabit
