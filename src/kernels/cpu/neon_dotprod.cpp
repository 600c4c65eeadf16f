// Kernels for AArch64 with dot products; flags in CMakeLists.txt.
#define RABIT_ISA cpu_neon_dotprod
#define RABIT_LANES 4
#define RABIT_NAME "neon-dotprod"
#include "kernels/cpu/neon.h"
