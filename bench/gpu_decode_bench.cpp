// Times the kernel for whole tokens at the shape of a known model, random weights, beside a copy
// within the device's memory.
//
//   gpu_decode_bench --shape llama2-7b --context 512 --tokens 1,2,4,8
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>

#include "gpu_bench.h"
#include "kernels/api/gpu_decode.h"
#include "model/random_model.h"

using namespace rabit;  // NOLINT: a program of one file

int main(int argc, char** argv) {
  CLI::App app{"Times the kernel for whole tokens"};
  std::string shape = "llama2-7b";
  int64_t layers = 0, paths = 2;
  int context = 512, repetitions = 50;
  std::vector<int> tokens = {1};
  std::vector<int> splits(gpu::kProducts);
  bool dense_weights = false, byte_head = false, byte_cache = false, parts = false;
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
  app.add_flag("--head-q8", byte_head, "The head in Q8_0 instead of F16");
  app.add_flag("--cache-q8", byte_cache, "Keys and values in Q8_0 instead of F16");
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
  const gpu::Linear head = byte_head ? bytes(memory, config.vocab_size, config.d_model)
                                     : dense(memory, config.vocab_size, config.d_model);

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
    const int64_t elements = args.sequence_stride * count;
    for (gpu::CacheRows* cache : {&args.keys, &args.values}) {
      cache->rows = byte_cache ? memory.room(elements) : memory.halves(elements, 0.1F);
      cache->scales = byte_cache ? memory.halves(elements / 32, 0.01F) : nullptr;
    }
    args.tokens = memory.put(std::vector<int32_t>(static_cast<size_t>(count), 1));
    args.positions = memory.put(std::vector<int32_t>(static_cast<size_t>(count), context));
    args.logits = static_cast<float*>(memory.room(config.vocab_size * count * 4));
    const int32_t phases = gpu::decode_phases(sizes);
    args.clocks = parts ? static_cast<int64_t*>(memory.room((phases + 1) * 8)) : nullptr;
    const auto times = time_each(repetitions, [&] {
      check(static_cast<cudaError_t>(gpu::launch_decode(args, plan, nullptr)), "launch");
      ++args.pass;
    });
    double bytes =
        static_cast<double>(config.vocab_size * config.d_model) * (byte_head ? 1.0625 : 2);
    for (const gpu::Block& block : blocks) {
      for (const gpu::Linear* w :
           {&block.q, &block.k, &block.v, &block.output, &block.gate, &block.up, &block.down}) {
        bytes += static_cast<double>(w->d_out) * w->d_in *
                 (dense_weights ? 2.0 : static_cast<double>(paths) / 8);
      }
    }
    const double cache = (byte_cache ? 2.125 : 4.0) * static_cast<double>(elements);
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
