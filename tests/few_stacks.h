// A limit of memory under which not all threads of a large number start.
#pragma once

#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>

namespace rabit {

/// As long as it lives the process gets no more memory than some threads' stacks.
class FewStacks {
 public:
  FewStacks() {
    getrlimit(RLIMIT_AS, &before_);
    int64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    rlimit less = before_;
    less.rlim_cur = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE)) + (rlim_t{100} << 20);
    setrlimit(RLIMIT_AS, &less);
  }
  ~FewStacks() { setrlimit(RLIMIT_AS, &before_); }

 private:
  rlimit before_{};
};

}  // namespace rabit
