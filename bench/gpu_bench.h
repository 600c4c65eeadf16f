// What the benchmarks on a GPU share: random weights, times, the speed of a copy.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "base/half.h"
#include "kernels/api/gpu_weights.h"

namespace rabit {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
  }
}

/// Device memory full of random bits.
class Memory {
 public:
  Memory() : random_(kBytes / 4) {
    std::mt19937 random(1);
    for (uint32_t& word : random_) {
      word = random();
    }
  }
  void* bits(int64_t bytes) {
    auto* const at = static_cast<char*>(room(bytes));
    for (int64_t done = 0; done < bytes; done += kBytes) {
      check(cudaMemcpy(at + done, random_.data(), std::min(kBytes, bytes - done),
                       cudaMemcpyHostToDevice),
            "copy");
    }
    return at;
  }
  /// F16 of magnitude about `value`, positive.
  uint16_t* halves(int64_t count, float value) {
    std::vector<uint16_t> some(static_cast<size_t>(std::min(count, kBytes / 2)));
    for (size_t i = 0; i < some.size(); ++i) {
      some[i] = float_to_half(
          value * (0.75F + static_cast<float>(random_[i % random_.size()] >> 8) * 0x1p-25F));
    }
    auto* const at = static_cast<uint16_t*>(room(2 * count));
    for (int64_t done = 0; done < count; done += kBytes / 2) {
      check(cudaMemcpy(at + done, some.data(),
                       static_cast<size_t>(2 * std::min(kBytes / 2, count - done)),
                       cudaMemcpyHostToDevice),
            "copy");
    }
    return at;
  }
  template <typename T>
  T* put(const std::vector<T>& host) {
    auto* const at = static_cast<T*>(room(static_cast<int64_t>(host.size() * sizeof(T))));
    check(cudaMemcpy(at, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
    return at;
  }
  void* room(int64_t bytes) {
    void* at = nullptr;
    check(cudaMalloc(&at, static_cast<size_t>(std::max<int64_t>(bytes, 16))), "memory");
    all_.push_back(at);
    return at;
  }
  void give_back() {
    for (void* at : all_) {
      cudaFree(at);
    }
    all_.clear();
  }

 private:
  static constexpr int64_t kBytes = 64 << 20;
  std::vector<uint32_t> random_;
  std::vector<void*> all_;
};

inline gpu::Linear packed(Memory& memory, int64_t out, int64_t in, int64_t paths) {
  gpu::Linear linear;
  linear.format = gpu::Format::kResidualBinary;
  linear.d_out = static_cast<int32_t>(out), linear.d_in = static_cast<int32_t>(in);
  linear.paths = static_cast<int32_t>(paths);
  linear.weights = memory.bits((out + 15) / 16 * ((in + 255) / 256) * paths * 512);
  linear.row_scale = memory.halves(out * paths, 0.1F);
  linear.col_scale = memory.halves(in * paths, 10.0F / static_cast<float>(in));
  return linear;
}

inline gpu::Linear dense(Memory& memory, int64_t out, int64_t in) {
  gpu::Linear linear;
  linear.d_out = static_cast<int32_t>(out), linear.d_in = static_cast<int32_t>(in);
  linear.weights = memory.halves(out * in, 0.01F);
  return linear;
}

inline gpu::Linear bytes(Memory& memory, int64_t out, int64_t in) {
  gpu::Linear linear;
  linear.format = gpu::Format::kQ8_0;
  linear.d_out = static_cast<int32_t>(out), linear.d_in = static_cast<int32_t>(in);
  linear.weights = memory.bits(out * in);
  linear.row_scale = memory.halves(out * in / 32, 0.0001F);
  return linear;
}

inline double median(std::vector<float> times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

template <typename Work>
std::vector<float> time_each(int repetitions, const Work& work, cudaStream_t stream = nullptr) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = -3; i < repetitions; ++i) {
    cudaEventRecord(begin, stream);
    work();
    cudaEventRecord(end, stream);
    check(cudaEventSynchronize(end), "run");
    float time = 0;
    cudaEventElapsedTime(&time, begin, end);
    if (i >= 0) {
      times.push_back(time);
    }
  }
  return times;
}

inline double copy_bandwidth() {
  constexpr size_t kBytes = size_t{2} << 30;
  void *from = nullptr, *to = nullptr;
  check(cudaMalloc(&from, kBytes), "memory"), check(cudaMalloc(&to, kBytes), "memory");
  const double time =
      median(time_each(9, [&] { cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice); }));
  cudaFree(from), cudaFree(to);
  return 2.0 * kBytes / time * 1e3;
}

}  // namespace rabit
