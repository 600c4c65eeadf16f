// Times single products at the widths of known models, random weights, beside a copy within the
// device's memory: packed weights as they lie, by warps and by warpgroups, unpacked before cuBLAS,
// and F16 with cuBLAS.
//
//   gpu_products_bench --widths 4096x4096,28672x8192 --tokens 1,8,64,512
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>

#include "gpu_bench.h"
#include "kernels/api/gpu.h"

using namespace rabit;  // NOLINT: a program of one file

namespace {

void expect(const Status& status) {
  if (!status) {
    std::fprintf(stderr, "%s\n", status.error().message.c_str());
    std::exit(1);
  }
}

struct Times {
  double median_us, least_us, most_us;
};

/// A kernel for packed products, and its memory.
struct Way {
  gpu::DeviceInfo device;
  gpu::PackedWork work;
};

/// Of each of `copies` in turn, so that no weights are in the caches: recorded and timed as one.
template <typename Work>
Times time_of(const gpu::Queue& queue, int copies, int repetitions, const Work& work) {
  work(0);  // what is only done once
  const auto recording = queue.record([&]() -> Status {
    for (int i = 0; i < copies; ++i) {
      work(i);
    }
    return {};
  });
  expect(recording ? Status() : Status(recording.error()));
  std::vector<float> times = time_each(
      repetitions, [&] { expect(queue.replay(*recording)); }, queue.stream());
  for (float& time : times) {
    time *= 1e3F / static_cast<float>(copies);
  }
  return {median(times), *std::min_element(times.begin(), times.end()),
          *std::max_element(times.begin(), times.end())};
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Times single products"};
  std::vector<std::string> widths = {"4096x4096", "11008x4096", "4096x11008", "22016x4096",
                                     "8192x8192", "14336x8192", "28672x8192", "57344x8192"};
  std::vector<int64_t> tokens = {1, 2, 4, 8, 16, 32, 64};
  int64_t paths = 2;
  int repetitions = 20;
  app.add_option("--widths", widths, "Rows x columns")->delimiter(',');
  app.add_option("--tokens", tokens)->delimiter(',')->check(CLI::Range(1, 4096));
  app.add_option("--paths", paths)->check(CLI::Range(1, 4));
  app.add_option("--repetitions", repetitions);
  CLI11_PARSE(app, argc, argv);

  const auto used = gpu::use_device(0);
  expect(used ? Status() : Status(used.error()));
  const gpu::DeviceInfo& device = *used;
  const double bandwidth = copy_bandwidth();
  std::printf("%s, copy %.0f GB/s; %lld paths; medians of %d, least and most\n",
              device.name.c_str(), bandwidth / 1e9, static_cast<long long>(paths), repetitions);
  const auto made = gpu::Queue::make();
  if (!made) {
    std::fprintf(stderr, "%s\n", made.error().message.c_str());
    return 1;
  }
  const gpu::Queue& queue = *made;
  for (const std::string& width : widths) {
    const size_t x = width.find('x');
    const int64_t out = std::atoll(width.c_str());
    const int64_t in = x == std::string::npos ? 0 : std::atoll(width.c_str() + x + 1);
    if (out < 1 || in < 8 || in % 8 != 0) {
      std::fprintf(stderr, "'%s' is no width: rows x columns, columns a multiple of 8\n",
                   width.c_str());
      return 1;
    }
    Memory memory;
    const double bytes = static_cast<double>(out * in * paths) / 8;
    const int copies = static_cast<int>(std::clamp(4e8 / bytes, 2.0, 64.0));
    const int dense_copies = static_cast<int>(std::clamp(4e8 / (2.0 * out * in), 2.0, 16.0));
    std::vector<gpu::Linear> linears, matrices;
    for (int i = 0; i < copies; ++i) {
      linears.push_back(packed(memory, out, in, paths));
    }
    for (int i = 0; i < dense_copies; ++i) {
      matrices.push_back(dense(memory, out, in));
    }
    const int64_t most = *std::max_element(tokens.begin(), tokens.end());
    const uint16_t* const input = memory.halves(most * in, 1.0F);
    auto* const y = static_cast<float*>(memory.room(most * out * 4));
    auto* const unpacked = static_cast<uint16_t*>(memory.room(out * in * 2));
    std::vector<Way> ways;
    for (const bool warpgroups : {false, true}) {
      if (warpgroups && !device.warpgroups) {
        continue;
      }
      Way& way = ways.emplace_back(Way{device});
      way.device.warpgroups = warpgroups;
      const gpu::PackedNeeds needs = gpu::packed_needs({&linears[0]}, way.device);
      way.work = {static_cast<float*>(memory.room(needs.floats * 4)),
                  static_cast<uint32_t*>(memory.room(needs.counters * 4))};
      check(cudaMemset(way.work.counters, 0, static_cast<size_t>(needs.counters * 4)), "memory");
    }
    for (const int64_t count : tokens) {
      const auto multiply = [&](const void* w) {
        expect(queue.multiply({.w = static_cast<const uint16_t*>(w),
                               .d_out = out,
                               .d_in = in,
                               .w_stride = in,
                               .x = input,
                               .tokens = count,
                               .y = y,
                               .y_stride = out}));
      };
      std::printf("%s, %lld tokens:", width.c_str(), static_cast<long long>(count));
      for (const Way& way : ways) {
        if (!gpu::takes_packed({&linears[0]}, count, way.device)) {
          continue;
        }
        const Times t = time_of(queue, copies, repetitions, [&](int i) {
          expect(gpu::multiply_packed({&linears[i]}, input, count, y, false, way.work, way.device,
                                      queue.stream()));
        });
        std::printf(" %s %.1f us (%.1f to %.1f), %.0f GB/s, %.0f %% of the copy;",
                    way.device.warpgroups ? "warpgroups" : "warps", t.median_us, t.least_us,
                    t.most_us, bytes / t.median_us / 1e3, bytes / t.median_us * 1e8 / bandwidth);
      }
      const Times u = time_of(queue, copies, repetitions, [&](int i) {
        expect(gpu::unpack(linears[i], unpacked, in, queue.stream()));
        multiply(unpacked);
      });
      const Times d =
          time_of(queue, dense_copies, repetitions, [&](int i) { multiply(matrices[i].weights); });
      std::printf(" unpacked %.1f us (%.1f to %.1f); F16 %.1f us (%.1f to %.1f)\n", u.median_us,
                  u.least_us, u.most_us, d.median_us, d.least_us, d.most_us);
    }
    memory.give_back();
  }
  return 0;
}
