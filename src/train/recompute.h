// Activation checkpointing (Chen et al., arXiv 1604.06174): a part of the network keeps its input
// alone and is computed again when its gradients are asked for.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace rabit::train {

/// body(x), whose graph is built only in the backward pass. `leaf`: one that body's result depends
/// on and that requires a gradient, for an x that does not. Gradients of leaves are added to
/// them there. The body must give the same bits again.
at::Tensor recomputed(std::function<at::Tensor(const at::Tensor&)> body, const at::Tensor& x,
                      const at::Tensor& leaf);

}  // namespace rabit::train
