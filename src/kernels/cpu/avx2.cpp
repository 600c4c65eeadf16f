// Kernels for AVX2; flags in CMakeLists.txt.
#define RABIT_ISA cpu_avx2
#define RABIT_LANES 8
#define RABIT_NAME "avx2"
#include "kernels/cpu/avx2.h"
