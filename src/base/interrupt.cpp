#include "base/interrupt.h"

#include <unistd.h>

#include <atomic>
#include <csignal>

namespace rabit {
namespace {

// Lock-free, so that the handler may set it while any thread looks at it.
std::atomic<int> g_interrupted{0};
static_assert(std::atomic<int>::is_always_lock_free);

extern "C" void on_signal(int signal) {
  if (g_interrupted.exchange(1) != 0) {
    // Only what is safe in a handler; nothing can be done if it fails.
    constexpr char kLastWords[] = "\nrabit: stopped at once, by a second signal\n";
    [[maybe_unused]] const auto written = ::write(STDERR_FILENO, kLastWords, sizeof kLastWords - 1);
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
}

}  // namespace

void catch_interrupts() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool interrupted() { return g_interrupted != 0; }

Status check_interrupt() {
  if (interrupted()) {
    return Error{"interrupted", true};
  }
  return {};
}

void set_interrupted(bool value) { g_interrupted = value ? 1 : 0; }

}  // namespace rabit
