#include "base/interrupt.h"

#include <csignal>

namespace rabit {
namespace {

volatile std::sig_atomic_t g_interrupted = 0;

extern "C" void on_signal(int signal) {
  if (g_interrupted != 0) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  g_interrupted = 1;
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
