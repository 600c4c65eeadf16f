// Model configuration from GGUF metadata, checked against the tensors.
// After read_model_config has succeeded, every tensor that the forward pass needs exists with the
// extents that the configuration implies, no tensor is left whose meaning we would ignore, and all
// sizes are small enough that their pairwise products fit into int64_t.
#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <unordered_map>
#include <vector>

namespace rabit {
namespace {

constexpr std::string_view kArchitectures = "llama";

// Far above any model of today, low enough to keep arithmetic on sizes harmless.
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxWidth = int64_t{1} << 20;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxContext = int64_t{1} << 30;

Error fail(const GgufFile& file, const std::string& what) {
  return Error{file.path().string() + ": " + what};
}

/// An integer within [low, high]; `fallback` where the key is missing, if it is not 0.
Result<int64_t> read_size(const GgufFile& file, const std::string& key, int64_t low, int64_t high,
                          int64_t fallback = 0) {
  int64_t value = fallback;
  if (fallback == 0 || file.find_meta(key) != nullptr) {
    RABIT_ASSIGN(value, file.get_int(key));
  }
  if (value < low || value > high) {
    return fail(file, "key \"" + key + "\" is " + std::to_string(value) + ", it must be " +
                          std::to_string(low) + " to " + std::to_string(high));
  }
  return value;
}

/// A finite positive number; `fallback` where the key is missing, if it is not 0.
Result<float> read_positive(const GgufFile& file, const std::string& key, double fallback = 0) {
  double value = fallback;
  if (fallback == 0 || file.find_meta(key) != nullptr) {
    RABIT_ASSIGN(value, file.get_float(key));
  }
  const auto narrow = static_cast<float>(value);
  if (!std::isfinite(narrow) || !(narrow > 0)) {
    return fail(file, "key \"" + key + "\" is " + std::to_string(value) +
                          ", it must be a positive finite number");
  }
  return narrow;
}

/// Refuses every form of rotary scaling. A factor without a type means linear scaling to programs
/// that read such files.
Status refuse_rope_scaling(const GgufFile& file, const std::string& prefix) {
  const std::string type_key = prefix + "rope.scaling.type";
  if (file.find_meta(type_key) != nullptr) {
    RABIT_ASSIGN(const std::string type, file.get_string(type_key));
    if (type == "none") {
      return {};
    }
    return fail(file, "key \"" + type_key + "\" is " + quote_untrusted(type) +
                          ": rope scaling is not supported; use a model without it");
  }
  for (const char* name : {"rope.scaling.factor", "rope.scale_linear"}) {
    const std::string key = prefix + name;
    if (file.find_meta(key) != nullptr) {
      RABIT_ASSIGN(const double factor, file.get_float(key));
      if (factor != 0 && factor != 1) {
        return fail(file, "key \"" + key + "\" is " + std::to_string(factor) +
                              ": rope scaling is not supported; use a model without it");
      }
    }
  }
  return {};
}

Result<ModelConfig> read_sizes(const GgufFile& file) {
  ModelConfig config;
  RABIT_ASSIGN(config.architecture, file.get_string("general.architecture"));
  if (config.architecture != kArchitectures) {
    return fail(file, "architecture " + quote_untrusted(config.architecture) +
                          " is not known; known are: " + std::string(kArchitectures));
  }
  if (file.find_meta("general.name") != nullptr) {
    RABIT_ASSIGN(config.name, file.get_string("general.name"));
  }
  if (file.find_meta("rabit.format_version") != nullptr) {
    RABIT_ASSIGN(const int64_t version, file.get_int("rabit.format_version"));
    if (version != 1) {
      return fail(file, "key \"rabit.format_version\" is " + std::to_string(version) +
                            ", this program reads version 1; use a program that fits the file");
    }
  }
  const std::string prefix = config.architecture + ".";
  RABIT_ASSIGN(config.layers, read_size(file, prefix + "block_count", 1, kMaxLayers));
  RABIT_ASSIGN(config.d_model, read_size(file, prefix + "embedding_length", 1, kMaxWidth));
  RABIT_ASSIGN(config.d_ff, read_size(file, prefix + "feed_forward_length", 1, kMaxWidth));
  RABIT_ASSIGN(config.heads, read_size(file, prefix + "attention.head_count", 1, kMaxHeads));
  RABIT_ASSIGN(config.kv_heads,
               read_size(file, prefix + "attention.head_count_kv", 1, kMaxHeads, config.heads));
  if (config.heads % config.kv_heads != 0) {
    return fail(file, std::to_string(config.heads) + " attention heads cannot share " +
                          std::to_string(config.kv_heads) + " key-value heads evenly");
  }
  const std::string key_length = prefix + "attention.key_length";
  if (file.find_meta(key_length) == nullptr && config.d_model % config.heads != 0) {
    return fail(file, "key \"" + key_length + "\" is missing and embedding length " +
                          std::to_string(config.d_model) + " is not a multiple of " +
                          std::to_string(config.heads) + " heads");
  }
  RABIT_ASSIGN(config.head_dim,
               read_size(file, key_length, 1, kMaxHeadDim, config.d_model / config.heads));
  if (config.head_dim % 2 != 0) {
    return fail(file, "head dimension " + std::to_string(config.head_dim) +
                          " is odd; rotary positions need an even one");
  }
  for (const char* name : {"attention.value_length", "rope.dimension_count"}) {
    RABIT_ASSIGN(const int64_t value,
                 read_size(file, prefix + name, 1, kMaxHeadDim, config.head_dim));
    if (value != config.head_dim) {
      return fail(file, "key \"" + prefix + name + "\" is " + std::to_string(value) +
                            ", only the head dimension " + std::to_string(config.head_dim) +
                            " is supported");
    }
  }
  RABIT_ASSIGN(config.context_length, read_size(file, prefix + "context_length", 1, kMaxContext));
  RABIT_ASSIGN(config.norm_epsilon,
               read_positive(file, prefix + "attention.layer_norm_rms_epsilon"));
  RABIT_ASSIGN(config.rope_theta, read_positive(file, prefix + "rope.freq_base", 10000.0));
  RABIT_CHECK(refuse_rope_scaling(file, prefix));
  return config;
}

std::string extents_text(std::span<const int64_t> ne) {
  std::string text = "[";
  for (const int64_t extent : ne) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  }
  return text + "]";
}

/// Ticks off the tensors that the model needs; what is left over at the end is foreign.
class TensorCheck {
 public:
  /// packed_paths: of every packed layer, 0: as each has.
  TensorCheck(const GgufFile& file, int64_t packed_paths)
      : file_(file), packed_paths_(packed_paths) {
    for (const TensorInfo& tensor : file.tensors()) {
      left_.emplace(tensor.name, &tensor);
    }
  }

  const TensorInfo* find(const std::string& name) const {
    const auto it = left_.find(name);
    return it == left_.end() ? nullptr : it->second;
  }

  /// The tensor exists, holds numbers and has these extents; extents of 1 at the end may be left
  /// out, as some writers do.
  Status need(const std::string& name, std::initializer_list<int64_t> ne) {
    RABIT_ASSIGN(const TensorInfo* tensor, take(name, ne));
    if (tensor->type == TensorType::kI32) {
      return fail(file_, "tensor \"" + name + "\" is of type I32, it must be of a float type or " +
                             "quantized");
    }
    return {};
  }

  Status need_type(const std::string& name, std::initializer_list<int64_t> ne, TensorType type) {
    RABIT_ASSIGN(const TensorInfo* tensor, take(name, ne));
    if (tensor->type != type) {
      return fail(file_, "tensor \"" + name + "\" is of type " +
                             std::string(tensor_type_name(tensor->type)) + ", it must be " +
                             std::string(tensor_type_name(type)));
    }
    return {};
  }

  /// A linear layer, plain or packed.
  Status need_linear(const std::string& name, LinearShape shape) {
    const TensorInfo* sign = find(name + ".sign");
    if (sign == nullptr) {
      if (find(name + ".weight") == nullptr) {
        return fail(file_, "tensor \"" + name + ".weight\" is missing (and there is no \"" + name +
                               ".sign\" of a packed layer either)");
      }
      return need(name + ".weight", {shape.d_in, shape.d_out});
    }
    if (find(name + ".weight") != nullptr) {
      return fail(file_, "layer \"" + name + "\" is there twice: as .weight and packed as .sign");
    }
    const int64_t paths = sign->ne.size() > 2 ? sign->ne[2] : 1;
    if (paths > kMostPackedPaths) {
      return fail(file_, "tensor \"" + name + ".sign\" has " + std::to_string(paths) +
                             " paths, 1 to " + std::to_string(kMostPackedPaths) + " are supported");
    }
    if (packed_paths_ > 0 && paths != packed_paths_) {
      return fail(file_, "tensor \"" + name + ".sign\" has " + std::to_string(paths) +
                             " paths, key \"rabit.paths\" is " + std::to_string(packed_paths_));
    }
    RABIT_CHECK(
        need_type(name + ".sign", {(shape.d_in + 31) / 32, shape.d_out, paths}, TensorType::kI32));
    RABIT_CHECK(need_type(name + ".row_scale", {shape.d_out, paths}, TensorType::kF16));
    return need_type(name + ".col_scale", {shape.d_in, paths}, TensorType::kF16);
  }

  Status nothing_left() const {
    for (const TensorInfo& tensor : file_.tensors()) {  // in file order, for a steady message
      if (left_.count(tensor.name) == 0) {
        continue;
      }
      const bool rope = tensor.name.find("rope_freqs") != std::string::npos ||
                        tensor.name.find("rope_factors") != std::string::npos;
      return fail(file_, "tensor " + quote_untrusted(tensor.name) +
                             (rope ? ": rope scaling is not supported; use a model without it"
                                   : " has no place in this architecture; a variant that needs it "
                                     "is not supported"));
    }
    return {};
  }

 private:
  Result<const TensorInfo*> take(const std::string& name, std::span<const int64_t> ne) {
    const auto it = left_.find(name);
    if (it == left_.end()) {
      return fail(file_, "tensor \"" + name + "\" is missing");
    }
    const TensorInfo* tensor = it->second;
    for (size_t i = 0; i < std::max(ne.size(), tensor->ne.size()); ++i) {
      const int64_t wanted = i < ne.size() ? ne[i] : 1;
      const int64_t found = i < tensor->ne.size() ? tensor->ne[i] : 1;
      if (wanted != found) {
        return fail(file_, "tensor \"" + name + "\" has extents " + extents_text(tensor->ne) +
                               ", the configuration needs " + extents_text(ne));
      }
    }
    left_.erase(it);
    return tensor;
  }

  const GgufFile& file_;
  const int64_t packed_paths_;
  std::unordered_map<std::string_view, const TensorInfo*> left_;
};

}  // namespace

std::string role_name(Role role) {
  switch (role) {
    case Role::kAttnQ:
      return "attn_q";
    case Role::kAttnK:
      return "attn_k";
    case Role::kAttnV:
      return "attn_v";
    case Role::kAttnOutput:
      return "attn_output";
    case Role::kFfnGate:
      return "ffn_gate";
    case Role::kFfnUp:
      return "ffn_up";
    case Role::kFfnDown:
      return "ffn_down";
  }
  return {};
}

LinearShape linear_shape(const ModelConfig& config, Role role) {
  switch (role) {
    case Role::kAttnQ:
      return {config.d_q(), config.d_model};
    case Role::kAttnK:
    case Role::kAttnV:
      return {config.d_kv(), config.d_model};
    case Role::kAttnOutput:
      return {config.d_model, config.d_q()};
    case Role::kFfnGate:
    case Role::kFfnUp:
      return {config.d_ff, config.d_model};
    case Role::kFfnDown:
      return {config.d_model, config.d_ff};
  }
  return {};
}

std::string linear_name(int64_t layer, Role role) {
  return "blk." + std::to_string(layer) + "." + role_name(role);
}

Result<ModelConfig> read_model_config(const GgufFile& file) {
  RABIT_ASSIGN(ModelConfig config, read_sizes(file));
  int64_t packed_paths = 0;
  if (const char* key = "rabit.paths"; file.find_meta(key) != nullptr) {
    RABIT_ASSIGN(packed_paths, read_size(file, key, 1, kMostPackedPaths));
  }
  TensorCheck check(file, packed_paths);
  const TensorInfo* embedding = check.find("token_embd.weight");
  if (embedding == nullptr) {
    return fail(file, "tensor \"token_embd.weight\" is missing");
  }
  config.vocab_size = embedding->ne.size() > 1 ? embedding->ne[1] : 1;
  if (config.vocab_size > kMaxVocab) {
    return fail(file, "tensor \"token_embd.weight\" has " + std::to_string(config.vocab_size) +
                          " rows, the limit for a vocabulary is " + std::to_string(kMaxVocab));
  }
  RABIT_ASSIGN(const int64_t said, read_size(file, config.architecture + ".vocab_size", 1,
                                             kMaxVocab, config.vocab_size));
  if (said != config.vocab_size) {
    return fail(file, "key \"" + config.architecture + ".vocab_size\" is " + std::to_string(said) +
                          ", tensor \"token_embd.weight\" has " +
                          std::to_string(config.vocab_size) + " rows");
  }
  RABIT_CHECK(check.need("token_embd.weight", {config.d_model, config.vocab_size}));
  RABIT_CHECK(check.need("output_norm.weight", {config.d_model}));
  config.tied_head = check.find("output.weight") == nullptr;
  if (!config.tied_head) {
    RABIT_CHECK(check.need("output.weight", {config.d_model, config.vocab_size}));
  }
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const std::string block = "blk." + std::to_string(layer) + ".";
    RABIT_CHECK(check.need(block + "attn_norm.weight", {config.d_model}));
    RABIT_CHECK(check.need(block + "ffn_norm.weight", {config.d_model}));
    for (const Role role : kRoles) {
      RABIT_CHECK(check.need_linear(linear_name(layer, role), linear_shape(config, role)));
    }
  }
  RABIT_CHECK(check.nothing_left());
  return config;
}

}  // namespace rabit
