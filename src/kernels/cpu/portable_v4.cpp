// The portable kernels for x86-64-v4 (AVX-512); flags in CMakeLists.txt.
#define RABIT_ISA cpu_v4
#define RABIT_LANES 16
#define RABIT_NAME "portable-v4"
#include "kernels/cpu/portable.h"
