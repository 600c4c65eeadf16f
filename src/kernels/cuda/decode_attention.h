// Attention of one token of each sequence: a block takes some positions of a KV head, for all query
// heads that share it. Queries and the new key are turned here, and the new key and value put into
// the cache.
#pragma once

#include "kernels/cuda/decode.h"

namespace rabit::gpu {

/// A warp's softmax so far, of one query head, and eight neighbours of the weighted sum of values.
struct Softmax {
  float most = -INFINITY, sum = 0;
  float values[8] = {};

  __device__ __forceinline__ void merge(float other_most, float other_sum,
                                        const float (&other)[8]) {
    const float both = fmaxf(most, other_most);
    const float mine = most == -INFINITY ? 0.0F : exp2f(most - both);
    const float theirs = other_most == -INFINITY ? 0.0F : exp2f(other_most - both);
    sum = sum * mine + other_sum * theirs;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = values[i] * mine + other[i] * theirs;
    }
    most = both;
  }
};

__device__ __forceinline__ void eight_halves(const uint4& bits, float (&out)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = from_half(static_cast<uint16_t>(words[i]));
    out[2 * i + 1] = from_half(static_cast<uint16_t>(words[i] >> 16));
  }
}

/// The queries of a KV head, turned and scaled, to `queries` (group, head_dim); the new key and
/// value as halves to `key` and `value` where the part has the last position, and to the cache.
template <int kTokens>
__device__ __forceinline__ void turn(const DecodeArgs& args, int layer, int token, int kv,
                                     bool last, float* queries, uint16_t* key, uint16_t* value) {
  const Sizes& sizes = args.sizes;
  const int width = args.widths[kQkv], splits = args.splits[kQkv], d = sizes.head_dim;
  const int group = sizes.heads / sizes.kv_heads, position = args.positions[token];
  const float root = reciprocal_root(grid_squares(args, 0, token), sizes);
  const float* const output = args.outputs[kQkv] + token * width;
  const float* const angles = args.cos_sin + int64_t{position} * d;
  const int sequence = args.sequences != nullptr ? args.sequences[token] : token;
  const int64_t place = sequence * args.sequence_stride +
                        ((int64_t{layer} * sizes.kv_heads + kv) * args.capacity + position) * d;
  const int pairs = (group + (last ? 2 : 0)) * d / 2;
  for (int i = threadIdx.x; i < pairs; i += kThreads) {
    const int head = i / (d / 2), at = i % (d / 2) * 2;
    const int column = head < group ? (kv * group + head) * d + at
                                    : (sizes.heads + (head - group) * sizes.kv_heads + kv) * d + at;
    float a = 0, b = 0;
    for (int split = 0; split < splits; ++split) {
      const float* const from = output + split * int64_t{kTokens} * width + column;
      a += read_fresh(from), b += read_fresh(from + 1);
    }
    a *= root, b *= root;
    if (head <= group) {
      const float cosine = angles[at], sine = angles[at + 1];
      const float turned = a * cosine - b * sine;
      b = a * sine + b * cosine;
      a = turned;
    }
    if (head < group) {
      const float scale = 1.44269504F / sqrtf(static_cast<float>(d));
      queries[head * d + at] = a * scale, queries[head * d + at + 1] = b * scale;
    } else {
      uint16_t* const own = head == group ? key : value;
      uint16_t* const cache = (head == group ? args.keys : args.values) + place + at;
      own[at] = cache[0] = to_half(a);
      own[at + 1] = cache[1] = to_half(b);
    }
  }
}

template <int kTokens>
__device__ __noinline__ void attend(const DecodeArgs& args, int layer, const Shared& shared) {
  constexpr int kHeads = 4, kAhead = 2;  // query heads and positions that a warp takes at once
  const Sizes& sizes = args.sizes;
  const int d = sizes.head_dim, group = sizes.heads / sizes.kv_heads;
  int width = 1;  // lanes that share a position
  while (width * 8 < d) {
    width *= 2;
  }
  const int each = 32 / width, sub = lane() / width, at = lane() % width * 8;
  const bool active = at < d;
  float* const queries = shared.input;                                 // (group, d)
  auto* const key = reinterpret_cast<uint16_t*>(queries + group * d);  // (d)
  auto* const value = key + 2 * d;
  float* const sums = queries + group * d + 2 * d;  // (warps, d)
  float* const states = sums + kWarps * d;          // (warps, 2)
  const int most_parts = Parts(sizes, kTokens, 1 << 30).count;
  const int units = kTokens * sizes.kv_heads * most_parts;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int token = unit / (sizes.kv_heads * most_parts);
    const int kv = unit / most_parts % sizes.kv_heads, part = unit % most_parts;
    const int position = args.positions[token];
    const Parts parts(sizes, kTokens, position);
    if (part >= parts.count) {
      continue;
    }
    const int begin = part * parts.length;
    const int end = begin + parts.length < position + 1 ? begin + parts.length : position + 1;
    __syncthreads();
    turn<kTokens>(args, layer, token, kv, begin <= position && position < end, queries, key, value);
    __syncthreads();
    const int sequence = args.sequences != nullptr ? args.sequences[token] : token;
    const int64_t place = sequence * args.sequence_stride +
                          (int64_t{layer} * sizes.kv_heads + kv) * args.capacity * d + at;
    for (int first = 0; first < group; first += kHeads) {
      Softmax softmax[kHeads];
      float query[kHeads][8] = {};
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        if (active && first + head < group) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            query[head][i] = queries[(first + head) * d + at + i];
          }
        }
      }
      for (int base = begin + warp() * each + sub; base - sub < end;
           base += kWarps * each * kAhead) {
        uint4 keys[kAhead], values[kAhead];
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
          const int p = base + ahead * kWarps * each;
          keys[ahead] = values[ahead] = make_uint4(0, 0, 0, 0);
          if (p < end && active) {
            const bool fresh = p == position;
            const uint16_t* const k = fresh ? key + at : args.keys + place + int64_t{p} * d;
            const uint16_t* const v = fresh ? value + at : args.values + place + int64_t{p} * d;
            keys[ahead] = *reinterpret_cast<const uint4*>(k);
            values[ahead] = *reinterpret_cast<const uint4*>(v);
          }
        }
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
          float k[8], v[8];
          eight_halves(keys[ahead], k);
          eight_halves(values[ahead], v);
          const bool inside = base + ahead * kWarps * each < end;
#pragma unroll
          for (int head = 0; head < kHeads; ++head) {
            if (first + head < group) {
              float score = 0;
#pragma unroll
              for (int i = 0; i < 8; ++i) {
                score += query[head][i] * k[i];
              }
              for (int step = width / 2; step >= 1; step /= 2) {
                score += __shfl_xor_sync(kAllLanes, score, step);
              }
              if (inside) {
                softmax[head].merge(score, 1.0F, v);
              }
            }
          }
        }
      }
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        if (first + head < group) {
          Softmax& own = softmax[head];
          for (int step = width; step < 32; step *= 2) {
            float other[8];
            const float most = __shfl_xor_sync(kAllLanes, own.most, step);
            const float sum = __shfl_xor_sync(kAllLanes, own.sum, step);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              other[i] = __shfl_xor_sync(kAllLanes, own.values[i], step);
            }
            own.merge(most, sum, other);
          }
          if (sub == 0 && active) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              sums[warp() * d + at + i] = own.values[i];
            }
          }
          if (lane() == 0) {
            states[2 * warp()] = own.most, states[2 * warp() + 1] = own.sum;
          }
          __syncthreads();
          const int64_t to =
              (int64_t{token} * sizes.heads + kv * group + first + head) * kMostParts + part;
          if (static_cast<int>(threadIdx.x) < d) {
            float most = states[0], sum = 0, out = 0;
            for (int w = 1; w < kWarps; ++w) {
              most = fmaxf(most, states[2 * w]);
            }
            for (int w = 0; w < kWarps; ++w) {
              const float weight = states[2 * w] == -INFINITY ? 0.0F : exp2f(states[2 * w] - most);
              sum += weight * states[2 * w + 1];
              out += weight * sums[w * d + threadIdx.x];
            }
            args.attended[to * d + threadIdx.x] = out;
            if (threadIdx.x == 0) {
              args.softmax[2 * to] = most, args.softmax[2 * to + 1] = sum;
            }
          }
          __syncthreads();
        }
      }
    }
  }
}

}  // namespace rabit::gpu
