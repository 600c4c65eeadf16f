#include "base/threads.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <fstream>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace rabit {
namespace {

// Workers look for the next loop so long before they sleep: products of one token follow each other
// within microseconds. Where there are more workers than CPUs they sleep at once.
constexpr std::chrono::microseconds kSpin{100};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // the hint `yield` does nothing on most of them
#endif
}

/// Looks until done() holds, for about as long as `most`: how long a turn takes differs between
/// processors.
template <typename Done>
void spin_until(std::chrono::microseconds most, const Done& done) {
  constexpr int kTurns = 64;  // between looks at the clock
  std::chrono::steady_clock::time_point started;
  for (int turn = 0; most.count() > 0 && !done(); ++turn) {
    relax();
    if (turn == 0) {
      started = std::chrono::steady_clock::now();
    } else if (turn % kTurns == 0 && std::chrono::steady_clock::now() - started > most) {
      return;
    }
  }
}

/// CPUs worth of time that a quota file allows: "QUOTA PERIOD" in microseconds, "max PERIOD" or, of
/// version 1, a negative quota for no limit. The period may be in a file of its own.
double quota_of(const std::filesystem::path& quota_file, const std::filesystem::path& period_file) {
  std::ifstream quotas(quota_file), periods(period_file);
  double quota = 0, period = 0;
  const bool read =
      (quotas >> quota) && (period_file.empty() ? quotas >> period : periods >> period);
  return read && quota > 0 && period > 0 ? quota / period : std::numeric_limits<double>::infinity();
}

/// The smallest quota of the process's control groups and of those that they lie in.
double cpu_quota(const std::filesystem::path& root) {
  const std::filesystem::path groups = root / "sys/fs/cgroup";
  double least = std::numeric_limits<double>::infinity();
  std::ifstream file(root / "proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // number:controllers:/path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) {
      continue;
    }
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool version_1 = ("," + controllers + ",").find(",cpu,") != std::string::npos;
    if (!controllers.empty() && !version_1) {
      continue;
    }
    // A container sees its own group as the root, whatever the path says: go up to there.
    for (std::filesystem::path path =
             std::filesystem::path(line.substr(second + 1)).relative_path();
         ; path = path.parent_path()) {
      // The folder of a version-1 hierarchy may list its controllers in another order.
      for (const std::string& name : std::set<std::string>{controllers, version_1 ? "cpu" : ""}) {
        const std::filesystem::path group = groups / name / path;
        least = std::min(
            least, version_1 ? quota_of(group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
                             : quota_of(group / "cpu.max", {}));
      }
      if (path.empty()) {
        break;
      }
    }
  }
  return least;
}

/// CPUs of the process's affinity.
std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) {
        cpus.push_back(cpu);
      }
    }
  } else {  // more CPUs than a set holds
    cpus.resize(std::max(1U, std::thread::hardware_concurrency()));
    std::iota(cpus.begin(), cpus.end(), 0);
  }
  return cpus;
}

}  // namespace

int usable_threads() { return usable_threads(allowed_cpus(), "/"); }

int usable_threads(const std::vector<int>& cpus, const std::filesystem::path& root) {
  std::set<std::string> cores;
  for (const int cpu : cpus) {
    const std::string name = "cpu" + std::to_string(cpu);
    std::ifstream file(root / "sys/devices/system/cpu" / name / "topology/thread_siblings_list");
    std::string siblings;
    cores.insert(file >> siblings ? siblings : name);
  }
  const auto count = std::max(1.0, static_cast<double>(cores.size()));
  return static_cast<int>(std::clamp(std::ceil(cpu_quota(root)), 1.0, count));
}

int64_t last_level_caches() { return last_level_caches(allowed_cpus(), "/"); }

int64_t last_level_caches(const std::vector<int>& cpus, const std::filesystem::path& root) {
  std::map<std::string, int64_t> caches;  // by the CPUs that share them
  for (const int cpu : cpus) {
    const std::string name = "cpu" + std::to_string(cpu);
    int last = 0;
    int64_t bytes = 0;
    std::string sharers;
    for (int index = 0;; ++index) {
      const std::filesystem::path cache =
          root / "sys/devices/system/cpu" / name / "cache" / ("index" + std::to_string(index));
      std::ifstream levels(cache / "level"), sizes(cache / "size"),
          lists(cache / "shared_cpu_list");
      int level = 0;
      int64_t size = 0;
      char unit = 0;
      if (!(levels >> level && sizes >> size)) {
        break;
      }
      sizes >> unit;
      if (level > last) {
        last = level;
        bytes = std::clamp<int64_t>(size, 0, int64_t{1} << 40) * (unit == 'M'   ? 1 << 20
                                                                  : unit == 'K' ? 1 << 10
                                                                                : 1);
        sharers = std::getline(lists, sharers) ? sharers : name;
      }
    }
    caches[sharers] = bytes;
  }
  return std::accumulate(caches.begin(), caches.end(), int64_t{0},
                         [](int64_t sum, const auto& cache) { return sum + cache.second; });
}

struct ThreadPool::State {
  std::vector<std::thread> workers;
  std::mutex mutex;
  std::condition_variable wake;
  // Waiting workers look at the one while others count down the other.
  alignas(64) std::atomic<uint64_t> generation{0};
  alignas(64) std::atomic<int> pending{0};
  alignas(64) std::atomic<bool> stop{false};
  const LoopBody* body = nullptr;
  int64_t count = 0, chunk = 0;
  std::exception_ptr failure;  // of a worker, under the mutex
  std::chrono::microseconds spin = kSpin;
};

ThreadPool::ThreadPool(int threads) : state_(new State) {
  const auto work = [state = state_.get()](int thread) {
    uint64_t seen = 0;
    for (;;) {
      spin_until(state->spin,
                 [&] { return state->generation.load(std::memory_order_acquire) != seen; });
      if (state->generation.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(state->mutex);
        state->wake.wait(lock, [&] { return state->generation.load() != seen; });
      }
      seen = state->generation.load(std::memory_order_acquire);
      if (state->stop.load()) {
        return;
      }
      const int64_t begin = thread * state->chunk;
      const int64_t end = std::min(state->count, begin + state->chunk);
      if (begin < end) {
        try {
          (*state->body)(begin, end, thread);
        } catch (...) {
          const std::lock_guard lock(state->mutex);
          state->failure = std::current_exception();
        }
      }
      state->pending.fetch_sub(1, std::memory_order_release);
    }
  };
  if (threads > 1 &&
      threads > std::min(static_cast<double>(allowed_cpus().size()), std::ceil(cpu_quota("/")))) {
    state_->spin = {};
  }
  state_->workers.reserve(static_cast<size_t>(std::max(threads, 1)));
  try {
    for (int thread = 1; thread < threads; ++thread) {
      state_->workers.emplace_back(work, thread);
    }
  } catch (const std::exception&) {
    // The system gives no more threads or no more memory: those that started do the work.
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
    state_->generation.fetch_add(1);
  }
  state_->wake.notify_all();
  for (auto& worker : state_->workers) {
    worker.join();
  }
}

int ThreadPool::size() const { return static_cast<int>(state_->workers.size()) + 1; }

void ThreadPool::parallel_for(int64_t count, int64_t grain, LoopBody body) {
  if (count <= 0) {
    return;
  }
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t chunk = (grains + size() - 1) / size() * grain;
  if (state_->workers.empty() || chunk >= count) {
    body(0, count, 0);
    return;
  }
  state_->body = &body;
  state_->count = count;
  state_->chunk = chunk;
  state_->pending.store(static_cast<int>(state_->workers.size()), std::memory_order_relaxed);
  {
    std::lock_guard lock(state_->mutex);
    state_->generation.fetch_add(1, std::memory_order_release);
  }
  state_->wake.notify_all();
  std::exception_ptr failure;
  try {
    body(0, std::min(count, chunk), 0);
  } catch (...) {  // the workers still read the loop's state
    failure = std::current_exception();
  }
  const auto all_done = [&] { return state_->pending.load(std::memory_order_acquire) == 0; };
  spin_until(state_->spin, all_done);
  while (!all_done()) {
    std::this_thread::yield();
  }
  if (failure == nullptr) {
    failure = std::exchange(state_->failure, nullptr);
  }
  state_->failure = nullptr;
  if (failure != nullptr) {
    std::rethrow_exception(failure);
  }
}

}  // namespace rabit
