// Tensors of the normal distribution that a seed repeats.
#pragma once

#include <ATen/ATen.h>

namespace rabit::train {

inline at::Tensor normal(at::IntArrayRef sizes, int64_t seed) {
  at::manual_seed(seed);
  return at::randn(sizes);
}

}  // namespace rabit::train
