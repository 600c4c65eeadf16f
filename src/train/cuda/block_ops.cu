// A warp takes a row in the norms: two passes over it, the second out of the cache. All else is
// element by element.

#include "train/cuda/block_ops.h"
#include "train/cuda/device.h"

namespace rabit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsOfBlock = kThreads / 32;
constexpr int kColumnRows = 64;  // rows that a thread sums for a norm's weight

dim3 grid_for(int64_t items, int64_t of_block) {
  return dim3(static_cast<unsigned>(ceil_divide(items, of_block)));
}
bool launched() { return cudaGetLastError() == cudaSuccess; }

template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    add_norm_kernel(int64_t rows, int64_t width, float epsilon, const float* x, const Bf16* delta,
                    const float* __restrict__ weight, float* sum, Bf16* __restrict__ y,
                    float* __restrict__ inverse_rms) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (row >= rows) {
    return;  // the whole warp
  }
  const int64_t start = row * width;
  float squares = 0.0F;
  for (int64_t c = lane * kWidth; c < width; c += 32 * kWidth) {
    Vector<kWidth> v = load<kWidth>(x + start + c);
    if (delta != nullptr) {
      const Vector<kWidth> d = load<kWidth>(delta + start + c);
#pragma unroll
      for (int l = 0; l < kWidth; ++l) {
        v.v[l] += d.v[l];
      }
      store<kWidth>(sum + start + c, v);
    }
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
      squares += v.v[l] * v.v[l];
    }
  }
  const float inverse = rsqrtf(warp_sum(squares) / static_cast<float>(width) + epsilon);
  if (lane == 0 && inverse_rms != nullptr) {
    inverse_rms[row] = inverse;
  }
  const float* from = delta != nullptr ? sum : x;
  for (int64_t c = lane * kWidth; c < width; c += 32 * kWidth) {
    Vector<kWidth> v = load<kWidth>(from + start + c);
    const Vector<kWidth> w = load<kWidth>(weight + c);
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
      v.v[l] = v.v[l] * inverse * w.v[l];
    }
    store<kWidth>(y + start + c, v);
  }
}

// With u = weight * d_y and r = inverse_rms: d = d_sum + r u - sum r^3 mean(u sum).
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    add_norm_backward_kernel(int64_t rows, int64_t width, const float* __restrict__ sum,
                             const float* __restrict__ inverse_rms,
                             const float* __restrict__ weight, const float* d_sum,
                             const Bf16* __restrict__ d_y, float* d, Bf16* __restrict__ d_delta) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (row >= rows) {
    return;
  }
  const int64_t start = row * width;
  float product = 0.0F;
  for (int64_t c = lane * kWidth; c < width; c += 32 * kWidth) {
    const Vector<kWidth> s = load<kWidth>(sum + start + c), g = load<kWidth>(d_y + start + c),
                         w = load<kWidth>(weight + c);
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
      product += s.v[l] * g.v[l] * w.v[l];
    }
  }
  const float r = inverse_rms[row];
  const float along = warp_sum(product) / static_cast<float>(width) * r * r * r;
  for (int64_t c = lane * kWidth; c < width; c += 32 * kWidth) {
    const Vector<kWidth> s = load<kWidth>(sum + start + c), g = load<kWidth>(d_y + start + c),
                         w = load<kWidth>(weight + c);
    Vector<kWidth> out{};
    if (d_sum != nullptr) {
      out = load<kWidth>(d_sum + start + c);
    }
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
      out.v[l] += r * g.v[l] * w.v[l] - s.v[l] * along;
    }
    store<kWidth>(d + start + c, out);
    if (d_delta != nullptr) {
      store<kWidth>(d_delta + start + c, out);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    norm_weight_kernel(int64_t rows, int64_t width, const float* __restrict__ sum,
                       const float* __restrict__ inverse_rms, const Bf16* __restrict__ d_y,
                       float* __restrict__ parts) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= width) {
    return;
  }
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kColumnRows;
  const int64_t last = first + kColumnRows < rows ? first + kColumnRows : rows;
  float total = 0.0F;
  for (int64_t r = first; r < last; ++r) {
    total += sum[r * width + column] * inverse_rms[r] * load<1>(d_y + r * width + column).v[0];
  }
  parts[static_cast<int64_t>(blockIdx.y) * width + column] = total;
}

__global__ void __launch_bounds__(kThreads)
    add_strips(int64_t strips, int64_t width, const float* __restrict__ parts,
               float* __restrict__ out) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column < width) {
    float total = 0.0F;
    for (int64_t i = 0; i < strips; ++i) {
      total += parts[i * width + column];
    }
    out[column] = total;
  }
}

// A thread takes a pair, or two that are neighbours.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    rotate_kernel(RotaryShape shape, const float* __restrict__ cos, const float* __restrict__ sin,
                  const Bf16* in, Bf16* out, float direction) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t of_token = shape.heads * shape.head_dim / kWidth;
  const int64_t token = item / of_token, feature = item % of_token * kWidth;
  if (token >= shape.tokens) {
    return;
  }
  const int64_t angle =
      token % shape.positions * (shape.head_dim / 2) + feature % shape.head_dim / 2;
  const Bf16* from = in + token * shape.in_stride + feature;
  Vector<kWidth> v;
  if constexpr (kWidth == 4) {
    v = load<4>(from);
  } else {
    v.v[0] = load<1>(from).v[0];
    v.v[1] = load<1>(from + 1).v[0];
  }
  Vector<kWidth> turned;
#pragma unroll
  for (int l = 0; l < kWidth; l += 2) {
    const float c = __ldg(cos + angle + l / 2), s = __ldg(sin + angle + l / 2) * direction;
    turned.v[l] = v.v[l] * c - v.v[l + 1] * s;
    turned.v[l + 1] = v.v[l] * s + v.v[l + 1] * c;
  }
  Bf16* to = out + token * shape.out_stride + feature;
  if constexpr (kWidth == 4) {
    store<4>(to, turned);
  } else {
    store<1>(to, Vector<1>{{turned.v[0]}});
    store<1>(to + 1, Vector<1>{{turned.v[1]}});
  }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0F / (1.0F + __expf(-x)); }

template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(int64_t rows, int64_t width, int64_t stride, const Bf16* __restrict__ gate,
                  const Bf16* __restrict__ up, Bf16* __restrict__ hidden) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t of_row = width / kWidth, row = item / of_row, c = item % of_row * kWidth;
  if (row >= rows) {
    return;
  }
  const Vector<kWidth> g = load<kWidth>(gate + row * stride + c),
                       u = load<kWidth>(up + row * stride + c);
  Vector<kWidth> out;
#pragma unroll
  for (int l = 0; l < kWidth; ++l) {
    out.v[l] = g.v[l] * sigmoid(g.v[l]) * u.v[l];
  }
  store<kWidth>(hidden + row * width + c, out);
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(int64_t rows, int64_t width, int64_t stride,
                           const Bf16* __restrict__ gate, const Bf16* __restrict__ up,
                           const Bf16* __restrict__ d_hidden, Bf16* __restrict__ d_gate,
                           Bf16* __restrict__ d_up) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t of_row = width / kWidth, row = item / of_row, c = item % of_row * kWidth;
  if (row >= rows) {
    return;
  }
  const Vector<kWidth> g = load<kWidth>(gate + row * stride + c),
                       u = load<kWidth>(up + row * stride + c),
                       d = load<kWidth>(d_hidden + row * width + c);
  Vector<kWidth> of_gate, of_up;
#pragma unroll
  for (int l = 0; l < kWidth; ++l) {
    const float s = sigmoid(g.v[l]);
    of_gate.v[l] = d.v[l] * u.v[l] * s * (1.0F + g.v[l] * (1.0F - s));
    of_up.v[l] = d.v[l] * g.v[l] * s;
  }
  store<kWidth>(d_gate + row * stride + c, of_gate);
  store<kWidth>(d_up + row * stride + c, of_up);
}

}  // namespace

bool add_norm(const NormShape& shape, const float* x, const Bf16* delta, const float* weight,
              float* sum, Bf16* y, float* inverse_rms, Stream stream) {
  const auto kernel = shape.width % 4 == 0 ? &add_norm_kernel<4> : &add_norm_kernel<1>;
  RABIT_LAUNCH(kernel, grid_for(shape.rows, kRowsOfBlock), dim3(kThreads), stream, shape.rows,
               shape.width, shape.epsilon, x, delta, weight, sum, y, inverse_rms);
  return launched();
}

bool add_norm_backward(const NormShape& shape, const float* sum, const float* inverse_rms,
                       const float* weight, const float* d_sum, const Bf16* d_y, float* d,
                       Bf16* d_delta, Stream stream) {
  const auto kernel =
      shape.width % 4 == 0 ? &add_norm_backward_kernel<4> : &add_norm_backward_kernel<1>;
  RABIT_LAUNCH(kernel, grid_for(shape.rows, kRowsOfBlock), dim3(kThreads), stream, shape.rows,
               shape.width, sum, inverse_rms, weight, d_sum, d_y, d, d_delta);
  return launched();
}

int64_t norm_weight_scratch(const NormShape& shape) {
  return ceil_divide(shape.rows, kColumnRows) * shape.width;
}

bool norm_weight_backward(const NormShape& shape, const float* sum, const float* inverse_rms,
                          const Bf16* d_y, float* d_weight, float* scratch, Stream stream) {
  const int64_t strips = ceil_divide(shape.rows, kColumnRows);
  const dim3 columns = grid_for(shape.width, kThreads);
  RABIT_LAUNCH(norm_weight_kernel, dim3(columns.x, static_cast<unsigned>(strips)), dim3(kThreads),
               stream, shape.rows, shape.width, sum, inverse_rms, d_y, scratch);
  RABIT_LAUNCH(add_strips, columns, dim3(kThreads), stream, strips, shape.width, scratch, d_weight);
  return launched();
}

bool rotate(const RotaryShape& shape, const float* cos, const float* sin, const Bf16* in, Bf16* out,
            bool back, Stream stream) {
  const bool wide =
      shape.head_dim % 4 == 0 && shape.in_stride % 4 == 0 && shape.out_stride % 4 == 0;
  const auto kernel = wide ? &rotate_kernel<4> : &rotate_kernel<2>;
  const int64_t items = shape.tokens * shape.heads * shape.head_dim / (wide ? 4 : 2);
  RABIT_LAUNCH(kernel, grid_for(items, kThreads), dim3(kThreads), stream, shape, cos, sin, in, out,
               back ? -1.0F : 1.0F);
  return launched();
}

bool swiglu(int64_t rows, int64_t width, int64_t stride, const Bf16* gate, const Bf16* up,
            Bf16* hidden, Stream stream) {
  const bool wide = width % 4 == 0 && stride % 4 == 0;
  const auto kernel = wide ? &swiglu_kernel<4> : &swiglu_kernel<1>;
  RABIT_LAUNCH(kernel, grid_for(rows * width / (wide ? 4 : 1), kThreads), dim3(kThreads), stream,
               rows, width, stride, gate, up, hidden);
  return launched();
}

bool swiglu_backward(int64_t rows, int64_t width, int64_t stride, const Bf16* gate, const Bf16* up,
                     const Bf16* d_hidden, Bf16* d_gate, Bf16* d_up, Stream stream) {
  const bool wide = width % 4 == 0 && stride % 4 == 0;
  const auto kernel = wide ? &swiglu_backward_kernel<4> : &swiglu_backward_kernel<1>;
  RABIT_LAUNCH(kernel, grid_for(rows * width / (wide ? 4 : 1), kThreads), dim3(kThreads), stream,
               rows, width, stride, gate, up, d_hidden, d_gate, d_up);
  return launched();
}

}  // namespace rabit::cuda
