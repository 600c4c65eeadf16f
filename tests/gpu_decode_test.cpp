// The kernel for whole tokens against a forward pass of the scalar reference: on a GPU, or over the
// emulator, where it runs phase by phase, each block after the other.
#ifndef RABIT_CUDA_EMULATOR
#include <cuda_runtime.h>
#endif
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>

#include "base/half.h"
#include "kernels/api/gpu_decode.h"
#include "kernels/api/kernels.h"

namespace rabit {
namespace {

using gpu::DecodeArgs;
using gpu::DecodePlan;
using gpu::Product;

/// Memory of the device for as long as a test runs; of the host, where kernels are emulated.
class DeviceMemory {
 public:
  ~DeviceMemory() {
    for (void* at : all_) {
#ifdef RABIT_CUDA_EMULATOR
      std::free(at);
#else
      cudaFree(at);
#endif
    }
  }
  template <typename T>
  T* put(const std::vector<T>& values) {
    void* at = nullptr;
    const size_t bytes = std::max<size_t>(values.size(), 1) * sizeof(T);
#ifdef RABIT_CUDA_EMULATOR
    at = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memcpy(at, values.data(), values.size() * sizeof(T));
#else
    EXPECT_EQ(cudaMalloc(&at, bytes), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(at, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
              cudaSuccess);
#endif
    all_.push_back(at);
    return static_cast<T*>(at);
  }
  template <typename T>
  static void set(T* at, const std::vector<T>& values) {
#ifdef RABIT_CUDA_EMULATOR
    std::copy(values.begin(), values.end(), at);
#else
    EXPECT_EQ(cudaMemcpy(at, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
              cudaSuccess);
#endif
  }
  template <typename T>
  static void get(const T* at, std::vector<T>& values) {
#ifdef RABIT_CUDA_EMULATOR
    std::copy_n(at, values.size(), values.begin());
#else
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(values.data(), at, values.size() * sizeof(T), cudaMemcpyDeviceToHost),
              cudaSuccess);
#endif
  }

 private:
  std::vector<void*> all_;
};

struct Shape {
  gpu::Sizes sizes;
  int paths;
  bool dense_head = true;
  bool dense_gate = false;  // one matrix of F16 among packed ones
  bool byte_head = false;   // in Q8_0
  bool byte_cache = false;  // keys and values, too
};

/// A matrix as files have it, for the reference, and as GPUs take it.
struct Matrix {
  LinearWeights host;
  gpu::Linear device;
  std::vector<uint32_t> signs, tiles;
  std::vector<uint16_t> row_scale, col_scale, dense;
  std::vector<uint8_t> file;  // blocks
};

class RandomDecoder {
 public:
  RandomDecoder(const Shape& shape, uint32_t seed)
      : sizes(shape.sizes),
        cache(shape.byte_cache ? CacheFormat::kQ8_0 : CacheFormat::kF16),
        random(seed) {
    const gpu::Sizes& s = sizes;
    const int d_q = s.heads * s.head_dim, d_kv = s.kv_heads * s.head_dim;
    matrices.reserve(static_cast<size_t>(7 * s.layers + 1));
    embedding = halves(static_cast<size_t>(s.vocab) * s.d_model, 1);
    for (int layer = 0; layer < s.layers; ++layer) {
      norms.push_back(floats(s.d_model));
      norms.push_back(floats(s.d_model));
      for (const auto& [out, in] : {std::pair{d_q, s.d_model},
                                    {d_kv, s.d_model},
                                    {d_kv, s.d_model},
                                    {s.d_model, d_q},
                                    {s.d_ff, s.d_model}}) {
        packed(out, in, shape.paths);
      }
      shape.dense_gate ? dense(s.d_ff, s.d_model) : packed(s.d_ff, s.d_model, shape.paths);
      packed(s.d_model, s.d_ff, shape.paths);
    }
    norms.push_back(floats(s.d_model));
    output_norm = memory.put(norms.back());
    shape.byte_head    ? bytes(s.vocab, s.d_model)
    : shape.dense_head ? dense(s.vocab, s.d_model)
                       : packed(s.vocab, s.d_model, shape.paths);
    for (int layer = 0; layer < s.layers; ++layer) {
      const Matrix* const m = &matrices[static_cast<size_t>(7 * layer)];
      blocks.push_back({.attn_norm = memory.put(norms[static_cast<size_t>(2 * layer)]),
                        .ffn_norm = memory.put(norms[static_cast<size_t>(2 * layer + 1)]),
                        .q = m[0].device,
                        .k = m[1].device,
                        .v = m[2].device,
                        .output = m[3].device,
                        .gate = m[4].device,
                        .up = m[5].device,
                        .down = m[6].device});
    }
  }

  const gpu::Linear& head() const { return matrices.back().device; }

  DeviceMemory memory;
  const float* output_norm = nullptr;
  gpu::Sizes sizes;
  CacheFormat cache;
  std::vector<Matrix> matrices;
  std::vector<std::vector<float>> norms;
  std::vector<uint16_t> embedding;
  std::vector<gpu::Block> blocks;

 private:
  std::vector<float> floats(int count) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& x : out) {
      x = 1 + 0.2F * normal(random);
    }
    return out;
  }
  std::vector<uint16_t> halves(size_t count, float scale) {
    std::vector<uint16_t> out(count);
    for (uint16_t& x : out) {
      x = float_to_half(scale * normal(random));
    }
    return out;
  }
  void packed(int out, int in, int paths) {
    Matrix& m = matrices.emplace_back();
    const int words = (in + 31) / 32;
    m.signs.resize(static_cast<size_t>(paths) * out * words);
    for (size_t i = 0; i < m.signs.size(); ++i) {
      m.signs[i] = random();
      if (in % 32 != 0 && i % static_cast<size_t>(words) == static_cast<size_t>(words) - 1) {
        m.signs[i] &= (1U << in % 32) - 1;
      }
    }
    for (int path = 0; path < paths; ++path) {
      for (const auto& [scales, count] : {std::pair{&m.row_scale, out}, {&m.col_scale, in}}) {
        for (int i = 0; i < count; ++i) {
          const float base = std::pow(0.5F, static_cast<float>(path)) / std::sqrt(std::sqrt(in));
          scales->push_back(float_to_half(base * (1 + 0.3F * normal(random))));
        }
      }
    }
    const int row_tiles = (out + 15) / 16, column_tiles = (in + 255) / 256;
    m.tiles.assign(static_cast<size_t>(row_tiles) * column_tiles * paths * gpu::kTileWords, 0);
    for (int path = 0; path < paths; ++path) {
      for (int row = 0; row < out; ++row) {
        for (int word = 0; word < words; ++word) {
          const int quad = word % 4, half = word / 4 % 2;
          const size_t tile =
              (static_cast<size_t>(row / 16) * column_tiles + word / 8) * paths + path;
          const uint32_t natural = m.signs[(static_cast<size_t>(path) * out + row) * words + word];
          uint32_t& tiled =
              m.tiles[tile * gpu::kTileWords + (row % 8 * 4 + quad) * 4 + half * 2 + row / 8 % 2];
          for (int bit = 0; bit < 32; ++bit) {
            tiled |= (natural >> gpu::tile_column(bit) & 1U) << bit;
          }
        }
      }
    }
    m.host = {.format = WeightFormat::kResidualBinary,
              .d_out = out,
              .d_in = in,
              .paths = paths,
              .signs = m.signs.data(),
              .row_scale = m.row_scale.data(),
              .col_scale = m.col_scale.data()};
    m.device = {.format = gpu::Format::kResidualBinary,
                .d_out = out,
                .d_in = in,
                .paths = paths,
                .weights = memory.put(m.tiles),
                .row_scale = memory.put(m.row_scale),
                .col_scale = memory.put(m.col_scale)};
  }
  void dense(int out, int in) {
    Matrix& m = matrices.emplace_back();
    m.dense = halves(static_cast<size_t>(out) * in, 1 / std::sqrt(static_cast<float>(in)));
    m.host = {.format = WeightFormat::kF16, .d_out = out, .d_in = in, .dense = m.dense.data()};
    m.device = {
        .format = gpu::Format::kF16, .d_out = out, .d_in = in, .weights = memory.put(m.dense)};
  }
  void bytes(int out, int in) {
    Matrix& m = matrices.emplace_back();
    const size_t blocks = static_cast<size_t>(out) * in / 32;
    std::vector<uint8_t> arranged(blocks * 32);
    const auto scales = halves(blocks, 0.02F / std::sqrt(static_cast<float>(in)));
    for (size_t block = 0; block < blocks; ++block) {
      const uint16_t scale = scales[block];
      m.file.push_back(static_cast<uint8_t>(scale)), m.file.push_back(scale >> 8);
      for (size_t i = 0; i < 32; ++i) {
        const auto value = static_cast<uint8_t>(random());
        m.file.push_back(value);
        arranged[block / 2 * 64 + i / 8 * 16 + block % 2 * 8 + i % 8] = value;
      }
    }
    m.host = {.format = WeightFormat::kQ8_0, .d_out = out, .d_in = in, .dense = m.file.data()};
    m.device = {.format = gpu::Format::kQ8_0,
                .d_out = out,
                .d_in = in,
                .weights = memory.put(arranged),
                .row_scale = memory.put(scales)};
  }

  std::mt19937 random;
  std::normal_distribution<float> normal;
};

/// One token after the other through the scalar reference.
class Reference {
 public:
  Reference(const RandomDecoder& decoder, int capacity, const std::vector<float>& cos_sin)
      : d_(decoder), capacity_(capacity), cos_sin_(cos_sin) {
    const int64_t rows = int64_t{d_.sizes.layers} * d_.sizes.kv_heads * capacity;
    keys_.resize(static_cast<size_t>(rows * row_bytes())), values_.resize(keys_.size());
  }

  std::vector<float> forward(int token) {
    const gpu::Sizes& s = d_.sizes;
    const KernelTable& table = reference_kernels();
    std::vector<float> x(static_cast<size_t>(s.d_model));
    for (int i = 0; i < s.d_model; ++i) {
      x[static_cast<size_t>(i)] =
          half_to_float(d_.embedding[static_cast<size_t>(token) * s.d_model + i]);
    }
    const auto normed = [&](size_t which) {
      std::vector<float> out(x.size());
      table.rms_norm(x.data(), d_.norms[which].data(), 1, s.d_model, s.norm_epsilon, out.data());
      return out;
    };
    const auto times = [&](size_t which, const std::vector<float>& in) {
      const LinearWeights& w = d_.matrices[which].host;
      std::vector<float> out(static_cast<size_t>(w.d_out));
      table.matmul(w, in.data(), nullptr, 1, out.data(), 0, w.d_out, nullptr);
      return out;
    };
    const auto add = [&](const std::vector<float>& y) {
      for (size_t i = 0; i < x.size(); ++i) {
        x[i] += y[i];
      }
    };
    for (int layer = 0; layer < s.layers; ++layer) {
      const size_t m = static_cast<size_t>(7 * layer);
      const auto h = normed(static_cast<size_t>(2 * layer));
      auto q = times(m, h), k = times(m + 1, h);
      const auto v = times(m + 2, h);
      const float* turns = cos_sin_.data() + position_ * s.head_dim;
      table.rope(q.data(), turns, 1, s.heads, s.head_dim);
      table.rope(k.data(), turns, 1, s.kv_heads, s.head_dim);
      std::byte* const keys = keys_.data() + layer * s.kv_heads * capacity_ * row_bytes();
      std::byte* const values = values_.data() + (keys - keys_.data());
      for (int head = 0; head < s.kv_heads; ++head) {
        const int64_t to = (head * capacity_ + position_) * row_bytes();
        table.to_cache(&k[static_cast<size_t>(head) * s.head_dim], s.head_dim, d_.cache, keys + to);
        table.to_cache(&v[static_cast<size_t>(head) * s.head_dim], s.head_dim, d_.cache,
                       values + to);
      }
      std::vector<float> attended(q.size());
      const AttentionInput input = {.q = q.data(),
                                    .cache = d_.cache,
                                    .k = keys,
                                    .v = values,
                                    .tokens = 1,
                                    .first_position = position_,
                                    .heads = s.heads,
                                    .kv_heads = s.kv_heads,
                                    .head_dim = s.head_dim,
                                    .capacity = capacity_};
      std::vector<float> scratch(static_cast<size_t>(
          table.attention_scratch(1, capacity_, s.heads, s.kv_heads, s.head_dim)));
      table.attention(input, 0, s.heads, 0, 1, scratch.data(), attended.data());
      add(times(m + 3, attended));
      const auto g = normed(static_cast<size_t>(2 * layer + 1));
      auto gate = times(m + 4, g);
      const auto up = times(m + 5, g);
      table.swiglu(gate.data(), up.data(), static_cast<int64_t>(gate.size()));
      add(times(m + 6, gate));
    }
    ++position_;
    return times(d_.matrices.size() - 1, normed(d_.norms.size() - 1));
  }

 private:
  int64_t row_bytes() const {
    return static_cast<int64_t>(cache_bytes(d_.cache, d_.sizes.head_dim));
  }

  const RandomDecoder& d_;
  int64_t capacity_, position_ = 0;
  const std::vector<float>& cos_sin_;
  std::vector<std::byte> keys_, values_;
};

double relative_error(const float* got, const std::vector<float>& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (static_cast<double>(got[i]) - want[i]) * (static_cast<double>(got[i]) - want[i]);
    norm += static_cast<double>(want[i]) * want[i];
  }
  const double relative = std::sqrt(error / norm);
  return std::isnan(relative) ? INFINITY : relative;
}

/// The largest relative error of logits over `steps` steps of `tokens` sequences, each at positions
/// of its own.
double largest_error(const Shape& shape, int grid, int tokens, int steps,
                     const int32_t (&splits)[gpu::kProducts]) {
  RandomDecoder decoder(shape, 7);
  DeviceMemory& memory = decoder.memory;
  const gpu::Sizes& s = decoder.sizes;
  const int capacity = steps + tokens;
  std::vector<float> cos_sin;
  for (int position = 0; position < capacity; ++position) {
    for (int i = 0; i < s.head_dim / 2; ++i) {
      const double angle = position * std::pow(10000.0, -2.0 * i / s.head_dim);
      cos_sin.push_back(static_cast<float>(std::cos(angle)));
      cos_sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  const auto planned = gpu::plan_decode(s, decoder.blocks, decoder.head(), decoder.output_norm,
                                        grid, tokens, 227 << 10, splits);
  if (!planned) {
    ADD_FAILURE() << planned.error().message;
    return INFINITY;
  }
  const DecodePlan& plan = *planned;
  DecodeArgs args;
  std::vector<float> work(static_cast<size_t>(gpu::bind_decode(s, plan, nullptr, args)));
  std::vector<float> logits(static_cast<size_t>(tokens) * s.vocab, NAN);
  EXPECT_EQ(gpu::bind_decode(s, plan, memory.put(work), args), static_cast<int64_t>(work.size()));
  const int64_t cache = int64_t{s.layers} * s.kv_heads * capacity * s.head_dim;
  const std::vector<uint16_t> nans(static_cast<size_t>(cache * tokens), 0x7E00);
  const auto unwritten = [&]() -> gpu::CacheRows {
    return {memory.put(nans), shape.byte_cache ? memory.put(nans) : nullptr};
  };
  args.jobs = memory.put(plan.jobs), args.first = memory.put(plan.first);
  args.embedding = memory.put(decoder.embedding);
  args.cos_sin = memory.put(cos_sin);
  args.keys = unwritten(), args.values = unwritten();
  args.sequence_stride = cache;
  args.capacity = capacity;
  args.logits = memory.put(logits);

  std::vector<Reference> references;
  std::vector<int32_t> ids(static_cast<size_t>(tokens)), positions(ids.size());
  for (int i = 0; i < tokens; ++i) {
    references.emplace_back(decoder, capacity, cos_sin);
  }
  int32_t* const device_ids = memory.put(ids);
  int32_t* const device_positions = memory.put(positions);
  args.tokens = device_ids, args.positions = device_positions;
  std::mt19937 random(3);
  double worst = 0;
  for (int step = 0; step < steps; ++step) {
    std::vector<std::vector<float>> want;
    for (size_t i = 0; i < ids.size(); ++i) {
      ids[i] = static_cast<int32_t>(random() % static_cast<uint32_t>(s.vocab));
      positions[i] = step;
      want.push_back(references[i].forward(ids[i]));
    }
    DeviceMemory::set(device_ids, ids);
    DeviceMemory::set(device_positions, positions);
    EXPECT_EQ(gpu::launch_decode(args, plan, nullptr), 0);
    ++args.pass;
    DeviceMemory::get(args.logits, logits);
    for (size_t i = 0; i < ids.size(); ++i) {
      worst = std::max(worst,
                       relative_error(logits.data() + i * static_cast<size_t>(s.vocab), want[i]));
    }
  }
  return worst;
}

// 16 bits of an input's range over a few hundred columns: noise of 2^-16 / sqrt(3) of the largest
// value, some 4 times the root mean square, at each of a dozen products; halves of keys and values
// are rounded from sums that differ so, and may fall to the other side.
constexpr double kBound = 4e-4;

gpu::Sizes sizes(int layers, int d_model, int d_ff, int heads, int kv_heads, int head_dim,
                 int vocab) {
  return {layers, d_model, d_ff, heads, kv_heads, head_dim, vocab, 1e-5F};
}

TEST(GpuDecode, OneTokenAfterTheOther) {
  EXPECT_LT(largest_error({sizes(2, 64, 96, 4, 2, 16, 50), 2}, 3, 1, 4, {}), kBound);
}

TEST(GpuDecode, EveryNumberOfPaths) {
  for (const int paths : {1, 3, 4}) {
    EXPECT_LT(largest_error({sizes(1, 64, 96, 2, 2, 32, 40), paths, false}, 2, 1, 2, {}), kBound)
        << paths;
  }
}

TEST(GpuDecode, InOneLaunch) {
  // A single block does all, so that its weights flow over the ends of phases here, too.
  for (const int paths : {1, 2, 3, 4}) {
    EXPECT_LT(largest_error({sizes(2, 288, 352, 2, 1, 32, 40), paths, paths == 2, paths == 3}, 1, 1,
                            2, {}),
              kBound)
        << paths;
  }
}

TEST(GpuDecode, AHeadOfBytes) {
  Shape shape = {sizes(1, 512, 264, 4, 2, 32, 83), 2};
  shape.byte_head = true;
  for (const int tokens : {1, 4}) {
    EXPECT_LT(largest_error(shape, 3, tokens, 2, {}), kBound) << tokens;
  }
}

TEST(GpuDecode, ACacheOfBytes) {
  // A byte of a key or value may fall to the other side, by 1/127 of the largest of 32: a few of
  // hundreds do.
  constexpr double kBytesBound = 10 * kBound;
  for (const auto& [shape_sizes, tokens] :
       {std::pair{sizes(2, 64, 96, 2, 2, 96, 50), 1}, {sizes(1, 32, 32, 4, 1, 32, 16), 2}}) {
    Shape shape = {shape_sizes, 1};
    shape.byte_cache = true;
    EXPECT_LT(largest_error(shape, 2, tokens, 3, {}), kBytesBound) << tokens;
  }
}

TEST(GpuDecode, ColumnsInSplits) {
  // 3 column tiles, the last not full, in 1, 2 and 3 ranges; some blocks have nothing to do.
  const Shape shape = {sizes(1, 544, 712, 5, 1, 104, 33), 2, true, true};
  EXPECT_LT(largest_error(shape, 7, 1, 2, {3, 2, 3, 2, 1}), kBound);
  EXPECT_LT(largest_error(shape, 7, 1, 2, {1, 1, 1, 1, 1}), kBound);
}

TEST(GpuDecode, SeveralSequences) {
  for (const int tokens : {2, 4}) {
    EXPECT_LT(largest_error({sizes(1, 256, 264, 3, 1, 8, 48), 2, tokens != 4, tokens == 2}, 4,
                            tokens, 2, {}),
              kBound)
        << tokens;
  }
}

TEST(GpuDecode, PositionsInParts) {
  // Parts of one KV head from 64 positions on, six query heads to it.
  EXPECT_LT(largest_error({sizes(1, 32, 32, 6, 1, 32, 16), 1}, 2, 1, 66, {}), kBound);
  // Lanes whose next position, 64 on, is the last one, which another part has.
  EXPECT_LT(largest_error({sizes(1, 32, 32, 2, 1, 64, 16), 1}, 2, 1, 66, {}), kBound);
}

TEST(GpuDecode, SizesItDoesNotTake) {
  for (const auto& [wrong, what] : {std::pair{sizes(1, 64, 96, 4, 2, 12, 50), "multiple of 8"},
                                    {sizes(1, 60, 96, 4, 2, 16, 50), "multiple of 8"},
                                    {sizes(1, 40, 96, 4, 2, 16, 50), "multiple of 32"}}) {
    const RandomDecoder decoder({wrong, 1}, 1);
    const auto plan = gpu::plan_decode(wrong, decoder.blocks, decoder.head(), decoder.output_norm,
                                       3, 1, 227 << 10, {});
    ASSERT_FALSE(plan);
    EXPECT_NE(plan.error().message.find(what), std::string::npos) << plan.error().message;
  }
  const RandomDecoder decoder({sizes(1, 64, 96, 4, 2, 16, 50), 1}, 1);
  const auto plan = gpu::plan_decode(decoder.sizes, decoder.blocks, decoder.head(),
                                     decoder.output_norm, 3, 1, 16 << 10, {});
  ASSERT_FALSE(plan);
  EXPECT_NE(plan.error().message.find("shared memory"), std::string::npos);
}

}  // namespace
}  // namespace rabit
