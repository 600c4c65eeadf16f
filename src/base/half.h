// IEEE 754 binary16 and bfloat16 to and from float, round to nearest even, on their bit patterns.
// Plain integer arithmetic: the same result on every machine; compilers vectorize the loops.
#pragma once

#include <bit>
#include <cstdint>

namespace rabit {

inline constexpr float kHalfMax = 65504.0F;  // the largest binary16

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
  const uint32_t magnitude = bits & 0x7FFFU;
  // Shift exponent and mantissa into place and rescale by 2^112: subnormals come out right.
  const float scaled =
      std::bit_cast<float>(magnitude << 13) * std::bit_cast<float>(uint32_t{0x77800000U});
  const uint32_t special = magnitude >= 0x7C00U ? (magnitude << 13) | 0x7F800000U : 0U;
  return std::bit_cast<float>(sign | (special != 0 ? special : std::bit_cast<uint32_t>(scaled)));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) {
    return sign | 0x7E00U;  // NaN
  }
  if (magnitude >= 0x477FF000U) {
    return sign | 0x7C00U;  // rounds past 65504: infinity
  }
  if (magnitude < 0x38800000U) {
    // Subnormal half: let the float adder round at 2^-24.
    const float shifted =
        std::bit_cast<float>(magnitude) + std::bit_cast<float>(uint32_t{0x3F000000U});
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3F000000U);
  }
  const uint32_t rounded = magnitude + 0xFFFU + ((magnitude >> 13) & 1U);
  return sign | static_cast<uint16_t>((rounded - 0x38000000U) >> 13);
}

inline float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

}  // namespace rabit
