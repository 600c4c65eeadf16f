// Products of every table that runs here against the scalar reference, over sizes around vector and
// block edges, with guard values behind every output. The orders of weights, the comparator and the
// reference itself.
#include <array>
#include <limits>

#include "product_test.h"

namespace rabit {
namespace {

class AllProducts : public Products {
 protected:
  void check_matmul(WeightFormat format, int64_t d_out, int64_t d_in, int64_t paths,
                    int64_t tokens) {
    SCOPED_TRACE("format " + std::to_string(static_cast<int>(format)) + " d_out " +
                 std::to_string(d_out) + " d_in " + std::to_string(d_in) + " paths " +
                 std::to_string(paths) + " tokens " + std::to_string(tokens));
    const Layer layer = Layer::make(format, d_out, d_in, paths);
    const Floats x = normals(tokens * d_in);
    const Floats want = reference_product(layer, x, tokens);
    Floats got = guarded(tokens * d_out);
    Scratch scratch(table().matmul_scratch(d_in, tokens, paths));
    const Prepared prepared(table(), layer, x, tokens);
    table().matmul(prepared.w, prepared.x(), prepared.input(), tokens, got.data(), 0, d_out,
                   scratch.data());
    EXPECT_TRUE(guards_hold(got));
    EXPECT_LE(worst(got.data(), want.data(), tolerance_of(layer, x, tokens).data(), tokens * d_out),
              1);
  }
};

TEST_P(AllProducts, MatmulOverColumns) {
  for (int64_t d_in = 1; d_in <= 130; d_in += d_in < 36 ? 1 : 7) {
    for (const int64_t tokens : {1, 3, 9}) {
      check_matmul(WeightFormat::kF32, 7, d_in, 0, tokens);
      check_matmul(WeightFormat::kF16, 7, d_in, 0, tokens);
      check_matmul(WeightFormat::kResidualBinary, 7, d_in, 2, tokens);
    }
  }
  for (const int64_t d_in : {384, 385, 576, 800, 1536}) {
    for (const int64_t tokens : {1, 13}) {
      check_matmul(WeightFormat::kF32, 33, d_in, 0, tokens);
      check_matmul(WeightFormat::kF16, 33, d_in, 0, tokens);
      check_matmul(WeightFormat::kResidualBinary, 33, d_in, 3, tokens);
    }
  }
}

TEST_P(AllProducts, MatmulOfBlocks) {
  for (const WeightFormat format : {WeightFormat::kQ8_0, WeightFormat::kQ4_0}) {
    for (const int64_t d_in : {32, 64, 96, 384, 416, 576}) {
      for (const int64_t d_out : {1, 4, 7, 63, 64, 65, 130}) {
        for (const int64_t tokens : {1, 2, 7, 8, 9, 25}) {
          check_matmul(format, d_out, d_in, 0, tokens);
        }
      }
    }
  }
}

TEST_P(AllProducts, MatmulOverTokens) {
  for (int64_t tokens = 1; tokens <= 40; ++tokens) {
    check_matmul(WeightFormat::kF32, 37, 67, 0, tokens);
    check_matmul(WeightFormat::kF16, 37, 67, 0, tokens);
    check_matmul(WeightFormat::kResidualBinary, 37, 67, 1 + tokens % 4, tokens);
  }
}

TEST_P(AllProducts, MatmulOverPathsAndRows) {
  for (int64_t paths = 1; paths <= 4; ++paths) {
    for (const int64_t tokens : {1, 2, 5, 8, 9, 25}) {
      for (const int64_t d_out : {1, 2, 5, 31, 32, 33, 64, 97, 400}) {
        check_matmul(WeightFormat::kResidualBinary, d_out, 96, paths, tokens);
      }
    }
  }
}

TEST_P(AllProducts, MatmulWritesItsRowsOnly) {
  const int64_t d_out = 150;
  for (const WeightFormat format : {WeightFormat::kF32, WeightFormat::kF16, WeightFormat::kQ8_0,
                                    WeightFormat::kQ4_0, WeightFormat::kResidualBinary}) {
    const bool blocks = format == WeightFormat::kQ8_0 || format == WeightFormat::kQ4_0;
    const int64_t d_in = blocks ? 96 : 70;
    const Layer layer = Layer::make(format, d_out, d_in, 2);
    for (const int64_t tokens : {1, 6, 20}) {
      const Floats x = normals(tokens * d_in);
      const Floats want = reference_product(layer, x, tokens);
      const std::vector<double> tolerance = tolerance_of(layer, x, tokens);
      const Prepared prepared(table(), layer, x, tokens);
      for (const auto& [begin, end] :
           {std::pair<int64_t, int64_t>{0, 32}, {32, 150}, {5, 6}, {31, 66}, {40, 40}}) {
        Floats got = guarded(tokens * d_out);
        Scratch scratch(table().matmul_scratch(d_in, tokens, 2));
        table().matmul(prepared.w, prepared.x(), prepared.input(), tokens, got.data(), begin, end,
                       scratch.data());
        for (int64_t i = 0; i < tokens * d_out; ++i) {
          if (i % d_out >= begin && i % d_out < end) {
            ASSERT_LE(worst(&got[i], &want[i], &tolerance[i], 1), 1) << begin << " " << end;
          } else {
            ASSERT_EQ(got[i], kGuard) << begin << " " << end;
          }
        }
        EXPECT_TRUE(guards_hold(got));
      }
    }
  }
}

// Without a prepared input the sums are of floats, for any number of tokens.
TEST_P(AllProducts, WithoutLookup) {
  for (const int64_t tokens : {1, 2, 9}) {
    const Layer layer = Layer::make(WeightFormat::kResidualBinary, 70, 130, 2);
    const Floats x = normals(tokens * 130), want = reference_product(layer, x, tokens);
    const Prepared prepared(table(), layer, x, tokens);
    Floats got = guarded(tokens * 70);
    Scratch scratch(table().matmul_scratch(130, tokens, 2));
    table().matmul(prepared.w, prepared.x(), nullptr, tokens, got.data(), 0, 70, scratch.data());
    EXPECT_TRUE(guards_hold(got));
    EXPECT_LE(
        worst(got.data(), want.data(), matmul_tolerance(layer, x, tokens).data(), tokens * 70), 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, AllProducts, testing::ValuesIn(cpu_kernels()), table_name);

// Every bit where the order says, nothing outside the tiles asked for; the reference reads them
// all.
TEST(TileSigns, PutEveryBitInItsPlace) {
  for (const WeightOrder order : {WeightOrder::kTilePairs, WeightOrder::kByteTiles}) {
    for (const auto& [d_out, d_in] :
         {std::pair<int64_t, int64_t>{1, 1}, {64, 32}, {128, 33}, {150, 70}, {300, 64}}) {
      const int64_t paths = 3, words = (d_in + 31) / 32, tiles = sign_tiles(d_out);
      const int64_t tile_words = paths * words * kTileRows;
      const Layer layer = Layer::make(WeightFormat::kResidualBinary, d_out, d_in, paths);
      // Where the words of a row and column lie, by the definition of each order.
      const auto places = [&](int64_t path, int64_t row, int64_t word) {
        std::array<int64_t, 4> bytes = {};
        for (int64_t byte = 0; byte < 4; ++byte) {
          if (order == WeightOrder::kByteTiles) {
            bytes[byte] = (((row / 64 * paths + path) * words + word) * 4 + byte) * 64 + row % 64;
          } else {
            const int64_t width = row / 128 * 2 + 1 < tiles ? 128 : 64;
            bytes[byte] =
                4 * (row / 128 * 128 * paths * words + (path * words + word) * width + row % 128) +
                byte;
          }
        }
        return bytes;
      };
      constexpr uint8_t kUntouched = 0xA5;
      std::vector<uint32_t> tiled(static_cast<size_t>(tiles * tile_words), 0xA5A5A5A5U);
      const auto* bytes = reinterpret_cast<const uint8_t*>(tiled.data());
      const auto check = [&](int64_t first, bool done) {
        for (int64_t path = 0; path < paths; ++path) {
          for (int64_t row = first * 64; row < tiles * 64; ++row) {
            for (int64_t word = 0; word < words; ++word) {
              const std::array<int64_t, 4> at = places(path, row, word);
              for (int64_t byte = 0; byte < 4; ++byte) {
                const uint32_t bits =
                    row < d_out ? layer.signs[(path * d_out + row) * words + word] : 0;
                ASSERT_EQ(bytes[at[byte]],
                          done ? static_cast<uint8_t>(bits >> (8 * byte)) : kUntouched);
              }
            }
          }
        }
      };
      tile_signs(layer.w, order, 0, tiles / 2, tiled.data());
      check(tiles / 2, false);
      tile_signs(layer.w, order, tiles / 2, tiles, tiled.data());
      check(0, true);
      const Floats x = normals(d_in), want = reference_product(layer, x, 1);
      LinearWeights w = layer.w;
      w.signs = tiled.data();
      w.order = order;
      Floats y(static_cast<size_t>(d_out));
      reference_kernels().matmul(w, x.data(), nullptr, 1, y.data(), 0, d_out, nullptr);
      EXPECT_EQ(y, want);
    }
  }
}

// The comparison must see the mistakes that kernels make.
TEST(Comparator, RejectsWrongResults) {
  const int64_t d_out = 32, d_in = 576, tokens = 2;
  Layer layer = Layer::make(WeightFormat::kResidualBinary, d_out, d_in, 4);
  const Floats x = normals(tokens * d_in);
  const Floats want = reference_product(layer, x, tokens);
  const std::vector<double> tolerance = matmul_tolerance(layer, x, tokens);
  const auto badness = [&](const Floats& got) {
    return worst(got.data(), want.data(), tolerance.data(), tokens * d_out);
  };
  EXPECT_EQ(badness(want), 0);
  EXPECT_GT(badness(Floats(want.size())), 100);

  Layer flipped = layer;
  flipped.point();
  flipped.signs[3] ^= 0x100U;
  EXPECT_GT(badness(reference_product(flipped, x, tokens)), 100);

  Layer swapped = layer;
  swapped.point();
  std::swap(swapped.row_scale[0], swapped.row_scale[1]);
  EXPECT_GT(badness(reference_product(swapped, x, tokens)), 100);
  swapped = layer;
  swapped.point();
  std::swap(swapped.col_scale[0], swapped.col_scale[1]);
  EXPECT_GT(badness(reference_product(swapped, x, tokens)), 100);

  // The smallest path dropped: its row scales come last.
  Layer dropped = layer;
  dropped.point();
  std::fill(dropped.row_scale.end() - d_out, dropped.row_scale.end(), uint16_t{0});
  EXPECT_GT(badness(reference_product(dropped, x, tokens)), 100);

  Floats broken = want;
  broken[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_GT(badness(broken), 100);
}

// The oracle against closed forms.
TEST(Reference, ProductsOfSmallIntegers) {
  // W[r, c] = r + 1, x[c] = c: y = (r + 1) n (n - 1) / 2.
  const int64_t d_out = 3, d_in = 40;
  Floats w, x;
  for (int64_t r = 0; r < d_out; ++r) {
    w.insert(w.end(), d_in, static_cast<float>(r + 1));
  }
  for (int64_t c = 0; c < d_in; ++c) {
    x.push_back(static_cast<float>(c));
  }
  const std::vector<uint16_t> half = to_halves(w);
  // Two binary paths: signs alternate in the first, all +1 in the second.
  const std::vector<uint32_t> signs = {0x55555555U, 0x55U, 0x55555555U, 0x55U, 0x55555555U, 0x55U,
                                       0xFFFFFFFFU, 0xFFU, 0xFFFFFFFFU, 0xFFU, 0xFFFFFFFFU, 0xFFU};
  const std::vector<uint16_t> g = to_halves({1, 2, 3, 0.5F, 0.25F, -1}), h(80, float_to_half(2.0F));
  const LinearWeights dense = {WeightFormat::kF32, d_out, d_in, 0, w.data()};
  const LinearWeights halves = {WeightFormat::kF16, d_out, d_in, 0, half.data()};
  const LinearWeights binary = {
      WeightFormat::kResidualBinary, d_out, d_in, 2, nullptr, signs.data(), g.data(), h.data()};
  Floats y(3);
  for (const LinearWeights* weights : {&dense, &halves}) {
    reference_kernels().matmul(*weights, x.data(), nullptr, 1, y.data(), 0, d_out, nullptr);
    EXPECT_EQ(y, (Floats{780, 1560, 2340}));
  }
  // Alternating sum 0 - 1 + 2 - ... - 39 = -20; times h = 2.
  reference_kernels().matmul(binary, x.data(), nullptr, 1, y.data(), 0, d_out, nullptr);
  EXPECT_EQ(y, (Floats{-40 + 780, -80 + 390, -120 - 1560}));
}

}  // namespace
}  // namespace rabit
