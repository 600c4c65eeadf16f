// No tensor is in memory before its turn to be written. Each has its own random numbers: the seed
// is the number of bytes before it.
#include "model/random_model.h"

#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "base/half.h"
#include "base/interrupt.h"
#include "io/gguf.h"

namespace rabit {
namespace {

struct Shape {
  std::string_view name;
  int64_t layers, d_model, heads, kv_heads, d_ff, vocab, context;
  float rope_theta;
  bool tied_head;
};

// From the models' published configurations.
constexpr std::array kShapes = {
    Shape{"smollm2-135m", 30, 576, 9, 3, 1536, 49152, 8192, 1e5F, true},
    Shape{"smollm2-1.7b", 24, 2048, 32, 32, 8192, 49152, 8192, 130000.0F, true},
    Shape{"llama2-7b", 32, 4096, 32, 32, 11008, 32000, 4096, 1e4F, false},
    Shape{"llama2-13b", 40, 5120, 40, 40, 13824, 32000, 4096, 1e4F, false},
    Shape{"llama2-70b", 80, 8192, 64, 8, 28672, 32000, 4096, 1e4F, false},
    Shape{"llama3-8b", 32, 4096, 32, 8, 14336, 128256, 8192, 5e5F, false},
    Shape{"llama3-70b", 80, 8192, 64, 8, 28672, 128256, 8192, 5e5F, false}};

uint64_t next(uint64_t& state) {
  state += 0x9E3779B97F4A7C15U;  // splitmix64
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}

using Bytes = std::shared_ptr<const std::byte>;

// Tensors that are made when it is their turn to be written.
class RandomTensors {
 public:
  Status add(const std::string& name, TensorType type, std::vector<int64_t> ne, uint64_t size,
             const std::function<void(std::byte*, uint64_t)>& fill) {
    seed_ += size;
    const auto make = [fill, size, seed = seed_]() -> Bytes {
      if (!check_interrupt()) {
        return nullptr;
      }
      const std::shared_ptr<std::byte[]> bytes(new std::byte[size + sizeof(uint64_t)]);
      fill(bytes.get(), seed);
      return Bytes(bytes, bytes.get());
    };
    return writer.add_tensor(name, type, std::move(ne), {TensorPiece{0, size, make}});
  }

  Status add_halves(const std::string& name, std::vector<int64_t> ne, int64_t count,
                    const std::function<float(int64_t)>& value) {
    return add(name, TensorType::kF16, std::move(ne), static_cast<uint64_t>(count) * 2,
               [count, value](std::byte* out, uint64_t) {
                 for (int64_t i = 0; i < count; ++i) {
                   const uint16_t half = float_to_half(value(i));
                   std::memcpy(out + 2 * i, &half, sizeof half);
                 }
               });
  }

  Status add_norm(const std::string& name, int64_t d) {
    return add(name, TensorType::kF32, {d}, static_cast<uint64_t>(d) * 4,
               [d](std::byte* out, uint64_t) {
                 for (int64_t i = 0; i < d; ++i) {
                   const float one = 1.0F;
                   std::memcpy(out + 4 * i, &one, sizeof one);
                 }
               });
  }

  // Random bytes, with a scale before every 32 of them.
  Status add_blocks(const std::string& name, int64_t rows, int64_t columns) {
    const auto blocks = static_cast<uint64_t>(rows * columns / 32);
    const auto bytes = static_cast<uint64_t>(block_bytes(TensorType::kQ8_0));
    const uint16_t scale = float_to_half(1.0F / 64 / std::sqrt(static_cast<float>(columns)));
    return add(name, TensorType::kQ8_0, {columns, rows}, blocks * bytes,
               [blocks, bytes, scale](std::byte* out, uint64_t seed) {
                 for (uint64_t block = 0; block < blocks; ++block, out += bytes) {
                   std::memcpy(out, &scale, sizeof scale);
                   for (int i = 0; i < 4; ++i) {
                     const uint64_t value = next(seed);
                     std::memcpy(out + 2 + 8 * i, &value, sizeof value);
                   }
                 }
               });
  }

  /// F16 of random signs and digits, about 1 / sqrt(d_in) in size.
  Status add_dense(const std::string& name, LinearShape shape) {
    const auto count = static_cast<uint64_t>(shape.d_in * shape.d_out);
    const int power = -std::ilogb(std::sqrt(static_cast<float>(shape.d_in)));
    const uint64_t exponent = static_cast<uint64_t>(15 + power) << 10;
    const uint64_t exponents = exponent * 0x0001000100010001U;
    return add(name, TensorType::kF16, {shape.d_in, shape.d_out}, count * 2,
               [count, exponents](std::byte* out, uint64_t seed) {
                 for (uint64_t i = 0; i < count; i += 4) {  // there is room for three more
                   const uint64_t value = (next(seed) & 0x83FF83FF83FF83FFU) | exponents;
                   std::memcpy(out + 2 * i, &value, sizeof value);
                 }
               });
  }

  Status add_packed(const std::string& name, LinearShape shape, int64_t paths) {
    const int64_t words = (shape.d_in + 31) / 32, count = words * shape.d_out * paths;
    const auto last = static_cast<uint32_t>((uint64_t{1} << (shape.d_in - (words - 1) * 32)) - 1);
    RABIT_CHECK(add(name + ".sign", TensorType::kI32, {words, shape.d_out, paths},
                    static_cast<uint64_t>(count) * 4, [=](std::byte* out, uint64_t seed) {
                      for (int64_t i = 0; i < count; i += 2) {  // there is room for one more
                        const uint64_t value = next(seed);
                        std::memcpy(out + 4 * i, &value, sizeof value);
                      }
                      for (int64_t i = words - 1; i < count; i += words) {  // bits past the end
                        uint32_t word = 0;
                        std::memcpy(&word, out + 4 * i, sizeof word);
                        word &= last;
                        std::memcpy(out + 4 * i, &word, sizeof word);
                      }
                    }));
    const float size = 1.0F / std::sqrt(static_cast<float>(shape.d_in));
    RABIT_CHECK(add_halves(name + ".row_scale", {shape.d_out, paths}, shape.d_out * paths,
                           [size, rows = shape.d_out](int64_t i) {
                             return size * std::pow(0.5F, static_cast<float>(i / rows));
                           }));
    return add_halves(name + ".col_scale", {shape.d_in, paths}, shape.d_in * paths,
                      [](int64_t) { return 1.0F; });
  }

  GgufWriter writer;

 private:
  uint64_t seed_ = 1;
};

}  // namespace

std::string shape_names() {
  std::string names;
  for (const Shape& shape : kShapes) {
    names += (names.empty() ? "" : ", ") + std::string(shape.name);
  }
  return names;
}

Result<ModelConfig> named_shape(std::string_view name) {
  for (const Shape& shape : kShapes) {
    if (shape.name == name) {
      ModelConfig config;
      config.architecture = "llama";
      config.name = std::string(name);
      config.layers = shape.layers;
      config.d_model = shape.d_model;
      config.heads = shape.heads;
      config.kv_heads = shape.kv_heads;
      config.head_dim = shape.d_model / shape.heads;
      config.d_ff = shape.d_ff;
      config.vocab_size = shape.vocab;
      config.context_length = shape.context;
      config.rope_theta = shape.rope_theta;
      config.tied_head = shape.tied_head;
      return config;
    }
  }
  return Error{"no shape is called '" + std::string(name) + "'; there are " + shape_names()};
}

Status write_random_model(const std::filesystem::path& path, const ModelConfig& config,
                          int64_t paths) {
  if (config.d_model % 32 != 0 || paths < 0 || paths > kMostPackedPaths) {
    return Error{"a random model has a width that is a multiple of 32 and at most 4 paths"};
  }
  RandomTensors tensors;
  GgufWriter& writer = tensors.writer;
  writer.set("general.architecture", MetaValue::string(config.architecture));
  writer.set("general.name", MetaValue::string("random " + config.name));
  const auto set = [&](const char* key, int64_t value) {
    writer.set(config.architecture + "." + key, MetaValue::u32(static_cast<uint32_t>(value)));
  };
  set("block_count", config.layers);
  set("embedding_length", config.d_model);
  set("attention.head_count", config.heads);
  set("attention.head_count_kv", config.kv_heads);
  set("rope.dimension_count", config.head_dim);
  set("feed_forward_length", config.d_ff);
  set("context_length", config.context_length);
  writer.set(config.architecture + ".attention.layer_norm_rms_epsilon",
             MetaValue::f32(config.norm_epsilon));
  writer.set(config.architecture + ".rope.freq_base", MetaValue::f32(config.rope_theta));
  const auto add_table = [&](const char* name) {
    return paths == 0
               ? tensors.add_dense(name, {.d_out = config.vocab_size, .d_in = config.d_model})
               : tensors.add_blocks(name, config.vocab_size, config.d_model);
  };
  RABIT_CHECK(add_table("token_embd.weight"));
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const std::string block = "blk." + std::to_string(layer) + ".";
    RABIT_CHECK(tensors.add_norm(block + "attn_norm.weight", config.d_model));
    RABIT_CHECK(tensors.add_norm(block + "ffn_norm.weight", config.d_model));
    for (const Role role : kRoles) {
      const std::string name = linear_name(layer, role);
      const LinearShape shape = linear_shape(config, role);
      RABIT_CHECK(paths == 0 ? tensors.add_dense(name + ".weight", shape)
                             : tensors.add_packed(name, shape, paths));
    }
  }
  RABIT_CHECK(tensors.add_norm("output_norm.weight", config.d_model));
  if (!config.tied_head) {
    RABIT_CHECK(add_table("output.weight"));
  }
  return writer.write(path);
}

}  // namespace rabit
