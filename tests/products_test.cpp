// Products of every table that runs here against the scalar reference, over sizes around vector and
// block edges, with guard values behind every output; sums of integers to the bit. The orders of
// weights.
#include <array>
#include <cstring>
#include <limits>
#include <tuple>

#include "kernel_test.h"

namespace rabit {
namespace {

/// A linear layer that owns its memory.
struct Layer {
  LinearWeights w;
  Floats dense;
  std::vector<uint8_t> blocks;
  std::vector<uint16_t> half, row_scale, col_scale;
  std::vector<uint32_t> signs;

  static Layer make(WeightFormat format, int64_t d_out, int64_t d_in, int64_t paths) {
    Layer layer;
    const int64_t words = (d_in + 31) / 32;
    layer.dense = normals(d_out * d_in);
    layer.half = to_halves(layer.dense);
    layer.half[0] = 3;  // a subnormal
    for (int64_t i = 0; i < paths * d_out * words; ++i) {
      const int64_t used = std::min<int64_t>(32, d_in - i % words * 32);
      const auto mask = static_cast<uint32_t>((uint64_t{1} << used) - 1);
      layer.signs.push_back(static_cast<uint32_t>(generator()()) & mask);
    }
    // Paths of falling size, as residuals are; scales of both signs.
    Floats rows, columns;
    for (int64_t path = 0; path < paths; ++path) {
      const float size = std::pow(0.5F, static_cast<float>(path));
      const Floats g = normals(d_out, size), h = normals(d_in);
      rows.insert(rows.end(), g.begin(), g.end());
      columns.insert(columns.end(), h.begin(), h.end());
    }
    layer.row_scale = to_halves(rows);
    layer.col_scale = to_halves(columns);
    layer.w = {.format = format, .d_out = d_out, .d_in = d_in, .paths = paths};
    if (format == WeightFormat::kQ8_0 || format == WeightFormat::kQ4_0) {
      layer.make_blocks();
    }
    layer.point();
    return layer;
  }

  /// Random blocks, their scales of both signs, a subnormal and a zero among them, and what they
  /// stand for.
  void make_blocks() {
    const bool eight = w.format == WeightFormat::kQ8_0;
    const size_t bytes = eight ? 34 : 18;
    const auto count = static_cast<size_t>(w.d_out * w.d_in / 32);
    for (size_t i = 0; i < count * bytes; ++i) {
      blocks.push_back(static_cast<uint8_t>(generator()()));
    }
    for (size_t i = 0; i < count; ++i) {
      uint8_t* block = blocks.data() + i * bytes;
      const uint16_t scale = i == 1 ? 5 : i == 2 ? 0 : float_to_half(normals(1, 0.01F)[0]);
      std::memcpy(block, &scale, sizeof scale);
      for (size_t j = 0; j < 32; ++j) {
        const int nibble = j < 16 ? block[2 + j % 16] & 15 : block[2 + j % 16] >> 4;
        const int value = eight ? static_cast<int8_t>(block[2 + j]) : nibble - 8;
        dense[i * 32 + j] = half_to_float(scale) * static_cast<float>(value);
      }
    }
  }

  void point() {
    w.dense = w.format == WeightFormat::kF32   ? static_cast<const void*>(dense.data())
              : w.format == WeightFormat::kF16 ? static_cast<const void*>(half.data())
                                               : blocks.data();
    w.signs = signs.data();
    w.row_scale = row_scale.data();
    w.col_scale = col_scale.data();
  }

  /// Sum over columns of (|w| |x|)^2 with |w| as the sum of the paths' magnitudes.
  double product_norm(int64_t row, const float* x) const {
    double sum = 0;
    for (int64_t c = 0; c < w.d_in; ++c) {
      double magnitude = 0;
      if (w.format == WeightFormat::kResidualBinary) {
        for (int64_t p = 0; p < w.paths; ++p) {
          magnitude += std::abs(half_to_float(row_scale[p * w.d_out + row]) *
                                half_to_float(col_scale[p * w.d_in + c]));
        }
      } else {
        magnitude = std::abs(dense[row * w.d_in + c]);
      }
      sum += magnitude * magnitude * x[c] * x[c];
    }
    return std::sqrt(sum);
  }
};

std::vector<double> matmul_tolerance(const Layer& layer, const Floats& x, int64_t tokens) {
  const LinearWeights& w = layer.w;
  std::vector<double> tolerance;
  // The norm of the products times sqrt(terms); the constant covers short sums.
  const double growth = kSafety * kEpsilon * (std::sqrt(static_cast<double>(w.d_in)) + 4);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < w.d_out; ++r) {
      tolerance.push_back(growth * layer.product_norm(r, x.data() + t * w.d_in) + 1e-30);
    }
  }
  return tolerance;
}

Floats reference_product(const Layer& layer, const Floats& x, int64_t tokens) {
  Floats y(static_cast<size_t>(tokens * layer.w.d_out));
  reference_kernels().matmul(layer.w, x.data(), nullptr, tokens, y.data(), 0, layer.w.d_out,
                             nullptr);
  return y;
}

/// A layer in the order that a table takes, and what its matmul reads beside x.
class Prepared {
 public:
  Prepared(const KernelTable& table, const Layer& layer, const Floats& x, int64_t tokens)
      : w(layer.w) {
    const int64_t words = (w.d_in + 31) / 32, tiles = sign_tiles(w.d_out);
    if (w.format == WeightFormat::kQ8_0 && table.block_order == WeightOrder::kTiles) {
      signs_ = std::make_unique<Scratch>(tiles * w.d_in / 32 * kBlockTileBytes / 4);
      auto* to = reinterpret_cast<uint8_t*>(signs_->data());
      tile_blocks(layer.w, 0, tiles / 2, to);
      tile_blocks(layer.w, tiles / 2, tiles, to);
      w.dense = to;
      w.order = WeightOrder::kTiles;
    }
    if (w.format == WeightFormat::kResidualBinary && table.sign_order != WeightOrder::kRows) {
      signs_ = std::make_unique<Scratch>(tiles * kTileRows * w.paths * words);
      auto* to = reinterpret_cast<uint32_t*>(signs_->data());
      tile_signs(layer.w, table.sign_order, 0, tiles / 2, to);
      tile_signs(layer.w, table.sign_order, tiles / 2, tiles, to);
      w.signs = to;
      w.order = table.sign_order;
    }
    if (const int64_t bytes = table.input_bytes(w, tokens); bytes > 0) {
      EXPECT_EQ(bytes % 64, 0);
      EXPECT_EQ(bytes, tokens * table.input_bytes(w, 1));
      input_ = std::make_unique<Scratch>(bytes / 4);
      table.prepare(w, x.data(), tokens, input_->data(), words / 3, words);
      table.prepare(w, x.data(), tokens, input_->data(), 0, words / 3);
    }
  }
  LinearWeights w;
  const void* input() const { return input_ ? input_->data() : nullptr; }

 private:
  std::unique_ptr<Scratch> signs_, input_;
};

/// Columns of one path times scales in integers, as kernels by lookup of an order take them: the
/// sum of four neighbouring columns is rounded to a multiple of `step`, and sums over a group of
/// columns count in the group's unit.
struct Quantized {
  int64_t group = 0, step = 1;  // columns; units
  std::vector<int64_t> q;       // (d_in)
  Floats units;                 // of q, by group

  Quantized(WeightOrder order, const Layer& layer, int64_t path, const float* x) {
    const int64_t d_in = layer.w.d_in;
    const bool bytes = order == WeightOrder::kByteTiles;
    group = bytes ? 128 : 1 << 17;  // as many as the sums have room for
    step = bytes ? 16 : 1;
    for (int64_t begin = 0; begin < d_in; begin += group) {
      // Words have a unit of all columns, bytes one of their group.
      const int64_t first = bytes ? begin : 0, count = bytes ? group : (d_in + 3) / 4 * 4;
      Floats scaled(static_cast<size_t>(count)), fours;
      for (int64_t c = 0; c < std::min(count, d_in - first); ++c) {
        scaled[c] = half_to_float(layer.col_scale[path * d_in + first + c]) * x[first + c];
      }
      for (int64_t c = 0; c < count; c += 4) {
        fours.push_back((std::abs(scaled[c]) + std::abs(scaled[c + 1])) +
                        (std::abs(scaled[c + 2]) + std::abs(scaled[c + 3])));
      }
      const float largest = *std::max_element(fours.begin(), fours.end());
      float in_units = 32765.0F / largest;
      units.push_back(largest / 32765.0F);
      if (bytes) {  // the sum over a group has a bound of its own
        std::array<float, 16> parts{};
        for (int64_t c = 0; c < group; ++c) {
          parts[c % 16] += std::abs(scaled[c]);
        }
        for (size_t half = 8; half > 0; half /= 2) {
          for (size_t i = 0; i < half; ++i) {
            parts[i] += parts[i + half];
          }
        }
        units.back() = largest > 1e-30F ? std::max(largest / 32750.0F, parts[0] / 523000.0F) : 0.0F;
        in_units = 1 / units.back();
      }
      for (int64_t c = begin; c < std::min(begin + group, d_in); ++c) {
        const float value = scaled[c - first];
        q.push_back(value == 0 ? 0 : static_cast<int64_t>(std::nearbyint(value * in_units)));
      }
    }
  }

  /// Sums over the groups of a row in units of steps; signs: the row's.
  std::vector<int64_t> sums(const uint32_t* signs) const {
    std::vector<int64_t> sums(units.size());
    const auto d_in = static_cast<int64_t>(q.size());
    for (int64_t c = 0; c < d_in; c += 4) {
      int64_t four = 0;
      for (int64_t i = c; i < std::min(c + 4, d_in); ++i) {
        four += (signs[i / 32] >> (i % 32)) & 1U ? q[i] : -q[i];
      }
      sums[c / group] += step == 1 ? four : std::lround(static_cast<double>(four) / step);
    }
    return sums;
  }

  /// What rounding puts a row's sum off by: errors of random direction, each this part of a unit.
  double rounding(double part) const {
    double squares = 0;
    for (size_t i = 0; i < units.size(); ++i) {
      const auto columns = std::min<double>(group, q.size() - i * group);
      const double column = part * units[i], four = step == 1 ? 0 : part * step * units[i];
      squares += columns * column * column + std::ceil(columns / 4) * four * four;
    }
    return std::sqrt(squares);
  }
};

class Products : public KernelTest {
 protected:
  /// What tables of integer sums may be off by: half a unit wherever they round, in random
  /// directions.
  std::vector<double> tolerance_of(const Layer& layer, const Floats& x, int64_t tokens) const {
    std::vector<double> tolerance = matmul_tolerance(layer, x, tokens);
    const LinearWeights& w = layer.w;
    if (table().input_bytes(w, tokens) == 0) {
      return tolerance;
    }
    for (int64_t t = 0; t < tokens && w.format == WeightFormat::kQ8_0; ++t) {
      double largest = 0;
      for (int64_t c = 0; c < w.d_in; ++c) {
        largest = std::max(largest, std::abs(double{x[t * w.d_in + c]}));
      }
      for (int64_t r = 0; r < w.d_out; ++r) {
        const Floats ones(static_cast<size_t>(w.d_in), 1.0F);
        tolerance[t * w.d_out + r] +=
            kSafety * 0.5 * largest / 32639.0 * layer.product_norm(r, ones.data());
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t path = 0; path < w.paths; ++path) {
        const double off =
            Quantized(table().sign_order, layer, path, x.data() + t * w.d_in).rounding(0.5);
        for (int64_t r = 0; r < w.d_out; ++r) {
          tolerance[t * w.d_out + r] +=
              kSafety * off * std::abs(half_to_float(layer.row_scale[path * w.d_out + r]));
        }
      }
    }
    return tolerance;
  }

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
    table().matmul(prepared.w, x.data(), prepared.input(), tokens, got.data(), 0, d_out,
                   scratch.data());
    EXPECT_TRUE(guards_hold(got));
    EXPECT_LE(worst(got.data(), want.data(), tolerance_of(layer, x, tokens).data(), tokens * d_out),
              1);
  }

  /// The bits of a product with Q8_0 by sums of integers, against a scalar computation of the same.
  void check_blocks(const Layer& layer, const Floats& x, int64_t tokens) {
    const auto [d_out, d_in] = std::pair(layer.w.d_out, layer.w.d_in);
    const Prepared prepared(table(), layer, x, tokens);
    Floats got = guarded(tokens * d_out);
    table().matmul(prepared.w, x.data(), prepared.input(), tokens, got.data(), 0, d_out, nullptr);
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
          const uint8_t* bytes = layer.blocks.data() + (r * d_in / 32 + block) * 34;
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
    table().matmul(prepared.w, x.data(), prepared.input(), tokens, got.data(), 0, d_out, nullptr);
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

TEST_P(Products, MatmulOverColumns) {
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

TEST_P(Products, MatmulOfBlocks) {
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

// The sums of integers are exact: the same bits as a scalar computation of them.
TEST_P(Products, SumsOfBlocksAreExact) {
  for (const int64_t d_in : {32, 64, 576, 4096}) {
    for (const int64_t d_out : {1, 16, 63, 65, 128}) {
      const Layer layer = Layer::make(WeightFormat::kQ8_0, d_out, d_in, 0);
      if (table().input_bytes(layer.w, 2) == 0) {
        GTEST_SKIP() << "sums of floats here";
      }
      check_blocks(layer, normals(2 * d_in, 3.0F), 2);
    }
  }
}

// As large as they get, and with all numbers that a byte of a weight and of a column can be.
TEST_P(Products, LargestSumsOfBlocksAreExact) {
  const int64_t d_in = 512, d_out = 70;
  Layer layer = Layer::make(WeightFormat::kQ8_0, d_out, d_in, 0);
  if (table().input_bytes(layer.w, 1) == 0) {
    GTEST_SKIP() << "sums of floats here";
  }
  for (int64_t row = 0; row < d_out; ++row) {
    for (int64_t c = 0; c < d_in; ++c) {
      const int64_t value = row == 0 ? -128 : row == 1 ? 127 : (c * (row - 1)) % 256 - 128;
      layer.blocks[(row * d_in + c) / 32 * 34 + 2 + c % 32] = static_cast<uint8_t>(value);
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

TEST_P(Products, MatmulOverTokens) {
  for (int64_t tokens = 1; tokens <= 40; ++tokens) {
    check_matmul(WeightFormat::kF32, 37, 67, 0, tokens);
    check_matmul(WeightFormat::kF16, 37, 67, 0, tokens);
    check_matmul(WeightFormat::kResidualBinary, 37, 67, 1 + tokens % 4, tokens);
  }
}

TEST_P(Products, MatmulOverPathsAndRows) {
  for (int64_t paths = 1; paths <= 4; ++paths) {
    for (const int64_t tokens : {1, 2, 5, 8, 9, 25}) {
      for (const int64_t d_out : {1, 2, 5, 31, 32, 33, 64, 97, 400}) {
        check_matmul(WeightFormat::kResidualBinary, d_out, 96, paths, tokens);
      }
    }
  }
}

TEST_P(Products, MatmulWritesItsRowsOnly) {
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
        table().matmul(prepared.w, x.data(), prepared.input(), tokens, got.data(), begin, end,
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

// The sums of integers are exact: the same bits as a scalar computation of them.
TEST_P(Products, LookupSumsAreExact) {
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
  // More columns than sums of 32 bits have room for at once.
  for (const int64_t d_in : {1 << 17, (1 << 17) + 1, (1 << 17) + 100, (1 << 18) + 33}) {
    check_lookup(Layer::make(WeightFormat::kResidualBinary, 3, d_in, 1), normals(2 * d_in, 3.0F),
                 2);
  }
}

// The same where sums are as large as they get: all columns of one size, or four alone, with the
// signs of a row all alike, or alike but for a few.
TEST_P(Products, LargestLookupSumsAreExact) {
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

// Without a prepared input the sums are of floats, for any number of tokens.
TEST_P(Products, WithoutLookup) {
  for (const int64_t tokens : {1, 2, 9}) {
    const Layer layer = Layer::make(WeightFormat::kResidualBinary, 70, 130, 2);
    const Floats x = normals(tokens * 130), want = reference_product(layer, x, tokens);
    const Prepared prepared(table(), layer, x, tokens);
    Floats got = guarded(tokens * 70);
    Scratch scratch(table().matmul_scratch(130, tokens, 2));
    table().matmul(prepared.w, x.data(), nullptr, tokens, got.data(), 0, 70, scratch.data());
    EXPECT_TRUE(guards_hold(got));
    EXPECT_LE(
        worst(got.data(), want.data(), matmul_tolerance(layer, x, tokens).data(), tokens * 70), 1);
  }
}

// Rounding errors are evenly spread and have no preferred direction, which would make them grow
// with the columns rather than with their root.
TEST_P(Products, LookupErrorsAreThoseOfRounding) {
  const int64_t d_out = 256, d_in = 4096;
  const Layer layer = Layer::make(WeightFormat::kResidualBinary, d_out, d_in, 1);
  if (table().input_bytes(layer.w, 1) == 0) {
    GTEST_SKIP() << "no lookup here";
  }
  const Floats x = normals(d_in), want = reference_product(layer, x, 1);
  const Prepared prepared(table(), layer, x, 1);
  Floats got(static_cast<size_t>(d_out));
  table().matmul(prepared.w, x.data(), prepared.input(), 1, got.data(), 0, d_out, nullptr);
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

TEST_P(Products, IntegersOfNothingAndOfWhatIsNotFinite) {
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
      table().matmul(prepared.w, x.data(), prepared.input(), 1, y.data(), 0, 40, nullptr);
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

INSTANTIATE_TEST_SUITE_P(Cpu, Products, testing::ValuesIn(cpu_kernels()), table_name);

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
