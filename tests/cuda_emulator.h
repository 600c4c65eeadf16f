// Runs CUDA kernels on the CPU, so that their arithmetic is tested where there is no GPU: a
// kernel's source is included as C++, blocks run one after the other, and the threads of a block as
// fibers that change at barriers and shuffles. Deterministic; shows a wrong index or formula, not a
// race between blocks, nor a speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__ __restrict
#define __grid_constant__
#define RABIT_DYNAMIC_SHARED(name)                   \
  alignas(128) static unsigned char name[256 << 10]; \
  rabit::emulator::spoil(name, sizeof name)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct CUstream_st;
using cudaStream_t = CUstream_st*;
using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "emulated error";
}

namespace rabit::emulator {

inline constexpr unsigned kWarp = 32;

// One block's threads; the fiber that runs now, and what the kernel may ask for.
class Block {
 public:
  Block(dim3 block, dim3 index, const std::function<void()>& body)
      : size(block), block_index(index), body_(body), count_(block.x * block.y * block.z) {
    fibers_.resize(count_);
    slots_.resize(count_);
    words_.resize(count_);
  }

  void run() {
    current() = this;
    for (unsigned i = 0; i < count_; ++i) {
      Fiber& fiber = fibers_[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stack(i);
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &back_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    // Round and round until all are done; a fiber that waits gives its turn away.
    for (unsigned left = count_; left > 0;) {
      left = 0;
      moved_ = false;
      for (now_ = 0; now_ < count_; ++now_) {
        if (!fibers_[now_].done) {
          swapcontext(&back_, &fibers_[now_].context);
          left += fibers_[now_].done ? 0 : 1;
        }
      }
      if (left > 0 && !moved_) {
        std::fputs("cuda_emulator: threads wait for others that have ended\n", stderr);
        std::abort();
      }
    }
  }

  void wait_block() { wait(block_arrived_, block_round_, count_); }
  void wait_warp() {
    Warp& warp = warps_[now_ / kWarp];
    wait(warp.arrived, warp.round, std::min(kWarp, count_ - now_ / kWarp * kWarp));
  }

  /// Gives the turn away, for a thread that waits for what another writes.
  void pass() {
    const unsigned own = now_;
    swapcontext(&fibers_[own].context, &back_);
    now_ = own;
  }
  /// Something was written that a thread may wait for.
  void moved() { moved_ = true; }

  template <typename T>
  T exchange(T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&slots_[now_], &value, sizeof(T));
    wait_warp();
    T out;
    std::memcpy(&out, &slots_[now_ / kWarp * kWarp + source], sizeof(T));
    wait_warp();
    return out;
  }

  /// Hands look(lane) -> words of that lane of the warp to `use`, when all have put theirs there.
  using Words = std::array<uint64_t, 4>;
  template <typename Use>
  void exchange_words(const Words& own, const Use& use) {
    words_[now_] = own;
    wait_warp();
    use([this](unsigned lane) -> const Words& { return words_[now_ / kWarp * kWarp + lane]; });
    wait_warp();
  }

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }
  dim3 thread_index() const {
    return {now_ % size.x, now_ / size.x % size.y, now_ / (size.x * size.y)};
  }
  unsigned lane() const { return now_ % kWarp; }

  dim3 size, block_index;

 private:
  static constexpr size_t kStack = 32 << 10;
  struct Fiber {
    ucontext_t context;
    bool done = false;
  };
  struct Warp {
    unsigned arrived = 0, round = 0;
  };

  // Of the fiber with this number, in whichever block.
  static char* stack(unsigned fiber) {
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() <= fiber) {
      stacks.push_back(std::make_unique<char[]>(kStack));
    }
    return stacks[fiber].get();
  }

  static void enter() {
    Block& block = *current();
    const unsigned own = block.now_;
    block.body_();
    block.fibers_[own].done = true;
    block.moved_ = true;
  }

  void wait(unsigned& arrived, unsigned& round, unsigned all) {
    const unsigned mine = round;
    if (++arrived == all) {
      arrived = 0;
      ++round;
      moved_ = true;
      return;
    }
    while (round == mine) {
      const unsigned own = now_;
      swapcontext(&fibers_[own].context, &back_);
      now_ = own;
    }
  }

  const std::function<void()>& body_;
  unsigned count_, now_ = 0;
  std::vector<Fiber> fibers_;
  std::vector<uint64_t> slots_;
  std::vector<Words> words_;
  Warp warps_[1024 / kWarp];
  unsigned block_arrived_ = 0, block_round_ = 0;
  bool moved_ = false;  // a thread ended or a barrier opened in this round
  ucontext_t back_{};
};

/// Shared memory as a block finds it: NaN as floats and halves. The first thread runs first.
inline void spoil(void* memory, size_t bytes) {
  const dim3 thread = Block::current()->thread_index();
  if (thread.x + thread.y + thread.z == 0) {
    std::memset(memory, 0xFF, bytes);
  }
}

inline dim3& grid_size() {
  static dim3 size;
  return size;
}

template <typename Kernel, typename... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, Args... args) {
  grid_size() = grid;
  const std::function<void()> body = [&] { kernel(args...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        Block(block, dim3(x, y, z), body).run();
      }
    }
  }
}

}  // namespace rabit::emulator

#define threadIdx (rabit::emulator::Block::current()->thread_index())
#define blockIdx (rabit::emulator::Block::current()->block_index)
#define blockDim (rabit::emulator::Block::current()->size)
#define gridDim (rabit::emulator::grid_size())

inline void __syncwarp() { rabit::emulator::Block::current()->wait_warp(); }
inline void __syncthreads() { rabit::emulator::Block::current()->wait_block(); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto& block = *rabit::emulator::Block::current();
  return block.exchange(value, block.lane() ^ static_cast<unsigned>(mask));
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return rabit::emulator::Block::current()->exchange(value, static_cast<unsigned>(source));
}
inline long long clock64() { return 0; }
inline unsigned atomicMax(unsigned* at, unsigned value) {
  return std::exchange(*at, std::max(*at, value));
}
inline int atomicAdd(int* at, int value) { return std::exchange(*at, *at + value); }
inline float atomicAdd(float* at, float value) { return std::exchange(*at, *at + value); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return std::exchange(*at, *at + value); }
inline void __threadfence() {}
inline unsigned __ballot_sync(unsigned mask, bool set) {
  const unsigned lane = rabit::emulator::Block::current()->lane();
  unsigned bits = set ? 1U << lane : 0U;
  for (int step = 1; step < 32; step *= 2) {
    bits |= __shfl_xor_sync(mask, bits, step);
  }
  return bits;
}
inline int __all_sync(unsigned mask, bool set) { return __ballot_sync(mask, !set) == 0 ? 1 : 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
inline float __fmul_rn(float a, float b) {
  volatile float out = a * b;
  return out;
}
inline float __fadd_rn(float a, float b) {
  volatile float out = a + b;
  return out;
}
inline float __fsub_rn(float a, float b) {
  volatile float out = a - b;
  return out;
}
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0F / std::sqrt(x); }

#define RABIT_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), rabit::emulator::launch(kernel, grid, block, __VA_ARGS__))
#define RABIT_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), rabit::emulator::launch(kernel, grid, block, __VA_ARGS__))
