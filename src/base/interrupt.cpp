#include "base/interrupt.h"

#include <atomic>

namespace rabit {
namespace {

// Lock-free, so that a signal handler may set it while any thread looks at it.
enum Wish { kNone, kInterrupt, kTerminate };
std::atomic<int> g_interrupted{kNone};
static_assert(std::atomic<int>::is_always_lock_free);
std::atomic<int> g_holds{0};

}  // namespace

bool interrupted() { return g_interrupted != kNone; }

Status check_interrupt() {
  if (interrupted() && g_holds == 0) {
    return Error{"interrupted", true};
  }
  return {};
}

bool set_interrupted(bool value, bool terminated) {
  return g_interrupted.exchange(!value ? kNone : terminated ? kTerminate : kInterrupt) != kNone;
}

bool terminated() { return g_interrupted == kTerminate; }

HoldInterrupts::HoldInterrupts() { ++g_holds; }
HoldInterrupts::~HoldInterrupts() { --g_holds; }

}  // namespace rabit
