// Which compiled copies of the kernels run on this machine. __builtin_cpu_supports says
// yes only if the operating system also saves the registers of the set.
#include "kernels/api/kernels.h"

#ifdef RABIT_AARCH64
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace rabit {

namespace cpu_base {
extern const KernelTable kTable;
}
#ifdef RABIT_X86
namespace cpu_v3 {
extern const KernelTable kTable;
}
namespace cpu_v4 {
extern const KernelTable kTable;
}
namespace cpu_avx2 {
extern const KernelTable kTable;
}
namespace cpu_avx2_vnni {
extern const KernelTable kTable;
}
namespace cpu_avx512 {
extern const KernelTable kTable;
}
namespace cpu_avx512_vnni {
extern const KernelTable kTable;
}
namespace cpu_vbmi {
extern const KernelTable kTable;
}
#endif
#ifdef RABIT_AARCH64
namespace cpu_neon {
extern const KernelTable kTable;
}
namespace cpu_neon_dotprod {
extern const KernelTable kTable;
}
#endif

std::vector<const KernelTable*> cpu_kernels() {
  std::vector<const KernelTable*> tables;
#ifdef RABIT_X86
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool vnni = v4 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512vbmi")) {
    tables.push_back(&cpu_vbmi::kTable);
  }
  if (vnni) {
    tables.push_back(&cpu_avx512_vnni::kTable);
  }
  if (v4) {
    tables.push_back(&cpu_avx512::kTable);
  }
  if (v3 && __builtin_cpu_supports("avxvnni")) {
    tables.push_back(&cpu_avx2_vnni::kTable);
  }
  if (v3) {
    tables.push_back(&cpu_avx2::kTable);
  }
  if (v4) {
    tables.push_back(&cpu_v4::kTable);
  }
  if (v3) {
    tables.push_back(&cpu_v3::kTable);
  }
#endif
#ifdef RABIT_AARCH64
  if ((::getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) {
    tables.push_back(&cpu_neon_dotprod::kTable);
  }
  tables.push_back(&cpu_neon::kTable);
#endif
  tables.push_back(&cpu_base::kTable);
  return tables;
}

}  // namespace rabit
