// The coupled forward and what derives from it: gradients of the scales, packed signs, error.
// One definition of the sign rule, `peel`, serves all of them. Rows are independent, columns are
// the vectorized direction.

#include <algorithm>

#include "base/multiversion.h"
#include "quant/peel.h"
#include "quant/residual_binary.h"

namespace rabit::quant {
namespace {

constexpr int64_t kLanes = 16;  // partial sums a row reduction keeps, fixed so that results are too

template <int kPaths>
RABIT_MULTIVERSION void forward_rows(const Shape& s, const float* w, const float* g, const float* h,
                                     int64_t begin, int64_t end, float* __restrict out) {
  for (int64_t r = begin; r < end; ++r) {
    const float* row = w + r * s.d_in;
    float* out_row = out + r * s.d_in;
    for (int64_t c = 0; c < s.d_in; ++c) {
      float residual = row[c];
      float sum = peel(residual, g[r] * h[c]);
      for (int i = 1; i < kPaths; ++i) {
        sum += peel(residual, g[i * s.d_out + r] * h[i * s.d_in + c]);
      }
      out_row[c] = sum;
    }
  }
}

template <int kPaths>
RABIT_MULTIVERSION void backward_rows(const Shape& s, const float* w, const float* g,
                                      const float* h, const float* grad, int64_t begin, int64_t end,
                                      float* dg, float* __restrict dh) {
  for (int64_t r = begin; r < end; ++r) {
    const float* row = w + r * s.d_in;
    const float* grad_row = grad + r * s.d_in;
    float lanes[kPaths][kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= s.d_in; c += kLanes) {
      float residual[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        residual[l] = row[c + l];
      }
      for (int i = 0; i < kPaths; ++i) {
        const float gi = g[i * s.d_out + r];
        const float* hi = h + i * s.d_in + c;
        float* dhi = dh + i * s.d_in + c;
        for (int64_t l = 0; l < kLanes; ++l) {
          const float grad_here = grad_row[c + l];
          const float signed_grad = residual[l] < 0.0F ? -grad_here : grad_here;
          lanes[i][l] += signed_grad * hi[l];
          dhi[l] += signed_grad * gi;
          peel(residual[l], gi * hi[l]);
        }
      }
    }
    for (; c < s.d_in; ++c) {
      float residual = row[c];
      for (int i = 0; i < kPaths; ++i) {
        const float signed_grad = residual < 0.0F ? -grad_row[c] : grad_row[c];
        const float gi = g[i * s.d_out + r];
        const float hi = h[i * s.d_in + c];
        lanes[i][0] += signed_grad * hi;
        dh[i * s.d_in + c] += signed_grad * gi;
        peel(residual, gi * hi);
      }
    }
    for (int i = 0; i < kPaths; ++i) {
      float sum = 0.0F;
      for (const float lane : lanes[i]) {
        sum += lane;
      }
      dg[i * s.d_out + r] = sum;
    }
  }
}

}  // namespace

void coupled_forward(const Shape& shape, const float* w, const float* g, const float* h,
                     int64_t row_begin, int64_t row_end, float* w_hat) {
  using Rows =
      void (*)(const Shape&, const float*, const float*, const float*, int64_t, int64_t, float*);
  static constexpr Rows kByPaths[kMaxPaths] = {forward_rows<1>, forward_rows<2>, forward_rows<3>,
                                               forward_rows<4>};
  kByPaths[shape.paths - 1](shape, w, g, h, row_begin, row_end, w_hat);
}

void coupled_backward(const Shape& shape, const float* w, const float* g, const float* h,
                      const float* grad, int64_t row_begin, int64_t row_end, float* dg, float* dh) {
  using Rows = void (*)(const Shape&, const float*, const float*, const float*, const float*,
                        int64_t, int64_t, float*, float*);
  static constexpr Rows kByPaths[kMaxPaths] = {backward_rows<1>, backward_rows<2>, backward_rows<3>,
                                               backward_rows<4>};
  kByPaths[shape.paths - 1](shape, w, g, h, grad, row_begin, row_end, dg, dh);
}

std::vector<uint32_t> coupled_signs(const Shape& shape, const float* w, const Scales& scales) {
  const int64_t words = (shape.d_in + 31) / 32;
  std::vector<uint32_t> signs(static_cast<size_t>(shape.paths * shape.d_out * words), 0U);
  for (int64_t r = 0; r < shape.d_out; ++r) {
    for (int64_t c = 0; c < shape.d_in; ++c) {
      float residual = w[r * shape.d_in + c];
      for (int64_t i = 0; i < shape.paths; ++i) {
        if (!(residual < 0.0F)) {
          signs[(i * shape.d_out + r) * words + c / 32] |= 1U << (c % 32);
        }
        peel(residual, scales.g[i * shape.d_out + r] * scales.h[i * shape.d_in + c]);
      }
    }
  }
  return signs;
}

std::vector<float> reconstruct(const Shape& shape, std::span<const uint32_t> signs,
                               std::span<const float> g, std::span<const float> h) {
  const int64_t words = (shape.d_in + 31) / 32;
  std::vector<float> out(static_cast<size_t>(shape.d_out * shape.d_in), 0.0F);
  for (int64_t i = 0; i < shape.paths; ++i) {
    for (int64_t r = 0; r < shape.d_out; ++r) {
      for (int64_t c = 0; c < shape.d_in; ++c) {
        const float p = g[i * shape.d_out + r] * h[i * shape.d_in + c];
        const bool positive = (signs[(i * shape.d_out + r) * words + c / 32] >> (c % 32)) & 1U;
        out[r * shape.d_in + c] += positive ? p : -p;
      }
    }
  }
  return out;
}

double weighted_error(const Shape& shape, const float* w, const Scales& scales,
                      std::span<const float> s_out, std::span<const float> s_in) {
  std::vector<float> w_hat(static_cast<size_t>(shape.d_out * shape.d_in));
  coupled_forward(shape, w, scales.g.data(), scales.h.data(), 0, shape.d_out, w_hat.data());
  double total = 0.0;
  for (int64_t r = 0; r < shape.d_out; ++r) {
    double row = 0.0;
    for (int64_t c = 0; c < shape.d_in; ++c) {
      const double error = static_cast<double>(w[r * shape.d_in + c]) - w_hat[r * shape.d_in + c];
      const double weight = s_in.empty() ? 1.0 : s_in[c];
      row += error * error * weight * weight;
    }
    const double weight = s_out.empty() ? 1.0 : s_out[r];
    total += row * weight * weight;
  }
  return total;
}

}  // namespace rabit::quant
