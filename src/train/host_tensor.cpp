#include "train/host_tensor.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "io/dequant.h"

namespace rabit::train {

std::vector<float> to_vector(const at::Tensor& tensor) {
  const at::Tensor host = tensor.detach().to(at::kCPU, at::kFloat).contiguous();
  const float* data = host.const_data_ptr<float>();
  return {data, data + host.numel()};
}

at::Tensor to_tensor(const std::vector<float>& values, at::IntArrayRef sizes) {
  at::Tensor tensor = at::empty(sizes, at::kFloat);
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<float>());
  return tensor;
}

Result<at::Tensor> read_tensor(const GgufFile& file, const std::string& name,
                               at::IntArrayRef sizes) {
  const std::vector<int64_t> ne(sizes.rbegin(), sizes.rend());
  RABIT_ASSIGN(const TensorInfo* info, file.get_tensor(name, ne));
  at::Tensor tensor = at::empty(sizes, at::kFloat);
  RABIT_CHECK(dequantize(
      *info, 0, std::span(tensor.mutable_data_ptr<float>(), static_cast<size_t>(tensor.numel()))));
  return tensor;
}

std::vector<int64_t> sign_extents(const quant::Shape& shape) {
  return {(shape.d_in + 31) / 32, shape.d_out, shape.paths};
}

at::Tensor sign_word_tensor(const std::vector<uint32_t>& signs, const quant::Shape& shape) {
  const at::Tensor out = at::empty({shape.paths, shape.d_out, (shape.d_in + 31) / 32}, at::kInt);
  std::memcpy(out.mutable_data_ptr(), signs.data(), signs.size() * sizeof(uint32_t));
  return out;
}

std::vector<uint32_t> sign_words(const at::Tensor& signs) {
  const at::Tensor own = signs.to(at::kCPU).contiguous();
  const auto* words = static_cast<const uint32_t*>(own.const_data_ptr());
  return {words, words + own.numel()};
}

Result<std::vector<uint32_t>> read_signs(const GgufFile& file, const std::string& name,
                                         const quant::Shape& shape) {
  RABIT_ASSIGN(const TensorInfo* tensor, file.get_tensor(name, sign_extents(shape)));
  if (tensor->type != TensorType::kI32) {
    return Error{file.path().string() + ": tensor " + name + " is not of type I32"};
  }
  std::vector<uint32_t> words(tensor->data.size() / sizeof(uint32_t));
  std::memcpy(words.data(), tensor->data.data(), tensor->data.size());
  return words;
}

}  // namespace rabit::train
