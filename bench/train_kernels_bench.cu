// How near the kernels of training come to the memory's speed: medians of device times beside a
// plain copy of as many bytes.
//   train_kernels_bench [REPEATS]
// Prints a markdown table. Bytes are what has to be moved once: inputs read, outputs written.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "train/cuda/block_ops.h"
#include "train/cuda/coupled.h"
#include "train/cuda/device.h"
#include "train/cuda/kl.h"

namespace {

using namespace rabit::cuda;

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    std::fprintf(stderr, "train_kernels_bench: %s\n", cudaGetErrorString(status));
    std::exit(1);
  }
}

// Device memory filled with small normal-looking values.
template <typename T>
T* device(int64_t count) {
  std::vector<T> host(static_cast<size_t>(std::min<int64_t>(count, 1 << 20)));
  uint32_t state = 12345;
  for (T& v : host) {
    state = state * 1664525U + 1013904223U;
    const float x = (static_cast<float>(state >> 8) / 8388608.0F - 1.0F) * 0.1F;
    if constexpr (sizeof(T) == 2) {
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      v.bits = static_cast<uint16_t>(bits >> 16);
    } else if constexpr (std::is_same_v<T, float>) {
      v = x;
    } else {
      v = static_cast<T>(state % 1000);
    }
  }
  T* out = nullptr;
  check(cudaMalloc(&out, static_cast<size_t>(count) * sizeof(T)));
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(host.size())) {
    const auto part = std::min<int64_t>(count - i, static_cast<int64_t>(host.size()));
    check(cudaMemcpy(out + i, host.data(), static_cast<size_t>(part) * sizeof(T),
                     cudaMemcpyHostToDevice));
  }
  return out;
}

struct Times {
  double median, low, high;  // microseconds
};

Times measure(int repeats, const std::function<bool()>& run) {
  for (int i = 0; i < 3; ++i) {
    if (!run()) {
      check(cudaGetLastError());
    }
  }
  std::vector<cudaEvent_t> events(static_cast<size_t>(repeats) + 1);
  for (auto& event : events) {
    check(cudaEventCreate(&event));
  }
  check(cudaEventRecord(events[0]));
  for (int i = 0; i < repeats; ++i) {
    run();
    check(cudaEventRecord(events[static_cast<size_t>(i) + 1]));
  }
  check(cudaDeviceSynchronize());
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    float ms = 0.0F;
    check(cudaEventElapsedTime(&ms, events[static_cast<size_t>(i)],
                               events[static_cast<size_t>(i) + 1]));
    times.push_back(1e3 * ms);
  }
  for (auto& event : events) {
    cudaEventDestroy(event);
  }
  std::sort(times.begin(), times.end());
  const size_t n = times.size();
  return {times[n / 2], times[n / 10], times[n - 1 - n / 10]};
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::max(10, std::atoi(argv[1])) : 100;
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, medians of %d, 10th to 90th percentile\n\n", properties.name, repeats);
  std::printf("| what | shape | us | spread | GB/s | of a copy |\n|---|---|---|---|---|---|\n");

  const auto copy_rate = [&](int64_t bytes) {
    static std::vector<std::pair<int64_t, double>> known;
    for (const auto& [size, rate] : known) {
      if (size == bytes) {
        return rate;
      }
    }
    char *from = nullptr, *to = nullptr;
    const auto half = static_cast<size_t>(bytes / 2);
    check(cudaMalloc(&from, half));
    check(cudaMalloc(&to, half));
    const Times t = measure(repeats, [&] {
      return cudaMemcpyAsync(to, from, half, cudaMemcpyDeviceToDevice) == cudaSuccess;
    });
    cudaFree(from);
    cudaFree(to);
    known.emplace_back(bytes, static_cast<double>(bytes) / t.median * 1e-3);
    return known.back().second;
  };
  const auto row = [&](const std::string& what, const std::string& shape, int64_t bytes,
                       const std::function<bool()>& run) {
    const Times t = measure(repeats, run);
    const double rate = static_cast<double>(bytes) / t.median * 1e-3;
    std::printf("| %s | %s | %.1f | %.1f to %.1f | %.0f | %.0f %% |\n", what.c_str(), shape.c_str(),
                t.median, t.low, t.high, rate, 100.0 * rate / copy_rate(bytes));
    std::fflush(stdout);
  };

  for (const auto& [d_out, d_in] : {std::pair<int64_t, int64_t>{576, 1536},
                                    {1536, 576},
                                    {4096, 4096},
                                    {4096, 11008},
                                    {11008, 4096}}) {
    const int64_t size = d_out * d_in;
    float *w = device<float>(size), *g = device<float>(4 * d_out), *h = device<float>(4 * d_in);
    Bf16 *out = device<Bf16>(size), *grad = device<Bf16>(size);
    float *dw = device<float>(size), *dg = device<float>(4 * d_out), *dh = device<float>(4 * d_in);
    const std::string name = std::to_string(d_out) + " x " + std::to_string(d_in);
    for (int paths = 1; paths <= 4; ++paths) {
      const CoupledShape shape{d_out, d_in, paths};
      float* scratch = device<float>(coupled_backward_scratch(shape));
      const std::string k = ", k = " + std::to_string(paths);
      row("coupled forward", name + k, size * 6,
          [&] { return coupled_forward(shape, w, g, h, out, nullptr); });
      row("coupled backward", name + k, size * 10,
          [&] { return coupled_backward(shape, w, g, h, grad, dw, dg, dh, scratch, nullptr); });
      cudaFree(scratch);
    }
    for (void* p : {static_cast<void*>(w), static_cast<void*>(g), static_cast<void*>(h),
                    static_cast<void*>(out), static_cast<void*>(grad), static_cast<void*>(dw),
                    static_cast<void*>(dg), static_cast<void*>(dh)}) {
      cudaFree(p);
    }
  }
  for (const auto& [rows, width, d_ff] :
       {std::tuple<int64_t, int64_t, int64_t>{16384, 576, 1536}, {4096, 4096, 11008}}) {
    const std::string name = std::to_string(rows) + " x " + std::to_string(width);
    const NormShape shape{rows, width, 1e-5F};
    const int64_t size = rows * width;
    float *x = device<float>(size), *sum = device<float>(size), *d = device<float>(size),
          *weight = device<float>(width), *inverse = device<float>(rows);
    Bf16 *delta = device<Bf16>(size), *y = device<Bf16>(size), *d_y = device<Bf16>(size),
         *d_delta = device<Bf16>(size);
    row("add and norm", name, size * 12,
        [&] { return add_norm(shape, x, delta, weight, sum, y, inverse, nullptr); });
    row("its gradient", name, size * 16, [&] {
      return add_norm_backward(shape, sum, inverse, weight, x, d_y, d, d_delta, nullptr);
    });
    Bf16 *both = device<Bf16>(rows * d_ff * 2), *hidden = device<Bf16>(rows * d_ff),
         *d_both = device<Bf16>(rows * d_ff * 2);
    const std::string ff = std::to_string(rows) + " x " + std::to_string(d_ff);
    row("SwiGLU", ff, rows * d_ff * 6,
        [&] { return swiglu(rows, d_ff, 2 * d_ff, both, both + d_ff, hidden, nullptr); });
    row("its gradient", ff, rows * d_ff * 10, [&] {
      return swiglu_backward(rows, d_ff, 2 * d_ff, both, both + d_ff, hidden, d_both, d_both + d_ff,
                             nullptr);
    });
    const int64_t heads = width / 64;
    float *cos = device<float>(1024 * 32), *sin = device<float>(1024 * 32);
    row("rotary", name, size * 4, [&] {
      return rotate({rows, 1024, heads, 64, width, width}, cos, sin, delta, y, false, nullptr);
    });
    for (void* p :
         {static_cast<void*>(x), static_cast<void*>(sum), static_cast<void*>(d),
          static_cast<void*>(weight), static_cast<void*>(inverse), static_cast<void*>(delta),
          static_cast<void*>(y), static_cast<void*>(d_y), static_cast<void*>(d_delta),
          static_cast<void*>(both), static_cast<void*>(hidden), static_cast<void*>(d_both),
          static_cast<void*>(cos), static_cast<void*>(sin)}) {
      cudaFree(p);
    }
  }
  for (const auto& [rows, vocab] : {std::pair<int64_t, int64_t>{2048, 49152}, {1024, 128256}}) {
    Bf16 *student = device<Bf16>(rows * vocab), *teacher = device<Bf16>(rows * vocab);
    int64_t* next = device<int64_t>(rows);
    float* sums = device<float>(rows * 3);
    row("divergence and gradient", std::to_string(rows) + " x " + std::to_string(vocab),
        rows * vocab * 6, [&] {
          return kl_backward(rows, vocab, {0.0F, 1.0F, 1e-4F, 0.0F}, student, teacher, next, sums,
                             nullptr);
        });
    cudaFree(student);
    cudaFree(teacher);
    cudaFree(next);
    cudaFree(sums);
  }
  return 0;
}
