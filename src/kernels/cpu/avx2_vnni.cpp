// Kernels for AVX2 with AVX-VNNI; flags in CMakeLists.txt.
#define RABIT_ISA cpu_avx2_vnni
#define RABIT_LANES 8
#define RABIT_NAME "avx2-vnni"
#define RABIT_VNNI
#include "kernels/cpu/avx2.h"
