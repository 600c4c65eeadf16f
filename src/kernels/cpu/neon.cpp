// Kernels for AArch64; flags in CMakeLists.txt.
#define RABIT_ISA cpu_neon
#define RABIT_LANES 4
#define RABIT_NAME "neon"
#include "kernels/cpu/neon.h"
