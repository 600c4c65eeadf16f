// What GPUs of compute capability 9.0 have beside: products of four warps whose right side lies in
// shared memory, copies by an engine that need no thread, and barriers that count both.
#pragma once

#include "kernels/cuda/warp.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(RABIT_CUDA_EMULATOR)
#define RABIT_WARPGROUPS 1
#else
#define RABIT_WARPGROUPS 0
#endif

#ifndef RABIT_CUDA_EMULATOR
#include <cuda.h>
#endif

namespace rabit::gpu {

constexpr int kSlab = 64;             // columns of 128 bytes, as the tensor cores read them
constexpr int kSlabAlignment = 1024;  // of slabs: eight rows

#ifdef RABIT_CUDA_EMULATOR
using emulator::arrive;
using emulator::await;
using emulator::Barrier;
using emulator::BoxMap;
using emulator::copy_box;
using emulator::expect;
using emulator::start_barrier;
__device__ __forceinline__ void show_to_engines() {}
__device__ __forceinline__ void begin_products() {}
__device__ __forceinline__ void end_products() {}
template <int kPending>
__device__ __forceinline__ void await_products() {}
__device__ __forceinline__ uint64_t describe(const uint4* slabs) {
  return reinterpret_cast<uint64_t>(slabs);
}
template <int kQuads>
__device__ __forceinline__ void multiply_group(float (&d)[kQuads][4], const uint32_t (&a)[4],
                                               uint64_t slabs, int slab, int step) {
  emulator::multiply_group(d, a, slabs + static_cast<uint64_t>(slab) * kQuads * kSlabAlignment,
                           step);
}
#else

/// A tensor in device memory whose boxes copy_box() takes.
using BoxMap = CUtensorMap;
/// In shared memory.
using Barrier = uint64_t;

#if RABIT_WARPGROUPS
__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

/// Opens each time when `arrivals` threads have come and all expected bytes. By one thread; others
/// may use it after a __syncthreads().
__device__ __forceinline__ void start_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// Comes, and says how many bytes the engine will have copied.
__device__ __forceinline__ void expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// Until it has opened for the (2 n + phase)th time, from 0 on; n: as often as this was awaited.
__device__ __forceinline__ void await(Barrier* barrier, int phase) {
  uint32_t open = 0;
  while (open == 0) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(open)
        : "r"(shared_address(barrier)), "r"(phase)
        : "memory");
  }
}
/// Starts to copy the map's box at (c0, c1, c2), zeros beyond the tensor.
__device__ __forceinline__ void copy_box(void* shared, const BoxMap& map, int c0, int c1, int c2,
                                         Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(barrier))
      : "memory");
}
/// Lets the engines for copies and products see what this thread has put into shared memory.
__device__ __forceinline__ void show_to_engines() {
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

/// Before the products that read what was written to registers.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;"); }
/// Until at most kPending of the groups that end_products() closed are under way.
template <int kPending>
__device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending));
}

#define RABIT_D_1 "%0, %1, %2, %3"
#define RABIT_D_2 RABIT_D_1 ", %4, %5, %6, %7"
#define RABIT_D_4 RABIT_D_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define RABIT_D_8 \
  RABIT_D_4       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RABIT_D_16                                                                               \
  RABIT_D_8                                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RABIT_D_32                                                                             \
  RABIT_D_16                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "    \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, " \
  "%99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, "  \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RABIT_Q_1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define RABIT_Q_2(i) RABIT_Q_1(i), RABIT_Q_1(i + 1)
#define RABIT_Q_4(i) RABIT_Q_2(i), RABIT_Q_2(i + 2)
#define RABIT_Q_8(i) RABIT_Q_4(i), RABIT_Q_4(i + 4)
#define RABIT_Q_16(i) RABIT_Q_8(i), RABIT_Q_8(i + 8)
#define RABIT_Q_32(i) RABIT_Q_16(i), RABIT_Q_16(i + 16)
#define RABIT_MULTIPLY(n, quads, a0, a1, a2, a3, b)                                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n" #n   \
               "k16.f32.f16.f16 {" RABIT_D_##quads "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 \
                                                   "}, %" #b ", p, 1, 1, 0; }"               \
               : RABIT_Q_##quads(0)                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_slab))

/// Slabs in shared memory for multiply_group(), kSlabAlignment-byte aligned.
__device__ __forceinline__ uint64_t describe(const uint4* slabs) {
  // Eight tokens lie 1,024 bytes apart; swizzled by 128 bytes.
  const uint64_t at = static_cast<uint32_t>(__cvta_generic_to_shared(slabs));
  return (at & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{kSlabAlignment >> 4} << 32 |
         uint64_t{1} << 62;
}

/// d += a b, of a warpgroup: a (64, 16) and b (16, 8 kQuads) in F16, sums in F32; a and d of a
/// warp, its 16 rows, as multiply_tile() has them. A slab: (8 kQuads tokens, kSlab columns), chunk
/// c of token n in place c ^ (n % 8); the step's 16 columns of it.
template <int kQuads>
__device__ __forceinline__ void multiply_group(float (&d)[kQuads][4], const uint32_t (&a)[4],
                                               uint64_t slabs, int slab, int step) {
  const uint64_t b_slab =
      slabs + static_cast<uint64_t>((slab * kQuads * kSlabAlignment + step * 32) >> 4);
  if constexpr (kQuads == 1) {
    RABIT_MULTIPLY(8, 1, 4, 5, 6, 7, 8);
  } else if constexpr (kQuads == 2) {
    RABIT_MULTIPLY(16, 2, 8, 9, 10, 11, 12);
  } else if constexpr (kQuads == 4) {
    RABIT_MULTIPLY(32, 4, 16, 17, 18, 19, 20);
  } else if constexpr (kQuads == 8) {
    RABIT_MULTIPLY(64, 8, 32, 33, 34, 35, 36);
  } else if constexpr (kQuads == 16) {
    RABIT_MULTIPLY(128, 16, 64, 65, 66, 67, 68);
  } else {
    static_assert(kQuads == 32);
    RABIT_MULTIPLY(256, 32, 128, 129, 130, 131, 132);
  }
}
#undef RABIT_MULTIPLY
#endif  // RABIT_WARPGROUPS
#endif  // RABIT_CUDA_EMULATOR

}  // namespace rabit::gpu
