// ggml's block formats to float.
//
// A quantized tensor is a run of blocks along its rows; a block is scales followed by packed codes:
//   Q8_0  f16 d | int8[32]                              d q
//   Q4_0  f16 d | 16 bytes of nibbles                   d (q - 8)
//   Q4_1  f16 d, m | 16 bytes of nibbles                d q + m
//   Q5_0  f16 d | 32 fifth bits | 16 bytes of nibbles   d (q - 16)
//   Q5_1  f16 d, m | 32 fifth bits | 16 bytes           d q + m
//   Q4_K  f16 d, dmin | 8 scales and 8 mins of 6 bits in 12 bytes | 128 bytes of nibbles
//                                                       (d s) q - (dmin m)   s, m per 32 codes
//   Q5_K  as Q4_K with 32 bytes of fifth bits before the nibbles
//   Q6_K  128 bytes of low nibbles | 64 bytes of upper bit pairs | int8 s[16] | f16 d
//                                                       (d s) (q - 32)       s per 16 codes
// In the 32-element formats byte j holds elements j (low nibble) and j + 16 (high nibble).
// Every product and sum is rounded to float by itself in the order written above, which is what
// ggml's reference functions say; this file is compiled without floating-point contraction so that
// no machine fuses them. Loops run over fixed counts on bytes, so that compilers vectorize them.
#include "io/dequant.h"

#include <cstring>

#include "base/half.h"

namespace rabit {
namespace {

uint16_t load16(const uint8_t* bytes) {
  uint16_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

float load_half(const uint8_t* bytes) { return half_to_float(load16(bytes)); }

/// Nibbles of 16 bytes as 32 codes.
void unpack_nibbles(const uint8_t* bytes, uint8_t* codes) {
  for (int j = 0; j < 16; ++j) {
    codes[j] = bytes[j] & 15;
    codes[j + 16] = bytes[j] >> 4;
  }
}

/// Adds bit j of the 32-bit word at `bits` to code j as its fifth bit.
void add_fifth_bits(const uint8_t* bits, uint8_t* codes) {
  for (int j = 0; j < 32; ++j) {
    codes[j] |= static_cast<uint8_t>(((bits[j / 8] >> (j % 8)) & 1) << 4);
  }
}

struct F32 {
  static constexpr int kElements = 1, kBytes = 4;
  static void decode(const uint8_t* in, float* out) { std::memcpy(out, in, sizeof *out); }
};

struct F16 {
  static constexpr int kElements = 1, kBytes = 2;
  static void decode(const uint8_t* in, float* out) { *out = load_half(in); }
};

struct BF16 {
  static constexpr int kElements = 1, kBytes = 2;
  static void decode(const uint8_t* in, float* out) { *out = bfloat16_to_float(load16(in)); }
};

struct Q8_0 {
  static constexpr int kElements = 32, kBytes = 34;
  static void decode(const uint8_t* in, float* out) {
    const float d = load_half(in);
    for (int j = 0; j < 32; ++j) {
      out[j] = d * static_cast<float>(static_cast<int8_t>(in[2 + j]));
    }
  }
};

struct Q4_0 {
  static constexpr int kElements = 32, kBytes = 18;
  static void decode(const uint8_t* in, float* out) {
    const float d = load_half(in);
    uint8_t codes[32];
    unpack_nibbles(in + 2, codes);
    for (int j = 0; j < 32; ++j) {
      out[j] = d * static_cast<float>(codes[j] - 8);
    }
  }
};

struct Q4_1 {
  static constexpr int kElements = 32, kBytes = 20;
  static void decode(const uint8_t* in, float* out) {
    const float d = load_half(in), m = load_half(in + 2);
    uint8_t codes[32];
    unpack_nibbles(in + 4, codes);
    for (int j = 0; j < 32; ++j) {
      out[j] = d * static_cast<float>(codes[j]) + m;
    }
  }
};

struct Q5_0 {
  static constexpr int kElements = 32, kBytes = 22;
  static void decode(const uint8_t* in, float* out) {
    const float d = load_half(in);
    uint8_t codes[32];
    unpack_nibbles(in + 6, codes);
    add_fifth_bits(in + 2, codes);
    for (int j = 0; j < 32; ++j) {
      out[j] = d * static_cast<float>(codes[j] - 16);
    }
  }
};

struct Q5_1 {
  static constexpr int kElements = 32, kBytes = 24;
  static void decode(const uint8_t* in, float* out) {
    const float d = load_half(in), m = load_half(in + 2);
    uint8_t codes[32];
    unpack_nibbles(in + 8, codes);
    add_fifth_bits(in + 4, codes);
    for (int j = 0; j < 32; ++j) {
      out[j] = d * static_cast<float>(codes[j]) + m;
    }
  }
};

/// Scales s[8] and mins m[8] of Q4_K and Q5_K out of 12 bytes. Groups 0 to 3 lie in the low six
/// bits of bytes 0-3 (s) and 4-7 (m); groups 4 to 7 have their low four bits in bytes 8-11 (s low
/// nibble, m high nibble) and their upper two on top of bytes 0-3 and 4-7.
void unpack_scales(const uint8_t* in, uint8_t* s, uint8_t* m) {
  for (int j = 0; j < 4; ++j) {
    s[j] = in[j] & 63;
    m[j] = in[4 + j] & 63;
    s[4 + j] = static_cast<uint8_t>((in[8 + j] & 15) | ((in[j] >> 6) << 4));
    m[4 + j] = static_cast<uint8_t>((in[8 + j] >> 4) | ((in[4 + j] >> 6) << 4));
  }
}

struct Q4_K {
  static constexpr int kElements = 256, kBytes = 144;
  static void decode(const uint8_t* in, float* out) {
    const float d = load_half(in), dmin = load_half(in + 2);
    uint8_t s[8], m[8];
    unpack_scales(in + 4, s, m);
    // 32 bytes hold two groups: the first in the low nibbles, the second in the high ones.
    for (int group = 0; group < 8; ++group) {
      const float scale = d * static_cast<float>(s[group]);
      const float min = dmin * static_cast<float>(m[group]);
      const uint8_t* codes = in + 16 + group / 2 * 32;
      const int shift = group % 2 * 4;
      for (int j = 0; j < 32; ++j) {
        out[group * 32 + j] = scale * static_cast<float>((codes[j] >> shift) & 15) - min;
      }
    }
  }
};

struct Q5_K {
  static constexpr int kElements = 256, kBytes = 176;
  static void decode(const uint8_t* in, float* out) {
    const float d = load_half(in), dmin = load_half(in + 2);
    uint8_t s[8], m[8];
    unpack_scales(in + 4, s, m);
    const uint8_t* fifth = in + 16;  // bit `group` of byte j
    for (int group = 0; group < 8; ++group) {
      const float scale = d * static_cast<float>(s[group]);
      const float min = dmin * static_cast<float>(m[group]);
      const uint8_t* codes = in + 48 + group / 2 * 32;
      const int shift = group % 2 * 4;
      for (int j = 0; j < 32; ++j) {
        const int code = ((codes[j] >> shift) & 15) | (((fifth[j] >> group) & 1) << 4);
        out[group * 32 + j] = scale * static_cast<float>(code) - min;
      }
    }
  }
};

struct Q6_K {
  static constexpr int kElements = 256, kBytes = 210;
  static void decode(const uint8_t* in, float* out) {
    const float d = load_half(in + 208);
    // Each half of 128 elements has 64 bytes of nibbles and 32 of bit pairs. Its four runs of 32
    // take: low nibbles of bytes 0-31, of 32-63, then the high nibbles of both; run r takes bit
    // pair r of each of the 32 bytes.
    for (int run = 0; run < 8; ++run) {
      const int half = run / 4, quarter = run % 4;
      const uint8_t* low = in + half * 64 + quarter % 2 * 32;
      const uint8_t* high = in + 128 + half * 32;
      const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
      for (int part = 0; part < 2; ++part) {
        const float scale = d * static_cast<float>(static_cast<int8_t>(in[192 + run * 2 + part]));
        for (int j = part * 16; j < part * 16 + 16; ++j) {
          const int code = ((low[j] >> low_shift) & 15) | (((high[j] >> high_shift) & 3) << 4);
          out[run * 32 + j] = scale * static_cast<float>(code - 32);
        }
      }
    }
  }
};

template <typename Block>
void decode_blocks(const uint8_t* in, int64_t elements, float* out) {
  for (int64_t i = 0; i < elements / Block::kElements; ++i) {
    Block::decode(in + i * Block::kBytes, out + i * Block::kElements);
  }
}

}  // namespace

Status dequantize(const TensorInfo& tensor, int64_t first, std::span<float> out) {
  const auto fail = [&](const std::string& what) {
    return Error{"cannot dequantize tensor " + quote_untrusted(tensor.name) + ": " + what};
  };
  const auto bytes = tensor_bytes(tensor.type, tensor.ne);
  if (!bytes) {
    return fail(bytes.error().message);
  }
  if (tensor.data.size() != *bytes) {
    return fail("its extents need " + std::to_string(*bytes) + " bytes, it has " +
                std::to_string(tensor.data.size()));
  }
  const auto count = static_cast<int64_t>(out.size());
  const int64_t block = block_elements(tensor.type);
  if (first < 0 || first > tensor.elements() || count > tensor.elements() - first ||
      first % block != 0 || count % block != 0) {
    return fail(std::to_string(count) + " elements from element " + std::to_string(first) +
                " are outside its " + std::to_string(tensor.elements()) +
                " elements or cut a block of " + std::to_string(block));
  }
  const auto* in = reinterpret_cast<const uint8_t*>(tensor.data.data()) +
                   first / block * block_bytes(tensor.type);
  switch (tensor.type) {
    case TensorType::kF32:
      return decode_blocks<F32>(in, count, out.data()), Status();
    case TensorType::kF16:
      return decode_blocks<F16>(in, count, out.data()), Status();
    case TensorType::kBF16:
      return decode_blocks<BF16>(in, count, out.data()), Status();
    case TensorType::kQ4_0:
      return decode_blocks<Q4_0>(in, count, out.data()), Status();
    case TensorType::kQ4_1:
      return decode_blocks<Q4_1>(in, count, out.data()), Status();
    case TensorType::kQ5_0:
      return decode_blocks<Q5_0>(in, count, out.data()), Status();
    case TensorType::kQ5_1:
      return decode_blocks<Q5_1>(in, count, out.data()), Status();
    case TensorType::kQ8_0:
      return decode_blocks<Q8_0>(in, count, out.data()), Status();
    case TensorType::kQ4_K:
      return decode_blocks<Q4_K>(in, count, out.data()), Status();
    case TensorType::kQ5_K:
      return decode_blocks<Q5_K>(in, count, out.data()), Status();
    case TensorType::kQ6_K:
      return decode_blocks<Q6_K>(in, count, out.data()), Status();
    case TensorType::kI32:
      break;
  }
  return fail("type " + std::string(tensor_type_name(tensor.type)) +
              " does not hold numbers to use");
}

Result<std::vector<float>> dequantize(const TensorInfo& tensor) {
  // The data's own size bounds the allocation: a block is never more than 256 elements.
  if (const auto bytes = tensor_bytes(tensor.type, tensor.ne);
      !bytes || *bytes != tensor.data.size()) {
    return Error{"cannot dequantize tensor " + quote_untrusted(tensor.name) +
                 ": its extents do not fit its data"};
  }
  std::vector<float> out(static_cast<size_t>(tensor.elements()));
  RABIT_CHECK(dequantize(tensor, 0, out));
  return out;
}

}  // namespace rabit
