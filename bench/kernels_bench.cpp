// Time of every CPU kernel table's products, by shape, format and number of tokens; of making their
// input ready alone; and of attention, by shape, format of the cache, positions and tokens, with
// weights and caches that come from memory: each iteration takes the next of several copies. Norm,
// rotary positions and SwiGLU work on what is in the cache.
//   kernels_bench --benchmark_filter='avx512.*/4096x4096/.*tokens:1$'
//   kernels_bench --benchmark_filter='avx512-vbmi/attention.*positions:4096/tokens:1$'
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/half.h"
#include "base/threads.h"
#include "kernels/api/kernels.h"

namespace {

using rabit::AttentionInput;
using rabit::CacheFormat;
using rabit::KernelTable;
using rabit::LinearWeights;
using rabit::WeightFormat;
using rabit::WeightOrder;

// Of all copies, at least: more than caches hold.
int64_t bytes_of_copies() {
  static const int64_t bytes = std::max(int64_t{192} << 20, 4 * rabit::last_level_caches());
  return bytes;
}
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

/// Copies of so many bytes, side by side, each at a multiple of a cache line.
class Copies {
 public:
  explicit Copies(int64_t bytes)
      : stride_((bytes + 63) / 64 * 64),
        count_((bytes_of_copies() + stride_ - 1) / stride_),
        memory_(allocate(count_ * stride_)) {}
  std::byte* operator[](int64_t i) const { return memory_.get() + i % count_ * stride_; }
  /// All as the first.
  void fill() {
    for (int64_t i = 1; i < count_; ++i) {
      std::memcpy((*this)[i], memory_.get(), static_cast<size_t>(stride_));
    }
  }

 private:
  int64_t stride_, count_;
  Memory memory_;
};

struct Case {
  WeightFormat format;
  int64_t d_out, d_in, paths, tokens;
};

// Weights of one case in a table's order, some copies of them, and their bytes.
struct Weights {
  LinearWeights w;
  std::vector<uint16_t> row_scale, col_scale;
  std::optional<Copies> copies;
  int64_t bytes = 0;

  Weights(const KernelTable& table, const Case& c) {
    std::mt19937_64 random(1);
    w = {.format = c.format, .d_out = c.d_out, .d_in = c.d_in, .paths = c.paths};
    const int64_t words = (c.d_in + 31) / 32;
    const int64_t tiles = rabit::sign_tiles(c.d_out);
    const bool binary = c.format == WeightFormat::kResidualBinary;
    const int64_t plain =
        binary                            ? c.paths * c.d_out * words * 4
        : c.format == WeightFormat::kQ8_0 ? c.d_out * c.d_in / 32 * rabit::kQ8BlockBytes
        : c.format == WeightFormat::kQ4_0 ? c.d_out * c.d_in / 32 * rabit::kQ4BlockBytes
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
    copies.emplace(size);
    std::byte* to = (*copies)[0];
    if (order == WeightOrder::kRows) {
      std::memcpy(to, rows.get(), static_cast<size_t>(size));
    } else if (binary) {
      tile_signs(w, order, 0, tiles, reinterpret_cast<uint32_t*>(to));
    } else {
      tile_blocks(w, 0, tiles, reinterpret_cast<uint8_t*>(to));
    }
    copies->fill();
    w.order = order;
    bytes = size;
  }

  LinearWeights copy(int64_t i) const {
    LinearWeights taken = w;
    taken.dense = (*copies)[i];
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
  int64_t turn = 0;
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

/// Of all tokens at once, at most as many as go together. Weights are not read.
void prepare(benchmark::State& state, const KernelTable& table, const Case& c) {
  const std::vector<uint16_t> h(static_cast<size_t>(c.paths * c.d_in), rabit::float_to_half(1.0F));
  const LinearWeights w = {.format = c.format,
                           .d_out = c.d_out,
                           .d_in = c.d_in,
                           .paths = c.paths,
                           .col_scale = h.data()};
  const int64_t group = std::min(c.tokens, table.group_tokens);
  const int64_t bytes = table.input_bytes(w, group);
  const Memory x = allocate(group * c.d_in * 4), input = allocate(bytes);
  fill_with_normals(x, group * c.d_in);
  for (auto _ : state) {
    for (int64_t t = 0; t < c.tokens; t += group) {
      table.prepare(w, reinterpret_cast<const float*>(x.get()), std::min(group, c.tokens - t),
                    input.get(), 0, (c.d_in + 31) / 32);
    }
    benchmark::ClobberMemory();
  }
  tell(state, bytes * c.tokens / group, c.tokens);
}

/// An operation on `floats` floats a token, (x, y) with as many normal numbers each.
template <typename Operation>
void add_pointwise(const KernelTable& table, const char* operation, int64_t floats, int64_t tokens,
                   const Operation& call) {
  const std::string name = std::string(table.name) + "/" + operation + "/" +
                           std::to_string(floats) + "/tokens:" + std::to_string(tokens);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const Memory x = allocate(tokens * floats * 4), y = allocate(tokens * floats * 4);
    fill_with_normals(x, tokens * floats);
    fill_with_normals(y, tokens * floats);
    for (auto _ : state) {
      call(reinterpret_cast<float*>(x.get()), reinterpret_cast<float*>(y.get()));
      benchmark::ClobberMemory();
    }
    tell(state, tokens * floats * 8, tokens);
  })->Unit(benchmark::kMicrosecond);
}

void add_all_pointwise(const KernelTable& table, int64_t d, int64_t head_dim, int64_t d_ff,
                       int64_t tokens) {
  add_pointwise(table, "rms-norm", d, tokens, [&table, d, tokens](float* x, float* y) {
    table.rms_norm(x, x, tokens, d, 1e-5F, y);  // any weights
  });
  add_pointwise(table, "rope", d, tokens, [&table, d, head_dim, tokens](float* x, float* y) {
    table.rope(x, y, tokens, d / head_dim, head_dim);  // any turns
    std::memcpy(x, y, static_cast<size_t>(tokens * d) * 4);
  });
  add_pointwise(table, "swiglu", d_ff, tokens, [&table, d_ff, tokens](float* x, float* y) {
    table.swiglu(x, y, tokens * d_ff);
    std::memcpy(x, y, static_cast<size_t>(tokens * d_ff) * 4);
  });
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
  Copies copies(2 * bytes);  // keys and values
  for (int64_t part = 0; part < 2; ++part) {
    table.to_cache(reinterpret_cast<const float*>(source.get()), values, c.cache,
                   copies[0] + part * bytes);
  }
  copies.fill();
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
  int64_t turn = 0;
  for (auto _ : state) {
    in.k = copies[turn];
    in.v = copies[turn++] + bytes;
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

void add(const KernelTable& table, const std::string& format, const Case& c) {
  const std::string tokens = "/tokens:" + std::to_string(c.tokens), d_in = std::to_string(c.d_in);
  const std::string start = std::string(table.name) + "/";
  benchmark::RegisterBenchmark(
      (start + format + "/" + std::to_string(c.d_out) + "x" + d_in + tokens).c_str(),
      [&table, c](benchmark::State& state) { product(state, table, c); })
      ->Unit(benchmark::kMicrosecond);
  const LinearWeights w = {.format = c.format, .d_out = 1, .d_in = c.d_in, .paths = c.paths};
  if (table.input_bytes(w, 1) > 0 && c.d_out == c.d_in) {
    benchmark::RegisterBenchmark((start + "prepare-" + format + "/" + d_in + tokens).c_str(),
                                 [&table, c](benchmark::State& state) { prepare(state, table, c); })
        ->Unit(benchmark::kMicrosecond);
  }
}

}  // namespace

int main(int argc, char** argv) {
  constexpr std::pair<int64_t, int64_t> kShapes[] = {{576, 576},   {1536, 576},   {576, 1536},
                                                     {4096, 4096}, {11008, 4096}, {4096, 11008},
                                                     {8192, 28672}};
  for (const KernelTable* table : rabit::cpu_kernels()) {
    for (const auto& [d_out, d_in] : kShapes) {
      for (const int64_t tokens : {1, 8, 32, 128, 512}) {
        for (const int64_t paths : {1, 2, 3, 4}) {
          add(*table, std::to_string(paths) + "-path",
              {WeightFormat::kResidualBinary, d_out, d_in, paths, tokens});
        }
        add(*table, "Q8_0", {WeightFormat::kQ8_0, d_out, d_in, 0, tokens});
        add(*table, "Q4_0", {WeightFormat::kQ4_0, d_out, d_in, 0, tokens});
        add(*table, "F16", {WeightFormat::kF16, d_out, d_in, 0, tokens});
      }
    }
    for (const int64_t tokens : {1, 512}) {
      add_all_pointwise(*table, 576, 64, 1536, tokens);
      add_all_pointwise(*table, 4096, 128, 11008, tokens);
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
