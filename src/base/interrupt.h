// Ctrl-C and SIGTERM as a flag that long loops look at between steps.
#pragma once

#include "rabit/result.h"

namespace rabit {

/// Installs handlers for SIGINT and SIGTERM: the first sets the flag, a second says so on
/// stderr and ends the process.
void catch_interrupts();

/// True once the user or the system has asked to stop.
bool interrupted();

/// An Error with `interrupted` set if interrupted(), else success.
Status check_interrupt();

/// Sets or clears the flag; for tests.
void set_interrupted(bool value);

}  // namespace rabit
