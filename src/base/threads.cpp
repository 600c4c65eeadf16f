#include "base/threads.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <fstream>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace rabit {
namespace {

// Workers look for the next loop this many times before they sleep: products of one token follow
// each other within microseconds.
constexpr int kSpins = 4000;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

int usable_threads() {
  int count = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof set, &set) == 0) {
    count = std::max(1, CPU_COUNT(&set));
  }
  // cgroup v2: "<quota> <period>" in microseconds, or "max <period>".
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (file >> quota >> period && quota > 0 && period > 0) {  // reading a number fails on "max"
    count = static_cast<int>(std::clamp(std::ceil(quota / period), 1.0, double(count)));
  }
  return count;
}

struct ThreadPool::State {
  std::vector<std::thread> workers;
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> generation{0};
  std::atomic<int> pending{0};
  std::atomic<bool> stop{false};
  const std::function<void(int64_t, int64_t, int)>* body = nullptr;
  int64_t count = 0, chunk = 0;
  std::exception_ptr failure;  // of a worker, under the mutex
};

ThreadPool::ThreadPool(int threads) : state_(new State) {
  const auto work = [state = state_.get()](int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && state->generation.load(std::memory_order_acquire) == seen;
           ++spin) {
        relax();
      }
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
  try {
    for (int thread = 1; thread < threads; ++thread) {
      state_->workers.emplace_back(work, thread);
    }
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started do the work.
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

void ThreadPool::parallel_for(int64_t count, int64_t grain,
                              const std::function<void(int64_t, int64_t, int)>& body) {
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
  for (int spin = 0; state_->pending.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpins) {
      relax();
    } else {
      std::this_thread::yield();
    }
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
