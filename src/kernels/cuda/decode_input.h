// What the products of a token read: made by every block for the columns of its job, from what the
// phase before left in device memory. An input's ask() begins the reads, and is repeated until all
// has come; value() uses what was read.
#pragma once

#include "kernels/cuda/decode.h"

namespace rabit::gpu {

__device__ __forceinline__ void add_4(float4& to, const float4& x) {
  to.x += x.x, to.y += x.y, to.z += x.z, to.w += x.w;
}

__device__ __forceinline__ float4 four_halves(uint2 bits) {
  return make_float4(half_to_float(static_cast<uint16_t>(bits.x)),
                     half_to_float(static_cast<uint16_t>(bits.x >> 16)),
                     half_to_float(static_cast<uint16_t>(bits.y)),
                     half_to_float(static_cast<uint16_t>(bits.y >> 16)));
}

/// What the splits of a product gave at four neighbours, first all asked for, then added up.
template <int kAhead>
struct Splits {
  float4 each[kAhead];

  __device__ __forceinline__ void ask(const float* at, int splits, int64_t stride,
                                      Arrivals& arrivals) {
#pragma unroll
    for (int split = 0; split < kAhead; ++split) {
      each[split] = arrivals.read_4(at + split * stride, split, splits);
    }
  }
  __device__ __forceinline__ float4 sum(const float* at, int splits, int64_t stride,
                                        Arrivals& arrivals) {
    float4 out = each[0];
#pragma unroll
    for (int split = 1; split < kAhead; ++split) {
      add_4(out, each[split]);
    }
#pragma unroll 1
    for (int split = kAhead; split < splits; split += kAhead) {
      do {
        ask(at + split * stride, splits - split, stride, arrivals);
      } while (!arrivals.all());
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        add_4(out, each[i]);
      }
    }
    return out;
  }
};

/// The residual stream, with what the last product adds to it, times the norm's weights; the norm
/// itself, one factor, is left to whoever reads the product.
template <int kTokens>
struct StreamInput {
  const DecodeArgs& args;
  const Shared& shared;
  const float* stream;  // (tokens, d_model); null: the embedding
  const float* added;   // (splits, tokens, d_model)
  float* next;          // where a leading job keeps the stream; null: nobody reads it again
  int splits;           // of `added`
  uint32_t tag, next_tag;
  static constexpr bool kNormed = true;

  __device__ __forceinline__ StreamInput(const DecodeArgs& a, const Shared& s, int layer,
                                         Product product)
      : args(a), shared(s) {
    const bool second = product == kGateUp, embedding = !second && layer == 0;
    const Exchange from(args, second ? layer : layer - 1), to(args, layer);
    stream = embedding ? nullptr : args.stream[second ? 1 : 0] + from.place;
    added = args.outputs[second ? kOutput : kDown] + from.place;
    splits = embedding ? 0 : args.splits[second ? kOutput : kDown];
    next = product == kHead ? nullptr : args.stream[second ? 0 : 1] + to.place;
    tag = from.tag, next_tag = to.tag;
  }

  struct Asked {
    float4 stream, norm;
    Splits<8> added;
  };
  __device__ __forceinline__ void ask(const Job& job, int token, int column, Asked& asked,
                                      Arrivals& arrivals) const {
    const int64_t width = args.sizes.d_model, at = token * width + column;
    asked.stream = stream != nullptr
                       ? arrivals.read_4(stream + at)
                       : four_halves(*reinterpret_cast<const uint2*>(
                             args.embedding + shared.tokens()[token] * width + column));
    asked.added.ask(added + at, splits, kTokens * width, arrivals);
    asked.norm = *reinterpret_cast<const float4*>(job.norm + column);
  }
  __device__ __forceinline__ float4 value(const Job& job, int token, int column, bool inside,
                                          Asked& asked, Arrivals& arrivals) const {
    const int64_t width = args.sizes.d_model, at = token * width + column;
    float4 x = asked.stream;
    add_4(x, asked.added.sum(added + at, splits, kTokens * width, arrivals));
    asked.stream = x;
    if (inside && job.leads != 0 && next != nullptr) {
      write_tagged_4(next + at, x, next_tag);
    }
    const float4& n = asked.norm;
    return make_float4(x.x * n.x, x.y * n.y, x.z * n.z, x.w * n.w);
  }
  /// Of the values' squares, before the norm's weights.
  static __device__ __forceinline__ float squares(const Asked& asked) {
    const float4& x = asked.stream;
    return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
  }
};

/// What attention gave, its parts put together.
template <int kTokens>
struct AttendedInput {
  const DecodeArgs& args;
  const Shared& shared;
  const Exchange from;
  const uint32_t tag;
  static constexpr bool kNormed = false;

  __device__ __forceinline__ AttendedInput(const DecodeArgs& a, const Shared& s, int layer)
      : args(a), shared(s), from(a, layer), tag(from.tag) {}

  static constexpr int kAhead = 8;
  struct Asked {
    float4 values[kAhead];
    float most[kAhead], sum[kAhead];
    const float *softmax, *attended;
    int count;

    __device__ __forceinline__ void ask(int first, int head_dim, Arrivals& arrivals) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float2 state = arrivals.read_2(softmax + 2 * (first + i), first + i, count);
        most[i] = first + i < count ? state.x : -INFINITY;
        sum[i] = state.y;
        values[i] = arrivals.read_4(attended + (first + i) * head_dim, first + i, count);
      }
    }
  };
  __device__ __forceinline__ void ask(const Job&, int token, int column, Asked& asked,
                                      Arrivals& arrivals) const {
    const Sizes& sizes = args.sizes;
    const int head = over_head_dim(args, column);
    const int64_t place = (int64_t{token} * sizes.heads + head) * kMostParts;
    asked.softmax = args.softmax + from.place + place * 2;
    asked.attended =
        args.attended + from.place + place * sizes.head_dim + column - head * sizes.head_dim;
    asked.count = shared.parts()[token];
    asked.ask(0, sizes.head_dim, arrivals);
  }
  __device__ __forceinline__ float4 value(const Job&, int, int, bool, Asked& asked,
                                          Arrivals& arrivals) const {
    float most = -INFINITY, sum = 0;
    float4 out = make_float4(0, 0, 0, 0);
#pragma unroll 1
    for (int first = 0;;) {
      float both = most;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        both = fmaxf(both, asked.most[i]);
      }
      const float kept = exp2f(most - both);
      sum *= kept, out.x *= kept, out.y *= kept, out.z *= kept, out.w *= kept;
      most = both;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float weight = exp2f(asked.most[i] - most);
        const float4& x = asked.values[i];
        sum += weight * asked.sum[i];
        add_4(out, make_float4(weight * x.x, weight * x.y, weight * x.z, weight * x.w));
      }
      first += kAhead;
      if (first >= asked.count) {
        break;
      }
      do {
        asked.ask(first, args.sizes.head_dim, arrivals);
      } while (!arrivals.all());
    }
    const float scale = __fdividef(1.0F, sum);
    return make_float4(scale * out.x, scale * out.y, scale * out.z, scale * out.w);
  }
};

/// silu(gate) up, each still without the factor of the norm before them.
template <int kTokens>
struct GatedInput {
  const DecodeArgs& args;
  const Exchange from;
  const uint32_t tag;
  static constexpr bool kNormed = false;

  __device__ __forceinline__ GatedInput(const DecodeArgs& a, int layer)
      : args(a), from(a, layer), tag(from.tag) {}

  struct Asked {
    Splits<4> gate, up;
    GridRoot root;
  };
  __device__ __forceinline__ void ask(const Job&, int token, int column, Asked& asked,
                                      Arrivals& arrivals) const {
    const int64_t width = args.widths[kGateUp];
    const float* const at = args.outputs[kGateUp] + from.place + token * width + column;
    asked.root.ask(args, from, 1, token, arrivals);
    asked.gate.ask(at, args.splits[kGateUp], kTokens * width, arrivals);
    asked.up.ask(at + args.sizes.d_ff, args.splits[kGateUp], kTokens * width, arrivals);
  }
  __device__ __forceinline__ float4 value(const Job&, int token, int column, bool, Asked& asked,
                                          Arrivals& arrivals) const {
    const int64_t width = args.widths[kGateUp];
    const float* const at = args.outputs[kGateUp] + from.place + token * width + column;
    const float root = asked.root.value(args);
    const float4 gate = asked.gate.sum(at, args.splits[kGateUp], kTokens * width, arrivals);
    const float4 up =
        asked.up.sum(at + args.sizes.d_ff, args.splits[kGateUp], kTokens * width, arrivals);
    const auto one = [&](float g, float u) {
      g *= root;
      return __fdividef(g, 1.0F + exp2f(-1.44269504F * g)) * (u * root);
    };
    return make_float4(one(gate.x, up.x), one(gate.y, up.y), one(gate.z, up.z), one(gate.w, up.w));
  }
};

/// Inputs none of which is larger are zeros: what reciprocal() has no answer to.
constexpr float kLeast = 1e-37F;

/// Planes of bits of all tokens and paths, two paths at a time; a warp takes two words of a column
/// tile at once, those that lanes of one number within their four will hold.
template <int kTokens>
__device__ __forceinline__ void make_bits(const Job& job, const Shared& shared) {
  constexpr float kShift = 12582912.0F;  // 1.5 * 2^23: a float's low bits are then the integer
  constexpr uint32_t kShiftBits = 0x4B400000U;
  const int tiles = job.column_end - job.column_begin, paths = job.paths;
  const int plane = lane() % 16, group = plane % 8, upper = lane() / 16;
  const int stride = tiles * kTileColumns;
  const BitTranspose transpose(lane());
#pragma unroll 1
  for (int token = 0; token < kTokens; ++token) {
#pragma unroll 1
    for (int path = 0; path < paths; path += 2) {
      const int place = token * kMostPaths + path, second = path + 1 < paths ? stride : 0;
      const float most[2] = {bits_to_float(shared.maxima()[place]),
                             bits_to_float(shared.maxima()[place + (second != 0 ? 1 : 0)])};
      float inverse[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        inverse[i] = most[i] > kLeast ? 32767.0F * reciprocal(most[i]) : 0.0F;
      }
      if (threadIdx.x < 2) {
        shared.scales()[place + lane()] = (lane() == 0 ? most[0] : most[1]) * (1.0F / 32767.0F);
      }
      const float* const values =
          shared.input() + (token * paths + path) * stride + tile_column(lane());
      auto* const bits = reinterpret_cast<uint32_t*>(shared.bits<kTokens>(job) +
                                                     (token * tiles * paths + path + upper) * 32);
      const int word = group * 16 + plane / 8 * 2;
      uint32_t sums[2] = {0, 0};
#pragma unroll 1
      for (int item = warp(); item < 4 * tiles; item += kWarps) {
        const int tile = item >> 2, quad = item & 3;
        const float* const from = values + tile * kTileColumns + quad * 32;
        uint32_t turned[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t q0 = float_to_bits(from[128 * i] * inverse[0] + kShift);
          const uint32_t q1 = float_to_bits(from[128 * i + second] * inverse[1] + kShift);
          sums[0] += q0 - kShiftBits, sums[1] += q1 - kShiftBits;
          turned[i] = transpose((q0 & 0xFFFFU) | (q1 << 16));
        }
        if (upper == 0 || second != 0) {
          uint2 pair;
          pair.x = turned[0], pair.y = turned[1];
          *reinterpret_cast<uint2*>(bits + tile * paths * 128 + word +
                                    4 * (quad ^ ((group >> 1) & 3))) = pair;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int sum = warp_sum(static_cast<int>(sums[i]));
        if (lane() == 0 && path + i < paths) {
          atomicAdd(shared.totals() + place + i, sum);
        }
      }
    }
  }
}

/// Halves of all tokens, scaled to at most 1, and halves of what these leave.
template <int kTokens>
__device__ __forceinline__ void make_halves(const Job& job, const Shared& shared) {
  const int columns = (job.column_end - job.column_begin) * kTileColumns;
  uint16_t* const halves = shared.halves<kTokens>(job);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const float most = bits_to_float(shared.maxima()[token * kMostPaths]);
    const float inverse = most > kLeast ? reciprocal(most) : 0.0F;
    if (threadIdx.x == 0) {
      shared.scales()[token * kMostPaths] = most;
    }
    for (int i = threadIdx.x; i < columns; i += kThreads) {
      const float value = shared.input()[token * columns + i] * inverse;
      const uint16_t half = float_to_half(value);
      halves[2 * token * (columns + 32) + i] = half;
      halves[(2 * token + 1) * (columns + 32) + i] = float_to_half(value - half_to_float(half));
    }
  }
}

/// The values of a job's columns to shared memory, with the largest of each path and, of the
/// stream, sums of squares. A warp takes 128 columns of a token at a time. The block's threads must
/// have left nothing but what they use of shared memory; they do when they wait here.
template <int kTokens, typename Input>
__device__ __forceinline__ void read_values(const Job& job, const Shared& shared,
                                            const Input& input) {
  const bool packed = job.format == static_cast<int>(Format::kResidualBinary);
  const int columns = (job.column_end - job.column_begin) * kTileColumns, paths = job.paths;
  const int first = job.column_begin * kTileColumns, runs = columns / kRun;
  Arrivals arrivals(input.tag);
  bool alone = false;  // nobody uses what the phase before left in shared memory
  const auto wait_for_block = [&] {
    if (!alone) {
      __syncthreads();
      if (threadIdx.x < kMostDecodeTokens * kMostPaths) {
        shared.totals()[threadIdx.x] = 0;
      }
      alone = true;
    }
  };
#pragma unroll 1
  for (int item = warp(); item < kTokens * runs; item += kWarps) {
    int run = item;
    const int token = token_of<kTokens>(run, runs), at = first + run * kRun + lane() * 4;
    const bool inside = at < job.d_in;
    const int column = inside ? at : job.d_in - 4;
    const auto column_scales = [&](int path) {
      uint2 ones;
      ones.x = ones.y = 0x3C003C00U;
      return packed && path < paths ? *reinterpret_cast<const uint2*>(
                                          job.col_scale + path * int64_t{job.d_in} + column)
                                    : ones;
    };
    uint2 halves[2] = {column_scales(0), column_scales(1)};
    typename Input::Asked asked;
    do {
      input.ask(job, token, column, asked, arrivals);
    } while (!arrivals.all());
    wait_for_block();
    const float4 x = input.value(job, token, column, inside, asked, arrivals);
    float* const to = shared.input() + token * paths * columns + at - first;
    const auto scaled = [&](int path, uint2 scales) {
      const float4 scale = four_halves(scales);
      const float4 y = inside
                           ? make_float4(x.x * scale.x, x.y * scale.y, x.z * scale.z, x.w * scale.w)
                           : make_float4(0, 0, 0, 0);
      *reinterpret_cast<float4*>(to + path * columns) = y;
      uint32_t most = 0;
      const auto grow = [&](float value) {
        const uint32_t bits = float_to_bits(value) & 0x7FFFFFFFU;
        most = bits > most ? bits : most;
      };
      grow(y.x), grow(y.y), grow(y.z), grow(y.w);
      const uint32_t all = warp_max(most);
      if (lane() == 0) {
        atomicMax(shared.maxima() + token * kMostPaths + path, all);
      }
    };
    scaled(0, halves[0]);
    if (paths > 1) {
      scaled(1, halves[1]);
    }
#pragma unroll 1
    for (int path = 2; path < paths; ++path) {
      scaled(path, column_scales(path));
    }
    if constexpr (Input::kNormed) {
      const float squares = warp_sum(inside ? Input::squares(asked) : 0.0F);
      if (lane() == 0) {
        shared.squares()[token * kMostRuns + run] = squares;
      }
    }
  }
  wait_for_block();
  __syncthreads();
}

/// What the tensor cores take of them.
template <int kTokens>
__device__ __forceinline__ void make_operand(const DecodeArgs& args, int layer, Product product,
                                             const Job& job, const Shared& shared) {
  if (job.format == static_cast<int>(Format::kResidualBinary)) {
    make_bits<kTokens>(job, shared);
  } else {
    make_halves<kTokens>(job, shared);
  }
  if ((product == kQkv || product == kGateUp) && job.leads != 0 && threadIdx.x < kTokens) {
    const int token = static_cast<int>(threadIdx.x), which = product == kQkv ? 0 : 1;
    const Exchange to(args, layer);
    write_tagged(
        args.squares + to.place + (which * kMostSplits + job.split) * kMostDecodeTokens + token,
        block_squares(shared, token, (job.column_end - job.column_begin) * kTileColumns / kRun),
        to.tag);
  }
  __syncthreads();
  if (threadIdx.x < kMostDecodeTokens * kMostPaths) {
    shared.maxima()[threadIdx.x] = 0;
  }
}

}  // namespace rabit::gpu
