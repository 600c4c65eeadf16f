// A wish to stop, as a flag that long loops look at between steps; the program sets it on Ctrl-C
// and SIGTERM.
#pragma once

#include "rabit/result.h"

namespace rabit {

/// True once the user or the system has asked to stop.
bool interrupted();

/// An Error with `interrupted` set if interrupted(), else success.
Status check_interrupt();

/// Sets or clears the flag and returns what it was. Safe in a signal handler. `terminated`: it is
/// the system that asks, which wants the machine; the work is to go on elsewhere.
bool set_interrupted(bool value, bool terminated = false);

/// Whether the wish to stop came with `terminated`.
bool terminated();

/// While one lives, check_interrupt() lets work go on that cannot stop in the middle, and
/// interrupted() alone tells.
class HoldInterrupts {
 public:
  HoldInterrupts();
  ~HoldInterrupts();
  HoldInterrupts(const HoldInterrupts&) = delete;
  HoldInterrupts& operator=(const HoldInterrupts&) = delete;
};

}  // namespace rabit
