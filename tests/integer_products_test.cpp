// Products by sums of integers, of every table that has them: to the bit those of a scalar
// computation of the same integers, also of the largest ones; what rounding does; what is not
// finite.
#include <limits>
#include <tuple>

#include "product_test.h"

namespace rabit {
namespace {

class IntegerProducts : public Products {
 protected:
  /// The bits of a product with Q8_0 by sums of integers, against a scalar computation of the same.
  void check_blocks(const Layer& layer, const Floats& x, int64_t tokens) {
    const auto [d_out, d_in] = std::pair(layer.w.d_out, layer.w.d_in);
    const Prepared prepared(table(), layer, x, tokens);
    Floats got = guarded(tokens * d_out);
    table().matmul(prepared.w, prepared.x(), prepared.input(), tokens, got.data(), 0, d_out,
                   nullptr);
    EXPECT_TRUE(guards_hold(got));
    for (int64_t t = 0; t < tokens; ++t) {
      float largest = 0;
      for (int64_t c = 0; c < d_in; ++c) {
        largest = std::max(largest, std::abs(x[t * d_in + c]));
      }
      const float unit = 32639.0F / largest;
      for (int64_t r = 0; r < d_out; ++r) {
        float want = 0;
        for (int64_t block = 0; block < d_in / 32; ++block) {
          const uint8_t* bytes = layer.blocks.data() + (r * d_in / 32 + block) * kQ8BlockBytes;
          uint16_t scale;
          std::memcpy(&scale, bytes, sizeof scale);
          int64_t sum = 0;
          for (int64_t i = 0; i < 32; ++i) {
            const auto q =
                static_cast<int64_t>(std::nearbyint(x[t * d_in + block * 32 + i] * unit));
            sum += q * static_cast<int8_t>(bytes[2 + i]);
          }
          want = std::fma(static_cast<float>(sum), half_to_float(scale), want);
        }
        ASSERT_EQ(got[t * d_out + r], want * (largest / 32639.0F)) << d_in << " " << d_out;
      }
    }
  }

  /// The bits of a product by lookup, against a scalar computation of the same integers.
  void check_lookup(const Layer& layer, const Floats& x, int64_t tokens) {
    const auto [d_out, d_in, paths] = std::tuple(layer.w.d_out, layer.w.d_in, layer.w.paths);
    const int64_t words = (d_in + 31) / 32;
    const Prepared prepared(table(), layer, x, tokens);
    Floats got = guarded(tokens * d_out);
    table().matmul(prepared.w, prepared.x(), prepared.input(), tokens, got.data(), 0, d_out,
                   nullptr);
    EXPECT_TRUE(guards_hold(got));
    for (int64_t t = 0; t < tokens; ++t) {
      Floats want(static_cast<size_t>(d_out), 0.0F);
      for (int64_t path = 0; path < paths; ++path) {
        const Quantized columns(table().sign_order, layer, path, x.data() + t * d_in);
        for (int64_t r = 0; r < d_out; ++r) {
          const std::vector<int64_t> sums =
              columns.sums(layer.signs.data() + (path * d_out + r) * words);
          const float g = half_to_float(layer.row_scale[path * d_out + r]);
          if (table().sign_order == WeightOrder::kTilePairs) {
            for (size_t i = 0; i < sums.size(); ++i) {
              want[r] = std::fma(static_cast<float>(sums[i]), columns.units[i] * g, want[r]);
            }
            continue;
          }
          float sum = 0;
          for (size_t i = 0; i < sums.size(); ++i) {
            ASSERT_LT(std::abs(sums[i]), 1 << 15);
            sum = std::fma(static_cast<float>(sums[i]),
                           columns.units[i] * static_cast<float>(columns.step), sum);
          }
          want[r] = std::fma(g, sum, want[r]);
        }
      }
      for (int64_t r = 0; r < d_out; ++r) {
        ASSERT_EQ(got[t * d_out + r], want[r]) << d_in << " " << d_out << " " << t << " " << r;
      }
    }
  }
};

// The tests below pass over tables without integers: those that are known to have none.
TEST_P(IntegerProducts, AreOfAllTablesButPortableOnes) {
  const bool floats = table().name.starts_with("portable");
  for (const WeightFormat format : {WeightFormat::kResidualBinary, WeightFormat::kQ8_0}) {
    const LinearWeights w = {.format = format, .d_out = 64, .d_in = 64, .paths = 2};
    EXPECT_EQ(table().input_bytes(w, 1) == 0, floats);
    EXPECT_EQ(reference_kernels().input_bytes(w, 1), 0);
  }
}

// The sums of integers are exact: the same bits as a scalar computation of them.
TEST_P(IntegerProducts, SumsOfBlocksAreExact) {
  for (const int64_t d_in : {32, 64, 576, 4096}) {
    for (const int64_t d_out : {1, 16, 63, 65, 128}) {
      const Layer layer = Layer::make(WeightFormat::kQ8_0, d_out, d_in, 0);
      if (table().input_bytes(layer.w, 2) == 0) {
        GTEST_SKIP() << "sums of floats here";
      }
      const int64_t tokens = 2 + d_out % 2;
      check_blocks(layer, normals(tokens * d_in, 3.0F), tokens);
    }
  }
}

// As large as they get, and with all numbers that a byte of a weight and of a column can be.
TEST_P(IntegerProducts, LargestSumsOfBlocksAreExact) {
  const int64_t d_in = 512, d_out = 70;
  Layer layer = Layer::make(WeightFormat::kQ8_0, d_out, d_in, 0);
  if (table().input_bytes(layer.w, 1) == 0) {
    GTEST_SKIP() << "sums of floats here";
  }
  for (int64_t row = 0; row < d_out; ++row) {
    for (int64_t c = 0; c < d_in; ++c) {
      const int64_t value = row == 0 ? -128 : row == 1 ? 127 : (c * (row - 1)) % 256 - 128;
      layer.blocks[(row * d_in + c) / 32 * kQ8BlockBytes + 2 + c % 32] =
          static_cast<uint8_t>(value);
    }
  }
  for (const float size : {0.7F, -1.0F, 3e-20F, 1e30F}) {
    Floats x(static_cast<size_t>(d_in), size);
    check_blocks(layer, x, 1);
    for (int64_t c = 0; c < d_in; ++c) {
      x[c] = c % 2 == 0 ? size : -size;
    }
    check_blocks(layer, x, 1);
    for (int64_t c = 0; c < d_in; ++c) {  // every lower byte beside different upper ones
      x[c] = size * static_cast<float>((c * 127 + 5) % 65279 - 32639) / 32639.0F;
    }
    x[0] = size;
    check_blocks(layer, x, 1);
  }
}

// The sums of integers are exact: the same bits as a scalar computation of them.
TEST_P(IntegerProducts, LookupSumsAreExact) {
  for (const int64_t d_in :
       {1, 3, 4, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 576, 4096, 11008}) {
    for (const int64_t d_out : {1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 257, 321}) {
      if (d_in > 600 && d_out > 129) {
        continue;
      }
      const int64_t paths = 1 + (d_in + d_out) % 4;
      const int64_t tokens = 1 + d_out % 3;
      const Layer layer = Layer::make(WeightFormat::kResidualBinary, d_out, d_in, paths);
      if (table().input_bytes(layer.w, tokens) == 0) {
        GTEST_SKIP() << "no lookup here";
      }
      check_lookup(layer, normals(tokens * d_in, 3.0F), tokens);
    }
  }
  // More tokens, rows and words than go together.
  if (table().prepare != nullptr) {
    check_lookup(Layer::make(WeightFormat::kResidualBinary, 530, 4200, 2), normals(35 * 4200), 35);
  }
  // More columns than sums of 32 bits have room for at once.
  for (const int64_t d_in : {1 << 17, (1 << 17) + 1, (1 << 17) + 100, (1 << 18) + 33}) {
    check_lookup(Layer::make(WeightFormat::kResidualBinary, 3, d_in, 1), normals(2 * d_in, 3.0F),
                 2);
  }
}

// The same where sums are as large as they get: all columns of one size, or four alone, with the
// signs of a row all alike, or alike but for a few.
TEST_P(IntegerProducts, LargestLookupSumsAreExact) {
  const int64_t d_out = 70;
  for (const int64_t d_in : {4, 32, 64, 100, 128, 192, 256, 11008, 1 << 17}) {
    Layer layer = Layer::make(WeightFormat::kResidualBinary, d_out, d_in, 1);
    if (table().input_bytes(layer.w, 1) == 0) {
      GTEST_SKIP() << "no lookup here";
    }
    const int64_t words = (d_in + 31) / 32;
    for (int64_t i = 0; i < d_out * words; ++i) {
      const int64_t row = i / words;
      layer.signs[i] = (row % 2 == 0 ? 0U : ~0U) ^ (row < 2 ? 0U : 1U << (row % 32));
    }
    std::fill(layer.col_scale.begin(), layer.col_scale.end(), float_to_half(1.0F));
    for (const float size : {0.7F, -1.0F, 1.0009F, 3e-20F, 1e30F}) {
      Floats x(static_cast<size_t>(d_in), size);
      check_lookup(layer, x, 1);
      std::fill(x.begin() + 4, x.end(), 0.0F);
      check_lookup(layer, x, 1);
      x[1] = x[2] = x[3] = 0;
      check_lookup(layer, x, 1);
    }
  }
}

// Rounding errors are evenly spread and have no preferred direction, which would make them grow
// with the columns rather than with their root.
TEST_P(IntegerProducts, LookupErrorsAreThoseOfRounding) {
  const int64_t d_out = 256, d_in = 4096;
  const Layer layer = Layer::make(WeightFormat::kResidualBinary, d_out, d_in, 1);
  if (table().input_bytes(layer.w, 1) == 0) {
    GTEST_SKIP() << "no lookup here";
  }
  const Floats x = normals(d_in), want = reference_product(layer, x, 1);
  const Prepared prepared(table(), layer, x, 1);
  Floats got(static_cast<size_t>(d_out));
  table().matmul(prepared.w, prepared.x(), prepared.input(), 1, got.data(), 0, d_out, nullptr);
  const double expected =
      Quantized(table().sign_order, layer, 0, x.data()).rounding(1 / std::sqrt(12));
  double squares = 0;
  for (int64_t r = 0; r < d_out; ++r) {
    const double off = (got[r] - want[r]) / half_to_float(layer.row_scale[r]) / expected;
    squares += off * off / d_out;
  }
  EXPECT_GT(squares, 0.7);
  EXPECT_LT(squares, 1.4);
}

TEST_P(IntegerProducts, IntegersOfNothingAndOfWhatIsNotFinite) {
  for (const auto& [format, d_in] :
       {std::pair<WeightFormat, int64_t>{WeightFormat::kResidualBinary, 70},
        {WeightFormat::kResidualBinary, 300},
        {WeightFormat::kQ8_0, 64}}) {
    const Layer layer = Layer::make(format, 40, d_in, 2);
    if (table().input_bytes(layer.w, 1) == 0) {
      GTEST_SKIP() << "no sums of integers here";
    }
    const auto product = [&](const Floats& x) {
      const Prepared prepared(table(), layer, x, 1);
      Floats y(40);
      table().matmul(prepared.w, prepared.x(), prepared.input(), 1, y.data(), 0, 40, nullptr);
      return y;
    };
    Floats x(static_cast<size_t>(d_in), 0.0F);
    EXPECT_EQ(product(x), Floats(40, 0.0F));
    for (const int64_t at : {int64_t{33}, d_in - 1}) {
      for (const float value :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
            -std::numeric_limits<float>::infinity()}) {
        for (const float others : {0.0F, 1.0F}) {
          x.assign(x.size(), others);
          x[at] = value;
          for (const float y : product(x)) {
            EXPECT_FALSE(std::isfinite(y));
          }
        }
      }
    }
    x.assign(x.size(), 1e-38F);
    for (const float y : product(x)) {
      EXPECT_LT(std::abs(y), 1e-30F);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, IntegerProducts, testing::ValuesIn(cpu_kernels()), table_name);

}  // namespace
}  // namespace rabit
