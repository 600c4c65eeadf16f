// Models of well-known shapes with random signs: to measure speed and memory where no such
// model is at hand. Their text means nothing.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "model/config.h"
#include "rabit/result.h"

namespace rabit {

/// "llama2-7b" and so on. Errors: a name that is not known, with those that are.
Result<ModelConfig> named_shape(std::string_view name);
std::string shape_names();  ///< with commas between

/// Writes a packed model: linear layers of `paths` paths (1 to 4), embedding and head in Q8_0, no
/// tokenizer; paths 0: all of these in F16. Scales are of a size that keeps activations near 1.
/// Errors: those of GgufWriter, a width that is no multiple of 32.
Status write_random_model(const std::filesystem::path& path, const ModelConfig& config,
                          int64_t paths);

}  // namespace rabit
