// Time of every CPU kernel table's products, by shape, format and number of tokens, and of
// attention, by shape, format of the cache, positions and tokens, with weights and caches that come
// from memory: each iteration takes the next of several copies.
//   kernels_bench --benchmark_filter='avx512.*/4096x4096/.*tokens:1$'
//   kernels_bench --benchmark_filter='avx512-vbmi/attention.*positions:4096/tokens:1$'
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/half.h"
#include "kernels/api/kernels.h"

namespace {

using rabit::AttentionInput;
using rabit::CacheFormat;
using rabit::KernelTable;
using rabit::LinearWeights;
using rabit::WeightFormat;
using rabit::WeightOrder;

constexpr int64_t kBytes = int64_t{192} << 20;  // of all copies, at least: more than caches hold
constexpr int64_t kHugePage = int64_t{2} << 20;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<std::byte, Free>;

Memory allocate(int64_t bytes) {
  const int64_t rounded = (bytes + kHugePage) / kHugePage * kHugePage;
  auto* memory =
      static_cast<std::byte*>(std::aligned_alloc(kHugePage, static_cast<size_t>(rounded)));
  if (memory == nullptr) {
    std::abort();
  }
  std::memset(memory, 0, static_cast<size_t>(rounded));
  return Memory(memory);
}

struct Case {
  WeightFormat format;
  int64_t d_out, d_in, paths, tokens;
};

// Weights of one case in a table's order, some copies of them, and their bytes.
struct Weights {
  LinearWeights w;
  std::vector<uint16_t> row_scale, col_scale;
  std::vector<Memory> copies;
  int64_t bytes = 0;

  Weights(const KernelTable& table, const Case& c) {
    std::mt19937_64 random(1);
    w = {.format = c.format, .d_out = c.d_out, .d_in = c.d_in, .paths = c.paths};
    const int64_t words = (c.d_in + 31) / 32;
    const int64_t tiles = rabit::sign_tiles(c.d_out);
    const bool binary = c.format == WeightFormat::kResidualBinary;
    const int64_t plain = binary                            ? c.paths * c.d_out * words * 4
                          : c.format == WeightFormat::kQ8_0 ? c.d_out * c.d_in / 32 * 34
                          : c.format == WeightFormat::kQ4_0 ? c.d_out * c.d_in / 32 * 18
                                                            : c.d_out * c.d_in * 2;
    const Memory rows = allocate(plain);
    for (int64_t i = 0; i + 8 <= plain; i += 8) {
      // Halves between 2^-7 and 2^-6 of both signs: fit for every format.
      const uint64_t value =
          binary ? random() : (random() & 0x83FF83FF83FF83FFU) | 0x2000200020002000U;
      std::memcpy(rows.get() + i, &value, sizeof value);
    }
    row_scale.assign(static_cast<size_t>(c.paths * c.d_out), rabit::float_to_half(0.01F));
    col_scale.assign(static_cast<size_t>(c.paths * c.d_in), rabit::float_to_half(1.0F));
    w.row_scale = row_scale.data();
    w.col_scale = col_scale.data();
    w.signs = reinterpret_cast<const uint32_t*>(rows.get());
    w.dense = rows.get();
    const WeightOrder order = binary                            ? table.sign_order
                              : c.format == WeightFormat::kQ8_0 ? table.block_order
                                                                : WeightOrder::kRows;
    const int64_t size = order == WeightOrder::kRows ? plain
                         : binary ? tiles * rabit::kTileRows * c.paths * words * 4
                                  : tiles * c.d_in / 32 * rabit::kBlockTileBytes;
    for (int64_t held = 0; held < kBytes; held += size) {
      copies.push_back(allocate(size));
      std::byte* to = copies.back().get();
      if (copies.size() > 1) {
        std::memcpy(to, copies.front().get(), static_cast<size_t>(size));
      } else if (order == WeightOrder::kRows) {
        std::memcpy(to, rows.get(), static_cast<size_t>(size));
      } else if (binary) {
        tile_signs(w, order, 0, tiles, reinterpret_cast<uint32_t*>(to));
      } else {
        tile_blocks(w, 0, tiles, reinterpret_cast<uint8_t*>(to));
      }
    }
    w.order = order;
    bytes = size;
  }

  LinearWeights copy(size_t i) const {
    LinearWeights taken = w;
    taken.dense = copies[i % copies.size()].get();
    taken.signs = static_cast<const uint32_t*>(taken.dense);
    return taken;
  }
};

void fill_with_normals(const Memory& memory, int64_t floats) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < floats; ++i) {
    reinterpret_cast<float*>(memory.get())[i] = normal(random);
  }
}

/// Rates of all iterations so far, each of so many bytes and tokens.
void tell(benchmark::State& state, int64_t bytes, int64_t tokens) {
  const auto iterations = static_cast<int64_t>(state.iterations());
  state.SetBytesProcessed(iterations * bytes);
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(iterations * tokens), benchmark::Counter::kIsRate);
}

void product(benchmark::State& state, const KernelTable& table, const Case& c) {
  const Weights weights(table, c);
  const int64_t group =
      table.input_bytes(weights.w, 1) > 0 ? std::min(c.tokens, table.group_tokens) : c.tokens;
  const Memory x = allocate(c.tokens * c.d_in * 4), y = allocate(c.tokens * c.d_out * 4);
  const Memory input = allocate(table.input_bytes(weights.w, group));
  const Memory scratch = allocate(table.matmul_scratch(c.d_in, group, c.paths) * 4);
  fill_with_normals(x, c.tokens * c.d_in);
  size_t turn = 0;
  for (auto _ : state) {
    const LinearWeights w = weights.copy(turn++);
    for (int64_t t = 0; t < c.tokens; t += group) {
      const int64_t tokens = std::min(group, c.tokens - t);
      const float* from = reinterpret_cast<const float*>(x.get()) + t * c.d_in;
      const bool prepared = table.input_bytes(w, 1) > 0;
      if (prepared) {
        table.prepare(w, from, tokens, input.get(), 0, (c.d_in + 31) / 32);
      }
      table.matmul(w, from, prepared ? input.get() : nullptr, tokens,
                   reinterpret_cast<float*>(y.get()) + t * c.d_out, 0, c.d_out,
                   reinterpret_cast<float*>(scratch.get()));
    }
    benchmark::ClobberMemory();
  }
  tell(state, weights.bytes, c.tokens);
}

struct Heads {
  CacheFormat cache;
  int64_t heads, kv_heads, head_dim, positions, tokens;
};

/// One layer's attention as the engine asks for it: of few tokens in parts.
void attention(benchmark::State& state, const KernelTable& table, const Heads& c) {
  const int64_t outputs = c.tokens * c.heads * c.head_dim;
  const int64_t values = c.kv_heads * c.positions * c.head_dim;
  const int64_t bytes = rabit::cache_bytes(c.cache, values);
  const Memory q = allocate(outputs * 4), out = allocate(outputs * 4),
               source = allocate(values * 4);
  fill_with_normals(q, outputs);
  fill_with_normals(source, values);
  std::vector<Memory> copies;  // keys, values, keys, ...
  for (int64_t held = 0; held < kBytes || copies.size() % 2 != 0; held += bytes) {
    copies.push_back(allocate(bytes));
    table.to_cache(reinterpret_cast<const float*>(source.get()), values, c.cache,
                   copies.back().get());
  }
  AttentionInput in = {.q = reinterpret_cast<const float*>(q.get()),
                       .cache = c.cache,
                       .tokens = c.tokens,
                       .first_position = c.positions - c.tokens,
                       .heads = c.heads,
                       .kv_heads = c.kv_heads,
                       .head_dim = c.head_dim,
                       .capacity = c.positions};
  const int64_t parts = c.tokens <= table.attention_token_grain
                            ? (c.positions + rabit::kPartPositions - 1) / rabit::kPartPositions
                            : 1;
  const Memory outs = allocate(parts * outputs * 4);
  const Memory states = allocate(parts * c.tokens * c.heads * 2 * 4);
  const Memory scratch =
      allocate(4 * table.attention_scratch(c.tokens, c.positions, c.heads, c.kv_heads, c.head_dim));
  const auto floats = [](const Memory& memory) { return reinterpret_cast<float*>(memory.get()); };
  size_t turn = 0;
  for (auto _ : state) {
    in.k = copies[turn % copies.size()].get();
    in.v = copies[(turn + 1) % copies.size()].get();
    turn += 2;
    if (parts == 1) {
      table.attention(in, 0, c.heads, 0, c.tokens, floats(scratch), floats(out));
    } else {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * rabit::kPartPositions;
        table.attention_part(in, 0, c.heads, begin,
                             std::min(begin + rabit::kPartPositions, c.positions), floats(scratch),
                             floats(outs) + part * outputs,
                             floats(states) + part * c.tokens * c.heads * 2);
      }
      table.merge_parts(in, 0, c.heads, parts, floats(outs), floats(states), floats(out));
    }
    benchmark::ClobberMemory();
  }
  tell(state, 2 * bytes, c.tokens);
}

void add_attention(const KernelTable& table, const char* cache, const Heads& c) {
  const std::string name =
      std::string(table.name) + "/attention-" + cache + "/" + std::to_string(c.heads) + ":" +
      std::to_string(c.kv_heads) + "x" + std::to_string(c.head_dim) +
      "/positions:" + std::to_string(c.positions) + "/tokens:" + std::to_string(c.tokens);
  benchmark::RegisterBenchmark(name.c_str(), [&table, c](benchmark::State& state) {
    attention(state, table, c);
  })->Unit(benchmark::kMicrosecond);
}

void add(const KernelTable& table, const char* format, const Case& c) {
  const std::string name = std::string(table.name) + "/" + format + "/" + std::to_string(c.d_out) +
                           "x" + std::to_string(c.d_in) + "/tokens:" + std::to_string(c.tokens);
  benchmark::RegisterBenchmark(name.c_str(), [&table, c](benchmark::State& state) {
    product(state, table, c);
  })->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  constexpr std::pair<int64_t, int64_t> kShapes[] = {{576, 576},   {1536, 576},   {576, 1536},
                                                     {4096, 4096}, {11008, 4096}, {4096, 11008}};
  for (const KernelTable* table : rabit::cpu_kernels()) {
    for (const auto& [d_out, d_in] : kShapes) {
      for (const int64_t tokens : {1, 8, 32, 128, 512}) {
        for (const int64_t paths : {1, 2, 3, 4}) {
          const std::string format = std::to_string(paths) + "-path";
          add(*table, format.c_str(), {WeightFormat::kResidualBinary, d_out, d_in, paths, tokens});
        }
        add(*table, "Q8_0", {WeightFormat::kQ8_0, d_out, d_in, 0, tokens});
        add(*table, "Q4_0", {WeightFormat::kQ4_0, d_out, d_in, 0, tokens});
        add(*table, "F16", {WeightFormat::kF16, d_out, d_in, 0, tokens});
      }
    }
    for (const auto& [cache, format] : {std::pair{"F16", CacheFormat::kF16},
                                        {"F32", CacheFormat::kF32},
                                        {"Q8_0", CacheFormat::kQ8_0}}) {
      for (const auto& [heads, kv_heads, head_dim] :
           {std::tuple<int64_t, int64_t, int64_t>{9, 3, 64}, {32, 8, 128}, {32, 32, 128}}) {
        for (const int64_t positions : {512, 4096}) {
          for (const int64_t tokens : {1, 8, 32, 128, 512}) {
            add_attention(*table, cache, {format, heads, kv_heads, head_dim, positions, tokens});
          }
        }
      }
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 2;
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
