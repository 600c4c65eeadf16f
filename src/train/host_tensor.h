// Between tensors and what the torch-free parts hold: vectors of floats and tensors of a file.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "io/gguf.h"
#include "rabit/result.h"

namespace rabit::train {

/// The values in row-major order, as float32.
std::vector<float> to_vector(const at::Tensor& tensor);

/// The reverse: a float32 tensor on the host.
at::Tensor to_tensor(const std::vector<float>& values, at::IntArrayRef sizes);

/// A tensor of a file, dequantized to float32 on the host; `sizes` slowest first. Errors: missing,
/// other sizes, a type that cannot be read.
Result<at::Tensor> read_tensor(const GgufFile& file, const std::string& name,
                               at::IntArrayRef sizes);

}  // namespace rabit::train
