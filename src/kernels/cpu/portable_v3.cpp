// The portable kernels for x86-64-v3 (AVX2, FMA); flags in CMakeLists.txt.
#define RABIT_ISA cpu_v3
#define RABIT_LANES 8
#define RABIT_NAME "portable-v3"
#include "kernels/cpu/portable.h"
