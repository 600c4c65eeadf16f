// Attention of one token of each sequence: a block takes some positions of a KV head, for all query
// heads that share it. Queries and the new key are turned here, and the new key and value put into
// the cache.
#pragma once

#include "kernels/cuda/cache.h"
#include "kernels/cuda/decode.h"

namespace rabit::gpu {

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

/// Brings the block's keys and values nearer while the products before attention run, by the last
/// warp.
template <int kTokens>
__device__ __forceinline__ void fetch_cache(const DecodeArgs& args, int layer, const Shared& shared,
                                            MostParts most) {
  constexpr int kMost = 64 << 10;  // bytes of keys, and of values
  const int d = args.sizes.head_dim;
  if (warp() != kWarps - 1) {
    return;
  }
#pragma unroll 1
  for (int index = blockIdx.x; index < Unit::count<kTokens>(args.sizes, most); index += gridDim.x) {
    const Unit unit = Unit::at<kTokens>(args, layer, shared, most, index);
    const int bytes = (unit.end - unit.begin) * d * (args.keys.scales == nullptr ? 2 : 1);
    const int64_t first = unit.cache + int64_t{unit.begin} * d;
    fetch_ahead((lane() < 16 ? args.keys : args.values).from(first).rows,
                bytes < kMost ? bytes : kMost, lane() % 16, 16);
  }
}

/// The queries of a KV head, turned and scaled, to `queries` (group, head_dim); where the unit has
/// the last position, the new key and value as halves to `key` and `value`, and to the cache. What
/// the block had in shared memory is used until its threads wait here.
template <int kTokens>
__device__ __forceinline__ void turn(const DecodeArgs& args, int layer, const Unit& unit,
                                     float* queries, uint16_t* key, uint16_t* value) {
  const Sizes& sizes = args.sizes;
  const int d = sizes.head_dim, group = args.group;
  const int64_t width = args.widths[kQkv];
  const bool last = unit.end == unit.position + 1;
  const Exchange from(args, layer);
  const float* const output = args.outputs[kQkv] + from.place + unit.token * width;
  const float* const angles = args.cos_sin + int64_t{unit.position} * d;
  const int pairs = (group + (last ? 2 : 0)) * d / 2, splits = args.splits[kQkv];
  Arrivals arrivals(from.tag);
  bool alone = false;
#pragma unroll 1
  for (int first = 32 * warp(); first < pairs; first += kThreads) {
    const bool active = first + lane() < pairs;
    const int element = active ? 2 * (first + lane()) : 0;
    const int head = over_head_dim(args, element), at = element - head * d;
    const int column = head < group
                           ? (unit.kv * group + head) * d + at
                           : (sizes.heads + (head - group) * sizes.kv_heads + unit.kv) * d + at;
    constexpr int kAhead = 4;
    const float cosine = angles[at], sine = angles[at + 1];
    float a = 0, b = 0;
    GridRoot root;
#pragma unroll 1
    for (int split = 0; split < splits; split += kAhead) {
      float2 x[kAhead];
      do {
        root.ask(args, from, 0, unit.token, arrivals);
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          x[j] =
              arrivals.read_2(output + (split + j) * kTokens * width + column, split + j, splits);
        }
      } while (!arrivals.all());
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        a += x[j].x, b += x[j].y;
      }
    }
    const float factor = root.value(args);
    a *= factor, b *= factor;
    if (!alone) {
      __syncthreads();
      alone = true;
    }
    if (head <= group) {
      const float turned = a * cosine - b * sine;
      b = a * sine + b * cosine;
      a = turned;
    }
    const bool query = head < group;
    if (query && active) {
      const float scale = args.query_factor;
      queries[head * d + at] = a * scale, queries[head * d + at + 1] = b * scale;
    }
    const uint32_t pair =
        put_pair(head <= group ? args.keys : args.values,
                 unit.cache + int64_t{unit.position} * d + at, a, b, active && !query);
    if (active && !query) {
      *reinterpret_cast<uint32_t*>((head == group ? key : value) + at) = pair;
    }
  }
  if (!alone) {
    __syncthreads();
  }
}

/// Keys and values of some positions: lanes that share a position have eight neighbours each.
template <bool kBytes>
struct Batch {
  static constexpr int kMost = 4;
  CachedEight<kBytes> keys[kMost], values[kMost];

  /// Positions first, first + step, ..., `ahead` of them, but for those at or after `end`.
  __device__ __forceinline__ void read(const CacheRows& k, const CacheRows& v, int head_dim,
                                       int first, int step, int end, int ahead) {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int p = first + i * step;
      keys[i] = values[i] = {};
      if (i < ahead && p < end) {
        keys[i].read(k, int64_t{p} * head_dim);
        values[i].read(v, int64_t{p} * head_dim);
      }
    }
  }
};

/// How the lanes of a block share out the positions of a unit.
struct Sharing {
  int width, each;         // lanes of a position; positions of a warp at once
  int first, step;         // a lane's first position, and how far it is to the next
  int at;                  // the lane's first element
  bool active;             // it has elements
  CacheRows keys, values;  // position 0, at `at`

  __device__ __forceinline__ Sharing(const DecodeArgs& args, const Unit& unit) {
    const int d = args.sizes.head_dim;
    int shift = 0;
    while (8 << shift < d) {
      ++shift;
    }
    width = 1 << shift, each = 32 >> shift;
    at = (lane() & (width - 1)) * 8;
    active = at < d;
    first = unit.begin + warp() * each + (lane() >> shift);
    step = kWarps * each;
    keys = args.keys.from(unit.cache + at), values = args.values.from(unit.cache + at);
  }
  /// Before which of the unit's positions a lane reads the cache: the last one is not yet there.
  __device__ __forceinline__ int cached(const Unit& unit) const {
    const int end = unit.end < unit.position ? unit.end : unit.position;
    return active ? end : 0;
  }
};

/// A warp's softmax of up to kHeads query heads over its positions: of each head the largest score,
/// the sum of exponentials and, in each lane, eight neighbours of the weighted sum of values.
template <int kHeads>
struct Softmax {
  float most[kHeads], sum[kHeads], values[kHeads][8];
};

/// `batch`: the first positions, already read.
template <int kHeads, int kAhead, bool kBytes>
__device__ __forceinline__ void attend_positions(const DecodeArgs& args, const Unit& unit,
                                                 const Sharing& sharing, const float* queries,
                                                 int heads, const uint16_t* key,
                                                 const uint16_t* value, Batch<kBytes>& batch,
                                                 Softmax<kHeads>& softmax) {
  static_assert(kAhead <= Batch<kBytes>::kMost);
  const int d = args.sizes.head_dim, width = sharing.width, at = sharing.at;
  const bool active = sharing.active;
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
  for (int base = unit.begin + warp() * sharing.each; base < unit.end;
       base += sharing.step * kAhead) {
    const int first = base + lane() / width;
    if (base != unit.begin + warp() * sharing.each) {
      batch.read(sharing.keys, sharing.values, d, first, sharing.step, sharing.cached(unit),
                 kAhead);
    }
    uint4 keys[kAhead], values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      keys[i] = batch.keys[i].halves(), values[i] = batch.values[i].halves();
      if (first + i * sharing.step == unit.position && unit.position < unit.end && active) {
        keys[i] = *reinterpret_cast<const uint4*>(key + at);
        values[i] = *reinterpret_cast<const uint4*>(value + at);
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
        if (first + i * sharing.step >= unit.end) {
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
template <int kHeads, int kAhead, bool kBytes>
__device__ __forceinline__ void attend_heads(const DecodeArgs& args, const Unit& unit,
                                             const Sharing& sharing, int first, int heads,
                                             const float* queries, const uint16_t* key,
                                             const uint16_t* value, Batch<kBytes>& batch,
                                             float* sums, float* states) {
  const int d = args.sizes.head_dim, at = lane() * 8;  // of the first group of lanes
  Softmax<kHeads> softmax;
  attend_positions<kHeads, kAhead>(args, unit, sharing, queries + first * d, heads, key, value,
                                   batch, softmax);
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    if (head < heads) {
      const int row = (first + head) * kWarps + warp();
      if (at < d && lane() < sharing.width) {
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

/// A unit without positions: nobody will read what it gives, but the place must be used in turn.
__device__ __forceinline__ void pass_by(const DecodeArgs& args, const Exchange& to, int64_t place) {
  const int d = args.sizes.head_dim;
#pragma unroll 1
  for (int i = threadIdx.x; i < args.group * (d + 2); i += kThreads) {
    const int head = i / (d + 2), at = i - head * (d + 2);
    const int64_t own = place + int64_t{head} * kMostParts;
    write_tagged(at < d ? args.attended + to.place + own * d + at
                        : args.softmax + to.place + 2 * own + at - d,
                 0.0F, to.tag);
  }
}

template <int kTokens, bool kBytes>
__device__ __forceinline__ void attend(const DecodeArgs& args, int layer, const Shared& shared,
                                       MostParts most) {
  const Sizes& sizes = args.sizes;
  const int d = sizes.head_dim, group = args.group;
  const Exchange to(args, layer);
  float* const queries = shared.input();                               // (group, d)
  auto* const key = reinterpret_cast<uint16_t*>(queries + group * d);  // (d)
  auto* const value = key + 2 * d;
  float* const sums = queries + (group + 2) * d;
  float* const states = sums + group * kWarps * d;
#pragma unroll 1
  for (int index = blockIdx.x; index < Unit::count<kTokens>(sizes, most); index += gridDim.x) {
    const Unit unit = Unit::at<kTokens>(args, layer, shared, most, index);
    // Of the unit's first query head.
    const int64_t place =
        (int64_t{unit.token} * sizes.heads + unit.kv * group) * kMostParts + unit.part;
    if (unit.begin == unit.end) {
      pass_by(args, to, place);
      continue;
    }
    const Sharing sharing(args, unit);
    Batch<kBytes> batch;
    const int ahead = group == 1 ? 4 : 2;
    const auto read_first = [&] {
      batch.read(sharing.keys, sharing.values, d, sharing.first, sharing.step, sharing.cached(unit),
                 ahead);
    };
    read_first();
    turn<kTokens>(args, layer, unit, queries, key, value);
    __syncthreads();
    if (group == 1) {
      attend_heads<1, 4>(args, unit, sharing, 0, 1, queries, key, value, batch, sums, states);
    } else {
#pragma unroll 1
      for (int first = 0; first < group; first += 2) {
        if (first > 0) {
          read_first();
        }
        attend_heads<2, 2>(args, unit, sharing, first, group - first, queries, key, value, batch,
                           sums, states);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < group * d; i += kThreads) {
      const int head = over_head_dim(args, i), at = i - head * d;
      const float* const state = states + head * kWarps * 2;
      float greatest = -INFINITY, sum = 0, out = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        greatest = fmaxf(greatest, state[2 * w]);
      }
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float weight = exp2f(state[2 * w] - greatest);
        sum += weight * state[2 * w + 1];
        out += weight * sums[(head * kWarps + w) * d + at];
      }
      const int64_t own = place + int64_t{head} * kMostParts;
      write_tagged(args.attended + to.place + own * d + at, out, to.tag);
      if (at == 0) {
        write_tagged(args.softmax + to.place + 2 * own, greatest, to.tag);
        write_tagged(args.softmax + to.place + 2 * own + 1, sum, to.tag);
      }
    }
  }
}

}  // namespace rabit::gpu
