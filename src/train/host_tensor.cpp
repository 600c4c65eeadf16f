#include "train/host_tensor.h"

#include <ATen/ATen.h>

#include <algorithm>

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

}  // namespace rabit::train
