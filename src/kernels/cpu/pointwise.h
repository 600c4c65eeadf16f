// Operations on single vectors: norm, rotary positions, SwiGLU, cross entropy.
#pragma once

#include "kernels/cpu/vec.h"

namespace rabit::RABIT_ISA {
namespace {

/// Mean square of a row times `shrink`.
RABIT_INLINE double mean_square(const float* x, int64_t d, float shrink) {
  const int64_t whole = d / kLanes * kLanes;
  Vec squares = {};
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Vec v = load(x + c) * shrink;
    squares += v * v;
  }
  if (whole < d) {
    const Vec v = load_part(x + whole, d - whole) * shrink;
    squares += v * v;
  }
  return sum_lanes_double(squares) / static_cast<double>(d);
}

void rms_norm(const float* x, const float* weight, int64_t tokens, int64_t d, float epsilon,
              float* y) {
  constexpr float kShrink = 0x1p-80F;  // of rows whose squares a float does not hold
  const int64_t whole = d / kLanes * kLanes;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* from = x + t * d;
    float* to = y + t * d;
    float shrink = 1;
    double mean = mean_square(from, d, shrink);
    if (!(mean < __builtin_inf())) {
      shrink = kShrink;
      mean = mean_square(from, d, shrink);
    }
    const double small = static_cast<double>(epsilon) * shrink * shrink;
    const auto scale = static_cast<float>(1.0 / __builtin_sqrt(mean + small));
    for (int64_t c = 0; c < whole; c += kLanes) {
      store(to + c, load(from + c) * shrink * scale * load(weight + c));
    }
    for (int64_t c = whole; c < d; ++c) {
      to[c] = from[c] * shrink * scale * weight[c];
    }
  }
}

void rope(float* x, const float* cos_sin, int64_t tokens, int64_t heads, int64_t head_dim) {
  const Vec minus_plus = (kLaneIndex & 1) == 0 ? splat(-1.0F) : splat(1.0F);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* turn = cos_sin + t * head_dim;
    for (int64_t head = 0; head < heads; ++head) {
      float* row = x + (t * heads + head) * head_dim;
      int64_t c = 0;
      for (; c + kLanes <= head_dim; c += kLanes) {
        const Vec v = load(row + c), cs = load(turn + c);
        store(row + c, v * RABIT_EVEN(cs) + RABIT_SWAP(v) * (RABIT_ODD(cs) * minus_plus));
      }
      for (; c < head_dim; c += 2) {
        const float a = row[c], b = row[c + 1];
        row[c] = a * turn[c] - b * turn[c + 1];
        row[c + 1] = a * turn[c + 1] + b * turn[c];
      }
    }
  }
}

RABIT_INLINE Vec gated(Vec x, Vec up) { return x / (1.0F + exp_of(-x)) * up; }

void swiglu(float* gate, const float* up, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(gate + i, gated(load(gate + i), load(up + i)));
  }
  if (i < count) {
    store_part(gate + i, gated(load_part(gate + i, count - i), load_part(up + i, count - i)),
               count - i);
  }
}

double cross_entropy(const float* logits, int64_t vocab, int32_t target) {
  constexpr int64_t kRun = 32 * kLanes;  // floats whose exponentials are summed in float
  const int64_t whole = vocab / kLanes * kLanes;
  float largest = logits[0];
  if (whole > 0) {
    Vec top = load(logits);
    for (int64_t i = kLanes; i < whole; i += kLanes) {
      top = max_of(top, load(logits + i));
    }
    largest = max_lane(top);
  }
  for (int64_t i = whole; i < vocab; ++i) {
    largest = logits[i] > largest ? logits[i] : largest;
  }
  double total = 0;
  for (int64_t begin = 0; begin < whole; begin += kRun) {
    Vec sum = {};
    for (int64_t i = begin; i < smaller(begin + kRun, whole); i += kLanes) {
      sum += exp_of(load(logits + i) - largest);
    }
    total += sum_lanes_double(sum);
  }
  for (int64_t i = whole; i < vocab; ++i) {
    total += exp_of(splat(logits[i] - largest))[0];
  }
  return __builtin_log(total) + (static_cast<double>(largest) - logits[target]);
}

}  // namespace
}  // namespace rabit::RABIT_ISA
