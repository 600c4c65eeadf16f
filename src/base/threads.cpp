#include "base/threads.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
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

using Clock = std::chrono::steady_clock;

// Threads look for what they wait for at most so long before they sleep: products of one token
// follow each other within microseconds.
constexpr std::chrono::microseconds kMostSpin{100};
// So long at most a caller leaves ranges to workers that have not begun: one may be on its way.
constexpr std::chrono::microseconds kMostGrace{5};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // the hint `yield` does nothing on most of them
#endif
}

/// Looks a few times, for a microsecond or so: how long differs between processors.
template <typename Done>
bool look(const Done& done) {
  constexpr int kTurns = 64;
  for (int turn = 0; turn < kTurns; ++turn) {
    if (done()) {
      return true;
    }
    relax();
  }
  return false;
}

/// How a thread waits: it spins, then sleeps. To spin in vain halves the time for it, for then
/// something else needs the CPU, perhaps what it waits for; short waits let that time grow again.
class Patience {
 public:
  explicit Patience(std::chrono::microseconds most) : most_(most), spin_(most) {}

  template <typename Done, typename Sleep>
  void wait(const Done& done, const Sleep& sleep) {
    if (most_.count() == 0) {
      return sleep();
    }
    if (look(done)) {
      return grow();
    }
    const Clock::time_point started = Clock::now();
    while (Clock::now() - started < spin_) {
      if (look(done)) {
        return grow();
      }
    }
    spin_ /= 2;
    sleep();
    if (Clock::now() - started < most_) {
      grow();
    }
  }

 private:
  void grow() { spin_ = std::min<Clock::duration>(most_, spin_ + most_ / kGrowths); }

  static constexpr int kGrowths = 64;
  Clock::duration most_, spin_;
};

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

// A loop has a range for each thread. A worker takes its own when it has seen the loop; the caller
// takes those that nobody has taken when it has done its own, so that it never waits for a worker
// that has no CPU, but for one that lost it in the middle.
struct ThreadPool::State {
  struct alignas(64) Worker {
    std::atomic<uint32_t> taken{0};  // loop whose range was taken last
    std::thread thread;
  };

  bool take(Worker& worker, uint32_t loop) {
    uint32_t before = loop - 1;
    return worker.taken.load(std::memory_order_relaxed) == before &&
           worker.taken.compare_exchange_strong(before, loop, std::memory_order_acq_rel);
  }
  void run(int thread) {
    const int64_t begin = thread * chunk, end = std::min(count, begin + chunk);
    if (begin < end) {
      try {
        (*body)(begin, end, thread);
      } catch (...) {
        const std::lock_guard lock(mutex);
        failure = std::current_exception();
      }
    }
  }

  std::unique_ptr<Worker[]> workers;
  int size = 0;  // of the workers
  // Waiting workers look at the one while others count down the other.
  alignas(64) std::atomic<uint32_t> loop{0};
  // Who is to be woken is counted here: the library's count is shared by many objects, and a call
  // of the system for nothing at every loop is 6 % of a small model's token.
  std::atomic<int> sleepers{0};
  alignas(64) std::atomic<int> pending{0};  // ranges of workers that are not done
  std::atomic<bool> caller_sleeps{false};
  alignas(64) std::atomic<bool> stop{false};
  const LoopBody* body = nullptr;
  int64_t count = 0, chunk = 0;
  std::mutex mutex;
  std::exception_ptr failure;  // under the mutex
  // The caller's: with workers that have not begun, and with those that have.
  Patience grace{kMostGrace}, patience{kMostSpin};
};

ThreadPool::ThreadPool(int threads) : state_(new State) {
  const bool crowded =
      threads > std::min(static_cast<double>(allowed_cpus().size()), std::ceil(cpu_quota("/")));
  const auto most_spin = crowded ? std::chrono::microseconds(0) : kMostSpin;
  if (crowded) {
    state_->grace = state_->patience = Patience(most_spin);
  }
  const auto work = [state = state_.get(), most_spin](int thread) {
    State::Worker& self = state->workers[static_cast<size_t>(thread - 1)];
    Patience patience(most_spin);
    for (uint32_t seen = 0;;) {
      patience.wait([&] { return state->loop.load(std::memory_order_acquire) != seen; },
                    [&] {
                      ++state->sleepers;
                      state->loop.wait(seen);
                      --state->sleepers;
                    });
      seen = state->loop.load();
      if (state->stop.load()) {
        return;
      }
      if (state->take(self, seen)) {
        state->run(thread);
        if (state->pending.fetch_sub(1) == 1 && state->caller_sleeps) {
          state->pending.notify_one();
        }
      }
    }
  };
  state_->workers =
      std::make_unique<State::Worker[]>(static_cast<size_t>(std::max(threads - 1, 0)));
  try {
    for (int thread = 1; thread < threads; ++thread) {
      state_->workers[static_cast<size_t>(thread - 1)].thread = std::thread(work, thread);
      state_->size = thread;
    }
  } catch (const std::exception&) {
    // The system gives no more threads or no more memory: those that started do the work.
  }
}

ThreadPool::~ThreadPool() {
  state_->stop = true;
  ++state_->loop;
  state_->loop.notify_all();
  for (int i = 0; i < state_->size; ++i) {
    state_->workers[static_cast<size_t>(i)].thread.join();
  }
}

int ThreadPool::size() const { return state_->size + 1; }

void ThreadPool::parallel_for(int64_t count, int64_t grain, LoopBody body) {
  if (count <= 0) {
    return;
  }
  State& state = *state_;
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t chunk = (grains + size() - 1) / size() * grain;
  if (state.size == 0 || chunk >= count) {
    body(0, count, 0);
    return;
  }
  state.body = &body;
  state.count = count;
  state.chunk = chunk;
  state.pending.store(state.size, std::memory_order_relaxed);
  const uint32_t loop = state.loop.fetch_add(1) + 1;
  if (state.sleepers > 0) {
    state.loop.notify_all();
  }
  state.run(0);
  const auto all_done = [&] { return state.pending.load(std::memory_order_acquire) == 0; };
  state.grace.wait(all_done, [&] {
    for (int i = 0; i < state.size; ++i) {
      if (state.take(state.workers[static_cast<size_t>(i)], loop)) {
        state.run(i + 1);
        state.pending.fetch_sub(1);
      }
    }
  });
  state.patience.wait(all_done, [&] {
    state.caller_sleeps = true;
    for (int left = state.pending.load(); left > 0; left = state.pending.load()) {
      state.pending.wait(left);
    }
    state.caller_sleeps = false;
  });
  if (state.failure != nullptr) {
    std::rethrow_exception(std::exchange(state.failure, nullptr));
  }
}

}  // namespace rabit
