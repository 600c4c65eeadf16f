// Causal attention by blocks: kQueryTokens tokens of all query heads that share one KV head go
// through the cache in blocks of kMaxColumns positions. Of each block, scores S = Q K^T and then
// P V are made with the tile product of gemm.h, so keys and values are converted once per block
// rather than once per query. The softmax is kept up to date block by block: `largest` and `total`
// of a row belong to all blocks so far, and the row's output is rescaled when `largest` grows
// (Milakov and Gimelshein, arXiv 1805.02867).
// A row is one (token, head) pair, heads of a token next to each other. A part of the positions
// ends with the same state, by which parts are put together.
#pragma once

#include "kernels/cpu/gemm.h"

namespace rabit::RABIT_ISA {
namespace {

/// A block of 32 values as Q8_0.
RABIT_INLINE void to_block(const float* from, uint8_t* block) {
  Vec top = {}, none = {};  // the second: 0, or NaN where a value is not finite
  for (int64_t c = 0; c < kBlock; c += kLanes) {
    const Vec v = load(from + c);
    top = max_of(top, v < 0 ? -v : v);
    none += v * 0.0F;
  }
  uint16_t scale[kLanes];
  store_half(scale, splat(max_lane(top) / 127 + sum_lanes(none)));
  __builtin_memcpy(block, scale, sizeof scale[0]);
  const float unit = half_value(scale[0]), units = unit > 0 ? 1 / unit : 0;
  constexpr float kRounder = 0x1.8p23F;  // adding it leaves the nearest integer in the low bits
  for (int64_t c = 0; c < kBlock; c += kLanes) {
    const Vec v = load(from + c) * units;
    const Vec bounded = v > 127.0F ? splat(127.0F) : v < -127.0F ? splat(-127.0F) : v;
    const IntVec whole = reinterpret_cast<IntVec>(bounded + kRounder);
    *reinterpret_cast<LooseByteVec*>(block + 2 + c) = __builtin_convertvector(whole, ByteVec);
  }
}

void to_cache(const float* from, int64_t count, CacheFormat format, void* to) {
  const int64_t whole = count / kLanes * kLanes;
  switch (format) {
    case CacheFormat::kF32:
      __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
      return;
    case CacheFormat::kF16: {
      auto* halves = static_cast<uint16_t*>(to);
      for (int64_t i = 0; i < whole; i += kLanes) {
        store_half(halves + i, load(from + i));
      }
      if (whole < count) {
        uint16_t rest[kLanes];
        store_half(rest, load_part(from + whole, count - whole));
        __builtin_memcpy(halves + whole, rest, static_cast<size_t>(count - whole) * sizeof rest[0]);
      }
      return;
    }
    case CacheFormat::kQ8_0:
      for (int64_t at = 0; at < count; at += kBlock) {
        to_block(from + at, static_cast<uint8_t*>(to) + cache_bytes(format, at));
      }
  }
}

constexpr int64_t kQueryTokens = 48;  // a multiple of every kTile
static_assert(kQueryTokens % kTile == 0);
static_assert(kPartPositions % kMaxColumns == 0);  // a part is of whole blocks

// Scratch: q (rows, kTileStride), scores (rows, kTileStride), sums (rows, d), largest (rows),
// total (rows), one panel of K (d, kPanel), a block of V (kMaxColumns, d); d rounded up to kPanel.
int64_t attention_scratch(int64_t tokens, int64_t /*positions*/, int64_t heads, int64_t kv_heads,
                          int64_t head_dim) {
  const int64_t d = round_up(head_dim, kPanel);
  const int64_t rows = round_up(smaller(tokens, kQueryTokens) * (heads / kv_heads), 16);
  return rows * (2 * kTileStride + d + 2) + d * kPanel + kMaxColumns * d;
}

/// out[p][0, d) = values of `count` positions as floats, zeros from head_dim to d. Returns whether
/// all are finite.
template <typename Rows>
bool unpack_values(const Rows& source, int64_t first, int64_t count, int64_t head_dim, int64_t d,
                   float* out) {
  Vec none = {};  // 0, or NaN where a value is not finite
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t c = 0; c < d; c += kLanes) {
      const Vec v = c < head_dim ? source.read(first + p, c, head_dim - c) : Vec{};
      none += v * 0.0F;
      store(out + p * d + c, v);
    }
  }
  return sum_lanes(none) == 0;
}

/// Turns a row of scores into exp(scale * s - largest) and updates the row's state; scores from
/// `count` up to `end` are masked. Returns what the sums so far must be multiplied with.
RABIT_INLINE float softmax_step(float* scores, int64_t count, int64_t end, float scale,
                                float* largest, float* total) {
  if (count == 0) {
    for (int64_t p = 0; p < end; ++p) {
      scores[p] = 0;
    }
    return 1.0F;
  }
  // Pad to whole vectors with a score that stands in the row already.
  const int64_t padded = round_up(count, kLanes);
  for (int64_t p = count; p < padded; ++p) {
    scores[p] = scores[0];
  }
  Vec top = load(scores);
  for (int64_t p = kLanes; p < padded; p += kLanes) {
    top = max_of(top, load(scores + p));
  }
  const float before = *largest;
  const float now = max_lane(top) * scale;
  const float after = now > before ? now : before;
  Vec sum = {};
  for (int64_t p = 0; p < padded; p += kLanes) {
    Vec e = exp_of(load(scores + p) * scale - after);
    if (p + kLanes > count) {
      e = kLaneIndex < static_cast<int32_t>(count - p) ? e : Vec{};
    }
    sum += e;
    store(scores + p, e);
  }
  for (int64_t p = padded; p < end; ++p) {
    scores[p] = 0;
  }
  const float shrink = exp_of(splat(before - after))[0];
  *largest = after;
  *total = *total * shrink + sum_lanes(sum);
  return shrink;
}

// Of a query or two, as when one token is generated, keys and values are used as they are read. It
// is all tokens of the call that count, so that how heads are shared out changes nothing.
constexpr int64_t kFewQueries = 2;
constexpr int64_t kCacheAhead = 2048;  // bytes from what is read to what is asked for

/// scores[row][p] = q[row] keys[first + p].
template <typename Rows>
void few_scores(const Rows& keys, int64_t first, int64_t count, int64_t head_dim, const float* q,
                int64_t rows, float* scores) {
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t row = 0; row < rows; ++row) {
      const float* query = q + row * kTileStride;
      Vec sum = {};
      int64_t c = 0;
      for (; c + kLanes <= head_dim; c += kLanes) {
        __builtin_prefetch(static_cast<const char*>(keys.place(first + p, c)) + kCacheAhead);
        sum += keys.read(first + p, c, kLanes) * load(query + c);
      }
      if (c < head_dim) {
        sum += keys.read(first + p, c, head_dim - c) * load_part(query + c, head_dim - c);
      }
      scores[row * kTileStride + p] = sum_lanes(sum);
    }
  }
}

/// sums[row][0, head_dim) (+)= sum over p < seen(row) of scores[row][p] values[first + p].
template <typename Rows, typename Seen>
void few_sums(const Rows& values, int64_t first, const Seen& seen, int64_t head_dim, int64_t d,
              const float* scores, int64_t rows, float* sums, bool add) {
  constexpr int64_t kWidth = 8;  // vectors at once
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t count = seen(row);
    for (int64_t c0 = 0; c0 < head_dim; c0 += kWidth * kLanes) {
      Vec parts[kWidth] = {};
      for (int64_t p = 0; p < count; ++p) {
        const float score = scores[row * kTileStride + p];
#pragma GCC unroll 8
        for (int64_t i = 0; i < kWidth; ++i) {
          const int64_t c = c0 + i * kLanes;
          if (c < head_dim) {
            __builtin_prefetch(static_cast<const char*>(values.place(first + p, c)) + kCacheAhead);
            parts[i] += score * values.read(first + p, c, head_dim - c);
          }
        }
      }
      for (int64_t i = 0; i < kWidth && c0 + i * kLanes < head_dim; ++i) {
        float* to = sums + row * d + c0 + i * kLanes;
        store(to, add ? load(to) + parts[i] : parts[i]);
      }
    }
  }
}

/// What is asked for of an attention: heads of one KV head, and where `state` is not null what
/// attention_part() has beside `out`.
struct Asked {
  int64_t head_begin, head_end, token_begin, token_end, position_begin, position_end;
  float *out, *state;
};

/// At most kQueryTokens tokens.
template <typename Rows>
void attend(const AttentionInput& in, const Rows& keys, const Rows& values, const Asked& asked,
            float* scratch) {
  const int64_t head_begin = asked.head_begin, group = asked.head_end - head_begin;
  const int64_t token_begin = asked.token_begin, token_count = asked.token_end - token_begin;
  const int64_t rows = token_count * group, head_dim = in.head_dim;
  const int64_t d = round_up(head_dim, kPanel);
  float* v = scratch;
  float* panel = v + kMaxColumns * d;
  float* q = panel + d * kPanel;
  float* scores = q + rows * kTileStride;
  float* sums = scores + rows * kTileStride;
  float* largest = sums + rows * d;
  float* total = largest + rows;
  const float scale = 1.0F / __builtin_sqrtf(static_cast<float>(head_dim));
  const bool few = in.tokens <= kFewQueries;

  for (int64_t t = 0; t < token_count; ++t) {
    copy_tile(in.q + ((token_begin + t) * in.heads + head_begin) * head_dim, head_dim, group,
              head_dim, q + t * group * kTileStride);
  }
  for (int64_t row = 0; row < rows; ++row) {
    largest[row] = -__builtin_inff();
    total[row] = 0;
  }
  const int64_t first_query = in.first_position + token_begin;
  const int64_t positions = smaller(asked.position_end, first_query + token_count);
  for (int64_t p0 = asked.position_begin; p0 < positions; p0 += kMaxColumns) {
    const int64_t count = smaller(kMaxColumns, positions - p0);
    const bool add = p0 > asked.position_begin;
    const auto seen = [&](int64_t row) {  // by the row, of these positions
      return larger(0, smaller(first_query + row / group + 1 - p0, count));
    };
    if (few) {
      few_scores(keys, p0, count, head_dim, q, rows, scores);
    }
    for (int64_t p = 0; p < count && !few; p += kPanel) {
      unpack_panel(keys, p0 + p, smaller(kPanel, count - p), 0, head_dim, panel);
      for (int64_t row = 0; row < rows; row += kTile) {
        // Scores past `count` land in the row's padding and are never read.
        panel_product(q + row * kTileStride, smaller(kTile, rows - row), panel, kPanel, head_dim,
                      scores + row * kTileStride + p, kTileStride, kPanel, false);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float shrink = softmax_step(scores + row * kTileStride, seen(row), count, scale,
                                        largest + row, total + row);
      if (add && shrink != 1.0F) {
        for (int64_t c = 0; c < d; c += kLanes) {
          store(sums + row * d + c, load(sums + row * d + c) * shrink);
        }
      }
    }
    if (few) {
      few_sums(values, p0, seen, head_dim, d, scores, rows, sums, add);
      continue;
    }
    // What a row does not see has a score of 0 and may stand in its sum, unless 0 times it is NaN.
    const bool finite = unpack_values(values, p0, count, head_dim, d, v);
    const int64_t together = finite ? kTile : 1;
    for (int64_t row = 0; row < rows; row += together) {
      for (int64_t c = 0; c < d; c += kPanel) {
        panel_product(scores + row * kTileStride, smaller(together, rows - row), v + c, d,
                      finite ? count : seen(row), sums + row * d + c, d, kPanel, add);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t place = (token_begin + row / group) * in.heads + head_begin + row % group;
    float* to = asked.out + place * head_dim;
    if (asked.state != nullptr) {
      asked.state[2 * place] = largest[row];
      asked.state[2 * place + 1] = total[row];
    }
    const bool none = total[row] == 0;
    const float inverse = 1.0F / total[row];
    int64_t c = 0;
    for (; c + kLanes <= head_dim; c += kLanes) {
      store(to + c, none ? Vec{} : load(sums + row * d + c) * inverse);
    }
    for (; c < head_dim; ++c) {
      to[c] = none ? 0 : sums[row * d + c] * inverse;
    }
  }
}

/// The same for heads of several KV heads and any number of tokens.
void attend_all(const AttentionInput& in, const Asked& all, float* scratch) {
  const int64_t group = in.heads / in.kv_heads;
  const int64_t cache_head = cache_bytes(in.cache, in.capacity * in.head_dim);
  Asked asked = all;
  for (int64_t t = all.token_begin; t < all.token_end; t += kQueryTokens) {
    asked.token_begin = t;
    asked.token_end = smaller(t + kQueryTokens, all.token_end);
    for (int64_t head = all.head_begin; head < all.head_end; head = asked.head_end) {
      const int64_t kv = head / group;
      asked.head_begin = head;
      asked.head_end = smaller(all.head_end, (kv + 1) * group);
      const auto* k = static_cast<const uint8_t*>(in.k) + kv * cache_head;
      const auto* v = static_cast<const uint8_t*>(in.v) + kv * cache_head;
      const auto run = [&](const auto& keys, const auto& values) {
        attend(in, keys, values, asked, scratch);
      };
      switch (in.cache) {
        case CacheFormat::kF32:
          run(FloatRows{reinterpret_cast<const float*>(k), in.head_dim},
              FloatRows{reinterpret_cast<const float*>(v), in.head_dim});
          break;
        case CacheFormat::kF16:
          run(HalfRows{reinterpret_cast<const uint16_t*>(k), in.head_dim},
              HalfRows{reinterpret_cast<const uint16_t*>(v), in.head_dim});
          break;
        case CacheFormat::kQ8_0:
          run(BlockRows<Q8Block>{k, in.head_dim}, BlockRows<Q8Block>{v, in.head_dim});
      }
    }
  }
}

void attention(const AttentionInput& in, int64_t head_begin, int64_t head_end, int64_t token_begin,
               int64_t token_end, float* scratch, float* out) {
  attend_all(in,
             {head_begin, head_end, token_begin, token_end, 0, in.first_position + token_end, out,
              nullptr},
             scratch);
}

void attention_part(const AttentionInput& in, int64_t head_begin, int64_t head_end,
                    int64_t position_begin, int64_t position_end, float* scratch, float* out,
                    float* state) {
  attend_all(in, {head_begin, head_end, 0, in.tokens, position_begin, position_end, out, state},
             scratch);
}

// Parts are weighed by their share of the sum of all exponentials.
void merge_parts(const AttentionInput& in, int64_t head_begin, int64_t head_end, int64_t parts,
                 const float* outs, const float* states, float* out) {
  const int64_t rows = in.tokens * in.heads, d = in.head_dim;
  for (int64_t t = 0; t < in.tokens; ++t) {
    for (int64_t head = head_begin; head < head_end; ++head) {
      const int64_t row = t * in.heads + head;
      float largest = states[2 * row];
      for (int64_t part = 1; part < parts; ++part) {
        const float other = states[2 * (part * rows + row)];
        largest = other > largest ? other : largest;
      }
      Vec sums[kMaxHeadDim / kLanes] = {};
      float total = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const float* state = states + 2 * (part * rows + row);
        const float weight = exp_of(splat(state[0] - largest))[0] * state[1];
        const float* from = outs + (part * rows + row) * d;
        total += weight;
        for (int64_t c = 0; c < d; c += kLanes) {
          sums[c / kLanes] +=
              weight * (c + kLanes <= d ? load(from + c) : load_part(from + c, d - c));
        }
      }
      for (int64_t c = 0; c < d; c += kLanes) {
        const Vec values = sums[c / kLanes] * (1.0F / total);
        c + kLanes <= d ? store(out + row * d + c, values)
                        : store_part(out + row * d + c, values, d - c);
      }
    }
  }
}

}  // namespace
}  // namespace rabit::RABIT_ISA
