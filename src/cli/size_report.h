// How large a model is, said the same way everywhere: bits per weight over the quantized layers,
// and bits per parameter over the whole file.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "io/gguf.h"
#include "model/config.h"
#include "rabit/result.h"

namespace rabit::cli {

/// The linear layers of one role, all blocks together.
struct RoleSize {
  std::string role;
  LinearShape shape;
  int64_t layers = 0;
  int64_t weights = 0;
  uint64_t bits = 0;
  int64_t paths = 0;  // 0: not packed; -1: differs between blocks
  std::string type;   // "packed", a tensor type, or "mixed"

  double bits_per_weight() const {
    return static_cast<double>(bits) / static_cast<double>(weights);
  }
};

struct SizeReport {
  uint64_t file_bytes = 0;
  uint64_t tensor_bytes = 0;
  int64_t parameters = 0;  // of the model: a packed layer counts as the d_out * d_in it stands for
  int64_t linear_weights = 0;  // in the linear layers of the blocks
  uint64_t linear_bits = 0;    // signs without padding + 16 a scale; a dense layer's stored bits
  int64_t packed_layers = 0;
  int64_t paths = 0;  // of the packed layers; 0: none is packed; -1: differs
  std::string type;   // as RoleSize::type, over all roles
  std::vector<RoleSize> roles;

  /// Over the linear layers of the blocks, the ones that quantization is about.
  double bits_per_weight() const {
    return static_cast<double>(linear_bits) / static_cast<double>(linear_weights);
  }
  /// Over the whole file: embedding, norms, metadata and tokenizer included.
  double file_bits_per_weight() const {
    return 8.0 * static_cast<double>(file_bytes) / static_cast<double>(parameters);
  }
};

/// Errors: a linear layer that is neither packed nor dense, or packed tensors of wrong extents.
Result<SizeReport> size_report(const GgufFile& file, const ModelConfig& config);

/// "llama 135M Q4_1", "llama 135M 2-path": architecture, size and how the linear layers are stored.
std::string model_label(const ModelConfig& config, const SizeReport& report);

/// Metadata as JSON; arrays longer than `max_items` become {"type", "length"}.
nlohmann::ordered_json meta_json(const MetaValue& value, size_t max_items);

/// One object as text with a newline at the end. Strings that are not UTF-8 are repaired.
std::string json_text(const nlohmann::ordered_json& json);

}  // namespace rabit::cli
