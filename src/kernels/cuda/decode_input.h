// What the products of a token read: made by every block for the columns of its job, from what the
// phase before left in device memory.
#pragma once

#include "kernels/cuda/decode.h"

namespace rabit::gpu {

__device__ __forceinline__ void add_4(float4& to, const float4& x) {
  to.x += x.x, to.y += x.y, to.z += x.z, to.w += x.w;
}

__device__ __forceinline__ float4 four_halves(const uint16_t* at) {
  const uint2 bits = *reinterpret_cast<const uint2*>(at);
  return make_float4(
      from_half(static_cast<uint16_t>(bits.x)), from_half(static_cast<uint16_t>(bits.x >> 16)),
      from_half(static_cast<uint16_t>(bits.y)), from_half(static_cast<uint16_t>(bits.y >> 16)));
}

/// The sum over the splits of a product's output at four neighbours.
__device__ __forceinline__ float4 sum_splits(const float* at, int splits, int64_t stride) {
  float4 sum = read_fresh_4(at);
#pragma unroll 4
  for (int split = 1; split < splits; ++split) {
    add_4(sum, read_fresh_4(at + split * stride));
  }
  return sum;
}

/// The residual stream, with what the last product adds to it, times the norm's weights; the norm
/// itself, one factor, is left to whoever reads the product.
template <int kTokens>
struct StreamInput {
  const DecodeArgs& args;
  const float* stream;  // (tokens, d_model); null: the embedding
  const float* added;   // (splits, tokens, d_model); null: nothing
  const float* norm;    // (d_model)
  float* next;          // where a leading job keeps the stream; null: nobody reads it again
  float* squares;       // (splits, tokens): where it keeps the sums of squares
  int splits;

  __device__ __forceinline__ StreamInput(const DecodeArgs& a, int layer, Product product)
      : args(a) {
    if (product == kGateUp) {
      stream = args.stream[1];
      added = args.outputs[kOutput];
      splits = args.splits[kOutput];
      norm = args.blocks[layer].ffn_norm;
      next = args.stream[0];
    } else {
      stream = layer == 0 ? nullptr : args.stream[0];
      added = layer == 0 ? nullptr : args.outputs[kDown];
      splits = args.splits[kDown];
      norm = product == kHead ? args.output_norm : args.blocks[layer].attn_norm;
      next = product == kHead ? nullptr : args.stream[1];
    }
    squares = args.squares + (product == kGateUp ? kMostSplits * kMostDecodeTokens : 0);
  }

  __device__ __forceinline__ float4 load(int token, int column, bool leads, float& sum) const {
    const int width = args.sizes.d_model;
    float4 x;
    if (stream != nullptr) {
      x = read_fresh_4(stream + token * width + column);
    } else {
      x = four_halves(args.embedding + int64_t{args.tokens[token]} * width + column);
    }
    if (added != nullptr) {
      add_4(x, sum_splits(added + token * width + column, splits, kTokens * width));
    }
    sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    if (leads && next != nullptr) {
      *reinterpret_cast<float4*>(next + token * width + column) = x;
    }
    const float4 n = *reinterpret_cast<const float4*>(norm + column);
    return make_float4(x.x * n.x, x.y * n.y, x.z * n.z, x.w * n.w);
  }
};

/// What attention gave, its parts put together.
template <int kTokens>
struct AttendedInput {
  const DecodeArgs& args;
  static constexpr float* squares = nullptr;

  __device__ __forceinline__ explicit AttendedInput(const DecodeArgs& a) : args(a) {}

  __device__ __forceinline__ float4 load(int token, int column, bool, float&) const {
    const Sizes& sizes = args.sizes;
    const int head = column / sizes.head_dim, at = column % sizes.head_dim;
    const Parts parts(sizes, kTokens, args.positions[token]);
    const int64_t place = (int64_t{token} * sizes.heads + head) * kMostParts;
    const float* const softmax = args.softmax + place * 2;
    const float* const attended = args.attended + place * sizes.head_dim + at;
    float most = read_fresh(softmax);
#pragma unroll 4
    for (int part = 1; part < parts.count; ++part) {
      most = fmaxf(most, read_fresh(softmax + 2 * part));
    }
    float sum = 0;
    float4 out = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int part = 0; part < parts.count; ++part) {
      const float weight = exp2f(read_fresh(softmax + 2 * part) - most);
      const float4 x = read_fresh_4(attended + part * sizes.head_dim);
      sum += weight * read_fresh(softmax + 2 * part + 1);
      add_4(out, make_float4(weight * x.x, weight * x.y, weight * x.z, weight * x.w));
    }
    const float scale = 1.0F / sum;
    return make_float4(scale * out.x, scale * out.y, scale * out.z, scale * out.w);
  }
};

/// silu(gate) up, each still without the factor of the norm before them.
template <int kTokens>
struct GatedInput {
  const DecodeArgs& args;
  float root[kTokens];
  static constexpr float* squares = nullptr;

  __device__ __forceinline__ explicit GatedInput(const DecodeArgs& a) : args(a) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      root[token] = reciprocal_root(grid_squares(args, 1, token), args.sizes);
    }
  }

  __device__ __forceinline__ float4 load(int token, int column, bool, float&) const {
    const int width = args.widths[kGateUp], splits = args.splits[kGateUp];
    const float* const at = args.outputs[kGateUp] + token * width + column;
    const float4 gate = sum_splits(at, splits, kTokens * width);
    const float4 up = sum_splits(at + args.sizes.d_ff, splits, kTokens * width);
    const auto one = [&](float g, float u) {
      g *= root[token];
      return g / (1.0F + exp2f(-1.44269504F * g)) * (u * root[token]);
    };
    return make_float4(one(gate.x, up.x), one(gate.y, up.y), one(gate.z, up.z), one(gate.w, up.w));
  }
};

/// Planes of bits of all tokens and paths; a warp takes 256 columns at a time.
template <int kTokens>
__device__ __forceinline__ void make_bits(const Job& job, const Shared& shared) {
  constexpr float kShift = 12582912.0F;  // 1.5 * 2^23: a float's low bits are then the integer
  constexpr int kShiftBits = 0x4B400000;
  const int tiles = job.column_end - job.column_begin, paths = job.paths;
  const int plane = lane() % 16, group = plane % 8;
  for (int item = warp(); item < kTokens * tiles; item += kWarps) {
    const int token = item / tiles, tile = item % tiles;
    const float* const values = shared.input + (token * tiles + tile) * kTileColumns;
    const int first = (job.column_begin + tile) * kTileColumns;
    for (int path = 0; path < paths; path += 2) {
      const bool two = path + 1 < paths;
      float inverse[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = token * kMostPaths + (i == 1 && !two ? path : path + i);
        const float most =
            warp_max_magnitude(as_float(shared.maxima[at * kWarps + lane() % kWarps]));
        inverse[i] = most > 0 ? 32767.0F / most : 0.0F;
        if (tile == 0 && lane() == 0) {
          shared.scales[at] = most / 32767.0F;
        }
      }
      const uint16_t* const scales = job.col_scale + path * int64_t{job.d_in};
      uint32_t bits[8];
      int sums[2] = {0, 0};
#pragma unroll
      for (int word = 0; word < 8; ++word) {
        const int at = word * 32 + lane();
        const bool inside = first + at < job.d_in;
        const float value = values[at];
        const float h0 = inside ? from_half(scales[first + at]) : 0.0F;
        const float h1 = inside && two ? from_half(scales[job.d_in + first + at]) : 0.0F;
        const uint32_t q0 = as_bits(value * h0 * inverse[0] + kShift);
        const uint32_t q1 = as_bits(value * h1 * inverse[1] + kShift);
        sums[0] += static_cast<int>(q0) - kShiftBits;
        sums[1] += static_cast<int>(q1) - kShiftBits;
        bits[word] = transpose_bits((q0 & 0xFFFFU) | (q1 << 16), lane());
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int sum = warp_sum(sums[i]);
        if (lane() == 0 && path + i < paths) {
          atomicAdd(shared.totals + token * kMostPaths + path + i, sum);
        }
      }
      if (path + lane() / 16 < paths) {
        auto* const to = reinterpret_cast<uint32_t*>(
            shared.bits<kTokens>(job) + ((token * tiles + tile) * paths + path + lane() / 16) * 32);
#pragma unroll
        for (int quad = 0; quad < 4; ++quad) {
          uint2 pair;
          pair.x = bits[quad], pair.y = bits[quad + 4];
          *reinterpret_cast<uint2*>(to + group * 16 + 4 * (quad ^ ((group >> 1) & 3)) +
                                    plane / 8 * 2) = pair;
        }
      }
    }
  }
}

/// Halves of all tokens, scaled to at most 1; of few tokens also halves of what these leave.
template <int kTokens>
__device__ __forceinline__ void make_halves(const Job& job, const Shared& shared) {
  constexpr bool kSplit = kTokens <= 4;
  const int columns = (job.column_end - job.column_begin) * kTileColumns;
  uint16_t* const halves = shared.halves<kTokens>(job);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const float most =
        warp_max_magnitude(as_float(shared.maxima[token * kMostPaths * kWarps + lane() % kWarps]));
    const float inverse = most > 0 ? 1.0F / most : 0.0F;
    if (threadIdx.x == 0) {
      shared.scales[token * kMostPaths] = most;
    }
    for (int i = threadIdx.x; i < columns; i += kThreads) {
      const float value = shared.input[token * columns + i] * inverse;
      const uint16_t half = to_half(value);
      if (kSplit) {
        halves[2 * token * (columns + 32) + i] = half;
        halves[(2 * token + 1) * (columns + 32) + i] = to_half(value - from_half(half));
      } else {
        halves[token * (columns + 32) + i] = half;
      }
    }
  }
}

/// The input of a job's columns, ready for its rows.
template <int kTokens, typename Input>
__device__ __forceinline__ void prepare(const Job& job, const Shared& shared, const Input& input) {
  const bool packed = job.format == static_cast<int>(Format::kResidualBinary);
  const int columns = (job.column_end - job.column_begin) * kTileColumns;
  const int first = job.column_begin * kTileColumns;
  uint32_t maxima[kTokens][kMostPaths] = {};
  float squares[kTokens] = {};
  for (int i = 4 * threadIdx.x; i < columns; i += 4 * kThreads) {
    const bool inside = first + i < job.d_in;
    float4 scales[kMostPaths];
#pragma unroll
    for (int path = 0; path < kMostPaths; ++path) {
      scales[path] = packed && path < job.paths && inside
                         ? four_halves(job.col_scale + path * int64_t{job.d_in} + first + i)
                         : make_float4(1, 1, 1, 1);
    }
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      float4 x = make_float4(0, 0, 0, 0);
      if (inside) {
        x = input.load(token, first + i, job.leads != 0, squares[token]);
      }
      *reinterpret_cast<float4*>(shared.input + token * columns + i) = x;
#pragma unroll
      for (int path = 0; path < kMostPaths; ++path) {
        const auto grow = [&](float value) {
          const uint32_t bits = as_bits(value) & 0x7FFFFFFFU;
          maxima[token][path] = bits > maxima[token][path] ? bits : maxima[token][path];
        };
        if (path < job.paths) {
          grow(x.x * scales[path].x), grow(x.y * scales[path].y);
          grow(x.z * scales[path].z), grow(x.w * scales[path].w);
        }
      }
    }
  }
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
#pragma unroll
    for (int path = 0; path < kMostPaths; ++path) {
      if (path < job.paths) {
        const float most = warp_max_magnitude(as_float(maxima[token][path]));
        if (lane() == 0) {
          shared.maxima[(token * kMostPaths + path) * kWarps + warp()] = as_bits(most);
        }
      }
    }
    if (input.squares != nullptr) {
      const float sum = warp_sum(squares[token]);
      if (lane() == 0) {
        shared.squares[token * kWarps + warp()] = sum;
      }
    }
  }
  if (threadIdx.x < kTokens * kMostPaths) {
    shared.totals[threadIdx.x] = 0;
  }
  __syncthreads();
  if (packed) {
    make_bits<kTokens>(job, shared);
  } else {
    make_halves<kTokens>(job, shared);
  }
  if (input.squares != nullptr && job.leads != 0 && threadIdx.x < kTokens) {
    input.squares[job.split * kMostDecodeTokens + threadIdx.x] =
        block_squares(shared, static_cast<int>(threadIdx.x));
  }
  __syncthreads();
}

}  // namespace rabit::gpu
