// The portable kernels for the instruction set that every machine of this kind has; flags in
// CMakeLists.txt.
#define RABIT_ISA cpu_base
#define RABIT_LANES 4
#define RABIT_NAME "portable"
#include "kernels/cpu/portable.h"
