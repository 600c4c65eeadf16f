// Attention of one token of each of several sequences: a block takes some positions of a KV head of
// a token, for all query heads that share it. Where there are few sequences, several blocks share
// the positions, and the last to come puts their parts together, in order.
#include <algorithm>
#include <cmath>

#include "kernels/api/gpu.h"
#include "kernels/cuda/cache.h"

namespace rabit::gpu {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMostWidth = 256;  // of a head
constexpr int kMostParts = 32;

struct EachArgs {
  Sizes sizes;
  int64_t layer;
  const uint16_t* q;    // F16 (tokens, heads, head_dim)
  const Place* places;  // (tokens)
  float scale;          // log2(e) / sqrt(head_dim)
  float* partial;       // (tokens, heads, parts, head_dim + 2)
  uint32_t* counters;   // (tokens, kv_heads)
  uint16_t* out;        // as q
};

/// Part of a softmax over positions: the largest score, the sum of exponentials relative to it, and
/// values weighted by them.
template <int kValues>
struct Part {
  float most = -INFINITY, sum = 0, values[kValues] = {};

  __device__ __forceinline__ void add(float other_most, float other_sum,
                                      const float (&other)[kValues]) {
    const float both = fmaxf(most, other_most);
    const float mine = both == -INFINITY ? 0.0F : exp2f(most - both);
    const float theirs = both == -INFINITY ? 0.0F : exp2f(other_most - both);
    most = both;
    sum = sum * mine + other_sum * theirs;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = values[i] * mine + other[i] * theirs;
    }
  }
};

/// kHeads: query heads at once. kBytes: what caches hold.
template <int kHeads, bool kBytes>
__global__ void __launch_bounds__(kThreads) attention_each_kernel(EachArgs args) {
  __shared__ float sums[kWarps * kHeads * kMostWidth];
  __shared__ float states[kWarps * kHeads * 2];
  const int d = args.sizes.head_dim, group = args.sizes.heads / args.sizes.kv_heads;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int kv = static_cast<int>(blockIdx.x), token = static_cast<int>(blockIdx.y);
  const int part = static_cast<int>(blockIdx.z), parts = static_cast<int>(gridDim.z);
  int width = 1;  // lanes that share a position, each with eight neighbours
  while (8 * width < d) {
    width *= 2;
  }
  const int each = 32 / width, at = lane % width * 8;
  const Place place = args.places[token];
  const int64_t all = place.position + 1, length = (all + parts - 1) / parts;
  const int64_t begin = part * length, end = begin + length < all ? begin + length : all;
  const int64_t plane = (args.layer * args.sizes.kv_heads + kv) * place.capacity * d + at;

  for (int first = 0; first < group; first += kHeads) {
    const int heads = group - first < kHeads ? group - first : kHeads;
    const int64_t head = int64_t{token} * args.sizes.heads + kv * group + first;
    float query[kHeads][8];
    Part<8> own[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      uint4 halves = make_uint4(0, 0, 0, 0);
      if (h < heads && at < d) {
        halves = *reinterpret_cast<const uint4*>(args.q + (head + h) * d + at);
      }
      eight_halves(halves, query[h]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        query[h][i] *= args.scale;
      }
    }
    for (int64_t base = begin + warp * each; base < end; base += kWarps * each) {
      const int64_t p = base + lane / width;
      CachedEight<kBytes> keys, values;
      if (p < end && at < d) {
        keys.read(place.k, plane + p * d);
        values.read(place.v, plane + p * d);
      }
      float key[8], value[8];
      eight_halves(keys.halves(), key);
      eight_halves(values.halves(), value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float score = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          score += query[h][i] * key[i];
        }
        for (int step = width / 2; step >= 1; step /= 2) {
          score += __shfl_xor_sync(kAllLanes, score, step);
        }
        if (p < end) {
          own[h].add(score, 1.0F, value);
        }
      }
    }
    for (int step = width; step < 32; step *= 2) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float most = __shfl_xor_sync(kAllLanes, own[h].most, step);
        const float sum = __shfl_xor_sync(kAllLanes, own[h].sum, step);
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          values[i] = __shfl_xor_sync(kAllLanes, own[h].values[i], step);
        }
        own[h].add(most, sum, values);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int row = warp * kHeads + h;
      if (lane < width && at < d) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sums[row * kMostWidth + at + i] = own[h].values[i];
        }
      }
      if (lane == 0) {
        states[2 * row] = own[h].most, states[2 * row + 1] = own[h].sum;
      }
    }
    __syncthreads();
    for (int item = thread; item < heads * d; item += kThreads) {
      const int h = item / d, column = item % d;
      Part<1> together;
      for (int w = 0; w < kWarps; ++w) {
        const int row = w * kHeads + h;
        const float value[1] = {sums[row * kMostWidth + column]};
        together.add(states[2 * row], states[2 * row + 1], value);
      }
      if (parts == 1) {
        args.out[(head + h) * d + column] = saturated_half(together.values[0] / together.sum);
      } else {
        float* const to = args.partial + ((head + h) * parts + part) * (d + 2);
        to[column] = together.values[0];
        if (column == 0) {
          to[d] = together.most, to[d + 1] = together.sum;
        }
      }
    }
    __syncthreads();
  }
  if (parts == 1 || !last_to_come(args.counters + token * args.sizes.kv_heads + kv, parts)) {
    return;
  }
  const int64_t head = int64_t{token} * args.sizes.heads + kv * group;
  for (int item = thread; item < group * d; item += kThreads) {
    const int h = item / d, column = item % d;
    Part<1> together;
    for (int other = 0; other < parts; ++other) {
      const float* const from = args.partial + ((head + h) * parts + other) * (d + 2);
      const float value[1] = {__ldcg(from + column)};
      together.add(__ldcg(from + d), __ldcg(from + d + 1), value);
    }
    args.out[(head + h) * d + column] = saturated_half(together.values[0] / together.sum);
  }
}

/// Blocks that share the positions of a KV head: as many as give every multiprocessor two.
int64_t parts_of(const Sizes& sizes, int64_t tokens, int32_t multiprocessors) {
  return std::clamp<int64_t>(2 * int64_t{multiprocessors} / (tokens * sizes.kv_heads), 1,
                             kMostParts);
}

}  // namespace

int64_t each_work(const Sizes& sizes, int64_t most_tokens, int32_t multiprocessors) {
  int64_t most = 0;
  for (int64_t tokens = 1; tokens <= most_tokens; ++tokens) {
    most = std::max(most, tokens * parts_of(sizes, tokens, multiprocessors));
  }
  return most * sizes.heads * (sizes.head_dim + 2);
}

Status attention_each(const Sizes& sizes, int64_t layer, const uint16_t* q, int64_t tokens,
                      const Place* places, bool bytes, int32_t multiprocessors, float* partial,
                      uint32_t* counters, uint16_t* out, Stream stream) {
  const EachArgs args = {
      sizes,   layer,    q,  places, 1.44269504F / std::sqrt(static_cast<float>(sizes.head_dim)),
      partial, counters, out};
  const dim3 grid(static_cast<unsigned>(sizes.kv_heads), static_cast<unsigned>(tokens),
                  static_cast<unsigned>(parts_of(sizes, tokens, multiprocessors)));
  const auto kernel =
      sizes.heads == sizes.kv_heads
          ? (bytes ? &attention_each_kernel<1, true> : &attention_each_kernel<1, false>)
          : (bytes ? &attention_each_kernel<4, true> : &attention_each_kernel<4, false>);
  RABIT_LAUNCH(kernel, grid, dim3(kThreads), stream, args);
  return launched("attention");
}

}  // namespace rabit::gpu
