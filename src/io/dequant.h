// ggml's block formats to float: one function per format, exact to the reference definition
// (ggml-quants.c): every product and sum in float32 in the order the format defines.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "io/gguf.h"

namespace rabit {

/// Elements [first, first + out.size()) of a tensor as float; both bounds multiples of the block
/// size. I32 is refused.
Status dequantize(const TensorInfo& tensor, int64_t first, std::span<float> out);

/// The whole tensor as float.
Result<std::vector<float>> dequantize(const TensorInfo& tensor);

}  // namespace rabit
