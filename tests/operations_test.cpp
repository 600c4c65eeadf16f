// Norm, rotary positions, the KV cache, attention, SwiGLU and cross entropy of every table that
// runs here against the scalar reference, over sizes around vector and block edges, with guard
// values behind every output; the reference itself against closed forms.
#include <array>
#include <limits>

#include "kernel_test.h"

namespace rabit {
namespace {

using Operations = KernelTest;

TEST_P(Operations, RmsNorm) {
  for (const int64_t d : {1, 3, 15, 16, 17, 64, 127, 576}) {
    const Floats x = normals(3 * d), weight = normals(d);
    Floats want(static_cast<size_t>(3 * d)), got = guarded(3 * d);
    reference_kernels().rms_norm(x.data(), weight.data(), 3, d, 1e-5F, want.data());
    table().rms_norm(x.data(), weight.data(), 3, d, 1e-5F, got.data());
    EXPECT_TRUE(guards_hold(got));
    std::vector<double> tolerance;
    for (const float value : want) {
      tolerance.push_back(kSafety * kEpsilon * 2 * std::abs(value) + 1e-30);
    }
    EXPECT_LE(worst(got.data(), want.data(), tolerance.data(), 3 * d), 1) << d;
  }
}

TEST_P(Operations, Rope) {
  for (const int64_t d : {2, 6, 16, 30, 64, 128}) {
    const int64_t tokens = 3, heads = 2;
    Floats want = normals(tokens * heads * d), turns;
    for (int64_t i = 0; i < tokens * d / 2; ++i) {
      turns.push_back(std::cos(static_cast<float>(i)));
      turns.push_back(std::sin(static_cast<float>(i)));
    }
    Floats got = want;
    got.insert(got.end(), kGuards, kGuard);
    std::vector<double> tolerance;
    for (int64_t i = 0; i < tokens * heads * d; ++i) {
      tolerance.push_back(kSafety * kEpsilon * std::hypot(want[i & ~1], want[i | 1]) + 1e-30);
    }
    reference_kernels().rope(want.data(), turns.data(), tokens, heads, d);
    table().rope(got.data(), turns.data(), tokens, heads, d);
    EXPECT_TRUE(guards_hold(got));
    EXPECT_LE(worst(got.data(), want.data(), tolerance.data(), tokens * heads * d), 1) << d;
  }
}

void check_attention(const KernelTable& table, CacheFormat format, int64_t tokens, int64_t first,
                     int64_t heads, int64_t kv_heads, int64_t d) {
  SCOPED_TRACE("tokens " + std::to_string(tokens) + " first " + std::to_string(first) + " heads " +
               std::to_string(heads) + "/" + std::to_string(kv_heads) + " d " + std::to_string(d));
  const int64_t positions = first + tokens, capacity = positions + 3;
  const Floats q = normals(tokens * heads * d, 2.0F);
  Floats k = normals(kv_heads * capacity * d), v = normals(kv_heads * capacity * d);
  for (int64_t head = 0; head < kv_heads; ++head) {  // what is not filled must not be used
    for (int64_t i = positions * d; i < capacity * d; ++i) {
      k[head * capacity * d + i] = v[head * capacity * d + i] =
          std::numeric_limits<float>::quiet_NaN();
    }
  }
  const auto cache = [&](const Floats& values) {
    const auto count = static_cast<int64_t>(values.size());
    std::vector<std::byte> bytes(static_cast<size_t>(cache_bytes(format, count)));
    reference_kernels().to_cache(values.data(), count, format, bytes.data());
    return bytes;
  };
  const std::vector<std::byte> keys = cache(k), values = cache(v);
  const AttentionInput in = {.q = q.data(),
                             .cache = format,
                             .k = keys.data(),
                             .v = values.data(),
                             .tokens = tokens,
                             .first_position = first,
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .head_dim = d,
                             .capacity = capacity};
  const int64_t count = tokens * heads * d;
  Floats want(static_cast<size_t>(count)), got = guarded(count), part = guarded(count);
  Scratch oracle(reference_kernels().attention_scratch(tokens, positions, heads, kv_heads, d));
  reference_kernels().attention(in, 0, heads, 0, tokens, oracle.data(), want.data());
  Scratch scratch(table.attention_scratch(tokens, positions, heads, kv_heads, d));
  table.attention(in, 0, heads, 0, tokens, scratch.data(), got.data());
  EXPECT_TRUE(guards_hold(got));
  // A score of n terms is off by delta ~ sqrt(d) eps |q||k|/sqrt(d) ~ 8 eps sqrt(d) here; that
  // moves weights by the factor exp(delta), outputs by delta times the largest value.
  const double tolerance = kSafety * kEpsilon * (16 * std::sqrt(static_cast<double>(d)) + 32);
  const std::vector<double> tolerances(static_cast<size_t>(count), tolerance);
  EXPECT_LE(worst(got.data(), want.data(), tolerances.data(), count), 1);

  const int64_t h0 = heads / 2, t0 = tokens / 2;
  table.attention(in, h0, heads, t0, tokens, scratch.data(), part.data());
  EXPECT_TRUE(guards_hold(part));
  for (int64_t i = 0; i < count; ++i) {
    const bool mine = i / d % heads >= h0 && i / d / heads >= t0;
    if (mine) {
      ASSERT_NEAR(part[i], want[i], tolerance);
    } else {
      ASSERT_EQ(part[i], kGuard);
    }
  }
}

TEST_P(Operations, Attention) {
  for (const CacheFormat format : {CacheFormat::kF16, CacheFormat::kF32}) {
    for (const int64_t tokens : {1, 2, 11, 12, 13, 47, 48, 49, 100}) {
      for (const int64_t first : {0, 5, 383, 384, 790}) {
        check_attention(table(), format, tokens, first, 3, 1, 16);
      }
    }
    for (const int64_t d : {2, 6, 32, 34, 64, 80, 128, 256}) {
      check_attention(table(), format, 19, 30, 4, 2, d);
      check_attention(table(), format, 1, 30, 6, 2, d);
    }
    check_attention(table(), format, 60, 400, 9, 3, 64);
  }
  for (const int64_t d : {32, 64, 96, 256}) {
    check_attention(table(), CacheFormat::kQ8_0, 1, 390, 6, 2, d);
    check_attention(table(), CacheFormat::kQ8_0, 2, 5, 3, 3, d);
    check_attention(table(), CacheFormat::kQ8_0, 60, 400, 9, 3, d);
  }
}

TEST_P(Operations, CacheIsThatOfTheReference) {
  const float largest = std::numeric_limits<float>::max();
  const float infinity = std::numeric_limits<float>::infinity();
  // Around every step of F16: subnormals, its smallest normal number, ties, its largest, beyond.
  Floats floats;
  for (const float value :
       {0.0F,         1e-9F,    0x1p-25F, 0x1.8p-25F, 0x1p-24F,   0x1.8p-24F,  0x1.ffcp-15F,
        0x1.ffep-15F, 0x1p-14F, 1.0F,     0x1.002p0F, 0x1.006p0F, 0x1.0021p0F, 127.0F,
        65504.0F,     65519.0F, 65520.0F, 1e6F,       largest,    infinity}) {
    floats.push_back(value);
    floats.push_back(-value);
  }
  for (const float value : normals(1000)) {
    floats.push_back(value);
  }
  for (const CacheFormat format : {CacheFormat::kF16, CacheFormat::kF32, CacheFormat::kQ8_0}) {
    const int64_t step = format == CacheFormat::kQ8_0 ? 32 : 1;
    for (int64_t count = step; count <= 200; count += step) {
      for (const int64_t first : {int64_t{0}, int64_t{32}, int64_t{64}, int64_t{133}}) {
        const auto bytes = static_cast<size_t>(cache_bytes(format, count));
        std::vector<uint8_t> want(bytes + 8, 0xA5), got(bytes + 8, 0xA5);
        const bool finite = std::all_of(floats.begin() + first, floats.begin() + first + count,
                                        [](float value) { return std::isfinite(value); });
        if (format == CacheFormat::kQ8_0 && !finite) {
          continue;
        }
        reference_kernels().to_cache(floats.data() + first, count, format, want.data());
        table().to_cache(floats.data() + first, count, format, got.data());
        ASSERT_EQ(want, got) << static_cast<int>(format) << " " << count << " from " << first;
      }
    }
  }
  // Blocks of zeros, of almost nothing, of what no scale of F16 holds, of what is not finite.
  for (const float value : {0.0F, 1e-7F, 3e-6F, 1e7F, largest}) {
    Floats block(32, value);
    block[7] = -value / 2;
    std::array<uint8_t, 34> want = {}, got = {};
    reference_kernels().to_cache(block.data(), 32, CacheFormat::kQ8_0, want.data());
    table().to_cache(block.data(), 32, CacheFormat::kQ8_0, got.data());
    EXPECT_EQ(want, got) << value;
  }
  for (const float value : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const int place : {0, 13, 31}) {
      Floats block(32, 1.0F);
      block[place] = value;
      std::array<uint8_t, 34> got = {};
      table().to_cache(block.data(), 32, CacheFormat::kQ8_0, got.data());
      EXPECT_TRUE(std::isnan(half_to_float(static_cast<uint16_t>(got[0] | got[1] << 8)))) << value;
    }
    Floats q(32, 1.0F), k(32, 1.0F), out(32, 0.0F);
    k[3] = value;
    std::array<uint8_t, 34> keys = {};
    table().to_cache(k.data(), 32, CacheFormat::kQ8_0, keys.data());
    const AttentionInput in = {
        q.data(), CacheFormat::kQ8_0, keys.data(), keys.data(), 1, 0, 1, 1, 32, 1};
    Scratch scratch(table().attention_scratch(1, 1, 1, 1, 32));
    table().attention(in, 0, 1, 0, 1, scratch.data(), out.data());
    EXPECT_TRUE(std::isnan(out[0])) << value;
  }
}

TEST_P(Operations, AttentionOfExtremeScores) {
  // One key far ahead of the rest, in the first, a middle and the last block.
  const int64_t d = 16, positions = 900;
  for (const int64_t chosen : {0, 500, 899}) {
    Floats q(d, 30.0F), k(positions * d, -30.0F), v(positions * d, 1.0F), out = guarded(d);
    for (int64_t i = 0; i < d; ++i) {
      k[chosen * d + i] = 30.0F;
      v[chosen * d + i] = -7.0F;
    }
    const AttentionInput in = {
        q.data(), CacheFormat::kF32, k.data(), v.data(), 1, positions - 1, 1, 1, d, positions};
    Scratch scratch(table().attention_scratch(1, positions, 1, 1, d));
    table().attention(in, 0, 1, 0, 1, scratch.data(), out.data());
    for (int64_t i = 0; i < d; ++i) {
      EXPECT_EQ(out[i], -7.0F);
    }
  }
}

TEST_P(Operations, Swiglu) {
  for (const int64_t count : {1, 15, 16, 17, 1000}) {
    Floats gate = normals(count, 8.0F);
    const Floats up = normals(count);
    gate[0] = -200.0F;
    Floats want = gate, got = gate;
    got.insert(got.end(), kGuards, kGuard);
    reference_kernels().swiglu(want.data(), up.data(), count);
    table().swiglu(got.data(), up.data(), count);
    EXPECT_TRUE(guards_hold(got));
    std::vector<double> tolerance;
    for (const float value : want) {
      // e^x within 2e-7, and an argument below -88 counts as infinitely small.
      tolerance.push_back((2e-7 + kSafety * kEpsilon) * std::abs(value) + 1e-35);
    }
    EXPECT_LE(worst(got.data(), want.data(), tolerance.data(), count), 1) << count;
  }
}

TEST_P(Operations, CrossEntropy) {
  for (const int64_t vocab : {1, 2, 15, 16, 17, 1000, 49152}) {
    for (const float spread : {0.1F, 4.0F, 60.0F}) {
      const Floats logits = normals(vocab, spread);
      const auto target = static_cast<int32_t>(vocab / 2);
      const double want = reference_kernels().cross_entropy(logits.data(), vocab, target);
      const double got = table().cross_entropy(logits.data(), vocab, target);
      EXPECT_NEAR(got, want, 1e-6 * std::max(1.0, want)) << vocab << " " << spread;
    }
  }
  Floats logits = normals(100);
  logits[98] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(std::isfinite(table().cross_entropy(logits.data(), 100, 3)));
  logits[98] = 0;
  logits[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(std::isfinite(table().cross_entropy(logits.data(), 100, 7)));
}

INSTANTIATE_TEST_SUITE_P(Cpu, Operations, testing::ValuesIn(cpu_kernels()), table_name);

TEST(KernelTables, NamesAreDistinctAndPortableIsLast) {
  const std::vector<const KernelTable*> tables = cpu_kernels();
  ASSERT_FALSE(tables.empty());
  EXPECT_EQ(tables.back()->name, "portable");
  for (size_t i = 1; i < tables.size(); ++i) {
    EXPECT_NE(tables[i]->name, tables[i - 1]->name);
    EXPECT_NE(tables[i]->matmul, tables[i - 1]->matmul);
  }
}

TEST(Reference, OtherOperations) {
  const KernelTable& table = reference_kernels();
  const Floats x = {3, -4}, weight = {1, 2};
  Floats y(2);
  table.rms_norm(x.data(), weight.data(), 1, 2, 0.0F, y.data());
  EXPECT_FLOAT_EQ(y[0], static_cast<float>(3 / std::sqrt(12.5)));
  EXPECT_FLOAT_EQ(y[1], static_cast<float>(-8 / std::sqrt(12.5)));

  Floats turned = {1, 0, 0, 2};
  const Floats turns = {0, 1, -1, 0};  // by 90 and by 180 degrees
  table.rope(turned.data(), turns.data(), 1, 1, 4);
  EXPECT_EQ(turned, (Floats{0, 1, 0, -2}));

  Floats gate = {0, std::log(3.0F)};
  const Floats up = {5, 2};
  table.swiglu(gate.data(), up.data(), 2);
  EXPECT_FLOAT_EQ(gate[0], 0);
  EXPECT_FLOAT_EQ(gate[1], 1.5F * std::log(3.0F));

  const Floats logits = {0, std::log(2.0F), std::log(5.0F)};
  EXPECT_NEAR(table.cross_entropy(logits.data(), 3, 1), std::log(4.0), 1e-7);

  // Scores 0 and ln 3 (d = 1 would be odd; the second component is 0): weights 1/4 and 3/4.
  const Floats q = {std::sqrt(2.0F), 0, std::sqrt(2.0F), 0}, k = {0, 0, std::log(3.0F), 0},
               v = {4, 8, 0, 4};
  const AttentionInput in = {q.data(), CacheFormat::kF32, k.data(), v.data(), 2, 0, 1, 1, 2, 2};
  Floats scratch(2), out(4);
  table.attention(in, 0, 1, 0, 2, scratch.data(), out.data());
  EXPECT_FLOAT_EQ(out[0], 4);
  EXPECT_FLOAT_EQ(out[1], 8);
  EXPECT_NEAR(out[2], 1, 1e-6);
  EXPECT_NEAR(out[3], 5, 1e-6);
}

}  // namespace
}  // namespace rabit
