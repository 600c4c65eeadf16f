// The table of one instruction set. Included once by each portable_*.cpp, after RABIT_ISA,
// RABIT_LANES and RABIT_NAME are defined; nothing but `kTable` leaves the file that does.
#pragma once

#include "kernels/cpu/portable_table.h"

namespace rabit::RABIT_ISA {

extern const KernelTable kTable;
constinit const KernelTable kTable = portable_table();

}  // namespace rabit::RABIT_ISA
