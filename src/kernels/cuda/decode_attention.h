// Attention of one token of each sequence: a block takes some positions of a KV head, for all query
// heads that share it. Queries and the new key are turned here, and the new key and value put into
// the cache.
#pragma once

#include "kernels/cuda/decode.h"

namespace rabit::gpu {

__device__ __forceinline__ void eight_halves(const uint4& bits, float (&out)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = half_to_float(static_cast<uint16_t>(words[i]));
    out[2 * i + 1] = half_to_float(static_cast<uint16_t>(words[i] >> 16));
  }
}

/// Some positions of a KV head of a token.
struct Unit {
  int token, kv, part, position, begin, end;
  int64_t cache;  // where its keys and values begin, position 0

  /// Units of the grid, some without positions.
  template <int kTokens>
  static __device__ __forceinline__ int count(const Sizes& sizes, MostParts most) {
    return kTokens * sizes.kv_heads * most.count;
  }
  template <int kTokens>
  static __device__ __forceinline__ Unit at(const DecodeArgs& args, int layer, const Shared& shared,
                                            MostParts most, int index) {
    const Sizes& sizes = args.sizes;
    Unit unit;
    unit.token = token_of<kTokens>(index, sizes.kv_heads * most.count);
    unit.kv = most.over(index);
    unit.part = index - unit.kv * most.count;
    unit.position = shared.positions()[unit.token];
    const int length = shared.lengths()[unit.token];
    unit.begin = unit.part * length;
    unit.end = unit.begin + length < unit.position + 1 ? unit.begin + length : unit.position + 1;
    if (unit.part >= shared.parts()[unit.token]) {
      unit.end = unit.begin;
    }
    unit.cache = shared.sequences()[unit.token] * args.sequence_stride +
                 (int64_t{layer} * sizes.kv_heads + unit.kv) * args.capacity * sizes.head_dim;
    return unit;
  }
};

/// Brings the block's keys and values nearer while the products before attention run.
template <int kTokens>
__device__ __forceinline__ void fetch_cache(const DecodeArgs& args, int layer, const Shared& shared,
                                            MostParts most) {
  constexpr int kMost = 64 << 10;  // bytes of keys, and of values
  const int d = args.sizes.head_dim;
  if (warp() >= 2) {
    return;
  }
#pragma unroll 1
  for (int index = blockIdx.x; index < Unit::count<kTokens>(args.sizes, most); index += gridDim.x) {
    const Unit unit = Unit::at<kTokens>(args, layer, shared, most, index);
    const int bytes = (unit.end - unit.begin) * d * 2;
    const int64_t first = unit.cache + int64_t{unit.begin} * d;
    fetch_ahead((warp() == 0 ? args.keys : args.values) + first, bytes < kMost ? bytes : kMost,
                lane());
  }
}

/// The queries of a KV head, turned and scaled, to `queries` (group, head_dim); where the unit has
/// the last position, the new key and value as halves to `key` and `value`, and to the cache.
template <int kTokens>
__device__ __forceinline__ void turn(const DecodeArgs& args, const Unit& unit, float* queries,
                                     uint16_t* key, uint16_t* value) {
  const Sizes& sizes = args.sizes;
  const int d = sizes.head_dim, group = args.group;
  const int64_t width = args.widths[kQkv];
  const bool last = unit.end == unit.position + 1;
  const float* const output = args.outputs[kQkv] + unit.token * width;
  const float* const angles = args.cos_sin + int64_t{unit.position} * d;
  const int pairs = (group + (last ? 2 : 0)) * d / 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < pairs; i += kThreads) {
    const int head = over_head_dim(args, 2 * i), at = 2 * i - head * d;
    const int column = head < group
                           ? (unit.kv * group + head) * d + at
                           : (sizes.heads + (head - group) * sizes.kv_heads + unit.kv) * d + at;
    constexpr int kAhead = 4;
    const float cosine = angles[at], sine = angles[at + 1];
    const int splits = args.splits[kQkv];
    const float* const squares = args.squares + unit.token;
    float a = 0, b = 0, all = 0;
#pragma unroll 1
    for (int split = 0; split < splits; split += kAhead) {
      float x[kAhead], y[kAhead], z[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const bool there = split + j < splits;
        const float* const from = output + (split + j) * kTokens * width + column;
        x[j] = read_fresh(from, there), y[j] = read_fresh(from + 1, there);
        z[j] = read_fresh(squares + (split + j) * kMostDecodeTokens, there);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        a += x[j], b += y[j], all += z[j];
      }
    }
    const float root = reciprocal_root(all, args);
    a *= root, b *= root;
    if (head <= group) {
      const float turned = a * cosine - b * sine;
      b = a * sine + b * cosine;
      a = turned;
    }
    if (head < group) {
      const float scale = args.query_factor;
      queries[head * d + at] = a * scale, queries[head * d + at + 1] = b * scale;
    } else {
      uint16_t* const own = head == group ? key : value;
      uint16_t* const cache =
          (head == group ? args.keys : args.values) + unit.cache + int64_t{unit.position} * d + at;
      own[at] = cache[0] = float_to_half(a);
      own[at + 1] = cache[1] = float_to_half(b);
    }
  }
}

/// A warp's softmax of up to kHeads query heads over its positions: of each head the largest score,
/// the sum of exponentials and, in each lane, eight neighbours of the weighted sum of values.
template <int kHeads>
struct Softmax {
  float most[kHeads], sum[kHeads], values[kHeads][8];
};

template <int kHeads, int kAhead>
__device__ __forceinline__ void attend_positions(const DecodeArgs& args, const Unit& unit,
                                                 int shift, const float* queries, int heads,
                                                 const uint16_t* key, const uint16_t* value,
                                                 Softmax<kHeads>& softmax) {
  const int d = args.sizes.head_dim;
  const int width = 1 << shift, each = 32 >> shift;  // lanes of a position; positions at once
  const int sub = lane() >> shift, at = (lane() & (width - 1)) * 8;
  const bool active = at < d;
  float query[kHeads][8];
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    softmax.most[head] = -INFINITY, softmax.sum[head] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      softmax.values[head][i] = 0;
      query[head][i] = active && head < heads ? queries[head * d + at + i] : 0.0F;
    }
  }
#pragma unroll 1
  for (int base = unit.begin + warp() * each; base < unit.end; base += kWarps * each * kAhead) {
    uint4 keys[kAhead], values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int p = base + sub + i * kWarps * each;
      keys[i] = values[i] = make_uint4(0, 0, 0, 0);
      if (p < unit.end && active) {
        const int64_t place = unit.cache + int64_t{p} * d + at;
        const bool fresh = p == unit.position;
        keys[i] = *reinterpret_cast<const uint4*>(fresh ? key + at : args.keys + place);
        values[i] = *reinterpret_cast<const uint4*>(fresh ? value + at : args.values + place);
      }
    }
    float scores[kHeads][kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float k[8];
      eight_halves(keys[i], k);
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        float score = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          score += query[head][j] * k[j];
        }
        scores[head][i] = score;
      }
    }
#pragma unroll 1
    for (int step = width / 2; step >= 1; step /= 2) {
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          scores[head][i] += __shfl_xor_sync(kAllLanes, scores[head][i], step);
        }
      }
    }
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      float most = softmax.most[head];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (base + sub + i * kWarps * each >= unit.end) {
          scores[head][i] = -INFINITY;
        }
        most = fmaxf(most, scores[head][i]);
      }
      const float kept = most == -INFINITY ? 1.0F : exp2f(softmax.most[head] - most);
      softmax.most[head] = most;
      softmax.sum[head] *= kept;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        softmax.values[head][j] *= kept;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        scores[head][i] = most == -INFINITY ? 0.0F : exp2f(scores[head][i] - most);
        softmax.sum[head] += scores[head][i];
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float v[8];
      eight_halves(values[i], v);
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          softmax.values[head][j] += scores[head][i] * v[j];
        }
      }
    }
  }
  // The lanes' groups, which had other positions, together.
#pragma unroll 1
  for (int step = width; step < 32; step *= 2) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const float other = __shfl_xor_sync(kAllLanes, softmax.most[head], step);
      const float both = fmaxf(softmax.most[head], other);
      const float mine = both == -INFINITY ? 0.0F : exp2f(softmax.most[head] - both);
      const float theirs = both == -INFINITY ? 0.0F : exp2f(other - both);
      softmax.most[head] = both;
      softmax.sum[head] =
          softmax.sum[head] * mine + __shfl_xor_sync(kAllLanes, softmax.sum[head], step) * theirs;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        softmax.values[head][j] =
            softmax.values[head][j] * mine +
            __shfl_xor_sync(kAllLanes, softmax.values[head][j], step) * theirs;
      }
    }
  }
}

/// What a warp makes of its positions for query heads [first, first + heads) of the unit's group:
/// sums (group, warps, d) and states (group, warps, 2).
template <int kHeads, int kAhead>
__device__ __forceinline__ void attend_heads(const DecodeArgs& args, const Unit& unit, int shift,
                                             int first, int heads, const float* queries,
                                             const uint16_t* key, const uint16_t* value,
                                             float* sums, float* states) {
  const int d = args.sizes.head_dim, at = lane() * 8;  // of the first group of lanes
  Softmax<kHeads> softmax;
  attend_positions<kHeads, kAhead>(args, unit, shift, queries + first * d, heads, key, value,
                                   softmax);
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    if (head < heads) {
      const int row = (first + head) * kWarps + warp();
      if (at < d && lane() >> shift == 0) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sums[row * d + at + j] = softmax.values[head][j];
        }
      }
      if (lane() == 0) {
        states[2 * row] = softmax.most[head], states[2 * row + 1] = softmax.sum[head];
      }
    }
  }
}

template <int kTokens>
__device__ __forceinline__ void attend(const DecodeArgs& args, int layer, const Shared& shared,
                                       MostParts most) {
  const Sizes& sizes = args.sizes;
  const int d = sizes.head_dim, group = args.group;
  int shift = 0;  // 2^shift lanes share a position
  while (8 << shift < d) {
    ++shift;
  }
  float* const queries = shared.input();                               // (group, d)
  auto* const key = reinterpret_cast<uint16_t*>(queries + group * d);  // (d)
  auto* const value = key + 2 * d;
  float* const sums = queries + (group + 2) * d;
  float* const states = sums + group * kWarps * d;
#pragma unroll 1
  for (int index = blockIdx.x; index < Unit::count<kTokens>(sizes, most); index += gridDim.x) {
    const Unit unit = Unit::at<kTokens>(args, layer, shared, most, index);
    if (unit.begin == unit.end) {
      continue;
    }
    __syncthreads();
    turn<kTokens>(args, unit, queries, key, value);
    __syncthreads();
    if (group == 1) {
      attend_heads<1, 4>(args, unit, shift, 0, 1, queries, key, value, sums, states);
    } else {
#pragma unroll 1
      for (int first = 0; first < group; first += 2) {
        attend_heads<2, 2>(args, unit, shift, first, group - first, queries, key, value, sums,
                           states);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < group * d; i += kThreads) {
      const int head = over_head_dim(args, i), at = i - head * d;
      const float* const state = states + head * kWarps * 2;
      float most = -INFINITY, sum = 0, out = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        most = fmaxf(most, state[2 * w]);
      }
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float weight = exp2f(state[2 * w] - most);
        sum += weight * state[2 * w + 1];
        out += weight * sums[(head * kWarps + w) * d + at];
      }
      const int64_t to =
          (int64_t{unit.token} * sizes.heads + unit.kv * group + head) * kMostParts + unit.part;
      args.attended[to * d + at] = out;
      if (at == 0) {
        args.softmax[2 * to] = most, args.softmax[2 * to + 1] = sum;
      }
    }
  }
}

}  // namespace rabit::gpu
