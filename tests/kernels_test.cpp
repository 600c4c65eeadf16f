// Every kernel of every table that runs here against the scalar reference, over sizes around vector
// and block edges, with guard values behind every output; the reference itself against closed
// forms. Tolerances: a sum of n products in float32, in any order, is off by at most about sqrt(n)
// * eps * ||w|| * ||x|| with rounding errors of random sign; kSafety covers their spread.
#include "kernels/api/kernels.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>

#include "base/half.h"

namespace rabit {
namespace {

constexpr double kEpsilon = 0x1p-24;
constexpr double kSafety = 4;
constexpr float kGuard = 12345.678F;
constexpr int64_t kGuards = 16;

using Floats = std::vector<float>;

std::mt19937& generator() {
  static std::mt19937 engine(7);
  return engine;
}

Floats normals(int64_t count, float scale = 1.0F) {
  std::normal_distribution<float> normal(0, scale);
  Floats values(static_cast<size_t>(count));
  for (float& value : values) {
    value = normal(generator());
  }
  return values;
}

std::vector<uint16_t> to_halves(const Floats& values) {
  std::vector<uint16_t> halves;
  for (const float value : values) {
    halves.push_back(float_to_half(value));
  }
  return halves;
}

/// `count` outputs with guards behind them.
Floats guarded(int64_t count) { return Floats(static_cast<size_t>(count + kGuards), kGuard); }

bool guards_hold(const Floats& values) {
  for (size_t i = values.size() - kGuards; i < values.size(); ++i) {
    if (values[i] != kGuard) {
      return false;
    }
  }
  return true;
}

/// Scratch of exactly the size that was asked for, aligned as promised, guarded.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : floats_(floats) {
    const auto bytes = static_cast<size_t>((floats + kGuards + 15) / 16 * 64);
    data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
    for (int64_t i = 0; i < floats; ++i) {
      data_[i] = std::numeric_limits<float>::quiet_NaN();  // nothing may be read before written
    }
    std::fill(data_ + floats, data_ + floats + kGuards, kGuard);
  }
  ~Scratch() {
    for (int64_t i = floats_; i < floats_ + kGuards; ++i) {
      EXPECT_EQ(data_[i], kGuard) << "scratch overrun";
    }
    std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() { return data_; }

 private:
  int64_t floats_;
  float* data_;
};

/// Largest |got - want| over tolerance; infinity for anything that is not finite.
double worst(const float* got, const float* want, const double* tolerance, int64_t count) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double off = std::abs(static_cast<double>(got[i]) - want[i]);
    if (!std::isfinite(off)) {
      return std::numeric_limits<double>::infinity();
    }
    largest = std::max(largest, off / tolerance[i]);
  }
  return largest;
}

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
    group = bytes ? 128 : (d_in + 3) / 4 * 4;
    step = bytes ? 16 : 1;
    for (int64_t begin = 0; begin < d_in; begin += group) {
      Floats scaled(static_cast<size_t>(group)), fours;
      for (int64_t c = 0; c < std::min(group, d_in - begin); ++c) {
        scaled[c] = half_to_float(layer.col_scale[path * d_in + begin + c]) * x[begin + c];
      }
      for (int64_t c = 0; c < group; c += 4) {
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
      for (int64_t c = 0; c < std::min(group, d_in - begin); ++c) {
        q.push_back(scaled[c] == 0 ? 0
                                   : static_cast<int64_t>(std::nearbyint(scaled[c] * in_units)));
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

class Kernels : public testing::TestWithParam<const KernelTable*> {
 protected:
  const KernelTable& table() const { return *GetParam(); }

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
            want[r] = std::fma(static_cast<float>(sums[0]), columns.units[0] * g, want[r]);
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

TEST_P(Kernels, MatmulOverColumns) {
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

TEST_P(Kernels, MatmulOfBlocks) {
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
TEST_P(Kernels, SumsOfBlocksAreExact) {
  for (const int64_t d_in : {32, 64, 576, 4096}) {
    for (const int64_t d_out : {1, 16, 63, 65, 128}) {
      const Layer layer = Layer::make(WeightFormat::kQ8_0, d_out, d_in, 0);
      if (table().input_bytes(layer.w, 2) == 0) {
        GTEST_SKIP() << "sums of floats here";
      }
      const Floats x = normals(2 * d_in, 3.0F);
      const Prepared prepared(table(), layer, x, 2);
      Floats got = guarded(2 * d_out);
      table().matmul(prepared.w, x.data(), prepared.input(), 2, got.data(), 0, d_out, nullptr);
      EXPECT_TRUE(guards_hold(got));
      for (int64_t t = 0; t < 2; ++t) {
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
  }
}

TEST_P(Kernels, MatmulOverTokens) {
  for (int64_t tokens = 1; tokens <= 40; ++tokens) {
    check_matmul(WeightFormat::kF32, 37, 67, 0, tokens);
    check_matmul(WeightFormat::kF16, 37, 67, 0, tokens);
    check_matmul(WeightFormat::kResidualBinary, 37, 67, 1 + tokens % 4, tokens);
  }
}

TEST_P(Kernels, MatmulOverPathsAndRows) {
  for (int64_t paths = 1; paths <= 4; ++paths) {
    for (const int64_t tokens : {1, 2, 5, 8, 9, 25}) {
      for (const int64_t d_out : {1, 2, 5, 31, 32, 33, 64, 97, 400}) {
        check_matmul(WeightFormat::kResidualBinary, d_out, 96, paths, tokens);
      }
    }
  }
}

TEST_P(Kernels, MatmulWritesItsRowsOnly) {
  const int64_t d_out = 150;
  for (const WeightFormat format : {WeightFormat::kF32, WeightFormat::kF16, WeightFormat::kQ8_0,
                                    WeightFormat::kResidualBinary}) {
    const int64_t d_in = format == WeightFormat::kQ8_0 ? 96 : 70;
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
TEST_P(Kernels, LookupSumsAreExact) {
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
}

// The same where sums are as large as they get: all columns of one size, or four alone, with the
// signs of a row all alike, or alike but for a few.
TEST_P(Kernels, LargestLookupSumsAreExact) {
  const int64_t d_out = 70;
  for (const int64_t d_in : {4, 32, 64, 100, 128, 192, 256, 11008}) {
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
TEST_P(Kernels, WithoutLookup) {
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
TEST_P(Kernels, LookupErrorsAreThoseOfRounding) {
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

TEST_P(Kernels, IntegersOfNothingAndOfWhatIsNotFinite) {
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

TEST_P(Kernels, RmsNorm) {
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

TEST_P(Kernels, Rope) {
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

TEST_P(Kernels, Attention) {
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

TEST_P(Kernels, CacheIsThatOfTheReference) {
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

TEST_P(Kernels, AttentionOfExtremeScores) {
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

TEST_P(Kernels, Swiglu) {
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

TEST_P(Kernels, CrossEntropy) {
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

std::string table_name(const testing::TestParamInfo<const KernelTable*>& info) {
  std::string name(info.param->name);
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Cpu, Kernels, testing::ValuesIn(cpu_kernels()), table_name);

TEST(KernelTables, NamesAreDistinctAndPortableIsLast) {
  const std::vector<const KernelTable*> tables = cpu_kernels();
  ASSERT_FALSE(tables.empty());
  EXPECT_EQ(tables.back()->name, "portable");
  for (size_t i = 1; i < tables.size(); ++i) {
    EXPECT_NE(tables[i]->name, tables[i - 1]->name);
    EXPECT_NE(tables[i]->matmul, tables[i - 1]->matmul);
  }
}

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
