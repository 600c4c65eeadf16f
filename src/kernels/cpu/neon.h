// Kernels for AArch64, which always has NEON, with products by lookup and dot products. Included by
// the files that define RABIT_ISA, RABIT_LANES and RABIT_NAME; flags in CMakeLists.txt.
#include <arm_neon.h>

#include "kernels/cpu/vec.h"

namespace rabit::RABIT_ISA {
namespace {

constexpr int kBytes = 16;
constexpr int kTilesAtOnce = 1;
typedef uint8_t Bytes __attribute__((vector_size(16), may_alias));

RABIT_INLINE void in_register(Bytes& v) { __asm__("" : "+w"(v)); }

RABIT_INLINE Bytes shuffle(Bytes table, Bytes indices) {
  return reinterpret_cast<Bytes>(
      vqtbl1q_u8(reinterpret_cast<uint8x16_t>(table), reinterpret_cast<uint8x16_t>(indices)));
}

RABIT_INLINE Bytes load_table(const uint8_t* from) {
  return reinterpret_cast<Bytes>(vld1q_u8(from));
}

// The sums with the last column added, the upper eight of a table, and from them the lower eight,
// which are their opposites backwards.
RABIT_INLINE void tabulate_two(const int16_t* q, uint8_t* tables) {
  constexpr int16x8_t k0 = {-1, 1, -1, 1, -1, 1, -1, 1}, k1 = {-1, -1, 1, 1, -1, -1, 1, 1},
                      k2 = {-1, -1, -1, -1, 1, 1, 1, 1}, k3 = {1, 1, 1, 1, 1, 1, 1, 1};
#pragma GCC unroll 2
  for (int nibble = 0; nibble < 2; ++nibble) {
    const int16x4_t four = vld1_s16(q + 4 * nibble);
    int16x8_t sums = vmulq_lane_s16(k0, four, 0);
    sums = vmlaq_lane_s16(sums, k1, four, 1);
    sums = vmlaq_lane_s16(sums, k2, four, 2);
    sums = vmlaq_lane_s16(sums, k3, four, 3);
    // A sixteenth, rounded, halves away from 0.
    const int16x8_t rounded = vrshrq_n_s16(vsraq_n_s16(sums, sums, 15), 4);
    const int16x8_t swapped = vrev64q_s16(rounded), bias = vdupq_n_s16(2048);
    const uint16x8_t upper = vreinterpretq_u16_s16(vaddq_s16(bias, rounded));
    const uint16x8_t lower = vreinterpretq_u16_s16(vsubq_s16(bias, vextq_s16(swapped, swapped, 4)));
    const uint16x8_t low_bits = vdupq_n_u16(63);
    uint8_t* to = tables + 32 * nibble;
    vst1q_u8(to, vcombine_u8(vmovn_u16(vandq_u16(lower, low_bits)),
                             vmovn_u16(vandq_u16(upper, low_bits))));
    vst1q_u8(to + 16, vcombine_u8(vshrn_n_u16(lower, 6), vshrn_n_u16(upper, 6)));
  }
}

// Rows 0 to 7, rows 8 to 15.
struct Sums {
  int16x8_t first, second;
};

RABIT_INLINE Sums start_sums(int16_t value) { return {vdupq_n_s16(value), vdupq_n_s16(value)}; }

RABIT_INLINE Sums add_sums(Sums sums, Bytes low, Bytes high) {
  const auto a = reinterpret_cast<uint8x16_t>(low), b = reinterpret_cast<uint8x16_t>(high);
  const uint16x8_t first = vaddw_u8(vreinterpretq_u16_s16(sums.first), vget_low_u8(a));
  const uint16x8_t second = vaddw_high_u8(vreinterpretq_u16_s16(sums.second), a);
  return {vreinterpretq_s16_u16(vmlal_u8(first, vget_low_u8(b), vdup_n_u8(64))),
          vreinterpretq_s16_u16(vmlal_high_u8(second, b, vdupq_n_u8(64)))};
}

RABIT_INLINE void flush_half(int16x8_t sums, float scale, float* to) {
  const float32x4_t first = vcvtq_f32_s32(vmovl_s16(vget_low_s16(sums)));
  const float32x4_t second = vcvtq_f32_s32(vmovl_high_s16(sums));
  vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), first, scale));
  vst1q_f32(to + 4, vfmaq_n_f32(vld1q_f32(to + 4), second, scale));
}

RABIT_INLINE void flush_sums(Sums sums, float scale, float* to) {
  flush_half(sums.first, scale, to);
  flush_half(sums.second, scale, to + 8);
}

RABIT_INLINE void rows_in_order(const float* from, float* to) {
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    vst1q_f32(to + i, vld1q_f32(from + i));
  }
}

// Dot products of Q8_0 (byte_products.h).
constexpr int kLanesAtOnce = 4;
#ifdef __ARM_FEATURE_DOTPROD
// Two signed bytes of every q, q = 256 upper + lower; weights without the 128 that tiles add.
constexpr int32_t kWeightBias = 0;

RABIT_INLINE void pack_four(const int16_t* q, int32_t* to) {
  int8_t bytes[8];
  for (int i = 0; i < 4; ++i) {
    bytes[i] = static_cast<int8_t>((q[i] + 128) >> 8);
    bytes[4 + i] = static_cast<int8_t>(q[i]);
  }
  __builtin_memcpy(to, bytes, sizeof bytes);
}

struct Dots {
  int32x4_t upper, lower;
  RABIT_INLINE void add(const uint8_t* weights, int32_t first, int32_t second) {
    const int8x16_t bytes = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weights), vdupq_n_u8(128)));
    upper = vdotq_s32(upper, bytes, vreinterpretq_s8_s32(vdupq_n_s32(first)));
    lower = vdotq_s32(lower, bytes, vreinterpretq_s8_s32(vdupq_n_s32(second)));
  }
  RABIT_INLINE IntVec sums() const {
    return reinterpret_cast<IntVec>(vaddq_s32(vshlq_n_s32(upper, 8), lower));
  }
};
#else
// Products of 16 bits of what lies in even and in odd bytes; two sums a row.
constexpr int32_t kWeightBias = 128;

RABIT_INLINE void pack_four(const int16_t* q, int32_t* to) {
  const int16_t pairs[4] = {q[0], q[2], q[1], q[3]};
  __builtin_memcpy(to, pairs, sizeof pairs);
}

struct Dots {
  int32x4_t first_rows, last_rows;
  RABIT_INLINE void add(const uint8_t* weights, int32_t first, int32_t second) {
    const uint16x8_t bytes = vreinterpretq_u16_u8(vld1q_u8(weights));
    const int16x8_t even = vreinterpretq_s16_u16(vandq_u16(bytes, vdupq_n_u16(255)));
    const int16x8_t odd = vreinterpretq_s16_u16(vshrq_n_u16(bytes, 8));
    const int16x8_t q_even = vreinterpretq_s16_s32(vdupq_n_s32(first));
    const int16x8_t q_odd = vreinterpretq_s16_s32(vdupq_n_s32(second));
    first_rows = vmlal_s16(first_rows, vget_low_s16(even), vget_low_s16(q_even));
    last_rows = vmlal_high_s16(last_rows, even, q_even);
    first_rows = vmlal_s16(first_rows, vget_low_s16(odd), vget_low_s16(q_odd));
    last_rows = vmlal_high_s16(last_rows, odd, q_odd);
  }
  RABIT_INLINE IntVec sums() const {
    return reinterpret_cast<IntVec>(vpaddq_s32(first_rows, last_rows));
  }
};
#endif

}  // namespace
}  // namespace rabit::RABIT_ISA

#include "kernels/cpu/byte_lookup.h"
