// Kernels for AVX-512; flags in CMakeLists.txt.
#define RABIT_ISA cpu_avx512
#define RABIT_LANES 16
#define RABIT_NAME "avx512"
#include "kernels/cpu/avx512.h"
