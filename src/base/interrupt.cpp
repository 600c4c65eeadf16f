#include "base/interrupt.h"

#include <atomic>

namespace rabit {
namespace {

// Lock-free, so that a signal handler may set it while any thread looks at it.
std::atomic<int> g_interrupted{0};
static_assert(std::atomic<int>::is_always_lock_free);

}  // namespace

bool interrupted() { return g_interrupted != 0; }

Status check_interrupt() {
  if (interrupted()) {
    return Error{"interrupted", true};
  }
  return {};
}

bool set_interrupted(bool value) { return g_interrupted.exchange(value ? 1 : 0) != 0; }

}  // namespace rabit
