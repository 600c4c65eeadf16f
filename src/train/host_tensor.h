// Between tensors and what the torch-free parts hold: vectors of floats and tensors of a file.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "io/gguf.h"
#include "quant/residual_binary.h"
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

/// Extents of a tensor of packed signs, fastest first.
std::vector<int64_t> sign_extents(const quant::Shape& shape);

/// Packed signs as a tensor of int32 (k, d_out, ceil(d_in/32)) on the host, and back from one on
/// any device.
at::Tensor sign_word_tensor(const std::vector<uint32_t>& signs, const quant::Shape& shape);
std::vector<uint32_t> sign_words(const at::Tensor& signs);

/// Packed signs (k, d_out, ceil(d_in/32)) of a file. Errors: missing, other sizes, not of type I32.
Result<std::vector<uint32_t>> read_signs(const GgufFile& file, const std::string& name,
                                         const quant::Shape& shape);

}  // namespace rabit::train
