// Loading onto a GPU: the file is checked and read as for the CPU, in the file's order; then
// weights go over one after the other, and the device puts them in its own order. Dense weights of
// any type become F16.
#include "engine/gpu_model.h"

#include <algorithm>

#include "base/interrupt.h"
#include "engine/model.h"

namespace rabit {
namespace {

constexpr uint64_t kHalf = sizeof(uint16_t), kWord = sizeof(uint32_t);

bool is_packed(const LinearWeights& w) { return w.format == WeightFormat::kResidualBinary; }
bool is_blocks(const LinearWeights& w) {
  return w.format == WeightFormat::kQ8_0 || w.format == WeightFormat::kQ4_0;
}

uint64_t elements(const LinearWeights& w) {
  return static_cast<uint64_t>(w.d_out) * static_cast<uint64_t>(w.d_in);
}

/// Bytes as they lie on the host, without scales.
uint64_t host_bytes(const LinearWeights& w) {
  switch (w.format) {
    case WeightFormat::kResidualBinary:
      return static_cast<uint64_t>(w.paths * w.d_out * ((w.d_in + 31) / 32)) * kWord;
    case WeightFormat::kQ8_0:
      return elements(w) / 32 * 34;
    case WeightFormat::kQ4_0:
      return elements(w) / 32 * 18;
    default:
      return elements(w) * kHalf;
  }
}

/// How they lie on the device: what is in blocks as bytes, where rows are whole tiles of them.
gpu::Format device_format(const LinearWeights& w) {
  return is_packed(w)                                    ? gpu::Format::kResidualBinary
         : is_blocks(w) && w.d_in % gpu::kQ8Columns == 0 ? gpu::Format::kQ8_0
                                                         : gpu::Format::kF16;
}

/// Bytes on the device, without scales.
uint64_t device_bytes(const LinearWeights& w, gpu::Format format) {
  switch (format) {
    case gpu::Format::kResidualBinary:
      return static_cast<uint64_t>(gpu::sign_words(w.d_out, w.d_in, w.paths)) * kWord;
    case gpu::Format::kQ8_0:
      return elements(w);
    default:
      return elements(w) * kHalf;
  }
}

/// Sizes of `w` in this format in `linear`, and its arrays among `parts`; bytes that a token reads
/// of them.
uint64_t plan(const LinearWeights& w, gpu::Format format, gpu::Linear& linear, DeviceParts& parts) {
  linear = {.format = format,
            .d_out = static_cast<int32_t>(w.d_out),
            .d_in = static_cast<int32_t>(w.d_in),
            .paths = static_cast<int32_t>(w.paths)};
  parts.add_bytes(linear.weights, device_bytes(w, format));
  if (is_packed(w)) {
    parts.add(linear.row_scale, w.paths * w.d_out);
    parts.add(linear.col_scale, w.paths * w.d_in);
  }
  if (linear.format == gpu::Format::kQ8_0) {
    const uint64_t scales = elements(w) / 32;
    parts.add(linear.row_scale, static_cast<int64_t>(scales));
    return device_bytes(w, format) + scales * kHalf;
  }
  return device_bytes(w, format) + static_cast<uint64_t>(w.paths * (w.d_out + w.d_in)) * kHalf;
}

/// What was planned as a constant array is written once, here.
template <typename T>
T* writable(const T* pointer) {
  return const_cast<T*>(pointer);
}

/// staging: device memory for weights in the file's order, where they change.
Status upload(const LinearWeights& w, const gpu::Linear& linear, const gpu::Memory& staging,
              const gpu::Queue& queue) {
  void* const to = const_cast<void*>(linear.weights);
  if (is_packed(w)) {
    RABIT_CHECK(queue.upload(staging.as<void>(), w.signs, host_bytes(w)));
    RABIT_CHECK(gpu::tile_signs(w.d_out, w.d_in, w.paths, staging.as<uint32_t>(),
                                static_cast<uint32_t*>(to), queue.stream()));
    RABIT_CHECK(queue.upload(writable(linear.row_scale), w.row_scale,
                             static_cast<uint64_t>(w.paths * w.d_out) * kHalf));
    return queue.upload(writable(linear.col_scale), w.col_scale,
                        static_cast<uint64_t>(w.paths * w.d_in) * kHalf);
  }
  if (is_blocks(w)) {
    RABIT_CHECK(queue.upload(staging.as<void>(), w.dense, host_bytes(w)));
    if (linear.format == gpu::Format::kQ8_0) {
      return gpu::arrange_blocks(w.format, staging.as<void>(), static_cast<int64_t>(elements(w)),
                                 static_cast<int8_t*>(to), writable(linear.row_scale),
                                 queue.stream());
    }
    return gpu::unpack_blocks(w.format, staging.as<void>(), static_cast<int64_t>(elements(w)),
                              static_cast<uint16_t*>(to), queue.stream());
  }
  return queue.upload(to, w.dense, host_bytes(w));
}

Status upload_floats(const std::vector<float>& values, const float* to, const gpu::Queue& queue) {
  return queue.upload(writable(to), values.data(), values.size() * sizeof(float));
}

gpu::Linear& linear_of(gpu::Block& block, Role role) {
  switch (role) {
    case Role::kAttnQ:
      return block.q;
    case Role::kAttnK:
      return block.k;
    case Role::kAttnV:
      return block.v;
    case Role::kAttnOutput:
      return block.output;
    case Role::kFfnGate:
      return block.gate;
    case Role::kFfnUp:
      return block.up;
    case Role::kFfnDown:
      break;
  }
  return block.down;
}

Status check_options(const EngineOptions& options) {
  const char* of_cpu = options.dense_as_f32       ? "weights and sums in F32"
                       : !options.kernels.empty() ? "a choice of kernels"
                                                  : nullptr;
  if (of_cpu != nullptr) {
    return Error{std::string(of_cpu) + ": on the CPU alone, not on " + options.device};
  }
  return {};
}

/// Sizes that kernels take as 32-bit numbers.
Result<gpu::Sizes> sizes_of(const ModelConfig& config, const std::string& path) {
  constexpr int64_t kMost = INT32_MAX / 4;
  for (const int64_t size : {config.layers, config.d_model, config.d_ff, config.d_q(),
                             config.d_kv(), config.vocab_size}) {
    if (size > kMost) {
      return Error{path + ": a size of " + std::to_string(size) + " is too large for a GPU"};
    }
  }
  return gpu::Sizes{.layers = static_cast<int32_t>(config.layers),
                    .d_model = static_cast<int32_t>(config.d_model),
                    .d_ff = static_cast<int32_t>(config.d_ff),
                    .heads = static_cast<int32_t>(config.heads),
                    .kv_heads = static_cast<int32_t>(config.kv_heads),
                    .head_dim = static_cast<int32_t>(config.head_dim),
                    .vocab = static_cast<int32_t>(config.vocab_size),
                    .norm_epsilon = config.norm_epsilon};
}

}  // namespace

Error too_little_memory(const std::string& what, uint64_t needed, const gpu::DeviceInfo& device) {
  const auto mebibytes = [](uint64_t bytes) { return std::to_string((bytes + 1048575) >> 20); };
  return Error{what + " needs " + mebibytes(needed) + " MiB on " + device.label() + ", where " +
               mebibytes(device.free_bytes) + " of " + mebibytes(device.total_bytes) +
               " MiB are free"};
}

Result<std::shared_ptr<Model>> load_on_gpu(const std::filesystem::path& path,
                                           const EngineOptions& options, int32_t device) {
  RABIT_CHECK(check_options(options));
  auto model = std::make_shared<GpuModel>();
  model->byte_cache = options.cache_q8_0;
  RABIT_ASSIGN(model->info, gpu::use_device(device));
  // The reference takes all weights in the file's order: nothing is rearranged on the host.
  RABIT_ASSIGN(const std::shared_ptr<LoadedModel> host,
               load_on_host(path, options, reference_kernels()));
  const ModelConfig& config = model->config = host->config;
  RABIT_ASSIGN(model->sizes, sizes_of(config, path.string()));

  DeviceParts parts;
  uint64_t staging_bytes = 0;
  const auto plan_linear = [&](const LinearWeights& w, gpu::Format format, gpu::Linear& linear) {
    staging_bytes = std::max(staging_bytes, is_packed(w) || is_blocks(w) ? host_bytes(w) : 0);
    return plan(w, format, linear, parts);
  };
  const LinearWeights& head = host->head.weights;
  model->bytes_per_token = plan_linear(head, device_format(head), model->head);
  // Rows of the embedding are read as F16, so that a head of bytes has it beside.
  const bool shared = config.tied_head && model->head.format != gpu::Format::kQ8_0;
  Linear untied;
  if (!config.tied_head) {
    RABIT_ASSIGN(untied, load_embedding(*host));
  }
  const LinearWeights& embedding = config.tied_head ? head : untied.weights;
  gpu::Linear embedding_linear;
  if (!shared) {
    plan_linear(embedding, gpu::Format::kF16, embedding_linear);
  }
  parts.add(model->output_norm, config.d_model);
  model->blocks.resize(host->blocks.size());
  for (size_t i = 0; i < model->blocks.size(); ++i) {
    gpu::Block& block = model->blocks[i];
    parts.add(block.attn_norm, config.d_model);
    parts.add(block.ffn_norm, config.d_model);
    for (const Role role : kRoles) {
      const LinearWeights& w = host->blocks[i].at(role);
      model->bytes_per_token += plan_linear(w, device_format(w), linear_of(block, role));
    }
  }
  if (const uint64_t needed = parts.bytes() + staging_bytes; needed > model->info.free_bytes) {
    return too_little_memory(path.string(), needed, model->info);
  }
  RABIT_ASSIGN(model->weights, gpu::Memory::make(parts.bytes(), "weights"));
  RABIT_ASSIGN(const gpu::Memory staging, gpu::Memory::make(staging_bytes, "weights on their way"));
  parts.place(model->weights);

  RABIT_ASSIGN(const gpu::Queue queue, gpu::Queue::make());
  RABIT_CHECK(upload(head, model->head, staging, queue));
  if (!shared) {
    RABIT_CHECK(upload(embedding, embedding_linear, staging, queue));
  }
  model->embedding =
      static_cast<const uint16_t*>((shared ? model->head : embedding_linear).weights);
  RABIT_CHECK(upload_floats(host->output_norm, model->output_norm, queue));
  for (size_t i = 0; i < model->blocks.size(); ++i) {
    RABIT_CHECK(check_interrupt());
    gpu::Block& block = model->blocks[i];
    RABIT_CHECK(upload_floats(host->blocks[i].attn_norm, block.attn_norm, queue));
    RABIT_CHECK(upload_floats(host->blocks[i].ffn_norm, block.ffn_norm, queue));
    for (const Role role : kRoles) {
      Linear& linear = host->blocks[i].linears[static_cast<size_t>(role)];
      RABIT_CHECK(upload(linear.weights, linear_of(block, role), staging, queue));
      linear = {};  // uploaded: what the host had decoded for it goes
    }
  }
  RABIT_CHECK(queue.wait());
  for (const TensorInfo& tensor : host->file->tensors()) {
    host->file->release(tensor);
  }
  model->pool = std::move(host->pool);
  return std::shared_ptr<Model>(std::move(model));
}

Result<double> gpu_read_speed(const Model& model) {
  // Far more than any cache holds, or, beside a model that fills its GPU, still some more.
  constexpr uint64_t kBytes = uint64_t{1} << 30, kFewer = uint64_t{256} << 20;
  const auto* on_gpu = dynamic_cast<const GpuModel*>(&model);
  if (on_gpu == nullptr) {
    return Error{"the model is not on a GPU"};
  }
  RABIT_CHECK(gpu::activate(on_gpu->info.index));
  RABIT_ASSIGN(const gpu::Queue queue, gpu::Queue::make());
  if (const auto memory = gpu::Memory::make(kBytes, "a measurement of its speed"); memory) {
    return gpu::read_speed(queue, *memory);
  }
  RABIT_ASSIGN(const gpu::Memory memory, gpu::Memory::make(kFewer, "a measurement of its speed"));
  return gpu::read_speed(queue, memory);
}

}  // namespace rabit
