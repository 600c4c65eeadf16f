// One trained layer as the file stores it: signs as they were trained, scales in F16.

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "base/half.h"
#include "quant/residual_binary.h"

namespace rabit::quant {
namespace {

float largest(std::span<const float> values) {
  float largest = 0.0F;
  for (const float v : values) {
    largest = std::isfinite(v) ? std::max(largest, std::fabs(v)) : v;
    if (!std::isfinite(largest)) {
      break;
    }
  }
  return largest;
}

}  // namespace

Result<PackedLinear> pack(const Shape& shape, std::vector<uint32_t> signs, const Scales& scales) {
  PackedLinear packed{shape, std::move(signs), {}, {}};
  packed.row_scale.resize(scales.g.size());
  packed.col_scale.resize(scales.h.size());
  for (int64_t i = 0; i < shape.paths; ++i) {
    const std::span g(scales.g.data() + i * shape.d_out, static_cast<size_t>(shape.d_out));
    const std::span h(scales.h.data() + i * shape.d_in, static_cast<size_t>(shape.d_in));
    const float g_largest = largest(g);
    const float h_largest = largest(h);
    if (!std::isfinite(g_largest) || !std::isfinite(h_largest)) {
      return Error{"path " + std::to_string(i + 1) + " has a scale that is not finite"};
    }
    // Move a power of two from one to the other so that both are of a size and far from F16's
    // subnormals and its largest value. The product is unchanged to the bit.
    const bool both = g_largest > 0.0F && h_largest > 0.0F;
    const int shift = both ? (std::ilogb(h_largest) - std::ilogb(g_largest)) / 2 : 0;
    const float size = std::max(std::ldexp(g_largest, shift), std::ldexp(h_largest, -shift));
    if (size > kHalfMax) {
      return Error{"path " + std::to_string(i + 1) + " has a scale of " + std::to_string(size) +
                   ", past F16's largest 65504"};
    }
    for (int64_t r = 0; r < shape.d_out; ++r) {
      packed.row_scale[i * shape.d_out + r] = float_to_half(std::ldexp(g[r], shift));
    }
    for (int64_t c = 0; c < shape.d_in; ++c) {
      packed.col_scale[i * shape.d_in + c] = float_to_half(std::ldexp(h[c], -shift));
    }
  }
  return packed;
}

int64_t packed_bits(const Shape& shape) {
  return shape.paths * (shape.d_out * shape.d_in + 16 * (shape.d_out + shape.d_in));
}

}  // namespace rabit::quant
