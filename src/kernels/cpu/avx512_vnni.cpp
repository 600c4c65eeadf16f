// Kernels for AVX-512 with VNNI; flags in CMakeLists.txt.
#define RABIT_ISA cpu_avx512_vnni
#define RABIT_LANES 16
#define RABIT_NAME "avx512-vnni"
#define RABIT_VNNI
#include "kernels/cpu/avx512.h"
