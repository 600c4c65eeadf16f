// What the tests of products share: random layers, what float sums may be off by, a layer as a
// table takes it, and the integers that kernels by lookup make of columns.
#pragma once

#include <array>
#include <cstring>

#include "kernel_test.h"

namespace rabit {

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
    const auto bytes = static_cast<size_t>(eight ? kQ8BlockBytes : kQ4BlockBytes);
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

inline std::vector<double> matmul_tolerance(const Layer& layer, const Floats& x, int64_t tokens) {
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

inline Floats reference_product(const Layer& layer, const Floats& x, int64_t tokens) {
  Floats y(static_cast<size_t>(tokens * layer.w.d_out));
  reference_kernels().matmul(layer.w, x.data(), nullptr, tokens, y.data(), 0, layer.w.d_out,
                             nullptr);
  return y;
}

/// A layer in the order that a table takes, what its matmul reads beside x, and x: all of them at
/// the end of what may be read.
class Prepared {
 public:
  Prepared(const KernelTable& table, const Layer& layer, const Floats& x, int64_t tokens)
      : w(layer.w), x_(x.data(), tokens * w.d_in * 4) {
    const int64_t words = (w.d_in + 31) / 32, tiles = sign_tiles(w.d_out);
    if (w.format == WeightFormat::kResidualBinary) {
      std::vector<uint32_t> tiled;
      if (table.sign_order != WeightOrder::kRows) {
        tiled.resize(static_cast<size_t>(tiles * kTileRows * w.paths * words));
        tile_signs(layer.w, table.sign_order, 0, tiles / 2, tiled.data());
        tile_signs(layer.w, table.sign_order, tiles / 2, tiles, tiled.data());
        w.order = table.sign_order;
      }
      w.signs = fenced<uint32_t>(tiled.empty() ? layer.signs : tiled);
      w.row_scale = fenced<uint16_t>(layer.row_scale);
      w.col_scale = fenced<uint16_t>(layer.col_scale);
    } else if (w.format == WeightFormat::kQ8_0 && table.block_order == WeightOrder::kTiles) {
      std::vector<uint8_t> tiled(static_cast<size_t>(tiles * w.d_in / 32 * kBlockTileBytes));
      tile_blocks(layer.w, 0, tiles / 2, tiled.data());
      tile_blocks(layer.w, tiles / 2, tiles, tiled.data());
      w.dense = fenced<uint8_t>(tiled);
      w.order = WeightOrder::kTiles;
    } else {
      w.dense =
          w.format == WeightFormat::kF32   ? static_cast<const void*>(fenced<float>(layer.dense))
          : w.format == WeightFormat::kF16 ? static_cast<const void*>(fenced<uint16_t>(layer.half))
                                           : fenced<uint8_t>(layer.blocks);
    }
    if (const int64_t bytes = table.input_bytes(w, tokens); bytes > 0) {
      EXPECT_EQ(bytes % 64, 0);
      EXPECT_EQ(bytes, tokens * table.input_bytes(w, 1));
      Scratch input(bytes / 4);
      table.prepare(w, this->x(), tokens, input.data(), words / 3, words);
      table.prepare(w, this->x(), tokens, input.data(), 0, words / 3);
      input_ = std::make_unique<Fenced>(input.data(), bytes);
    }
  }
  LinearWeights w;
  const float* x() const { return x_.as<float>(); }
  const void* input() const { return input_ ? input_->as<void>() : nullptr; }

 private:
  template <typename T>
  const T* fenced(const std::vector<T>& values) {
    fenced_.push_back(
        std::make_unique<Fenced>(values.data(), static_cast<int64_t>(values.size() * sizeof(T))));
    return fenced_.back()->template as<T>();
  }
  Fenced x_;
  std::vector<std::unique_ptr<Fenced>> fenced_;
  std::unique_ptr<Fenced> input_;
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
    for (int64_t t = 0; t < tokens && w.format == WeightFormat::kResidualBinary; ++t) {
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
};

}  // namespace rabit
