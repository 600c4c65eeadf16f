// What a decoder block does between its products: residual sums with RMSNorm, rotary positions,
// SwiGLU; forward and backward. Pointers are of the device, rows lie without gaps where no stride
// is given. Functions return false where the launch failed.
#pragma once

#include <cstdint>

#include "train/cuda/types.h"

namespace rabit::cuda {

/// Sizes of a norm: rows of `width` features.
struct NormShape {
  int64_t rows, width;
  float epsilon;
};

/// sum = x + delta and y = weight * sum / rms(sum), rms over a row with epsilon under the root
/// (Zhang and Sennrich, arXiv 1910.07467). x, sum (rows, width) float32, sum may be x itself; delta
/// (rows, width) bf16 or null: then sum is not written; weight (width); y (rows, width) bf16;
/// inverse_rms (rows) for the backward pass, or null.
bool add_norm(const NormShape& shape, const float* x, const Bf16* delta, const float* weight,
              float* sum, Bf16* y, float* inverse_rms, Stream stream);

/// d = d_sum + the gradient through y: of x and, rounded, of delta. sum and inverse_rms as add_norm
/// left them; d_sum (rows, width) or null for zeros, may be d itself; d_y (rows, width) bf16; d
/// (rows, width) float32; d_delta (rows, width) bf16 or null.
bool add_norm_backward(const NormShape& shape, const float* sum, const float* inverse_rms,
                       const float* weight, const float* d_sum, const Bf16* d_y, float* d,
                       Bf16* d_delta, Stream stream);

/// Floats of scratch for norm_weight_backward.
int64_t norm_weight_scratch(const NormShape& shape);

/// d_weight (width) = sum over rows of d_y * sum * inverse_rms, in a fixed order.
bool norm_weight_backward(const NormShape& shape, const float* sum, const float* inverse_rms,
                          const Bf16* d_y, float* d_weight, float* scratch, Stream stream);

/// Heads of queries or keys within wider rows.
struct RotaryShape {
  int64_t tokens, positions;      // token t stands at t % positions
  int64_t heads, head_dim;        // head_dim even
  int64_t in_stride, out_stride;  // elements from a token's first to the next one's
};

/// Turns the pairs (2i, 2i + 1) of every head by the token's angle i, back where `back` is set.
/// cos, sin (positions, head_dim / 2) float32; in, out bf16, may be the same. Su et al.,
/// arXiv 2104.09864.
bool rotate(const RotaryShape& shape, const float* cos, const float* sin, const Bf16* in, Bf16* out,
            bool back, Stream stream);

/// hidden = silu(gate) * up. gate, up: rows of `width` with `stride` elements from one to the next;
/// hidden (rows, width); all bf16.
bool swiglu(int64_t rows, int64_t width, int64_t stride, const Bf16* gate, const Bf16* up,
            Bf16* hidden, Stream stream);

/// Gradients of gate and up, in rows of the same stride, from d_hidden (rows, width).
bool swiglu_backward(int64_t rows, int64_t width, int64_t stride, const Bf16* gate, const Bf16* up,
                     const Bf16* d_hidden, Bf16* d_gate, Bf16* d_up, Stream stream);

}  // namespace rabit::cuda
