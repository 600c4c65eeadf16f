// The coupled form on a GPU. Pointers are of the device; matrices lie row by row without gaps.
#pragma once

#include <cstdint>

#include "train/cuda/types.h"

namespace rabit::cuda {

struct CoupledShape {
  int64_t d_out, d_in;
  int paths;  // 1 to 4
};

/// What = sum of the paths that W gives with scales g and h, as quant::coupled_forward, to the bit
/// before the rounding to bf16. w (d_out, d_in) float32, g (paths, d_out), h (paths, d_in), out
/// (d_out, d_in) float32 or bf16. One read of w, one write of out. False: the launch failed.
bool coupled_forward(const CoupledShape& shape, const float* w, const float* g, const float* h,
                     float* out, Stream stream);
bool coupled_forward(const CoupledShape& shape, const float* w, const float* g, const float* h,
                     Bf16* out, Stream stream);

/// The signs of all paths, packed as quant::coupled_signs packs them, (paths, d_out, words of 32
/// columns), in place of those that `packed` held; turned (paths, d_out): how many of a row differ.
bool coupled_signs(const CoupledShape& shape, const float* w, const float* g, const float* h,
                   uint32_t* packed, int32_t* turned, Stream stream);

/// Floats of scratch that coupled_backward needs.
int64_t coupled_backward_scratch(const CoupledShape& shape);

/// Gradients of the scales, as quant::coupled_backward but for the order of its sums, and the
/// straight-through gradient of w: `grad` (d_out, d_in), float32 or bf16, as float32 into dw where
/// dw is not null. dg (paths, d_out), dh (paths, d_in). One read of w and of grad. Sums have a
/// fixed order: equal inputs give equal bits.
bool coupled_backward(const CoupledShape& shape, const float* w, const float* g, const float* h,
                      const float* grad, float* dw, float* dg, float* dh, float* scratch,
                      Stream stream);
bool coupled_backward(const CoupledShape& shape, const float* w, const float* g, const float* h,
                      const Bf16* grad, float* dw, float* dg, float* dh, float* scratch,
                      Stream stream);

}  // namespace rabit::cuda
