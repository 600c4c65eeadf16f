// How many signs a training turns from one look to the next.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "train/fake_quant.h"

namespace rabit::train {

class SignWatch {
 public:
  /// Looks for the first time. The student's tensors must stay.
  explicit SignWatch(const Student& student);

  /// Share of all signs of all layers and paths, over all processes, that differ from those at the
  /// last look.
  double turned();

 private:
  const Student& student_;
  std::vector<at::Tensor> packed_;  // by block, role and latent: (k, d_out, words) int32
  int64_t signs_ = 0;               // of this process
};

}  // namespace rabit::train
