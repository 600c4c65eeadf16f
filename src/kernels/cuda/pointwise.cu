// What lies between products. A block takes a row in the norm; all else is pair by pair, a row of a
// token in blocks along x.

#include "kernels/api/gpu.h"
#include "kernels/cuda/cache.h"
#include "kernels/cuda/device.h"

namespace rabit::gpu {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kMostGridY = 65535;

/// Values of a row in blocks along x, tokens along y; threads go on by the grid's height.
dim3 grid_of_rows(int64_t items, int64_t tokens) {
  return dim3(static_cast<unsigned>(ceil_divide(items, kThreads)),
              tokens < kMostGridY ? static_cast<unsigned>(tokens) : kMostGridY);
}

__global__ void __launch_bounds__(kThreads)
    embed_kernel(const uint16_t* __restrict__ table, const int32_t* __restrict__ ids,
                 int64_t tokens, int64_t d, float* __restrict__ x) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < d) {
    for (int64_t t = blockIdx.y; t < tokens; t += gridDim.y) {
      x[t * d + i] = half_to_float(table[ids[t] * d + i]);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const float* __restrict__ x, const float* __restrict__ weight, int64_t d,
                    float epsilon, uint16_t* __restrict__ y) {
  __shared__ float parts[kThreads / 32];
  const float* const row = x + static_cast<int64_t>(blockIdx.x) * d;
  uint16_t* const to = y + static_cast<int64_t>(blockIdx.x) * d;
  const bool wide = d % 4 == 0;  // rows of 16-byte vectors
  float squares = 0.0F;
  if (wide) {
    for (int64_t i = threadIdx.x * 4; i < d; i += kThreads * 4) {
      const float4 v = *reinterpret_cast<const float4*>(row + i);
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
  } else {
    for (int64_t i = threadIdx.x; i < d; i += kThreads) {
      squares += row[i] * row[i];
    }
  }
  squares = warp_sum(squares);
  if (threadIdx.x % 32 == 0) {
    parts[threadIdx.x / 32] = squares;
  }
  __syncthreads();
  float all = 0.0F;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    all += parts[i];
  }
  const float inverse = 1.0F / sqrtf(all / static_cast<float>(d) + epsilon);
  if (wide) {
    for (int64_t i = threadIdx.x * 4; i < d; i += kThreads * 4) {
      const float4 v = *reinterpret_cast<const float4*>(row + i);
      const float4 w = *reinterpret_cast<const float4*>(weight + i);
      uint2 out;
      out.x = pack_saturated(v.x * inverse * w.x, v.y * inverse * w.y);
      out.y = pack_saturated(v.z * inverse * w.z, v.w * inverse * w.w);
      *reinterpret_cast<uint2*>(to + i) = out;
    }
  } else {
    for (int64_t i = threadIdx.x; i < d; i += kThreads) {
      to[i] = saturated_half(row[i] * inverse * weight[i]);
    }
  }
}

/// Where the tokens of a prompt go: one sequence, one position after the other.
struct PromptPlaces {
  CacheView cache;
  const float* turns;

  __device__ __forceinline__ Place at(int64_t token, int64_t head_dim) const {
    const int64_t position = cache.first_position + token;
    return {cache.k, cache.v, turns + position * head_dim, cache.capacity, position};
  }
};
/// Each token to a sequence of its own.
struct OwnPlaces {
  const Place* places;
  int64_t layer, kv_heads;

  __device__ __forceinline__ Place at(int64_t token, int64_t head_dim) const {
    Place place = places[token];
    const int64_t before = layer * kv_heads * place.capacity * head_dim;
    place.k = place.k.from(before), place.v = place.v.from(before);
    return place;
  }
};

/// A thread takes a pair of every token's queries, keys or values.
template <typename Places>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(Sizes sizes, const float* __restrict__ qkv, int64_t tokens, Places places,
                uint16_t* __restrict__ q) {
  const int64_t d = sizes.head_dim, d_q = sizes.heads * d, d_kv = sizes.kv_heads * d;
  const int64_t feature = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 2;
  const bool active = feature < d_q + 2 * d_kv;  // the others are with those whose warp they share
  for (int64_t t = blockIdx.y; t < tokens; t += gridDim.y) {
    const Place place = places.at(t, d);
    const float* const from = qkv + t * (d_q + 2 * d_kv) + feature;
    float a = active ? from[0] : 0.0F, b = active ? from[1] : 0.0F;
    if (feature < d_q + d_kv) {
      const float* const turn = place.turn + feature % d;
      const float cosine = turn[0], sine = turn[1], first = a;
      a = first * cosine - b * sine;
      b = first * sine + b * cosine;
    }
    if (feature < d_q) {
      *reinterpret_cast<uint32_t*>(q + t * d_q + feature) = pack_saturated(a, b);
    }
    const bool key = feature < d_q + d_kv;
    const int64_t at = feature - d_q - (key ? 0 : d_kv);
    put_pair(key ? place.k : place.v, (at / d * place.capacity + place.position) * d + at % d, a, b,
             active && feature >= d_q);
  }
}

__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const float* __restrict__ gate_up, int64_t tokens, int64_t d,
                  uint16_t* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < d) {
    for (int64_t t = blockIdx.y; t < tokens; t += gridDim.y) {
      const float gate = gate_up[t * 2 * d + i], up = gate_up[t * 2 * d + d + i];
      out[t * d + i] = saturated_half(gate / (1.0F + expf(-gate)) * up);
    }
  }
}

/// Sums words so that none may be left unread; a thread writes only what can hardly come out.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* __restrict__ data, int64_t count, uint32_t* __restrict__ out) {
  uint32_t sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint4 v = data[i];
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x9E3779B9U) {
    *out = sum;
  }
}

}  // namespace

Status embed(const uint16_t* table, const int32_t* ids, int64_t tokens, int64_t d, float* x,
             Stream stream) {
  RABIT_LAUNCH(embed_kernel, grid_of_rows(d, tokens), dim3(kThreads), stream, table, ids, tokens, d,
               x);
  return launched("the embedding");
}

Status rms_norm(const float* x, const float* weight, int64_t tokens, int64_t d, float epsilon,
                uint16_t* y, Stream stream) {
  RABIT_LAUNCH(rms_norm_kernel, dim3(static_cast<unsigned>(tokens)), dim3(kThreads), stream, x,
               weight, d, epsilon, y);
  return launched("a norm");
}

Status rope(const Sizes& sizes, const float* qkv, int64_t tokens, const float* turns,
            const CacheView& cache, uint16_t* q, Stream stream) {
  const int64_t pairs = (int64_t{sizes.heads} + 2 * int64_t{sizes.kv_heads}) * sizes.head_dim / 2;
  RABIT_LAUNCH(rope_kernel<PromptPlaces>, grid_of_rows(pairs, tokens), dim3(kThreads), stream,
               sizes, qkv, tokens, PromptPlaces{cache, turns}, q);
  return launched("the positions");
}

Status rope_each(const Sizes& sizes, int64_t layer, const float* qkv, int64_t tokens,
                 const Place* places, uint16_t* q, Stream stream) {
  const int64_t pairs = (int64_t{sizes.heads} + 2 * int64_t{sizes.kv_heads}) * sizes.head_dim / 2;
  RABIT_LAUNCH(rope_kernel<OwnPlaces>, grid_of_rows(pairs, tokens), dim3(kThreads), stream, sizes,
               qkv, tokens, OwnPlaces{places, layer, sizes.kv_heads}, q);
  return launched("the positions");
}

Status swiglu(const float* gate_up, int64_t tokens, int64_t d, uint16_t* out, Stream stream) {
  RABIT_LAUNCH(swiglu_kernel, grid_of_rows(d, tokens), dim3(kThreads), stream, gate_up, tokens, d,
               out);
  return launched("SwiGLU");
}

Status start_reading(const void* data, int64_t bytes, uint32_t* out, Stream stream) {
  constexpr int64_t kBlocks = 2048;  // some for each of any GPU's multiprocessors
  const int64_t blocks = ceil_divide(bytes / 16, kThreads);
  RABIT_LAUNCH(read_kernel, dim3(static_cast<unsigned>(blocks < kBlocks ? blocks : kBlocks)),
               dim3(kThreads), stream, static_cast<const uint4*>(data), bytes / 16, out);
  return launched("a measurement");
}

bool code_fits() {
  cudaFuncAttributes attributes;
  const bool fits = cudaFuncGetAttributes(&attributes, read_kernel) == cudaSuccess;
  cudaGetLastError();  // it is told here
  return fits;
}

}  // namespace rabit::gpu
