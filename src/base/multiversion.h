// Marks a function whose loops the compiler should vectorize for each x86-64 level; the loader
// picks one at start. Without -ffast-math or contraction all versions give the same bits.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define RABIT_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RABIT_MULTIVERSION
#endif
