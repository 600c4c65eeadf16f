// The oracle: each operation written straight from its definition, one scalar at a time, sums in
// double. It shares no code with the kernels that it judges.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "base/half.h"
#include "kernels/api/kernels.h"

namespace rabit {
namespace {

// The block of 32 values that a value of Q8_0 or Q4_0 lies in, and its scale.
const int8_t* block_at(const LinearWeights& w, int64_t at, int64_t bytes) {
  return static_cast<const int8_t*>(w.dense) + at / 32 * bytes;
}

double scale_of(const int8_t* block) {
  uint16_t half;
  std::memcpy(&half, block, sizeof half);
  return half_to_float(half);
}

/// Is the bit of a row and column set?
bool sign_bit(const LinearWeights& w, int64_t path, int64_t row, int64_t column) {
  const int64_t words = (w.d_in + 31) / 32, word = column / 32;
  const int64_t tile_word = (row / kTileRows * w.paths + path) * words + word;
  if (w.order == WeightOrder::kRows) {
    return (w.signs[(path * w.d_out + row) * words + word] >> (column % 32)) & 1U;
  }
  if (w.order == WeightOrder::kTilePairs) {
    const PlaceInPairs place = place_in_pairs(w, row / kTileRows);
    const int64_t at = place.first + path * place.next_path + word * place.next_word;
    return (w.signs[at + row % kTileRows] >> (column % 32)) & 1U;
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(w.signs);
  const int64_t at = (tile_word * 4 + column % 32 / 8) * kTileRows + row % kTileRows;
  return (bytes[at] >> (column % 8)) & 1;
}

double weight_at(const LinearWeights& w, int64_t row, int64_t column) {
  const int64_t at = row * w.d_in + column;
  switch (w.format) {
    case WeightFormat::kF32:
      return static_cast<const float*>(w.dense)[at];
    case WeightFormat::kF16:
      return half_to_float(static_cast<const uint16_t*>(w.dense)[at]);
    case WeightFormat::kQ8_0:
      return block_at(w, at, kQ8BlockBytes)[2 + at % 32] * scale_of(block_at(w, at, kQ8BlockBytes));
    case WeightFormat::kQ4_0: {
      const int8_t* block = block_at(w, at, kQ4BlockBytes);
      const int nibbles = static_cast<uint8_t>(block[2 + at % 16]);
      return ((at % 32 < 16 ? nibbles & 15 : nibbles >> 4) - 8) * scale_of(block);
    }
    case WeightFormat::kResidualBinary:
      break;
  }
  double sum = 0;
  for (int64_t path = 0; path < w.paths; ++path) {
    const double sign = sign_bit(w, path, row, column) ? 1.0 : -1.0;
    sum += sign * static_cast<double>(half_to_float(w.row_scale[path * w.d_out + row])) *
           static_cast<double>(half_to_float(w.col_scale[path * w.d_in + column]));
  }
  return sum;
}

void matmul(const LinearWeights& w, const float* x, const void* /*input*/, int64_t tokens, float* y,
            int64_t row_begin, int64_t row_end, float* /*scratch*/) {
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      double sum = 0;
      for (int64_t column = 0; column < w.d_in; ++column) {
        sum += weight_at(w, row, column) * x[token * w.d_in + column];
      }
      y[token * w.d_out + row] = static_cast<float>(sum);
    }
  }
}

int64_t no_scratch(int64_t, int64_t, int64_t) { return 0; }
int64_t no_input(const LinearWeights&, int64_t) { return 0; }

void rms_norm(const float* x, const float* weight, int64_t tokens, int64_t d, float epsilon,
              float* y) {
  for (int64_t token = 0; token < tokens; ++token) {
    double squares = 0;
    for (int64_t i = 0; i < d; ++i) {
      squares += static_cast<double>(x[token * d + i]) * x[token * d + i];
    }
    const double root = std::sqrt(squares / static_cast<double>(d) + epsilon);
    for (int64_t i = 0; i < d; ++i) {
      y[token * d + i] = static_cast<float>(x[token * d + i] / root * weight[i]);
    }
  }
}

void rope(float* x, const float* cos_sin, int64_t tokens, int64_t heads, int64_t head_dim) {
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t head = 0; head < heads; ++head) {
      float* row = x + (token * heads + head) * head_dim;
      for (int64_t pair = 0; pair < head_dim / 2; ++pair) {
        const double cosine = cos_sin[token * head_dim + 2 * pair];
        const double sine = cos_sin[token * head_dim + 2 * pair + 1];
        const double a = row[2 * pair], b = row[2 * pair + 1];
        row[2 * pair] = static_cast<float>(a * cosine - b * sine);
        row[2 * pair + 1] = static_cast<float>(a * sine + b * cosine);
      }
    }
  }
}

void to_cache(const float* from, int64_t count, CacheFormat format, void* to) {
  constexpr int64_t kBlock = 32;
  switch (format) {
    case CacheFormat::kF32:
      std::copy_n(from, count, static_cast<float*>(to));
      return;
    case CacheFormat::kF16:
      std::transform(from, from + count, static_cast<uint16_t*>(to), float_to_half);
      return;
    case CacheFormat::kQ8_0:
      break;
  }
  auto* block = static_cast<uint8_t*>(to);
  for (int64_t at = 0; at < count; at += kBlock, block += cache_bytes(format, kBlock)) {
    float largest = 0;
    bool finite = true;
    for (int64_t i = at; i < at + kBlock; ++i) {
      largest = std::max(largest, std::abs(from[i]));
      finite = finite && std::isfinite(from[i]);
    }
    const uint16_t scale =
        float_to_half(finite ? largest / 127 : std::numeric_limits<float>::quiet_NaN());
    std::memcpy(block, &scale, sizeof scale);
    const float unit = half_to_float(scale), units = unit > 0 ? 1 / unit : 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      const float value = std::clamp(std::nearbyint(from[at + i] * units), -127.0F, 127.0F);
      block[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(finite ? value : 0));
    }
  }
}

double cache_at(const void* cache, CacheFormat format, int64_t at) {
  switch (format) {
    case CacheFormat::kF32:
      return static_cast<const float*>(cache)[at];
    case CacheFormat::kF16:
      return half_to_float(static_cast<const uint16_t*>(cache)[at]);
    case CacheFormat::kQ8_0:
      break;
  }
  const int8_t* block = static_cast<const int8_t*>(cache) + at / 32 * cache_bytes(format, 32);
  return scale_of(block) * block[2 + at % 32];
}

/// One head of one token over positions [begin, end), at least one; returns the largest score and
/// the sum of what is relative to it.
std::pair<float, double> attend(const AttentionInput& in, int64_t token, int64_t head,
                                int64_t begin, int64_t end, float* scratch, float* out) {
  const int64_t d = in.head_dim;
  const int64_t base = head / (in.heads / in.kv_heads) * in.capacity * d;
  const float* q = in.q + (token * in.heads + head) * d;
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t p = begin; p < end; ++p) {
    double dot = 0;
    for (int64_t i = 0; i < d; ++i) {
      dot += q[i] * cache_at(in.k, in.cache, base + p * d + i);
    }
    scratch[p] = static_cast<float>(dot / std::sqrt(static_cast<double>(d)));
    largest = std::max(largest, scratch[p]);
  }
  double total = 0;
  for (int64_t p = begin; p < end; ++p) {
    total += std::exp(static_cast<double>(scratch[p]) - largest);
  }
  for (int64_t i = 0; i < d; ++i) {
    double sum = 0;
    for (int64_t p = begin; p < end; ++p) {
      sum += std::exp(static_cast<double>(scratch[p]) - largest) *
             cache_at(in.v, in.cache, base + p * d + i);
    }
    out[(token * in.heads + head) * d + i] = static_cast<float>(sum / total);
  }
  return {largest, total};
}

void attention(const AttentionInput& in, int64_t head_begin, int64_t head_end, int64_t token_begin,
               int64_t token_end, float* scratch, float* out) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    for (int64_t head = head_begin; head < head_end; ++head) {
      attend(in, token, head, 0, in.first_position + token + 1, scratch, out);
    }
  }
}

void attention_part(const AttentionInput& in, int64_t head_begin, int64_t head_end,
                    int64_t position_begin, int64_t position_end, float* scratch, float* out,
                    float* state) {
  for (int64_t token = 0; token < in.tokens; ++token) {
    const int64_t end = std::min(position_end, in.first_position + token + 1);
    for (int64_t head = head_begin; head < head_end; ++head) {
      const int64_t row = token * in.heads + head;
      state[2 * row] = -std::numeric_limits<float>::infinity();
      state[2 * row + 1] = 0;
      std::fill_n(out + row * in.head_dim, in.head_dim, 0.0F);
      if (position_begin < end) {
        const auto [largest, total] = attend(in, token, head, position_begin, end, scratch, out);
        state[2 * row] = largest;
        state[2 * row + 1] = static_cast<float>(total);
      }
    }
  }
}

void merge_parts(const AttentionInput& in, int64_t head_begin, int64_t head_end, int64_t parts,
                 const float* outs, const float* states, float* out) {
  const int64_t rows = in.tokens * in.heads, d = in.head_dim;
  for (int64_t row = 0; row < rows; ++row) {
    if (row % in.heads < head_begin || row % in.heads >= head_end) {
      continue;
    }
    double largest = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t part = 0; part < parts; ++part) {
      largest = std::max<double>(largest, states[2 * (part * rows + row)]);
    }
    const auto weight = [&](int64_t part) {
      const float* state = states + 2 * (part * rows + row);
      return std::exp(state[0] - largest) * state[1];
    };
    for (int64_t part = 0; part < parts; ++part) {
      total += weight(part);
    }
    for (int64_t i = 0; i < d; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) {
        sum += weight(part) * outs[(part * rows + row) * d + i];
      }
      out[row * d + i] = static_cast<float>(sum / total);
    }
  }
}

int64_t attention_scratch(int64_t, int64_t positions, int64_t, int64_t, int64_t) {
  return positions;
}

void swiglu(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double x = gate[i];
    gate[i] = static_cast<float>(x / (1.0 + std::exp(-x)) * up[i]);
  }
}

double cross_entropy(const float* logits, int64_t vocab, int32_t target) {
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < vocab; ++i) {
    largest = std::max<double>(largest, logits[i]);
  }
  double total = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    total += std::exp(logits[i] - largest);
  }
  return std::log(total) + largest - logits[target];
}

constexpr KernelTable kReference = {.name = "reference",
                                    .sign_order = WeightOrder::kRows,
                                    .block_order = WeightOrder::kRows,
                                    .input_bytes = no_input,
                                    .group_tokens = 1,
                                    .prepare = nullptr,
                                    .matmul = matmul,
                                    .matmul_scratch = no_scratch,
                                    .matmul_row_grain = 1,
                                    .rms_norm = rms_norm,
                                    .rope = rope,
                                    .to_cache = to_cache,
                                    .attention = attention,
                                    .attention_part = attention_part,
                                    .merge_parts = merge_parts,
                                    .attention_scratch = attention_scratch,
                                    .attention_token_grain = 1,
                                    .swiglu = swiglu,
                                    .cross_entropy = cross_entropy};

}  // namespace

const KernelTable& reference_kernels() { return kReference; }

}  // namespace rabit
