// Times the kernel for whole tokens at the shape of a known model, random weights, beside a copy
// within the device's memory.
//
//   gpu_decode_bench --shape llama2-7b --context 512 --tokens 1,2,4,8
#include <cuda_runtime.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "base/half.h"
#include "kernels/api/gpu_decode.h"
#include "model/random_model.h"

namespace {

using namespace rabit;  // NOLINT: a program of one file

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
  }
}

/// Device memory full of random bits, never given back: the program ends soon.
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
    std::vector<uint16_t> host(static_cast<size_t>(count));
    for (size_t i = 0; i < host.size(); ++i) {
      host[i] = float_to_half(
          value * (0.75F + static_cast<float>(random_[i % random_.size()] >> 8) * 0x1p-25F));
    }
    return put(host);
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
    return at;
  }

 private:
  static constexpr int64_t kBytes = 64 << 20;
  std::vector<uint32_t> random_;
};

gpu::Linear packed(Memory& memory, int64_t out, int64_t in, int64_t paths) {
  gpu::Linear linear;
  linear.format = gpu::Format::kResidualBinary;
  linear.d_out = static_cast<int32_t>(out), linear.d_in = static_cast<int32_t>(in);
  linear.paths = static_cast<int32_t>(paths);
  linear.weights = memory.bits((out + 15) / 16 * ((in + 255) / 256) * paths * 512);
  linear.row_scale = memory.halves(out * paths, 0.1F);
  linear.col_scale = memory.halves(in * paths, 10.0F / static_cast<float>(in));
  return linear;
}

gpu::Linear dense(Memory& memory, int64_t out, int64_t in) {
  gpu::Linear linear;
  linear.d_out = static_cast<int32_t>(out), linear.d_in = static_cast<int32_t>(in);
  linear.weights = memory.halves(out * in, 0.01F);
  return linear;
}

double median(std::vector<float> times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

template <typename Work>
std::vector<float> time_each(int repetitions, const Work& work) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = -3; i < repetitions; ++i) {
    cudaEventRecord(begin);
    work();
    cudaEventRecord(end);
    check(cudaEventSynchronize(end), "run");
    float time = 0;
    cudaEventElapsedTime(&time, begin, end);
    if (i >= 0) {
      times.push_back(time);
    }
  }
  return times;
}

double copy_bandwidth() {
  constexpr size_t kBytes = size_t{2} << 30;
  void *from = nullptr, *to = nullptr;
  check(cudaMalloc(&from, kBytes), "memory"), check(cudaMalloc(&to, kBytes), "memory");
  const double time =
      median(time_each(9, [&] { cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice); }));
  cudaFree(from), cudaFree(to);
  return 2.0 * kBytes / time * 1e3;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Times the kernel for whole tokens"};
  std::string shape = "llama2-7b";
  int64_t layers = 0, paths = 2;
  int context = 512, repetitions = 50;
  std::vector<int> tokens = {1};
  std::vector<int> splits(gpu::kProducts);
  bool dense_weights = false, parts = false;
  app.add_option("--shape", shape)
      ->check(CLI::IsMember(
          {"smollm2-135m", "llama2-7b", "llama2-13b", "llama2-70b", "llama3-8b", "llama3-70b"}));
  app.add_option("--layers", layers, "0: all");
  app.add_option("--paths", paths)->check(CLI::Range(1, 4));
  app.add_option("--context", context, "Position of the token")->check(CLI::Range(1, 131072));
  app.add_option("--tokens", tokens, "Sequences at once")
      ->delimiter(',')
      ->check(CLI::IsMember({1, 2, 4}));
  app.add_option("--splits", splits, "Of the columns of qkv, output, gate and up, down")
      ->delimiter(',');
  app.add_option("--repetitions", repetitions);
  app.add_flag("--dense", dense_weights, "F16 instead of packed weights");
  app.add_flag("--parts", parts, "Where the time goes");
  CLI11_PARSE(app, argc, argv);

  auto config = *named_shape(shape);
  config.layers = layers > 0 ? layers : config.layers;
  Memory memory;
  gpu::Sizes sizes;
  sizes.layers = static_cast<int32_t>(config.layers);
  sizes.d_model = static_cast<int32_t>(config.d_model),
  sizes.d_ff = static_cast<int32_t>(config.d_ff);
  sizes.heads = static_cast<int32_t>(config.heads),
  sizes.kv_heads = static_cast<int32_t>(config.kv_heads);
  sizes.head_dim = static_cast<int32_t>(config.head_dim);
  sizes.vocab = static_cast<int32_t>(config.vocab_size), sizes.norm_epsilon = 1e-5F;
  const auto make = [&](int64_t out, int64_t in) {
    return dense_weights ? dense(memory, out, in) : packed(memory, out, in, paths);
  };
  const auto ones = [&] {
    return memory.put(std::vector<float>(static_cast<size_t>(config.d_model), 1));
  };
  std::vector<gpu::Block> blocks;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    blocks.push_back({ones(), ones(), make(config.d_q(), config.d_model),
                      make(config.d_kv(), config.d_model), make(config.d_kv(), config.d_model),
                      make(config.d_model, config.d_q()), make(config.d_ff, config.d_model),
                      make(config.d_ff, config.d_model), make(config.d_model, config.d_ff)});
  }
  const float* const output_norm = ones();
  const gpu::Linear head = dense(memory, config.vocab_size, config.d_model);

  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  const double bandwidth = copy_bandwidth();
  std::printf("%s, %d multiprocessors, copy %.0f GB/s; %s, %lld layers\n", device.name,
              device.multiProcessorCount, bandwidth / 1e9, shape.c_str(),
              static_cast<long long>(config.layers));
  for (const int count : tokens) {
    int32_t wanted[gpu::kProducts] = {};
    std::copy_n(splits.begin(), std::min<size_t>(splits.size(), gpu::kProducts), wanted);
    const auto planned =
        gpu::plan_decode(sizes, blocks, head, output_norm, device.multiProcessorCount, count,
                         static_cast<int64_t>(device.sharedMemPerBlockOptin), wanted);
    if (!planned) {
      std::fprintf(stderr, "%s\n", planned.error().message.c_str());
      return 1;
    }
    const gpu::DecodePlan& plan = *planned;
    gpu::DecodeArgs args;
    const int64_t work = gpu::bind_decode(sizes, plan, nullptr, args);
    auto* const room = static_cast<float*>(memory.room(work * 4));
    check(cudaMemset(room, 0, static_cast<size_t>(work) * 4), "memory");
    gpu::bind_decode(sizes, plan, room, args);
    args.jobs = memory.put(plan.jobs), args.first = memory.put(plan.first);
    args.embedding = memory.halves(config.vocab_size * config.d_model, 1.0F);
    args.cos_sin =
        memory.put(std::vector<float>(static_cast<size_t>((context + 1) * config.head_dim), 0.7F));
    args.capacity = context + 1;
    args.sequence_stride = config.layers * config.d_kv() * args.capacity;
    args.keys = memory.halves(args.sequence_stride * count, 0.1F);
    args.values = memory.halves(args.sequence_stride * count, 0.1F);
    args.tokens = memory.put(std::vector<int32_t>(static_cast<size_t>(count), 1));
    args.positions = memory.put(std::vector<int32_t>(static_cast<size_t>(count), context));
    args.logits = static_cast<float*>(memory.room(config.vocab_size * count * 4));
    const int32_t phases = gpu::decode_phases(sizes);
    args.clocks = parts ? static_cast<int64_t*>(memory.room((phases + 1) * 8)) : nullptr;
    const auto times = time_each(repetitions, [&] {
      check(static_cast<cudaError_t>(gpu::launch_decode(args, plan, nullptr)), "launch");
      ++args.pass;
    });
    double bytes = static_cast<double>(config.vocab_size * config.d_model * 2);
    for (const gpu::Block& block : blocks) {
      for (const gpu::Linear* w :
           {&block.q, &block.k, &block.v, &block.output, &block.gate, &block.up, &block.down}) {
        bytes += static_cast<double>(w->d_out) * w->d_in *
                 (dense_weights ? 2.0 : static_cast<double>(paths) / 8);
      }
    }
    const double cache = 4.0 * static_cast<double>(args.sequence_stride * count);
    const double time = median(times);
    std::printf(
        "tokens %d: %.4f ms (%.4f to %.4f), %.0f tokens/s; weights %.3f GB, cache %.3f GB: "
        "%.0f GB/s, %.0f %% of the copy; splits %d %d %d %d, stages %d, shared %lld KB\n",
        count, time, *std::min_element(times.begin(), times.end()),
        *std::max_element(times.begin(), times.end()), count * 1e3 / time, bytes / 1e9, cache / 1e9,
        (bytes + cache) / time / 1e6, 100 * (bytes + cache) / time * 1e3 / bandwidth,
        plan.splits[0], plan.splits[1], plan.splits[2], plan.splits[3], plan.stages,
        static_cast<long long>(plan.shared_bytes >> 10));
    if (parts) {
      std::vector<int64_t> clocks(static_cast<size_t>(phases) + 1);
      check(cudaMemcpy(clocks.data(), args.clocks, clocks.size() * 8, cudaMemcpyDeviceToHost),
            "copy");
      const double all = static_cast<double>(clocks.back() - clocks.front());
      const char* const names[] = {"qkv", "attention", "output", "gate and up", "down"};
      for (int part = 0; part < 5; ++part) {
        std::vector<float> each;
        for (int32_t phase = part; phase < phases - 1; phase += 5) {
          each.push_back(static_cast<float>(clocks[static_cast<size_t>(phase) + 1] -
                                            clocks[static_cast<size_t>(phase)]));
        }
        std::printf("  %-12s %.2f us\n", names[part], median(each) / all * time * 1e3);
      }
      std::printf(
          "  %-12s %.2f us\n", "head",
          static_cast<double>(clocks.back() - clocks[clocks.size() - 2]) / all * time * 1e3);
    }
  }
  return 0;
}
