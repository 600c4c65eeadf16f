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

// Squares that a float does not hold.
TEST_P(Operations, RmsNormOfLargeNumbers) {
  for (const int64_t d : {1, 17, 64, 4096}) {
    for (const float size : {1e18F, 1e19F, 3e19F, 1e25F, 1e37F}) {
      Floats x = normals(d, size), weight = normals(d);
      x[0] = size == 1e37F ? std::numeric_limits<float>::max() : size;
      Floats want(static_cast<size_t>(d)), got = guarded(d);
      reference_kernels().rms_norm(x.data(), weight.data(), 1, d, 1e-5F, want.data());
      table().rms_norm(x.data(), weight.data(), 1, d, 1e-5F, got.data());
      EXPECT_TRUE(guards_hold(got));
      std::vector<double> tolerance;
      for (const float value : want) {
        tolerance.push_back(kSafety * kEpsilon * 2 * std::abs(value) + 1e-30);
      }
      EXPECT_LE(worst(got.data(), want.data(), tolerance.data(), d), 1) << d << " " << size;
    }
  }
  for (const float value :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    Floats x(20, 1.0F), weight(20, 1.0F), y(20);
    x[17] = value;
    table().rms_norm(x.data(), weight.data(), 1, 20, 1e-5F, y.data());
    EXPECT_TRUE(std::isnan(y[17]));
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

/// Random queries over a random cache, and what the reference makes of them.
struct AttentionCase {
  Floats q, want;
  std::vector<std::byte> keys, values;
  AttentionInput in;
  int64_t positions, count;  // of what is seen by the last token, of outputs
  // A score of n terms is off by delta ~ sqrt(d) eps |q||k|/sqrt(d) ~ 8 eps sqrt(d) here; that
  // moves weights by the factor exp(delta), outputs by delta times the largest value.
  double tolerance;

  AttentionCase(CacheFormat format, int64_t tokens, int64_t first, int64_t heads, int64_t kv_heads,
                int64_t d)
      : q(normals(tokens * heads * d, 2.0F)),
        positions(first + tokens),
        count(tokens * heads * d),
        tolerance(kSafety * kEpsilon * (16 * std::sqrt(static_cast<double>(d)) + 32)) {
    const int64_t capacity = positions + 3;
    const auto cache = [&] {
      Floats floats = normals(kv_heads * capacity * d);
      for (int64_t head = 0; head < kv_heads; ++head) {  // what is not filled must not be used
        std::fill_n(floats.begin() + (head * capacity + positions) * d, 3 * d,
                    std::numeric_limits<float>::quiet_NaN());
      }
      const auto size = static_cast<int64_t>(floats.size());
      std::vector<std::byte> bytes(static_cast<size_t>(cache_bytes(format, size)));
      reference_kernels().to_cache(floats.data(), size, format, bytes.data());
      return bytes;
    };
    keys = cache();
    values = cache();
    in = {.q = q.data(),
          .cache = format,
          .k = keys.data(),
          .v = values.data(),
          .tokens = tokens,
          .first_position = first,
          .heads = heads,
          .kv_heads = kv_heads,
          .head_dim = d,
          .capacity = capacity};
    want.resize(static_cast<size_t>(count));
    Scratch oracle(scratch_floats(reference_kernels()));
    reference_kernels().attention(in, 0, heads, 0, tokens, oracle.data(), want.data());
  }
  AttentionCase(const AttentionCase&) = delete;

  int64_t scratch_floats(const KernelTable& table) const {
    return table.attention_scratch(in.tokens, positions, in.heads, in.kv_heads, in.head_dim);
  }
  std::vector<double> tolerances() const {
    return std::vector<double>(static_cast<size_t>(count), tolerance);
  }
  std::string name() const {
    return "tokens " + std::to_string(in.tokens) + " first " + std::to_string(in.first_position) +
           " heads " + std::to_string(in.heads) + "/" + std::to_string(in.kv_heads) + " d " +
           std::to_string(in.head_dim);
  }
};

void check_attention(const KernelTable& table, CacheFormat format, int64_t tokens, int64_t first,
                     int64_t heads, int64_t kv_heads, int64_t d) {
  const AttentionCase c(format, tokens, first, heads, kv_heads, d);
  SCOPED_TRACE(c.name());
  Floats got = guarded(c.count), part = guarded(c.count);
  Scratch scratch(c.scratch_floats(table));
  table.attention(c.in, 0, heads, 0, tokens, scratch.data(), got.data());
  EXPECT_TRUE(guards_hold(got));
  EXPECT_LE(worst(got.data(), c.want.data(), c.tolerances().data(), c.count), 1);

  const int64_t h0 = heads / 2, t0 = tokens / 2;
  table.attention(c.in, h0, heads, t0, tokens, scratch.data(), part.data());
  EXPECT_TRUE(guards_hold(part));
  for (int64_t i = 0; i < c.count; ++i) {
    const bool mine = i / d % heads >= h0 && i / d / heads >= t0;
    if (mine) {
      ASSERT_NEAR(part[i], c.want[i], c.tolerance);
    } else {
      ASSERT_EQ(part[i], kGuard);
    }
  }
}

/// Parts that end at `cuts`, the last of which is all positions: each against the reference's, and
/// put together, heads apart, against the whole.
void check_parts(const KernelTable& table, const AttentionCase& c,
                 const std::vector<int64_t>& cuts) {
  SCOPED_TRACE(c.name() + " parts " + std::to_string(cuts.size()));
  const AttentionInput& in = c.in;
  const auto parts = static_cast<int64_t>(cuts.size()), rows = in.tokens * in.heads;
  Floats outs = guarded(parts * c.count), states = guarded(parts * rows * 2);
  Scratch scratch(c.scratch_floats(table)), oracle(c.scratch_floats(reference_kernels()));
  int64_t begin = 0;
  for (int64_t part = 0; part < parts; ++part) {
    float *out = outs.data() + part * c.count, *state = states.data() + part * rows * 2;
    for (const auto& [first, last] :
         {std::pair<int64_t, int64_t>{0, in.heads / 2}, {in.heads / 2, in.heads}}) {
      table.attention_part(in, first, last, begin, cuts[part], scratch.data(), out, state);
    }
    Floats want(static_cast<size_t>(c.count)), want_states(static_cast<size_t>(rows * 2));
    reference_kernels().attention_part(in, 0, in.heads, begin, cuts[part], oracle.data(),
                                       want.data(), want_states.data());
    ASSERT_LE(worst(out, want.data(), c.tolerances().data(), c.count), 1) << part;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t seen = std::min(cuts[part], in.first_position + row / in.heads + 1);
      if (seen <= begin) {
        ASSERT_EQ(state[2 * row], -std::numeric_limits<float>::infinity());
        ASSERT_EQ(state[2 * row + 1], 0);
      } else {
        ASSERT_NEAR(state[2 * row], want_states[2 * row], c.tolerance);
        const double total = want_states[2 * row + 1];
        ASSERT_NEAR(state[2 * row + 1], total, 2 * c.tolerance * total);
      }
    }
    begin = cuts[part];
  }
  EXPECT_TRUE(guards_hold(outs));
  EXPECT_TRUE(guards_hold(states));
  Floats got = guarded(c.count);
  const int64_t half = in.heads / 2;
  table.merge_parts(in, 0, half, parts, outs.data(), states.data(), got.data());
  for (int64_t i = 0; i < c.count; ++i) {
    ASSERT_EQ(got[i] == kGuard, i / in.head_dim % in.heads >= half);
  }
  table.merge_parts(in, half, in.heads, parts, outs.data(), states.data(), got.data());
  EXPECT_TRUE(guards_hold(got));
  EXPECT_LE(worst(got.data(), c.want.data(), c.tolerances().data(), c.count), 1);
}

/// Two parts, cut there, put together: tokens before `end` are those of the whole.
void check_parts_before(const KernelTable& table, const AttentionCase& c, int64_t cut,
                        int64_t end) {
  const int64_t rows = c.in.tokens * c.in.heads;
  Floats outs(static_cast<size_t>(2 * c.count)), states(static_cast<size_t>(4 * rows)),
      got = guarded(c.count);
  Scratch scratch(c.scratch_floats(table));
  table.attention_part(c.in, 0, c.in.heads, 0, cut, scratch.data(), outs.data(), states.data());
  table.attention_part(c.in, 0, c.in.heads, cut, c.positions, scratch.data(), outs.data() + c.count,
                       states.data() + 2 * rows);
  table.merge_parts(c.in, 0, c.in.heads, 2, outs.data(), states.data(), got.data());
  EXPECT_TRUE(guards_hold(got));
  ASSERT_LE(
      worst(got.data(), c.want.data(), c.tolerances().data(), end * c.in.heads * c.in.head_dim), 1);
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

// Parts as the engine cuts them, around their bounds and those of blocks; with several tokens the
// first of them may see nothing of the last part.
TEST_P(Operations, AttentionInParts) {
  const auto parts_of = [](int64_t positions) {
    std::vector<int64_t> cuts;
    for (int64_t end = kPartPositions; end < positions; end += kPartPositions) {
      cuts.push_back(end);
    }
    cuts.push_back(positions);
    return cuts;
  };
  for (const CacheFormat format : {CacheFormat::kF16, CacheFormat::kF32, CacheFormat::kQ8_0}) {
    for (const int64_t tokens : {1, 2, 5}) {
      for (const int64_t positions : {kPartPositions - 1, kPartPositions, kPartPositions + 1,
                                      2 * kPartPositions, 2 * kPartPositions + 1}) {
        check_parts(table(), {format, tokens, positions - tokens, 2, 1, 32}, parts_of(positions));
      }
    }
    check_parts(table(), {format, 48, kPartPositions - 20, 2, 1, 32},
                parts_of(kPartPositions + 28));
    check_parts(table(), {format, 1, 4 * kPartPositions + 100, 3, 3, 64},
                parts_of(4 * kPartPositions + 101));
    check_parts(table(), {format, 5, 500, 4, 1, 96}, {1, 2, 17, 18, 400, 501, 503, 505});
  }
  for (const int64_t d : {2, 6, 34, 80, 256}) {
    check_parts(table(), {CacheFormat::kF16, 2, 40, 4, 2, d}, {7, 41, 42});
    check_parts(table(), {CacheFormat::kF16, 7, 40, 4, 2, d}, {7, 41, 47});
  }
}

// A value that is not a number is not lost on the way, wherever it is.
TEST_P(Operations, PartsThatAreNotFinite) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const int64_t d = 16, positions = 20;
  for (const int64_t place : {0, 9, 10, 19}) {
    for (const bool in_keys : {false, true}) {
      Floats q(d, 1.0F), k(positions * d, 1.0F), v(positions * d, 1.0F), outs(2 * d), states(4),
          out(d);
      (in_keys ? k : v)[place * d + 3] = kNaN;
      const AttentionInput in = {
          q.data(), CacheFormat::kF32, k.data(), v.data(), 1, positions - 1, 1, 1, d, positions};
      Scratch scratch(table().attention_scratch(1, positions, 1, 1, d));
      table().attention_part(in, 0, 1, 0, 10, scratch.data(), outs.data(), states.data());
      table().attention_part(in, 0, 1, 10, 20, scratch.data(), outs.data() + d, states.data() + 2);
      table().merge_parts(in, 0, 1, 2, outs.data(), states.data(), out.data());
      EXPECT_TRUE(std::isnan(out[3])) << place;
      EXPECT_EQ(std::isnan(out[4]), in_keys) << place;
    }
  }
}

// What comes after a token counts for nothing in it, infinite or not.
TEST_P(Operations, ValuesAfterATokenAreNotItsOwn) {
  const int64_t d = 32, heads = 4;
  for (const CacheFormat format : {CacheFormat::kF16, CacheFormat::kF32, CacheFormat::kQ8_0}) {
    for (const int64_t tokens : {2, 3, 60}) {
      for (const int64_t first : {0, 380}) {
        for (const int64_t at : {tokens - 1, tokens / 2}) {
          AttentionCase c(format, tokens, first, heads, 2, d);
          for (int64_t head = 0; head < 2; ++head) {  // of keys and values, at one position
            for (auto* cache : {&c.keys, &c.values}) {
              Floats row = normals(d);
              row[5] = cache == &c.values ? std::numeric_limits<float>::infinity() : row[5];
              const int64_t place = (head * c.in.capacity + first + at) * d;
              reference_kernels().to_cache(row.data(), d, format,
                                           cache->data() + cache_bytes(format, place));
            }
          }
          SCOPED_TRACE(c.name() + " infinite " + std::to_string(at));
          Floats got = guarded(c.count);
          Scratch scratch(c.scratch_floats(table())), oracle(c.scratch_floats(reference_kernels()));
          reference_kernels().attention(c.in, 0, heads, 0, tokens, oracle.data(), c.want.data());
          table().attention(c.in, 0, heads, 0, tokens, scratch.data(), got.data());
          const int64_t before = at * heads * d;
          ASSERT_LE(worst(got.data(), c.want.data(), c.tolerances().data(), before), 1);
          for (int64_t row = at * heads; row < tokens * heads; ++row) {
            ASSERT_FALSE(std::isfinite(got[row * d + 5]));
          }
          const int64_t cut = first + at / 2 + 1;
          check_parts_before(table(), c, cut, at);
        }
      }
    }
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
    std::array<uint8_t, kQ8BlockBytes> want = {}, got = {};
    reference_kernels().to_cache(block.data(), 32, CacheFormat::kQ8_0, want.data());
    table().to_cache(block.data(), 32, CacheFormat::kQ8_0, got.data());
    EXPECT_EQ(want, got) << value;
  }
  for (const float value : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const int place : {0, 13, 31}) {
      Floats block(32, 1.0F);
      block[place] = value;
      std::array<uint8_t, kQ8BlockBytes> got = {};
      table().to_cache(block.data(), 32, CacheFormat::kQ8_0, got.data());
      EXPECT_TRUE(std::isnan(half_to_float(static_cast<uint16_t>(got[0] | got[1] << 8)))) << value;
    }
    Floats q(32, 1.0F), k(32, 1.0F), out(32, 0.0F);
    k[3] = value;
    std::array<uint8_t, kQ8BlockBytes> keys = {};
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
    Floats outs(3 * d), states(6);
    for (int64_t part = 0; part < 3; ++part) {
      table().attention_part(in, 0, 1, 300 * part, 300 * part + 300, scratch.data(),
                             outs.data() + part * d, states.data() + 2 * part);
    }
    table().merge_parts(in, 0, 1, 3, outs.data(), states.data(), out.data());
    EXPECT_TRUE(guards_hold(out));
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

  // The second token's two positions apart: scores 0 and ln 3 of one value each.
  Floats outs(8), states(8), merged(4);
  table.attention_part(in, 0, 1, 0, 1, scratch.data(), outs.data(), states.data());
  table.attention_part(in, 0, 1, 1, 2, scratch.data(), outs.data() + 4, states.data() + 4);
  EXPECT_EQ(outs, (Floats{4, 8, 4, 8, 0, 0, 0, 4}));
  const float none = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(states, (Floats{0, 1, 0, 1, none, 0, states[6], 1}));
  EXPECT_FLOAT_EQ(states[6], std::log(3.0F));
  table.merge_parts(in, 0, 1, 2, outs.data(), states.data(), merged.data());
  EXPECT_EQ(merged, out);
}

}  // namespace
}  // namespace rabit
