// Loading: every tensor's type, extents, alignment and scales are checked here, so that the forward
// pass need not fail. What kernels take as it lies stays in the mapped file; signs and Q8_0 are
// rearranged where they want them in tiles, everything else is decoded once.
#include "engine/model.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>

#include "base/half.h"
#include "base/interrupt.h"
#include "engine/gpu.h"
#include "io/dequant.h"

namespace rabit {
namespace {

Error tensor_error(const GgufFile& file, const TensorInfo& tensor, const std::string& what) {
  return Error{file.path().string() + ": tensor " + tensor.name + ": " + what};
}

/// Extents beyond those written count as 1: (n) is (n, 1).
bool has_extents(const TensorInfo& tensor, std::initializer_list<int64_t> extents) {
  size_t i = 0;
  for (const int64_t extent : extents) {
    if ((i < tensor.ne.size() ? tensor.ne[i] : 1) != extent) {
      return false;
    }
    ++i;
  }
  return std::all_of(tensor.ne.begin() + std::min(i, tensor.ne.size()), tensor.ne.end(),
                     [](int64_t extent) { return extent == 1; });
}

Result<const TensorInfo*> find(const GgufFile& file, const std::string& name,
                               std::initializer_list<int64_t> extents) {
  const TensorInfo* tensor = file.find_tensor(name);
  if (tensor == nullptr) {
    return Error{file.path().string() + ": tensor " + name + " is missing"};
  }
  if (!has_extents(*tensor, extents)) {
    return tensor_error(file, *tensor, "its extents do not fit the model's sizes");
  }
  return tensor;
}

bool aligned(const TensorInfo& tensor, size_t alignment) {
  return reinterpret_cast<uintptr_t>(tensor.data.data()) % alignment == 0;
}

bool finite_halves(std::span<const uint16_t> halves) {
  return std::none_of(halves.begin(), halves.end(),
                      [](uint16_t half) { return (half & 0x7C00U) == 0x7C00U; });
}

/// Whether ok(begin, end) holds for all parts of [0, count), each in a thread.
template <typename Ok>
bool all_parts(ThreadPool& pool, int64_t count, const Ok& ok) {
  std::atomic<bool> all{true};
  pool.parallel_for(count, 1, [&](int64_t begin, int64_t end, int) {
    if (!ok(begin, end)) {
      all = false;
    }
  });
  return all;
}

/// The tensor's bytes where they lie if a T may stand there, else a copy in `owned`.
template <typename T>
Result<const T*> in_place(const TensorInfo& tensor, std::vector<Buffer>& owned) {
  if (aligned(tensor, alignof(T))) {
    return reinterpret_cast<const T*>(tensor.data.data());
  }
  RABIT_ASSIGN(Buffer copy, Buffer::make(tensor.data.size(), 1, "a weight tensor"));
  std::memcpy(copy.as<std::byte>(), tensor.data.data(), tensor.data.size());
  owned.push_back(std::move(copy));
  return owned.back().as<const T>();
}

/// Of 32 values.
uint64_t block_bytes(WeightFormat format) {
  return static_cast<uint64_t>(format == WeightFormat::kQ8_0 ? kQ8BlockBytes : kQ4BlockBytes);
}

/// Signs and Q8_0 in the order that the kernels take, from the file's, whose tensor is not needed
/// then.
Status arrange(Linear& linear, const KernelTable& table, const GgufFile& file,
               const TensorInfo& source, ThreadPool& pool) {
  LinearWeights& w = linear.weights;
  const bool packed = w.format == WeightFormat::kResidualBinary;
  const WeightOrder order = packed                            ? table.sign_order
                            : w.format == WeightFormat::kQ8_0 ? table.block_order
                                                              : w.order;
  if (order == w.order) {
    return {};
  }
  const int64_t tiles = sign_tiles(w.d_out), words = (w.d_in + 31) / 32;
  const int64_t word_bytes =
      packed ? kTileRows * w.paths * static_cast<int64_t>(sizeof(uint32_t)) : kBlockTileBytes;
  RABIT_ASSIGN(Buffer buffer, Buffer::make(static_cast<uint64_t>(tiles * words),
                                           static_cast<uint64_t>(word_bytes), "weights in tiles"));
  pool.parallel_for(tiles, 1, [&](int64_t begin, int64_t end, int) {
    packed ? tile_signs(w, order, begin, end, buffer.as<uint32_t>())
           : tile_blocks(w, begin, end, buffer.as<uint8_t>());
  });
  w.signs = packed ? buffer.as<uint32_t>() : nullptr;
  w.dense = packed ? nullptr : buffer.as<void>();
  w.order = order;
  linear.owned.push_back(std::move(buffer));
  file.release(source);
  return {};
}

Result<Linear> load_packed(const GgufFile& file, const std::string& name, LinearShape shape) {
  Linear linear;
  const TensorInfo* sign = file.find_tensor(name + ".sign");
  const int64_t paths = sign->ne.size() > 2 ? sign->ne[2] : 1;
  const int64_t words = (shape.d_in + 31) / 32;
  if (paths < 1 || paths > kMostPackedPaths || !has_extents(*sign, {words, shape.d_out, paths})) {
    return tensor_error(file, *sign, "its extents do not fit the model's sizes and 1 to 4 paths");
  }
  if (sign->type != TensorType::kI32) {
    return tensor_error(file, *sign, "signs must be of type I32");
  }
  RABIT_ASSIGN(const TensorInfo* rows, find(file, name + ".row_scale", {shape.d_out, paths}));
  RABIT_ASSIGN(const TensorInfo* columns, find(file, name + ".col_scale", {shape.d_in, paths}));
  linear.weights = {.format = WeightFormat::kResidualBinary,
                    .d_out = shape.d_out,
                    .d_in = shape.d_in,
                    .paths = paths};
  RABIT_ASSIGN(linear.weights.signs, in_place<uint32_t>(*sign, linear.owned));
  for (const auto& [tensor, target] : {std::pair{rows, &linear.weights.row_scale},
                                       std::pair{columns, &linear.weights.col_scale}}) {
    if (tensor->type != TensorType::kF16) {
      return tensor_error(file, *tensor, "scales must be of type F16");
    }
    RABIT_ASSIGN(*target, in_place<uint16_t>(*tensor, linear.owned));
    if (!finite_halves({*target, static_cast<size_t>(tensor->elements())})) {
      return tensor_error(file, *tensor, "a scale is not finite");
    }
  }
  return linear;
}

/// Decodes rows in parallel to F32 or F16. Errors: of the decoder, values that are not finite.
Result<Linear> decode_dense(const GgufFile& file, const TensorInfo& tensor, LinearShape shape,
                            bool as_f32, ThreadPool& pool) {
  Linear linear;
  const auto elements = static_cast<uint64_t>(shape.d_out) * static_cast<uint64_t>(shape.d_in);
  RABIT_ASSIGN(Buffer buffer, Buffer::make(elements, as_f32 ? 4 : 2, "a weight matrix"));
  linear.weights = {.format = as_f32 ? WeightFormat::kF32 : WeightFormat::kF16,
                    .d_out = shape.d_out,
                    .d_in = shape.d_in,
                    .dense = buffer.as<void>()};
  std::mutex mutex;
  std::optional<Error> failure;
  const auto fail = [&](Error error) {
    const std::lock_guard lock(mutex);
    failure = std::move(error);
  };
  pool.parallel_for(shape.d_out, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<float> row(static_cast<size_t>(shape.d_in));
    bool finite = true;
    for (int64_t r = begin; r < end; ++r) {
      if (const Status status = dequantize(tensor, r * shape.d_in, row); !status) {
        return fail(status.error());
      }
      for (int64_t c = 0; c < shape.d_in; ++c) {
        const int64_t at = r * shape.d_in + c;
        if (as_f32) {
          buffer.as<float>()[at] = row[c];
          finite &= std::isfinite(row[c]);
        } else {
          const uint16_t half = float_to_half(row[c]);
          buffer.as<uint16_t>()[at] = half;
          finite &= (half & 0x7C00U) != 0x7C00U;
        }
      }
    }
    if (!finite) {
      fail(tensor_error(file, tensor,
                        std::string("a weight is not finite") +
                            (as_f32 ? "" : " or too large for F16; load dense weights as F32")));
    }
  });
  if (failure) {
    return *failure;
  }
  linear.owned.push_back(std::move(buffer));
  return linear;
}

/// Quantized blocks that kernels take as they are.
std::optional<WeightFormat> block_format(TensorType type) {
  return type == TensorType::kQ8_0   ? std::optional(WeightFormat::kQ8_0)
         : type == TensorType::kQ4_0 ? std::optional(WeightFormat::kQ4_0)
                                     : std::nullopt;
}

Result<Linear> load_blocks(const GgufFile& file, const TensorInfo& tensor, LinearShape shape,
                           WeightFormat format, ThreadPool& pool) {
  const auto bytes = static_cast<int64_t>(block_bytes(format));
  const auto blocks = static_cast<int64_t>(tensor.data.size()) / bytes;
  const bool finite = all_parts(pool, blocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      uint16_t scale;
      std::memcpy(&scale, tensor.data.data() + block * bytes, sizeof scale);
      if (!finite_halves({&scale, 1})) {
        return false;
      }
    }
    return true;
  });
  if (!finite) {
    return tensor_error(file, tensor, "a scale is not finite");
  }
  Linear linear;
  linear.weights = {
      .format = format, .d_out = shape.d_out, .d_in = shape.d_in, .dense = tensor.data.data()};
  return linear;
}

Result<Linear> load_dense(const GgufFile& file, const std::string& name, LinearShape shape,
                          bool as_f32, const KernelTable& table, ThreadPool& pool) {
  RABIT_ASSIGN(const TensorInfo* tensor, find(file, name, {shape.d_in, shape.d_out}));
  if (const auto format = block_format(tensor->type); format && !as_f32) {
    RABIT_ASSIGN(Linear linear, load_blocks(file, *tensor, shape, *format, pool));
    RABIT_CHECK(arrange(linear, table, file, *tensor, pool));
    return linear;
  }
  const TensorType wanted = as_f32 ? TensorType::kF32 : TensorType::kF16;
  if (tensor->type != wanted || !aligned(*tensor, 4)) {
    return decode_dense(file, *tensor, shape, as_f32, pool);
  }
  Linear linear;
  linear.weights = {.format = as_f32 ? WeightFormat::kF32 : WeightFormat::kF16,
                    .d_out = shape.d_out,
                    .d_in = shape.d_in,
                    .dense = tensor->data.data()};
  const bool finite = all_parts(pool, tensor->elements(), [&](int64_t begin, int64_t end) {
    if (!as_f32) {
      const auto* halves = reinterpret_cast<const uint16_t*>(tensor->data.data());
      return finite_halves({halves + begin, static_cast<size_t>(end - begin)});
    }
    const auto* data = reinterpret_cast<const float*>(tensor->data.data());
    return std::all_of(data + begin, data + end, [](float value) { return std::isfinite(value); });
  });
  if (!finite) {
    return tensor_error(file, *tensor, "a weight is not finite");
  }
  return linear;
}

Result<std::vector<float>> load_norm(const GgufFile& file, const std::string& name, int64_t d) {
  RABIT_ASSIGN(const TensorInfo* tensor, find(file, name, {d}));
  RABIT_ASSIGN(std::vector<float> values, dequantize(*tensor));
  if (!std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); })) {
    return tensor_error(file, *tensor, "a weight is not finite");
  }
  return values;
}

uint64_t linear_bytes(const LinearWeights& w) {
  const auto out = static_cast<uint64_t>(w.d_out), in = static_cast<uint64_t>(w.d_in);
  switch (w.format) {
    case WeightFormat::kF32:
      return out * in * 4;
    case WeightFormat::kF16:
      return out * in * 2;
    case WeightFormat::kResidualBinary:
      break;
    default:
      return out * in / 32 * block_bytes(w.format);
  }
  return static_cast<uint64_t>(w.paths) * (out * ((in + 31) / 32) * 4 + (out + in) * 2);
}

Result<const KernelTable*> choose_kernels(std::string name) {
  const std::vector<const KernelTable*> tables = cpu_kernels();
  if (const char* isa = std::getenv("RABIT_ISA"); isa != nullptr && name.empty()) {
    name = isa;
  }
  if (name.empty()) {
    return tables.front();
  }
  std::string known;
  for (const KernelTable* table : tables) {
    if (table->name == name) {
      return table;
    }
    known += std::string(table->name) + ", ";
  }
  const KernelTable& reference = reference_kernels();
  if (reference.name == name) {
    return &reference;
  }
  return Error{"no kernels named '" + name + "' run here; there are " + known +
               std::string(reference.name)};
}

/// The number of the GPU that a name means; none: the CPU.
Result<std::optional<int32_t>> choose_gpu(const std::string& name) {
  if (name.empty() || name == "cpu") {
    return std::optional<int32_t>();
  }
  if (name == "cuda") {
    return std::optional<int32_t>(0);
  }
  constexpr std::string_view kPrefix = "cuda:";
  const std::string_view digits =
      name.starts_with(kPrefix) ? std::string_view(name).substr(kPrefix.size()) : "";
  int32_t number = -1;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  if (error != std::errc() || end != digits.data() + digits.size() || number < 0) {
    return Error{"no device is called '" + name + "'; there are cpu, cuda and cuda:N"};
  }
  return std::optional<int32_t>(number);
}

}  // namespace

Status Model::check_kernels(const std::string& kernels) {
  RABIT_CHECK(choose_kernels(kernels));
  return {};
}

Status Model::check_device(const std::string& device) {
  RABIT_CHECK(choose_gpu(device));
  return {};
}

Result<std::shared_ptr<Model>> Model::load(const std::filesystem::path& path,
                                           const EngineOptions& options) {
  RABIT_ASSIGN(const std::optional<int32_t> gpu, choose_gpu(options.device));
  if (gpu) {
    return load_on_gpu(path, options, *gpu);
  }
  RABIT_ASSIGN(const KernelTable* table, choose_kernels(options.kernels));
  RABIT_ASSIGN(auto model, load_on_host(path, options, *table));
  return std::shared_ptr<Model>(std::move(model));
}

Result<Linear> load_embedding(const LoadedModel& model) {
  return load_dense(*model.file, model.embedding->name,
                    {model.config.vocab_size, model.config.d_model},
                    model.cache == CacheFormat::kF32, *model.table, *model.pool);
}

Result<std::shared_ptr<LoadedModel>> load_on_host(const std::filesystem::path& path,
                                                  const EngineOptions& options,
                                                  const KernelTable& table) {
  constexpr int kMostThreads = 1024;
  if (options.threads < 0 || options.threads > kMostThreads) {
    return Error{"the number of threads must be 1 to " + std::to_string(kMostThreads) +
                 ", or 0 for all"};
  }
  auto model = std::make_shared<LoadedModel>();
  model->table = &table;
  RABIT_ASSIGN(model->file, GgufFile::open(path));
  const GgufFile& file = *model->file;
  RABIT_ASSIGN(model->config, read_model_config(file));
  const ModelConfig& config = model->config;
  if (config.head_dim > kMaxHeadDim || config.head_dim % 2 != 0 ||
      config.heads % config.kv_heads != 0) {
    return Error{path.string() + ": heads of " + std::to_string(config.head_dim) +
                 " are not supported: even, at most " + std::to_string(kMaxHeadDim)};
  }
  if (options.cache_q8_0 && config.head_dim % 32 != 0) {
    return Error{path.string() + ": a KV cache of Q8_0 needs heads of a multiple of 32, not " +
                 std::to_string(config.head_dim) + "; take F16"};
  }
  model->cache = options.dense_as_f32 ? CacheFormat::kF32
                 : options.cache_q8_0 ? CacheFormat::kQ8_0
                                      : CacheFormat::kF16;
  const int threads = options.threads == 0 ? usable_threads() : options.threads;
  model->pool = std::make_unique<ThreadPool>(threads);
  if (const int started = model->pool->size(); started < threads) {
    return Error{"only " + std::to_string(started) + " of " + std::to_string(threads) +
                 " threads can be started here; take fewer"};
  }

  const bool as_f32 = options.dense_as_f32;
  RABIT_ASSIGN(model->embedding,
               find(file, "token_embd.weight", {config.d_model, config.vocab_size}));
  std::vector<float> row(static_cast<size_t>(config.d_model));
  RABIT_CHECK(dequantize(*model->embedding, 0, row));  // its type can be read
  RABIT_ASSIGN(model->output_norm, load_norm(file, "output_norm.weight", config.d_model));
  const std::string head_name = config.tied_head ? "token_embd.weight" : "output.weight";
  RABIT_ASSIGN(model->head, load_dense(file, head_name, {config.vocab_size, config.d_model}, as_f32,
                                       *model->table, *model->pool));
  model->bytes_per_token = linear_bytes(model->head.weights);

  model->blocks.resize(static_cast<size_t>(config.layers));
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    RABIT_CHECK(check_interrupt());
    DecoderBlock& block = model->blocks[static_cast<size_t>(layer)];
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    RABIT_ASSIGN(block.attn_norm, load_norm(file, prefix + "attn_norm.weight", config.d_model));
    RABIT_ASSIGN(block.ffn_norm, load_norm(file, prefix + "ffn_norm.weight", config.d_model));
    for (const Role role : kRoles) {
      const std::string name = linear_name(layer, role);
      const LinearShape shape = linear_shape(config, role);
      Linear& linear = block.linears[static_cast<size_t>(role)];
      if (const TensorInfo* sign = file.find_tensor(name + ".sign"); sign != nullptr) {
        RABIT_ASSIGN(linear, load_packed(file, name, shape));
        RABIT_CHECK(arrange(linear, *model->table, file, *sign, *model->pool));
      } else {
        RABIT_ASSIGN(
            linear, load_dense(file, name + ".weight", shape, as_f32, *model->table, *model->pool));
      }
      model->bytes_per_token += linear_bytes(linear.weights);
    }
  }
  return model;
}

}  // namespace rabit
