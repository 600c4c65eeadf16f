// Residual binarization of one linear layer: the mathematics, on plain spans.
//
//   What = sum over paths i of diag(g_i) B_i diag(h_i),  B_i in {-1, +1}   (d_out, d_in)
//   R_0 = W;  B_i = sign(R_{i-1}), sign(0) = sign(-0) = +1;  R_i = R_{i-1} - diag(g_i) B_i
//   diag(h_i)
//
// All matrices are row-major; scales are stored path after path: g is (k, d_out), h is (k, d_in).
// Every product g*h is rounded to float before it is added (no fused multiply-add), so that the
// same signs come out wherever this is mirrored.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rabit/result.h"

namespace rabit {
class ThreadPool;
}

namespace rabit::quant {

inline constexpr int64_t kMaxPaths = 4;

struct Shape {
  int64_t d_out = 0;
  int64_t d_in = 0;
  int64_t paths = 0;
};

/// Row and column scales of all paths.
struct Scales {
  std::vector<float> g;  // (k, d_out)
  std::vector<float> h;  // (k, d_in)
};

/// Coupled forward: What (d_out, d_in) from the latent W (d_out, d_in), rows [row_begin, row_end).
void coupled_forward(const Shape& shape, const float* w, const float* g, const float* h,
                     int64_t row_begin, int64_t row_end, float* w_hat);

/// Gradients of the scales for given upstream gradient G = dL/dWhat, signs held:
///   dg_i = (G * B_i) h_i,  dh_i += (G * B_i)^T g_i   over rows [row_begin, row_end).
/// dg rows are overwritten, dh is added to: give each thread its own.
void coupled_backward(const Shape& shape, const float* w, const float* g, const float* h,
                      const float* grad, int64_t row_begin, int64_t row_end, float* dg, float* dh);

/// Signs of the coupled forward packed as the file stores them: (k, d_out, ceil(d_in/32)) words,
/// bit j of word c: column 32c+j, 1 = +1; padding bits 0.
std::vector<uint32_t> coupled_signs(const Shape& shape, const float* w, const Scales& scales);

/// What from packed signs and scales, in the order of the paths. (d_out, d_in)
std::vector<float> reconstruct(const Shape& shape, std::span<const uint32_t> signs,
                               std::span<const float> g, std::span<const float> h);

/// Importance-weighted squared error sum_rc (s_out_r s_in_c (W - What)_rc)^2 in double. Empty spans
/// stand for all ones.
double weighted_error(const Shape& shape, const float* w, const Scales& scales,
                      std::span<const float> s_out, std::span<const float> s_in);

struct InitOptions {
  int64_t sweeps = 8;      // Gauss-Seidel sweeps of SVID over the paths; 1 = greedy SVID's order
  int64_t als_steps = 12;  // alternating least-squares refits of the scales under the coupled signs
};

/// Scales for W (d_out, d_in) that minimise weighted_error under the coupled forward's own signs:
/// greedy and Gauss-Seidel SVID, then alternating least squares; the best seen is kept, so the
/// result is never worse than plain (greedy) SVID. Importances must be positive; empty = ones.
/// docs/training.md, "Phase 1".
Scales fit_scales(const Shape& shape, const float* w, std::span<const float> s_out,
                  std::span<const float> s_in, const InitOptions& options, ThreadPool& pool);

/// Plain greedy SVID: path after path, the rank-1 factor of the residual's magnitude
/// (Xu et al., OneBit, arXiv 2402.11295, section 3.2).
Scales svid(const Shape& shape, const float* w);

/// Scales of round-to-nearest at 2 bits, one step size s a row: g = (s, s/2), h = 1, so that the
/// coupled rule gives the levels -3/2 s, -s/2, s/2, 3/2 s. s has the least squared error of a grid
/// up to the largest weight of the row. The start of DB-LLM (Chen et al., arXiv 2402.11960) without
/// its offset of s/2, which our levels do not have.
Scales two_bit_scales(int64_t d_out, int64_t d_in, const float* w);

/// Error feedback (docs/training.md). Goes through the columns in order, rounds each to its level
/// by the coupled sign rule under fixed scales, and pushes the error onto the columns still open.
/// w (d_out, d_in) is replaced by the latent: each column as it stood when it was rounded, so that
/// coupled_forward derives exactly the levels chosen. `u` (d_in, d_in): upper Cholesky factor of
/// the inverse of the damped second moment H of the inputs.
void error_feedback(const Shape& shape, float* w, const Scales& scales, const float* u,
                    ThreadPool& pool);

/// Coordinate descent on tr((T - What) H (T - What)^T), one weight after another, signs free and
/// scales held: `sweeps` passes over the columns of every row. `moment` is H (d_in, d_in),
/// symmetric, `product` (T - What) H (d_out, d_in), kept up to date. A weight whose best value, all
/// others held, has another level under the coupled rule gets that value as its latent in w (d_out,
/// d_in) if that lowers the objective; the others stay as they are. Returns how many changes were
/// made.
int64_t coordinate_descent(const Shape& shape, const float* moment, const Scales& scales,
                           int64_t sweeps, float* product, float* w, ThreadPool& pool);

/// Makes coupled_forward derive `signs` (k, d_out, ceil(d_in/32)) under `scales` again after the
/// scales have changed: where it would not, the latent in w (d_out, d_in) becomes the level that
/// the signs stand for, or the middle of the latents that give them. Signs that no latent gives
/// (three paths and more, a later one larger than an earlier one) are left as they come. Returns
/// how many are.
int64_t settle(const Shape& shape, std::span<const uint32_t> signs, const Scales& scales, float* w);

/// Moves every latent in w (d_out, d_in) as near to `original` (d_out, d_in) as it can go without
/// another sign, and `margin` of the last path's magnitude less (half way between the bounds at
/// most).
void draw_towards(const Shape& shape, const float* original, const Scales& scales, float margin,
                  float* w);

/// One layer as the file stores it.
struct PackedLinear {
  Shape shape;
  std::vector<uint32_t> signs;      // (k, d_out, ceil(d_in/32))
  std::vector<uint16_t> row_scale;  // F16 (k, d_out)
  std::vector<uint16_t> col_scale;  // F16 (k, d_in)
};

/// Signs (k, d_out, ceil(d_in/32)) as they are, scales rounded to F16 after a power of two is moved
/// between g_i and h_i so that the largest of both are of one size: as far from F16's largest
/// value, and as many scales from its subnormals, as can be. Errors: a scale that is not finite or
/// cannot be held.
Result<PackedLinear> pack(const Shape& shape, std::vector<uint32_t> signs, const Scales& scales);

/// Bits that a packed layer takes: signs without padding, and 16 a scale.
int64_t packed_bits(const Shape& shape);

}  // namespace rabit::quant
