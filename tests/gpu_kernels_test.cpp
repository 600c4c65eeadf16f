// The runtime's operations on a GPU. Signs and weights equal their definitions bit for bit; the
// others are held to the scalar reference within what rounding to F16 can do. Sizes lie around the
// edges of tiles and vectors, guards behind every output.
#include <algorithm>

#include "gpu_test.h"
#include "io/dequant.h"
#include "kernel_test.h"

namespace rabit {
namespace {

using Halves = std::vector<uint16_t>;

constexpr double kHalf = 0x1p-11;       // rounding to F16, relative
constexpr double kHalfLeast = 0x1p-25;  // and where it has no more digits

std::vector<uint32_t> random_words(int64_t count) {
  std::vector<uint32_t> words(static_cast<size_t>(count));
  for (uint32_t& word : words) {
    word = generator()();
  }
  return words;
}

Floats to_floats(const Halves& halves) {
  Floats values;
  for (const uint16_t half : halves) {
    values.push_back(half_to_float(half));
  }
  return values;
}
Floats rounded(const Floats& values) { return to_floats(to_halves(values)); }

/// Largest |got - want| over tolerance(i).
template <typename Tolerance>
double worst_of(const Floats& got, const Floats& want, const Tolerance& tolerance) {
  EXPECT_EQ(got.size(), want.size());
  std::vector<double> tolerances;
  for (size_t i = 0; i < want.size(); ++i) {
    tolerances.push_back(tolerance(i));
  }
  return worst(got.data(), want.data(), tolerances.data(), static_cast<int64_t>(want.size()));
}
double worst_of_halves(const Floats& got, const Floats& want) {
  return worst_of(got, want,
                  [&](size_t i) { return 1.01 * kHalf * std::abs(want[i]) + kHalfLeast; });
}

TEST(GpuComparator, RejectsWhatIsWrong) {
  const Floats want = {1.0F, -2.0F, 0.5F};
  EXPECT_EQ(worst_of_halves(want, want), 0);
  EXPECT_GT(worst_of_halves({0, 0, 0}, want), 100);
  EXPECT_GT(worst_of_halves({1, 2, 0.5F}, want), 100);
  EXPECT_GT(worst_of_halves({-2, 1, 0.5F}, want), 100);
  EXPECT_GT(worst_of_halves({1, NAN, 0.5F}, want), 100);
}

class GpuKernels : public GpuTest {
 protected:
  template <typename T>
  OnDevice<T> up(const std::vector<T>& values) const {
    return OnDevice<T>(queue_, values);
  }
  template <typename T>
  OnDevice<T> room(int64_t count) const {
    return OnDevice<T>(queue_, count);
  }
  void expect_ok(const Status& status) const {
    ASSERT_TRUE(status) << (status ? "" : status.error().message);
  }
};

struct Packed {
  int64_t d_out, d_in, paths;
  std::vector<uint32_t> signs;  // (k, d_out, words), garbage beyond d_in
  Halves g, h;
  int64_t words() const { return (d_in + 31) / 32; }
  bool plus(int64_t path, int64_t row, int64_t column) const {
    return (signs[(path * d_out + row) * words() + column / 32] >> (column % 32) & 1U) != 0;
  }
};

std::vector<Packed> packed_layers() {
  std::vector<Packed> all;
  for (const auto& [d_out, d_in] : {std::pair<int64_t, int64_t>{1, 1},
                                    {16, 256},
                                    {17, 257},
                                    {15, 255},
                                    {33, 31},
                                    {8, 513},
                                    {50, 600},
                                    {100, 40}}) {
    for (int64_t paths = 1; paths <= 4; ++paths) {
      const int64_t words = (d_in + 31) / 32;
      all.push_back({d_out, d_in, paths, random_words(paths * d_out * words),
                     to_halves(normals(paths * d_out, 0.2F)),
                     to_halves(normals(paths * d_in, 1.0F))});
    }
  }
  return all;
}

TEST_F(GpuKernels, SignsInTiles) {
  for (const Packed& layer : packed_layers()) {
    SCOPED_TRACE(std::to_string(layer.d_out) + " by " + std::to_string(layer.d_in) + ", paths " +
                 std::to_string(layer.paths));
    const int64_t count = gpu::sign_words(layer.d_out, layer.d_in, layer.paths);
    const auto rows = up(layer.signs);
    const auto tiles = room<uint32_t>(count);
    expect_ok(
        gpu::tile_signs(layer.d_out, layer.d_in, layer.paths, rows.data(), tiles.data(), stream()));
    // Every bit from where gpu_weights.h says that it lies.
    std::vector<uint32_t> want;
    for (int64_t row = 0; row < layer.d_out; row += gpu::kTileRows) {
      for (int64_t column = 0; column < layer.d_in; column += gpu::kTileColumns) {
        for (int64_t path = 0; path < layer.paths; ++path) {
          for (int64_t lane = 0; lane < 32; ++lane) {
            for (int64_t i = 0; i < 4; ++i) {
              const int64_t r = row + lane / 4 + 8 * (i % 2);
              uint32_t word = 0;
              for (int64_t j = 0; j < 32; ++j) {
                const int64_t in_word = j < 16 ? 2 * j : 2 * (j - 16) + 1;
                const int64_t c = column + 32 * (lane % 4 + 4 * (i / 2)) + in_word;
                if (r < layer.d_out && c < layer.d_in && layer.plus(path, r, c)) {
                  word |= 1U << j;
                }
              }
              want.push_back(word);
            }
          }
        }
      }
    }
    EXPECT_EQ(tiles.read(), want);
  }
}

TEST_F(GpuKernels, PackedWeightsAsAMatrix) {
  for (const Packed& layer : packed_layers()) {
    SCOPED_TRACE(std::to_string(layer.d_out) + " by " + std::to_string(layer.d_in) + ", paths " +
                 std::to_string(layer.paths));
    const auto rows = up(layer.signs);
    const auto tiles = room<uint32_t>(gpu::sign_words(layer.d_out, layer.d_in, layer.paths));
    const auto g = up(layer.g), h = up(layer.h);
    const int64_t stride = (layer.d_in + 7) / 8 * 8;
    const auto out = room<uint16_t>(layer.d_out * stride);
    expect_ok(
        gpu::tile_signs(layer.d_out, layer.d_in, layer.paths, rows.data(), tiles.data(), stream()));
    expect_ok(gpu::unpack({.format = gpu::Format::kResidualBinary,
                           .d_out = static_cast<int32_t>(layer.d_out),
                           .d_in = static_cast<int32_t>(layer.d_in),
                           .paths = static_cast<int32_t>(layer.paths),
                           .weights = tiles.data(),
                           .row_scale = g.data(),
                           .col_scale = h.data()},
                          out.data(), stride, stream()));
    const Halves got = out.read();
    int64_t wrong = 0;
    for (int64_t r = 0; r < layer.d_out; ++r) {
      for (int64_t c = 0; c < stride; ++c) {
        float want = 0;
        for (int64_t path = 0; path < layer.paths && c < layer.d_in; ++path) {
          const float magnitude = half_to_float(layer.g[path * layer.d_out + r]) *
                                  half_to_float(layer.h[path * layer.d_in + c]);
          want += layer.plus(path, r, c) ? magnitude : -magnitude;
        }
        const uint16_t half = got[r * stride + c];
        // A sum that cancels is +0 or -0.
        wrong += half != float_to_half(want) && (half & 0x7FFFU) + std::abs(want) != 0 ? 1 : 0;
      }
    }
    EXPECT_EQ(wrong, 0);
  }
}

/// A layer on the device.
struct PackedOnDevice {
  OnDevice<uint32_t> rows, tiles;
  OnDevice<uint16_t> g, h;
  gpu::Linear linear;

  PackedOnDevice(const gpu::Queue& queue, const Packed& layer)
      : rows(queue, layer.signs),
        tiles(queue, gpu::sign_words(layer.d_out, layer.d_in, layer.paths)),
        g(queue, layer.g),
        h(queue, layer.h),
        linear({.format = gpu::Format::kResidualBinary,
                .d_out = static_cast<int32_t>(layer.d_out),
                .d_in = static_cast<int32_t>(layer.d_in),
                .paths = static_cast<int32_t>(layer.paths),
                .weights = tiles.data(),
                .row_scale = g.data(),
                .col_scale = h.data()}) {
    EXPECT_TRUE(gpu::tile_signs(layer.d_out, layer.d_in, layer.paths, rows.data(), tiles.data(),
                                queue.stream()));
  }
};

/// With and without products of warpgroups, where the device has them.
std::vector<gpu::DeviceInfo> ways_of_products(int32_t multiprocessors) {
  const auto device = gpu::use_device(0);
  std::vector<gpu::DeviceInfo> ways(device && device->warpgroups ? 2 : 1);
  for (gpu::DeviceInfo& way : ways) {
    way.multiprocessors = multiprocessors;
  }
  ways.back().warpgroups = ways.size() == 2;
  return ways;
}

TEST_F(GpuKernels, ProductsOfPackedWeights) {
  struct Case {
    std::vector<int64_t> d_out;  // of layers that share their input
    int64_t d_in, paths, tokens;
    int32_t multiprocessors;
  };
  std::vector<Case> cases = {{{1}, 8, 2, 1, 1},          {{130, 5, 17}, 264, 2, 3, 9},
                             {{300}, 1032, 2, 8, 20},    {{257, 16}, 512, 2, 17, 40},
                             {{40}, 800, 2, 64, 3},      {{24}, 256, 2, 33, 100},
                             {{260, 3}, 1288, 2, 65, 9}, {{128}, 320, 2, 257, 1}};
  for (int64_t paths = 1; paths <= 4; ++paths) {
    for (const int64_t tokens : {2, 16, 31, 50, 130}) {
      cases.push_back({{33}, 536, paths, tokens, paths == 3 ? 1 : 5});
    }
  }
  for (const Case& c : cases) {
    SCOPED_TRACE(std::to_string(c.d_out.front()) + " by " + std::to_string(c.d_in) + ", paths " +
                 std::to_string(c.paths) + ", tokens " + std::to_string(c.tokens));
    std::vector<Packed> layers;
    std::vector<PackedOnDevice> device;
    int64_t width = 0;
    for (const int64_t d_out : c.d_out) {
      const int64_t words = (c.d_in + 31) / 32;
      Packed& layer = layers.emplace_back(
          Packed{d_out, c.d_in, c.paths, random_words(c.paths * d_out * words),
                 to_halves(normals(c.paths * d_out, 0.2F)), to_halves(normals(c.paths * c.d_in))});
      layer.g[0] = 0;  // the first path of a row, and all of the last row
      for (int64_t path = 0; path < c.paths; ++path) {
        layer.g[(path + 1) * d_out - 1] = 0;
      }
      device.emplace_back(queue_, layer);
      width += d_out;
    }
    const auto multiply = [&](const gpu::DeviceInfo& way, const auto&... linear) {
      const std::initializer_list<const gpu::Linear*> all = {&linear...};
      EXPECT_EQ(gpu::takes_packed(all, c.tokens, way), way.warpgroups || c.tokens <= 64);
      if (!gpu::takes_packed(all, c.tokens, way)) {
        return;
      }
      const Floats x = rounded(normals(c.tokens * c.d_in));
      const auto input = up(to_halves(x));
      const gpu::PackedNeeds needs = gpu::packed_needs(all, way);
      const auto partial = room<float>(needs.floats);
      const auto counters = up(std::vector<uint32_t>(static_cast<size_t>(needs.counters)));
      const Floats start = normals(c.tokens * width);
      for (const bool add : {false, true}) {
        const auto y = up(start);
        // Twice: the counters are as before.
        for (int pass = 0; pass < (add ? 1 : 2); ++pass) {
          expect_ok(gpu::multiply_packed(all, input.data(), c.tokens, y.data(), add,
                                         {partial.data(), counters.data()}, way, stream()));
        }
        Floats want;
        std::vector<double> tolerance;
        double squares = 0, errors = 0;
        for (int64_t token = 0; token < c.tokens; ++token) {
          for (const Packed& layer : layers) {
            for (int64_t r = 0; r < layer.d_out; ++r) {
              double sum = 0, size = 0;
              for (int64_t path = 0; path < c.paths; ++path) {
                const double g = half_to_float(layer.g[path * layer.d_out + r]);
                for (int64_t i = 0; i < c.d_in; ++i) {
                  const double term =
                      g * half_to_float(layer.h[path * c.d_in + i]) * x[token * c.d_in + i];
                  sum += layer.plus(path, r, i) ? term : -term;
                  size += std::abs(term);
                }
              }
              const float before = add ? start[want.size()] : 0.0F;
              want.push_back(static_cast<float>(sum + before));
              // The scale in units of the largest, and each sum of paths, rounded to F16.
              tolerance.push_back(static_cast<double>(c.paths + 1) * kHalf * size +
                                  2 * kEpsilon * std::abs(before) + 1e-6);
            }
          }
        }
        const Floats got = y.read();
        for (size_t i = 0; i < want.size(); ++i) {
          squares += static_cast<double>(want[i]) * want[i];
          errors +=
              (static_cast<double>(got[i]) - want[i]) * (static_cast<double>(got[i]) - want[i]);
        }
        EXPECT_LE(worst_of(got, want, [&](size_t i) { return tolerance[i]; }), 1);
        EXPECT_LE(std::sqrt(errors), kHalf * std::sqrt(squares) + 1e-6);
      }
    };
    for (const gpu::DeviceInfo& way : ways_of_products(c.multiprocessors)) {
      SCOPED_TRACE(way.warpgroups ? "by warpgroups" : "by warps");
      if (device.size() == 1) {
        multiply(way, device[0].linear);
      } else if (device.size() == 2) {
        multiply(way, device[0].linear, device[1].linear);
      } else {
        multiply(way, device[0].linear, device[1].linear, device[2].linear);
      }
    }
  }
}

TEST_F(GpuKernels, ProductsThatStayUnpacked) {
  const gpu::Linear packed = {
      .format = gpu::Format::kResidualBinary, .d_out = 8, .d_in = 64, .paths = 2};
  gpu::Linear other = packed;
  const gpu::DeviceInfo warps, warpgroups = {.warpgroups = true};
  for (const gpu::DeviceInfo& device : {warps, warpgroups}) {
    other = packed;
    EXPECT_TRUE(gpu::takes_packed({&packed, &other}, 64, device));
    EXPECT_EQ(gpu::takes_packed({&packed}, 65, device), device.warpgroups);
    EXPECT_FALSE(gpu::takes_packed({&packed}, 0, device));
    other.paths = 3;
    EXPECT_FALSE(gpu::takes_packed({&packed, &other}, 1, device));
    other = packed, other.d_in = 72;
    EXPECT_FALSE(gpu::takes_packed({&packed, &other}, 1, device));
    other.d_in = 68;
    EXPECT_FALSE(gpu::takes_packed({&other}, 1, device));
    other = packed, other.format = gpu::Format::kF16;
    EXPECT_FALSE(gpu::takes_packed({&other}, 1, device));
  }
}

/// Work for products of any number of tokens is what packed_needs() says, at widths of known
/// models.
TEST_F(GpuKernels, WorkOfPackedProducts) {
  for (const auto& [d_out, d_in] :
       {std::pair(4096, 4096), {22016, 4096}, {4096, 11008}, {576, 1536}}) {
    const gpu::Linear w = {
        .format = gpu::Format::kResidualBinary, .d_out = d_out, .d_in = d_in, .paths = 2};
    for (const bool warpgroups : {false, true}) {
      const gpu::PackedNeeds needs =
          gpu::packed_needs({&w}, {.multiprocessors = 132, .warpgroups = warpgroups});
      EXPECT_GT(needs.floats, 0);
      EXPECT_LE(needs.floats, int64_t{132} * 2 * 256 * 128);
      EXPECT_LE(needs.counters, 132 * 2);
    }
  }
}

TEST_F(GpuKernels, BlocksAsAMatrix) {
  for (const bool bytes : {true, false}) {
    for (const int64_t blocks : {1, 7, 100}) {
      const int64_t size = bytes ? 34 : 18;
      std::vector<uint8_t> data;
      for (int64_t i = 0; i < blocks * size; ++i) {
        data.push_back(static_cast<uint8_t>(generator()()));
      }
      const Halves scales = to_halves(normals(blocks, 0.01F));
      for (int64_t block = 0; block < blocks; ++block) {
        std::memcpy(&data[block * size], &scales[block], 2);
      }
      const auto format = bytes ? WeightFormat::kQ8_0 : WeightFormat::kQ4_0;
      const TensorInfo tensor = {.name = "blocks",
                                 .type = bytes ? TensorType::kQ8_0 : TensorType::kQ4_0,
                                 .ne = {32 * blocks},
                                 .data = std::as_bytes(std::span(data))};
      const Result<Floats> want = dequantize(tensor);
      ASSERT_TRUE(want);
      const auto from = up(data);
      const auto out = room<uint16_t>(32 * blocks);
      expect_ok(gpu::unpack_blocks(format, from.data(), 32 * blocks, out.data(), stream()));
      EXPECT_EQ(out.read(), to_halves(*want));
    }
  }
}

// Into bytes and scales, and rows of those as halves: what the blocks hold.
TEST_F(GpuKernels, BlocksAsBytes) {
  for (const bool bytes : {true, false}) {
    constexpr int64_t kRows = 7, kColumns = 512, kBlocks = kRows * kColumns / 32;
    const int64_t size = bytes ? 34 : 18;
    std::vector<uint8_t> data;
    for (int64_t i = 0; i < kBlocks * size; ++i) {
      data.push_back(static_cast<uint8_t>(generator()()));
    }
    const Halves scales = to_halves(normals(kBlocks, 0.01F));
    for (int64_t block = 0; block < kBlocks; ++block) {
      std::memcpy(&data[block * size], &scales[block], 2);
    }
    const TensorInfo tensor = {.name = "blocks",
                               .type = bytes ? TensorType::kQ8_0 : TensorType::kQ4_0,
                               .ne = {32 * kBlocks},
                               .data = std::as_bytes(std::span(data))};
    const Result<Floats> all = dequantize(tensor);
    ASSERT_TRUE(all);
    const Halves want = to_halves(*all);
    const auto from = up(data);
    const auto values = room<int8_t>(kRows * kColumns);
    const auto own_scales = room<uint16_t>(kBlocks);
    expect_ok(gpu::arrange_blocks(bytes ? WeightFormat::kQ8_0 : WeightFormat::kQ4_0, from.data(),
                                  kRows * kColumns, values.data(), own_scales.data(), stream()));
    EXPECT_EQ(own_scales.read(), scales);
    const gpu::Linear w = {.format = gpu::Format::kQ8_0,
                           .d_out = kRows,
                           .d_in = kColumns,
                           .weights = values.data(),
                           .row_scale = own_scales.data()};
    for (const auto& [first, rows] : {std::pair<int64_t, int64_t>{0, kRows}, {2, 3}}) {
      const auto out = room<uint16_t>(rows * kColumns);
      expect_ok(gpu::widen(w, first, rows, out.data(), stream()));
      EXPECT_EQ(out.read(),
                Halves(want.begin() + first * kColumns, want.begin() + (first + rows) * kColumns));
    }
  }
}

TEST_F(GpuKernels, ProductsOfBytes) {
  for (const auto& [d_out, d_in, tokens, multiprocessors] :
       {std::tuple<int32_t, int32_t, int64_t, int32_t>{1, 256, 1, 1},
        {150, 512, 3, 2},
        {37, 1280, 16, 40},
        {129, 256, 31, 3},
        {40, 768, 64, 9}}) {
    SCOPED_TRACE(std::to_string(d_out) + " by " + std::to_string(d_in) + ", tokens " +
                 std::to_string(tokens));
    const auto bytes = room<int8_t>(int64_t{d_out} * d_in);
    const auto scales = room<uint16_t>(int64_t{d_out} * d_in / 32);
    std::vector<uint8_t> blocks;
    for (int64_t block = 0; block < int64_t{d_out} * d_in / 32; ++block) {
      const uint16_t scale = to_halves(normals(1, 0.01F))[0];
      blocks.push_back(static_cast<uint8_t>(scale)), blocks.push_back(scale >> 8);
      for (int i = 0; i < 32; ++i) {
        blocks.push_back(static_cast<uint8_t>(generator()()));
      }
    }
    const auto from = up(blocks);
    expect_ok(gpu::arrange_blocks(WeightFormat::kQ8_0, from.data(), int64_t{d_out} * d_in,
                                  bytes.data(), scales.data(), stream()));
    const gpu::Linear w = {.format = gpu::Format::kQ8_0,
                           .d_out = d_out,
                           .d_in = d_in,
                           .weights = bytes.data(),
                           .row_scale = scales.data()};
    const auto matrix = room<uint16_t>(int64_t{d_out} * d_in);
    expect_ok(gpu::widen(w, 0, d_out, matrix.data(), stream()));
    const Halves halves = matrix.read();
    const Floats x = rounded(normals(tokens * d_in));
    const auto input = up(to_halves(x));
    for (const gpu::DeviceInfo& way : ways_of_products(multiprocessors)) {
      EXPECT_TRUE(gpu::takes_packed({&w}, tokens, way));
      EXPECT_FALSE(gpu::takes_packed({&w}, 65, way));
      const gpu::PackedNeeds needs = gpu::packed_needs({&w}, way);
      const auto partial = room<float>(needs.floats);
      const auto counters = up(std::vector<uint32_t>(static_cast<size_t>(needs.counters)));
      const auto y = room<float>(tokens * d_out);
      expect_ok(gpu::multiply_packed({&w}, input.data(), tokens, y.data(), false,
                                     {partial.data(), counters.data()}, way, stream()));
      Floats want;
      std::vector<double> tolerance;
      for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t row = 0; row < d_out; ++row) {
          double sum = 0, size = 0;
          for (int64_t i = 0; i < d_in; ++i) {
            const double term =
                static_cast<double>(half_to_float(halves[row * d_in + i])) * x[token * d_in + i];
            sum += term, size += std::abs(term);
          }
          want.push_back(static_cast<float>(sum));
          tolerance.push_back(1e-5 * size + 1e-6);
        }
      }
      EXPECT_LE(worst_of(y.read(), want, [&](size_t i) { return tolerance[i]; }), 1);
    }
  }
}

TEST_F(GpuKernels, EmbeddingsOfEveryHalf) {
  constexpr int64_t kAll = 1 << 16;
  Halves table;
  for (int64_t i = 0; i < kAll; ++i) {
    table.push_back(static_cast<uint16_t>(i));
  }
  const auto halves = up(table);
  const auto id = up(std::vector<int32_t>{0});
  const auto whole = room<float>(kAll);
  expect_ok(gpu::embed(halves.data(), id.data(), 1, kAll, whole.data(), stream()));
  const Floats got = whole.read();
  for (int64_t i = 0; i < kAll; ++i) {
    const float want = half_to_float(table[i]);
    ASSERT_TRUE(got[i] == want || (std::isnan(got[i]) && std::isnan(want))) << i;
  }
  const std::vector<int32_t> ids = {5, 0, 9, 9, 1};
  const auto some_ids = up(ids);
  for (const int64_t d : {1, 6, 300}) {
    const auto rows = room<float>(static_cast<int64_t>(ids.size()) * d);
    expect_ok(gpu::embed(halves.data(), some_ids.data(), static_cast<int64_t>(ids.size()), d,
                         rows.data(), stream()));
    Floats want;
    for (const int32_t row : ids) {
      for (int64_t i = 0; i < d; ++i) {
        want.push_back(half_to_float(table[row * d + i]));
      }
    }
    EXPECT_EQ(rows.read(), want);
  }
}

TEST_F(GpuKernels, RmsNorm) {
  for (const int64_t d : {1, 2, 30, 48, 64, 576, 1023, 1024, 4100}) {
    const int64_t tokens = 3;
    Floats x = normals(tokens * d, 3.0F);
    std::fill_n(x.begin(), d, 0.0F);  // a row of zeros stays one
    const Floats weight = normals(d);
    Floats want(x.size());
    reference_kernels().rms_norm(x.data(), weight.data(), tokens, d, 1e-5F, want.data());
    const auto from = up(x), by = up(weight);
    const auto out = room<uint16_t>(tokens * d);
    expect_ok(gpu::rms_norm(from.data(), by.data(), tokens, d, 1e-5F, out.data(), stream()));
    EXPECT_LE(worst_of_halves(to_floats(out.read()), want), 1) << d;
  }
  // What F16 has no room for becomes its largest.
  const auto from = up(Floats{1, -1, 1, 1}), by = up(Floats{1e6F, 1e6F, -1e6F, 1});
  const auto out = room<uint16_t>(4);
  expect_ok(gpu::rms_norm(from.data(), by.data(), 1, 4, 0, out.data(), stream()));
  EXPECT_EQ(to_floats(out.read()), (Floats{kHalfMax, -kHalfMax, -kHalfMax, 1}));
}

TEST_F(GpuKernels, RoundingIsToNearestWithTiesToEven) {
  Floats values;
  for (int exponent = -28; exponent <= 12; ++exponent) {
    for (int i = 0; i < 200; ++i) {
      // Halves, what lies in the middle between two, and what is just beside it.
      const float half = half_to_float(float_to_half(std::ldexp(normals(1)[0], exponent)));
      const float unit = std::ldexp(1.0F, std::max(std::ilogb(half), -14) - 11);
      const float middle = half + unit;
      for (const float value :
           {half, middle, std::nextafter(middle, 0.0F), std::nextafter(middle, 1e9F), -middle}) {
        values.push_back(value);
      }
    }
  }
  const auto d = static_cast<int64_t>(values.size()) / 2 * 2;
  values.resize(static_cast<size_t>(d));
  // A product with 1 and 1 rounds alone: SwiGLU of a large gate is the gate times `up`.
  Floats gate_up(values.size(), 64.0F);
  for (const float value : values) {
    gate_up.push_back(value / 64);
  }
  const auto from = up(gate_up);
  const auto out = room<uint16_t>(d);
  expect_ok(gpu::swiglu(from.data(), 1, d, out.data(), stream()));
  const Halves got = out.read();
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(got[i], float_to_half(values[i])) << values[i];
  }
}

TEST_F(GpuKernels, SwiGlu) {
  for (const int64_t d : {1, 2, 255, 256, 700}) {
    for (const int64_t tokens : {1, 3}) {
      const Floats gate_up = normals(tokens * 2 * d, 4.0F);
      Floats want;
      for (int64_t t = 0; t < tokens; ++t) {
        Floats gate(gate_up.begin() + 2 * t * d, gate_up.begin() + (2 * t + 1) * d);
        reference_kernels().swiglu(gate.data(), &gate_up[(2 * t + 1) * d], d);
        want.insert(want.end(), gate.begin(), gate.end());
      }
      const auto from = up(gate_up);
      const auto out = room<uint16_t>(tokens * d);
      expect_ok(gpu::swiglu(from.data(), tokens, d, out.data(), stream()));
      EXPECT_LE(worst_of_halves(to_floats(out.read()), want), 1) << d;
    }
  }
}

gpu::Sizes heads_of(int64_t heads, int64_t kv_heads, int64_t d) {
  return {.heads = static_cast<int32_t>(heads),
          .kv_heads = static_cast<int32_t>(kv_heads),
          .head_dim = static_cast<int32_t>(d)};
}

TEST_F(GpuKernels, RopeAndCache) {
  for (const int64_t d : {2, 6, 16, 64, 80}) {
    for (const auto& [heads, kv_heads] : {std::pair<int64_t, int64_t>{1, 1}, {6, 2}}) {
      const int64_t tokens = 3, first = 4, capacity = 9, width = (heads + 2 * kv_heads) * d;
      const Floats qkv = normals(tokens * width);
      Floats turns;
      for (int64_t i = 0; i < capacity * d / 2; ++i) {
        turns.push_back(std::cos(static_cast<float>(i)));
        turns.push_back(std::sin(static_cast<float>(i)));
      }
      const auto from = up(qkv), by = up(turns);
      const auto q = room<uint16_t>(tokens * heads * d);
      const auto k = room<uint16_t>(kv_heads * capacity * d);
      const auto v = room<uint16_t>(kv_heads * capacity * d);
      expect_ok(gpu::rope(heads_of(heads, kv_heads, d), from.data(), tokens, by.data(),
                          {{k.data()}, {v.data()}, capacity, first}, q.data(), stream()));
      const Halves got_q = q.read(), got_k = k.read(), got_v = v.read();
      Halves want_k(got_k.size(), 0xFFFF), want_v = want_k;
      for (int64_t t = 0; t < tokens; ++t) {
        Floats row(qkv.begin() + t * width, qkv.begin() + (t + 1) * width);
        const float* turn = &turns[(first + t) * d];
        reference_kernels().rope(row.data(), turn, 1, heads + kv_heads, d);
        // A turned pair may be off in its last place before it is rounded to F16.
        const auto off = [&](uint16_t got, int64_t i) {
          const double pair = std::hypot(row[i & ~int64_t{1}], row[i | 1]);
          return std::abs(half_to_float(got) - row[i]) /
                 (1.01 * kHalf * std::abs(row[i]) + 4 * kEpsilon * pair + kHalfLeast);
        };
        for (int64_t i = 0; i < heads * d; ++i) {
          EXPECT_LE(off(got_q[t * heads * d + i], i), 1) << d << " " << i;
        }
        for (int64_t i = 0; i < kv_heads * d; ++i) {
          const int64_t at = (i / d * capacity + first + t) * d + i % d;
          EXPECT_LE(off(got_k[at], heads * d + i), 1) << d << " " << i;
          want_k[at] = got_k[at];
          want_v[at] = float_to_half(row[(heads + kv_heads) * d + i]);
        }
      }
      EXPECT_EQ(got_k, want_k) << "written at other positions";
      EXPECT_EQ(got_v, want_v);
    }
  }
}

TEST_F(GpuKernels, Attention) {
  struct Case {
    int64_t tokens, first, heads, kv_heads, d;
  };
  std::vector<Case> cases = {{1, 0, 1, 1, 2},    {1, 63, 2, 1, 64},   {1, 64, 3, 3, 64},
                             {1, 200, 8, 2, 16}, {70, 0, 2, 2, 12},   {65, 5, 3, 1, 64},
                             {16, 130, 9, 3, 6}, {33, 31, 4, 1, 128}, {20, 40, 2, 1, 256},
                             {2, 70, 16, 1, 130}};
  for (const int64_t d : {30, 32, 34, 40, 80, 96, 100}) {
    cases.push_back({5, 66, 2, 1, d});
  }
  for (const auto& [tokens, first, heads, kv_heads, d] : cases) {
    SCOPED_TRACE("tokens " + std::to_string(tokens) + " first " + std::to_string(first) +
                 " heads " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " d " +
                 std::to_string(d));
    const int64_t positions = first + tokens, capacity = positions + 3;
    const Floats q = rounded(normals(tokens * heads * d, 2.0F));
    Floats k = normals(kv_heads * capacity * d), v = normals(kv_heads * capacity * d);
    for (int64_t head = 0; head < kv_heads; ++head) {  // what is not filled must not be used
      for (int64_t i = positions * d; i < capacity * d; ++i) {
        k[head * capacity * d + i] = v[head * capacity * d + i] = NAN;
      }
    }
    const Halves keys = to_halves(k);
    const auto reference = [&](const Halves& values) {
      const AttentionInput in = {.q = q.data(),
                                 .cache = CacheFormat::kF16,
                                 .k = keys.data(),
                                 .v = values.data(),
                                 .tokens = tokens,
                                 .first_position = first,
                                 .heads = heads,
                                 .kv_heads = kv_heads,
                                 .head_dim = d,
                                 .capacity = capacity};
      Scratch scratch(reference_kernels().attention_scratch(tokens, positions, heads, kv_heads, d));
      Floats out(static_cast<size_t>(tokens * heads * d));
      reference_kernels().attention(in, 0, heads, 0, tokens, scratch.data(), out.data());
      return out;
    };
    const Halves values = to_halves(v);
    Halves sizes = values;
    for (uint16_t& half : sizes) {
      half &= 0x7FFF;
    }
    const Floats want = reference(values), mean_size = reference(sizes);
    const auto queries = up(to_halves(q)), k_cache = up(keys), v_cache = up(values);
    const auto out = room<uint16_t>(tokens * heads * d);
    expect_ok(gpu::attention(heads_of(heads, kv_heads, d), queries.data(), tokens,
                             {{k_cache.data()}, {v_cache.data()}, capacity, first}, out.data(),
                             stream()));
    // Each weight is rounded to F16, relative to the largest at least that of its subnormals; its
    // score is a sum of floats, of up to about 40 here.
    const double bound = kHalf + 100 * kEpsilon;
    EXPECT_LE(worst_of(to_floats(out.read()), want,
                       [&](size_t i) {
                         return bound * mean_size[i] + 1.01 * kHalf * std::abs(want[i]) +
                                kHalfLeast * static_cast<double>(positions) * 5;
                       }),
              1);
  }
}

TEST_F(GpuKernels, RopeAndAttentionOfSeveralSequences) {
  struct Case {
    int64_t heads, kv_heads, d;
    std::vector<int64_t> positions;
    int32_t multiprocessors;
  };
  const std::vector<Case> cases = {{2, 2, 8, {0}, 1},
                                   {4, 2, 64, {0, 5, 200}, 6},
                                   {9, 3, 16, {31, 32, 33, 1}, 40},
                                   {5, 1, 104, {70, 3}, 50},
                                   {1, 1, 256, {17, 90, 40}, 4}};
  for (const auto& [heads, kv_heads, d, positions, multiprocessors] : cases) {
    SCOPED_TRACE("heads " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " d " +
                 std::to_string(d));
    const auto tokens = static_cast<int64_t>(positions.size());
    const int64_t layers = 2, layer = 1, width = (heads + 2 * kv_heads) * d;
    const Floats qkv = normals(tokens * width);
    const auto from = up(qkv);
    Floats turns;
    for (int64_t i = 0; i < 201 * d / 2; ++i) {
      turns.push_back(std::cos(static_cast<float>(i)));
      turns.push_back(std::sin(static_cast<float>(i)));
    }
    const auto by = up(turns);
    std::vector<OnDevice<uint16_t>> keys, values;
    std::vector<Halves> want_keys, want_values;
    std::vector<gpu::Place> places;
    const auto want_q = room<uint16_t>(tokens * heads * d);
    const auto want = room<uint16_t>(tokens * heads * d);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t capacity = positions[t] + 2 + t, plane = layer * kv_heads * capacity * d;
      keys.push_back(up(to_halves(normals(layers * kv_heads * capacity * d))));
      values.push_back(up(to_halves(normals(layers * kv_heads * capacity * d))));
      places.push_back({{keys.back().data()},
                        {values.back().data()},
                        by.data() + positions[t] * d,
                        capacity,
                        positions[t]});
      // As a prompt of one token, in copies of the caches.
      const auto k = up(keys.back().read()), v = up(values.back().read());
      const gpu::CacheView cache = {{k.data() + plane}, {v.data() + plane}, capacity, positions[t]};
      expect_ok(gpu::rope(heads_of(heads, kv_heads, d), from.data() + t * width, 1, by.data(),
                          cache, want_q.data() + t * heads * d, stream()));
      expect_ok(gpu::attention(heads_of(heads, kv_heads, d), want_q.data() + t * heads * d, 1,
                               cache, want.data() + t * heads * d, stream()));
      want_keys.push_back(k.read()), want_values.push_back(v.read());
    }
    const gpu::Sizes sizes = heads_of(heads, kv_heads, d);
    const auto where = up(places);
    const auto q = room<uint16_t>(tokens * heads * d), out = room<uint16_t>(tokens * heads * d);
    const auto partial = room<float>(gpu::each_work(sizes, tokens, multiprocessors));
    const auto counters = up(std::vector<uint32_t>(static_cast<size_t>(tokens * kv_heads)));
    expect_ok(gpu::rope_each(sizes, layer, from.data(), tokens, where.data(), q.data(), stream()));
    for (int pass = 0; pass < 2; ++pass) {  // the counters are as before
      expect_ok(gpu::attention_each(sizes, layer, q.data(), tokens, where.data(), false,
                                    multiprocessors, partial.data(), counters.data(), out.data(),
                                    stream()));
    }
    EXPECT_EQ(q.read(), want_q.read());
    for (int64_t t = 0; t < tokens; ++t) {
      EXPECT_EQ(keys[t].read(), want_keys[t]);
      EXPECT_EQ(values[t].read(), want_values[t]);
    }
    // There the weights of positions are rounded to F16, and the result in both.
    const Floats got = to_floats(out.read()), expected = to_floats(want.read());
    EXPECT_LE(worst_of(got, expected,
                       [&](size_t i) { return 3 * kHalf * (std::abs(expected[i]) + 1.0); }),
              1);
  }
}

/// A cache in bytes.
struct ByteCache {
  OnDevice<int8_t> rows;
  OnDevice<uint16_t> scales;

  ByteCache(const gpu::Queue& queue, int64_t elements)
      : rows(queue, std::vector<int8_t>(static_cast<size_t>(elements), 55)),
        scales(queue, Halves(static_cast<size_t>(elements / 32), 0x7E00)) {}
  gpu::CacheRows from(int64_t element) const {
    return gpu::CacheRows{rows.data(), scales.data()}.from(element);
  }
  /// As the CPU has it.
  std::vector<uint8_t> blocks() const {
    const auto bytes = rows.read();
    const Halves of_blocks = scales.read();
    std::vector<uint8_t> all;
    for (size_t block = 0; block < of_blocks.size(); ++block) {
      all.push_back(static_cast<uint8_t>(of_blocks[block])), all.push_back(of_blocks[block] >> 8);
      all.insert(all.end(), bytes.begin() + block * 32, bytes.begin() + (block + 1) * 32);
    }
    return all;
  }
};

TEST_F(GpuKernels, CachesOfBytes) {
  struct Case {
    int64_t heads, kv_heads, d, first, tokens;
  };
  for (const auto& [heads, kv_heads, d, first, tokens] :
       {Case{2, 2, 32, 0, 3}, {4, 1, 64, 70, 67}, {3, 3, 96, 5, 1}, {8, 2, 256, 33, 9}}) {
    SCOPED_TRACE("heads " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " d " +
                 std::to_string(d));
    const int64_t capacity = first + tokens + 2, layers = 2, layer = 1;
    const int64_t plane = kv_heads * capacity * d, width = (heads + 2 * kv_heads) * d;
    const gpu::Sizes sizes = heads_of(heads, kv_heads, d);
    const Floats turns = [&] {
      Floats all;
      for (int64_t i = 0; i < capacity * d / 2; ++i) {
        all.push_back(std::cos(static_cast<float>(i))),
            all.push_back(std::sin(static_cast<float>(i)));
      }
      return all;
    }();
    const auto by = up(turns);
    const ByteCache keys(queue_, layers * plane), values(queue_, layers * plane);
    const gpu::CacheView cache = {
        .k = keys.from(plane), .v = values.from(plane), .capacity = capacity, .first_position = 0};
    // All positions as a prompt; then the last again, as the token of a sequence.
    const int64_t all = first + tokens;
    Floats qkv = normals(all * width, 2.0F);
    std::fill_n(qkv.begin() + (heads + kv_heads) * d, 32, 0.0F);  // a block without a value
    qkv[(heads + kv_heads) * d + d - 1] = 1e6F;                   // and one too large
    const auto from = up(qkv);
    const auto q = room<uint16_t>(all * heads * d);
    expect_ok(gpu::rope(sizes, from.data(), all, by.data(), cache, q.data(), stream()));

    const std::vector<uint8_t> k = keys.blocks(), v = values.blocks();
    constexpr int64_t kBlock = kQ8BlockBytes;
    const int64_t plane_bytes = plane / 32 * kBlock;
    const auto byte_of = [](const std::vector<uint8_t>& blocks, int64_t at) {
      const uint8_t* const block = &blocks[at / 32 * kBlock];
      return std::pair{half_to_float(static_cast<uint16_t>(block[0] | block[1] << 8)),
                       static_cast<int8_t>(block[2 + at % 32])};
    };
    for (int64_t t = 0; t < all; ++t) {
      Floats row(qkv.begin() + t * width, qkv.begin() + (t + 1) * width);
      reference_kernels().rope(row.data(), &turns[t * d], 1, heads + kv_heads, d);
      for (int64_t i = 0; i < 2 * kv_heads * d; i += 32) {
        const Floats block(row.begin() + heads * d + i, row.begin() + heads * d + i + 32);
        uint8_t want[kBlock];
        reference_kernels().to_cache(block.data(), 32, CacheFormat::kQ8_0, want);
        const bool key = i < kv_heads * d;
        const int64_t of = key ? i : i - kv_heads * d;
        const int64_t at = plane + (of / d * capacity + t) * d + of % d;
        const float scale = half_to_float(static_cast<uint16_t>(want[0] | want[1] << 8));
        for (int64_t j = 0; j < 32; ++j) {
          const auto [got_scale, byte] = byte_of(key ? k : v, at + j);
          if (std::isinf(block[j]) || block[j] > 65504) {
            EXPECT_EQ(got_scale * byte, 127 * 512);
          } else if (std::abs(block[31]) < 65504) {
            // Turned pairs may be off in their last places, the scale by a half's last.
            ASSERT_NEAR(got_scale, scale, 2 * kHalf * scale);
            ASSERT_NEAR(got_scale * byte, block[j], (0.5 + 127 * 2 * kHalf) * scale)
                << t << " " << i;
          }
        }
      }
    }
    for (const auto& [blocks, name] : {std::pair{&k, "keys"}, {&v, "values"}}) {
      for (int64_t at = 0; at < layers * plane; ++at) {
        if (at < plane || at / d % capacity >= all) {
          ASSERT_EQ((*blocks)[at / 32 * kBlock + 2 + at % 32], 55) << name << " elsewhere: " << at;
        }
      }
    }

    const Floats queries = to_floats(q.read());
    const auto reference = [&](int64_t token, int64_t count, const uint8_t* of_values) {
      const AttentionInput in = {.q = queries.data() + token * heads * d,
                                 .cache = CacheFormat::kQ8_0,
                                 .k = k.data() + plane_bytes,
                                 .v = of_values,
                                 .tokens = count,
                                 .first_position = token,
                                 .heads = heads,
                                 .kv_heads = kv_heads,
                                 .head_dim = d,
                                 .capacity = capacity};
      Scratch scratch(reference_kernels().attention_scratch(count, all, heads, kv_heads, d));
      Floats out(static_cast<size_t>(count * heads * d));
      reference_kernels().attention(in, 0, heads, 0, count, scratch.data(), out.data());
      return out;
    };
    std::vector<uint8_t> sizes_of(v.begin() + plane_bytes, v.end());
    for (size_t i = 0; i < sizes_of.size(); ++i) {
      if (i % kBlock >= 2) {
        sizes_of[i] = static_cast<uint8_t>(std::abs(static_cast<int8_t>(sizes_of[i])));
      }
    }
    // Beside what rounding weights costs (see Attention), keys are rounded to halves: scores of up
    // to a few tens move by so much of themselves.
    const auto expect_near = [&](const Floats& got, int64_t token, int64_t count) {
      const Floats want = reference(token, count, v.data() + plane_bytes);
      const Floats mean_size = reference(token, count, sizes_of.data());
      EXPECT_LE(worst_of(got, want,
                         [&](size_t i) {
                           return 8 * kHalf * mean_size[i] + kHalf * std::abs(want[i]) +
                                  kHalfLeast * (static_cast<double>(all) * 5 + 2 * 65024);
                         }),
                1);
    };
    const auto out = room<uint16_t>(tokens * heads * d);
    expect_ok(gpu::attention(sizes, q.data() + first * heads * d, tokens,
                             {cache.k, cache.v, capacity, first}, out.data(), stream()));
    expect_near(to_floats(out.read()), first, tokens);

    const gpu::Place place = {keys.from(0), values.from(0), by.data() + (all - 1) * d, capacity,
                              all - 1};
    const auto where = up(std::vector<gpu::Place>{place});
    const auto one = room<uint16_t>(heads * d), attended = room<uint16_t>(heads * d);
    for (const int32_t multiprocessors : {1, 40}) {
      const auto partial = room<float>(gpu::each_work(sizes, 1, multiprocessors));
      const auto counters = up(std::vector<uint32_t>(static_cast<size_t>(kv_heads)));
      expect_ok(gpu::rope_each(sizes, layer, from.data() + (all - 1) * width, 1, where.data(),
                               one.data(), stream()));
      expect_ok(gpu::attention_each(sizes, layer, one.data(), 1, where.data(), true,
                                    multiprocessors, partial.data(), counters.data(),
                                    attended.data(), stream()));
      expect_near(to_floats(attended.read()), all - 1, 1);
    }
    EXPECT_EQ(keys.blocks(), k);
    EXPECT_EQ(values.blocks(), v);
  }
}

TEST_F(GpuKernels, Products) {
  for (const auto& [d_out, d_in] :
       {std::pair<int64_t, int64_t>{1, 8}, {7, 20}, {64, 48}, {33, 256}}) {
    for (const int64_t tokens : {1, 2, 9}) {
      for (const bool add : {false, true}) {
        const int64_t w_stride = (d_in + 7) / 8 * 8, y_stride = d_out + 5;
        Floats w = rounded(normals(d_out * d_in)), x = rounded(normals(tokens * d_in));
        Halves wide(static_cast<size_t>(d_out * w_stride), 0xFFFF);
        for (int64_t i = 0; i < d_out * d_in; ++i) {
          wide[i / d_in * w_stride + i % d_in] = float_to_half(w[i]);
        }
        const LinearWeights weights = {
            .format = WeightFormat::kF32, .d_out = d_out, .d_in = d_in, .dense = w.data()};
        Floats sums(static_cast<size_t>(tokens * d_out));
        reference_kernels().matmul(weights, x.data(), nullptr, tokens, sums.data(), 0, d_out,
                                   nullptr);
        Floats want = normals(tokens * y_stride);
        const auto y = up(want);
        for (int64_t i = 0; i < tokens * d_out; ++i) {
          float& at = want[i / d_out * y_stride + i % d_out];
          at = sums[i] + (add ? at : 0);
        }
        const auto on_w = up(wide), on_x = up(to_halves(x));
        expect_ok(queue_.multiply({.w = on_w.data(),
                                   .d_out = d_out,
                                   .d_in = d_in,
                                   .w_stride = w_stride,
                                   .x = on_x.data(),
                                   .tokens = tokens,
                                   .y = y.data(),
                                   .y_stride = y_stride,
                                   .add = add}));
        // Norms of a row and of an input are about sqrt(d_in).
        const double tolerance = kSafety * kEpsilon * std::pow(static_cast<double>(d_in), 1.5) * 2;
        EXPECT_LE(worst_of(y.read(), want, [&](size_t) { return tolerance; }), 1);
      }
    }
  }
}

TEST_F(GpuKernels, LikeliestTokens) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const int64_t vocab : {1, 57, 4095, 4096, 4097, 10000}) {
    for (const int32_t count : {1, 3, 40, 256}) {
      for (const int kind :
           {0, 1, 2}) {  // all different; many equal, and zeros of both signs; few finite
        SCOPED_TRACE(std::to_string(count) + " of " + std::to_string(vocab) + ", kind " +
                     std::to_string(kind));
        Floats logits = normals(vocab, 3.0F);
        for (int64_t i = 0; i < vocab; ++i) {
          float& logit = logits[i];
          logit = kind == 1 ? std::trunc(logit / 4) : logit;
          logit = kind == 2 && i % 50 != 3 ? (i % 2 == 0 ? NAN : -kInf) : logit;
        }
        if (vocab > 50) {
          logits[50] = kind == 2 ? kInf : logits[50];
        }
        const int64_t slices = (vocab + gpu::kSlice - 1) / gpu::kSlice;
        const auto from = up(logits);
        const auto out = room<float>(slices * count);
        const auto tokens = room<int32_t>(slices * count);
        expect_ok(gpu::likeliest(from.data(), vocab, count, out.data(), tokens.data(), stream()));
        const Floats got = out.read();
        const std::vector<int32_t> ids = tokens.read();
        for (int64_t slice = 0; slice < slices; ++slice) {
          std::vector<int32_t> want;
          for (int64_t i = slice * gpu::kSlice; i < std::min(vocab, (slice + 1) * gpu::kSlice);
               ++i) {
            if (logits[i] > -kInf) {
              want.push_back(static_cast<int32_t>(i));
            }
          }
          std::stable_sort(want.begin(), want.end(),
                           [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
          want.resize(std::min<size_t>(want.size(), count));
          std::vector<int32_t> all(ids.begin() + slice * count, ids.begin() + (slice + 1) * count);
          for (int64_t i = 0; i < count; ++i) {
            ASSERT_EQ(got[slice * count + i], all[i] < 0 ? -kInf : logits[all[i]]);
          }
          all.erase(std::remove(all.begin(), all.end(), -1), all.end());
          std::sort(all.begin(), all.end());
          std::sort(want.begin(), want.end());
          ASSERT_EQ(all, want);
        }
      }
    }
  }
}

TEST_F(GpuKernels, ReadsMemory) {
  const auto memory = gpu::Memory::make(1 << 20, "a test");
  ASSERT_TRUE(memory);
  const auto speed = gpu::read_speed(queue_, *memory);
  ASSERT_TRUE(speed) << speed.error().message;
  EXPECT_GT(*speed, 0);
}

}  // namespace
}  // namespace rabit
