// A block of threads holds a strip of columns and goes down some of its rows, so that the column
// scales and the sums over rows stay in registers; sums over columns meet in the warp, eight rows
// at a time.

#include "train/cuda/coupled.h"
#include "train/cuda/device.h"

namespace rabit::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kGroup = 8;         // rows whose sums over columns are reduced together
constexpr int kAhead = 4;         // rows that are on their way from memory; divides kGroup
constexpr int kProcessors = 132;  // an H200's; elsewhere the last blocks leave some idle

// How a matrix is cut into blocks of threads.
struct Tiling {
  int width;        // columns of a thread
  int rows;         // of a block, a multiple of kGroup
  int64_t columns;  // blocks side by side
  int64_t strips;   // blocks one below the other
};

// About `blocks` blocks of at most `most_rows` rows each.
Tiling tiling_of(const CoupledShape& shape, int64_t blocks, int64_t most_rows) {
  Tiling tiling;
  tiling.width = shape.d_in % 4 == 0 ? 4 : 1;
  tiling.columns = ceil_divide(shape.d_in, int64_t{kThreads} * tiling.width);
  const int64_t wanted = ceil_divide(shape.d_out * tiling.columns, blocks);
  const int64_t rows = ceil_divide(wanted, kGroup) * kGroup;
  tiling.rows = static_cast<int>(rows < most_rows ? rows : most_rows);
  tiling.strips = ceil_divide(shape.d_out, tiling.rows);
  return tiling;
}

// The gradient needs registers by paths: so many blocks go on a multiprocessor, and all are to run
// at once, for a second round would leave most of the GPU idle.
constexpr int resident_blocks(int paths) {
  return paths == 1 ? 9 : paths == 2 ? 7 : paths == 3 ? 5 : 4;
}

Tiling forward_tiling(const CoupledShape& shape) { return tiling_of(shape, 8 * kProcessors, 64); }
Tiling backward_tiling(const CoupledShape& shape) {
  return tiling_of(shape, int64_t{kProcessors} * resident_blocks(shape.paths), 1024);
}

// As quant::peel: takes a path's level off the residual, each operation rounded on its own.
__device__ __forceinline__ float peel(float& residual, float p) {
  const float level = residual < 0.0F ? -p : p;
  residual = __fsub_rn(residual, level);
  return level;
}

template <int kPaths, int kWidth, typename Out>
__global__ void __launch_bounds__(kThreads)
    forward(int64_t d_out, int64_t d_in, int rows, const float* __restrict__ w,
            const float* __restrict__ g, const float* __restrict__ h, Out* __restrict__ out) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (column >= d_in) {
    return;
  }
  Vector<kWidth> hs[kPaths];
#pragma unroll
  for (int i = 0; i < kPaths; ++i) {
    hs[i] = load<kWidth>(h + i * d_in + column);
  }
  const int64_t first = static_cast<int64_t>(blockIdx.y) * rows;
  const int64_t last = first + rows < d_out ? first + rows : d_out;
#pragma unroll 4
  for (int64_t r = first; r < last; ++r) {
    Vector<kWidth> residual = load<kWidth>(w + r * d_in + column), sum{};
#pragma unroll
    for (int i = 0; i < kPaths; ++i) {
      const float row_scale = __ldg(g + i * d_out + r);
#pragma unroll
      for (int l = 0; l < kWidth; ++l) {
        const float level = peel(residual.v[l], __fmul_rn(row_scale, hs[i].v[l]));
        sum.v[l] = i == 0 ? level : __fadd_rn(sum.v[l], level);
      }
    }
    store<kWidth>(out + r * d_in + column, sum);
  }
}

constexpr int kSignThreads = 256;

// A warp goes along a row, a word of 32 columns at a time. packed (paths, d_out, words), turned
// (paths, d_out).
template <int kPaths>
__global__ void __launch_bounds__(kSignThreads)
    pack_signs(int64_t d_out, int64_t d_in, const float* __restrict__ w,
               const float* __restrict__ g, const float* __restrict__ h,
               uint32_t* __restrict__ packed, int32_t* __restrict__ turned) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * (kSignThreads / 32) + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (r >= d_out) {
    return;
  }
  const int64_t words = (d_in + 31) / 32;
  int32_t changed[kPaths] = {};
  for (int64_t word = 0; word < words; ++word) {
    const int64_t column = word * 32 + lane;
    const bool inside = column < d_in;
    float residual = inside ? w[r * d_in + column] : 0.0F;
#pragma unroll
    for (int i = 0; i < kPaths; ++i) {
      const uint32_t now = __ballot_sync(0xFFFFFFFFU, inside && !(residual < 0.0F));
      if (inside) {
        peel(residual, __fmul_rn(__ldg(g + i * d_out + r), h[i * d_in + column]));
      }
      uint32_t* at = packed + (i * d_out + r) * words + word;
      if (lane == 0) {
        changed[i] += __popc(*at ^ now);
        *at = now;
      }
    }
  }
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kPaths; ++i) {
      turned[i * d_out + r] = changed[i];
    }
  }
}

// Sums each of kGroup values over the warp; lane l gets the sum of value l % kGroup. Half of the
// values change lanes in every step, so that eight sums cost little more than one.
__device__ __forceinline__ float sum_group(float (&v)[kGroup]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int half = kGroup / 2; half >= 1; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const float given = upper ? v[j] : v[j + half];
      const float kept = upper ? v[j + half] : v[j];
      v[j] = kept + __shfl_xor_sync(0xFFFFFFFFU, given, half);
    }
  }
  float sum = v[0];
#pragma unroll
  for (int step = kGroup; step < 32; step *= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFFU, sum, step);
  }
  return sum;
}

// dg_parts (columns of blocks, paths, d_out), dh_parts (strips, paths, d_in).
template <int kPaths, int kWidth, typename In>
__global__ void __launch_bounds__(kThreads, resident_blocks(kPaths))
    backward(int64_t d_out, int64_t d_in, int rows, const float* __restrict__ w,
             const float* __restrict__ g, const float* __restrict__ h, const In* __restrict__ grad,
             float* __restrict__ dw, float* __restrict__ dg_parts, float* __restrict__ dh_parts) {
  __shared__ float row_sums[kWarps][kPaths][kGroup];
  alignas(16) __shared__ float next_w[kAhead][kThreads * kWidth];
  alignas(16) __shared__ In next_grad[kAhead][kThreads * kWidth];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  const bool inside = column < d_in;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  Vector<kWidth> hs[kPaths], dh[kPaths];
#pragma unroll
  for (int i = 0; i < kPaths; ++i) {
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
      hs[i].v[l] = dh[i].v[l] = 0.0F;
    }
    if (inside) {
      hs[i] = load<kWidth>(h + i * d_in + column);
    }
  }
  const int64_t first = static_cast<int64_t>(blockIdx.y) * rows;
  const int64_t last = first + rows < d_out ? first + rows : d_out;
  // Every thread copies for itself alone, some rows ahead. Beyond the last column and row it gets
  // others' values, and their scales are 0.
  const int64_t from = inside ? column : 0;
  const auto fetch = [&](int64_t row) {
    const int64_t r = row < last ? row : last - 1;
    const auto slot = static_cast<int>((row - first) % kAhead);
    copy_async<kWidth>(&next_w[slot][thread * kWidth], w + r * d_in + from);
    copy_async<kWidth>(&next_grad[slot][thread * kWidth], grad + r * d_in + from);
    commit_copies();
  };
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    fetch(first + j);
  }
  for (int64_t begin = first; begin < last; begin += kGroup) {
    float sums[kPaths][kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int64_t r = begin + j;
      wait_for_copies<kAhead - 1>();
      Vector<kWidth> residual = load<kWidth>(&next_w[j % kAhead][thread * kWidth]);
      const Vector<kWidth> d = load<kWidth>(&next_grad[j % kAhead][thread * kWidth]);
      fetch(r + kAhead);
      if (dw != nullptr && inside && r < last) {
        store<kWidth>(dw + r * d_in + column, d);
      }
#pragma unroll
      for (int i = 0; i < kPaths; ++i) {
        const float row_scale = r < last ? __ldg(g + i * d_out + r) : 0.0F;
        float sum = 0.0F;
#pragma unroll
        for (int l = 0; l < kWidth; ++l) {
          const float signed_grad = residual.v[l] < 0.0F ? -d.v[l] : d.v[l];
          sum += signed_grad * hs[i].v[l];
          dh[i].v[l] += signed_grad * row_scale;
          peel(residual.v[l], __fmul_rn(row_scale, hs[i].v[l]));
        }
        sums[i][j] = sum;
      }
    }
#pragma unroll
    for (int i = 0; i < kPaths; ++i) {
      const float sum = sum_group(sums[i]);
      if (lane < kGroup) {
        row_sums[warp][i][lane] = sum;
      }
    }
    __syncthreads();
    for (int t = thread; t < kPaths * kGroup; t += kThreads) {
      const int i = t / kGroup, j = t % kGroup;
      if (begin + j < last) {
        float sum = 0.0F;
#pragma unroll
        for (int k = 0; k < kWarps; ++k) {
          sum += row_sums[k][i][j];
        }
        dg_parts[(static_cast<int64_t>(blockIdx.x) * kPaths + i) * d_out + begin + j] = sum;
      }
    }
    __syncthreads();
  }
  if (inside) {
#pragma unroll
    for (int i = 0; i < kPaths; ++i) {
      store<kWidth>(dh_parts + (static_cast<int64_t>(blockIdx.y) * kPaths + i) * d_in + column,
                    dh[i]);
    }
  }
}

constexpr int kAddColumns = 32;  // of a block of threads, each summed by
constexpr int kAddLanes = 8;     // so many threads

// out (size) = the sum of parts (count, size) over their first extent.
struct Parts {
  const float* parts;
  int64_t count, size;
  float* out;
};

// Sums two of them, each in one order whatever the GPU does: the first by `first_blocks` blocks of
// threads, the second by the others.
__global__ void __launch_bounds__(kAddColumns* kAddLanes)
    add_parts(Parts first, Parts second, unsigned first_blocks) {
  __shared__ float sums[kAddLanes][kAddColumns];
  const bool of_first = blockIdx.x < first_blocks;
  const Parts given = of_first ? first : second;
  const unsigned block = of_first ? blockIdx.x : blockIdx.x - first_blocks;
  const int column = static_cast<int>(threadIdx.x) % kAddColumns;
  const int lane = static_cast<int>(threadIdx.x) / kAddColumns;
  const int64_t j = static_cast<int64_t>(block) * kAddColumns + column;
  float sum = 0.0F;
  if (j < given.size) {
#pragma unroll 8
    for (int64_t part = lane; part < given.count; part += kAddLanes) {
      sum += given.parts[part * given.size + j];
    }
  }
  sums[lane][column] = sum;
  __syncthreads();
  if (lane == 0 && j < given.size) {
#pragma unroll
    for (int other = 1; other < kAddLanes; ++other) {
      sum += sums[other][column];
    }
    given.out[j] = sum;
  }
}

void add_all(const Parts& first, const Parts& second, Stream stream) {
  const auto blocks = [](const Parts& parts) {
    return static_cast<unsigned>(ceil_divide(parts.size, kAddColumns));
  };
  RABIT_LAUNCH(add_parts, dim3(blocks(first) + blocks(second)), dim3(kAddColumns * kAddLanes),
               stream, first, second, blocks(first));
}

// Calls body<paths, width>().
template <int kPaths, typename Body>
void with_width(int width, const Body& body) {
  if (width == 4) {
    body.template operator()<kPaths, 4>();
  } else {
    body.template operator()<kPaths, 1>();
  }
}

template <typename Body>
bool dispatch(int paths, int width, const Body& body) {
  switch (paths) {
    case 1:
      with_width<1>(width, body);
      break;
    case 2:
      with_width<2>(width, body);
      break;
    case 3:
      with_width<3>(width, body);
      break;
    case 4:
      with_width<4>(width, body);
      break;
    default:
      return false;
  }
  return cudaGetLastError() == cudaSuccess;
}

template <typename Out>
struct Forward {
  const CoupledShape& shape;
  const Tiling& tiling;
  dim3 grid;
  const float *w, *g, *h;
  Out* out;
  Stream stream;

  template <int kPaths, int kWidth>
  void operator()() const {
    const auto kernel = &forward<kPaths, kWidth, Out>;
    RABIT_LAUNCH(kernel, grid, dim3(kThreads), stream, shape.d_out, shape.d_in, tiling.rows, w, g,
                 h, out);
  }
};

struct PackSigns {
  const CoupledShape& shape;
  const float *w, *g, *h;
  uint32_t* packed;
  int32_t* turned;
  Stream stream;

  template <int kPaths, int kWidth>
  void operator()() const {
    const auto kernel = &pack_signs<kPaths>;
    const dim3 grid(static_cast<unsigned>(ceil_divide(shape.d_out, kSignThreads / 32)));
    RABIT_LAUNCH(kernel, grid, dim3(kSignThreads), stream, shape.d_out, shape.d_in, w, g, h, packed,
                 turned);
  }
};

template <typename In>
struct Backward {
  const CoupledShape& shape;
  const Tiling& tiling;
  dim3 grid;
  const float *w, *g, *h;
  const In* grad;
  float *dw, *dg_parts, *dh_parts;
  Stream stream;

  template <int kPaths, int kWidth>
  void operator()() const {
    const auto kernel = &backward<kPaths, kWidth, In>;
    RABIT_LAUNCH(kernel, grid, dim3(kThreads), stream, shape.d_out, shape.d_in, tiling.rows, w, g,
                 h, grad, dw, dg_parts, dh_parts);
  }
};

// Floats of the parts of dg, so that those of dh lie on 16 bytes.
int64_t row_parts(const CoupledShape& shape, const Tiling& tiling) {
  return ceil_divide(tiling.columns * shape.paths * shape.d_out, 4) * 4;
}

dim3 grid_of(const Tiling& tiling) {
  return dim3(static_cast<unsigned>(tiling.columns), static_cast<unsigned>(tiling.strips));
}

template <typename Out>
bool run_forward(const CoupledShape& shape, const float* w, const float* g, const float* h,
                 Out* out, Stream stream) {
  const Tiling tiling = forward_tiling(shape);
  return dispatch(shape.paths, tiling.width,
                  Forward<Out>{shape, tiling, grid_of(tiling), w, g, h, out, stream});
}

template <typename In>
bool run_backward(const CoupledShape& shape, const float* w, const float* g, const float* h,
                  const In* grad, float* dw, float* dg, float* dh, float* scratch, Stream stream) {
  const Tiling tiling = backward_tiling(shape);
  float* dg_parts = scratch;
  float* dh_parts = scratch + row_parts(shape, tiling);
  if (!dispatch(shape.paths, tiling.width,
                Backward<In>{shape, tiling, grid_of(tiling), w, g, h, grad, dw, dg_parts, dh_parts,
                             stream})) {
    return false;
  }
  add_all({dg_parts, tiling.columns, shape.paths * shape.d_out, dg},
          {dh_parts, tiling.strips, shape.paths * shape.d_in, dh}, stream);
  return cudaGetLastError() == cudaSuccess;
}

}  // namespace

bool coupled_forward(const CoupledShape& shape, const float* w, const float* g, const float* h,
                     float* out, Stream stream) {
  return run_forward(shape, w, g, h, out, stream);
}
bool coupled_forward(const CoupledShape& shape, const float* w, const float* g, const float* h,
                     Bf16* out, Stream stream) {
  return run_forward(shape, w, g, h, out, stream);
}

bool coupled_signs(const CoupledShape& shape, const float* w, const float* g, const float* h,
                   uint32_t* packed, int32_t* turned, Stream stream) {
  return dispatch(shape.paths, 1, PackSigns{shape, w, g, h, packed, turned, stream});
}

int64_t coupled_backward_scratch(const CoupledShape& shape) {
  const Tiling tiling = backward_tiling(shape);
  return row_parts(shape, tiling) + tiling.strips * shape.paths * shape.d_in;
}

bool coupled_backward(const CoupledShape& shape, const float* w, const float* g, const float* h,
                      const float* grad, float* dw, float* dg, float* dh, float* scratch,
                      Stream stream) {
  return run_backward(shape, w, g, h, grad, dw, dg, dh, scratch, stream);
}
bool coupled_backward(const CoupledShape& shape, const float* w, const float* g, const float* h,
                      const Bf16* grad, float* dw, float* dg, float* dh, float* scratch,
                      Stream stream) {
  return run_backward(shape, w, g, h, grad, dw, dg, dh, scratch, stream);
}

}  // namespace rabit::cuda
