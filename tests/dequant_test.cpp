// Dequantization against golden floats from an independent implementation, and its refusals.
// Golden files: tools/make_dequant_golden.py.
#include "io/dequant.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>

namespace rabit {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(RABIT_SOURCE_DIR) / "tests/golden";

std::vector<float> golden_floats() {
  const auto text = read_file(kGolden / "dequant.f32");
  std::vector<float> floats(text ? text->size() / sizeof(float) : 0);
  if (!floats.empty()) {
    std::memcpy(floats.data(), text->data(), floats.size() * sizeof(float));
  }
  return floats;
}

/// Elements that differ in their bits. NaNs count as equal whatever their payload and sign: which
/// of them an operation returns is left to the processor. Everything else must match exactly: the
/// golden implementation rounds each product and sum to float in the same order.
int64_t count_differences(std::span<const float> a, std::span<const float> b) {
  int64_t count = std::abs(static_cast<int64_t>(a.size()) - static_cast<int64_t>(b.size()));
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    if (std::isnan(a[i]) || std::isnan(b[i])) {
      count += std::isnan(a[i]) != std::isnan(b[i]);
    } else {
      count += std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i]);
    }
  }
  return count;
}

TEST(Dequant, EqualsTheGoldenFloats) {
  const auto file = GgufFile::open(kGolden / "dequant.gguf");
  ASSERT_TRUE(file) << file.error().message;
  const std::vector<float> golden = golden_floats();
  ASSERT_EQ((*file)->tensors().size(), 11U);
  size_t begin = 0;
  for (const TensorInfo& tensor : (*file)->tensors()) {
    EXPECT_EQ(tensor.name, tensor_type_name(tensor.type));
    const auto count = static_cast<size_t>(tensor.elements());
    ASSERT_LE(begin + count, golden.size());
    const std::span<const float> expected = std::span(golden).subspan(begin, count);
    const auto floats = dequantize(tensor);
    ASSERT_TRUE(floats) << floats.error().message;
    EXPECT_EQ(count_differences(*floats, expected), 0) << tensor.name;
    begin += count;
  }
  EXPECT_EQ(begin, golden.size());
}

TEST(Dequant, TheComparisonNoticesChanges) {
  const std::vector<float> golden = golden_floats();
  ASSERT_FALSE(golden.empty());
  const auto differs_after = [&](auto&& change) {
    std::vector<float> copy = golden;
    change(copy);
    return count_differences(copy, golden) > 0;
  };
  EXPECT_FALSE(differs_after([](auto&) {}));
  EXPECT_TRUE(differs_after([](auto& v) { std::fill(v.begin(), v.end(), 0.0F); }));
  EXPECT_TRUE(differs_after([](auto& v) { v[10] = -v[10]; }));
  EXPECT_TRUE(differs_after([](auto& v) { v[10] = std::nextafterf(v[10], 1e30F); }));
  EXPECT_TRUE(differs_after([](auto& v) { v[10] = std::nanf(""); }));
  EXPECT_TRUE(differs_after([](auto& v) { v.pop_back(); }));
}

TEST(Dequant, RangesEqualTheWhole) {
  const auto file = GgufFile::open(kGolden / "dequant.gguf");
  ASSERT_TRUE(file);
  for (const TensorInfo& tensor : (*file)->tensors()) {
    const auto whole = dequantize(tensor);
    ASSERT_TRUE(whole);
    const int64_t block = block_elements(tensor.type);
    for (int64_t first = 0; first <= tensor.elements(); first += 2 * block) {
      const int64_t count = std::min(3 * block, tensor.elements() - first);
      // A guard element behind the output must stay as it is.
      std::vector<float> out(static_cast<size_t>(count) + 1, -77.0F);
      ASSERT_TRUE(dequantize(tensor, first, std::span(out).first(static_cast<size_t>(count))));
      EXPECT_EQ(out.back(), -77.0F);
      out.pop_back();
      EXPECT_EQ(count_differences(out, std::span(*whole).subspan(static_cast<size_t>(first),
                                                                 static_cast<size_t>(count))),
                0)
          << tensor.name << " " << first;
    }
  }
}

TEST(Dequant, RefusesWhatDoesNotFit) {
  const auto file = GgufFile::open(kGolden / "dequant.gguf");
  ASSERT_TRUE(file);
  const TensorInfo* tensor = (*file)->find_tensor("Q4_K");
  ASSERT_NE(tensor, nullptr);
  std::vector<float> out(256);
  EXPECT_FALSE(dequantize(*tensor, 1, out));
  EXPECT_FALSE(dequantize(*tensor, -256, out));
  EXPECT_FALSE(dequantize(*tensor, tensor->elements(), out));
  EXPECT_FALSE(dequantize(*tensor, std::numeric_limits<int64_t>::max(), out));
  EXPECT_FALSE(dequantize(*tensor, 0, std::span(out).first(255)));
  EXPECT_TRUE(dequantize(*tensor, tensor->elements(), std::span<float>()));

  TensorInfo cut = *tensor;
  cut.data = cut.data.first(cut.data.size() - 1);
  EXPECT_FALSE(dequantize(cut, 0, out));
  EXPECT_FALSE(dequantize(cut));

  const std::vector<std::byte> bytes(16);
  const auto integers = dequantize(TensorInfo{"some.sign", TensorType::kI32, {4}, bytes});
  ASSERT_FALSE(integers);
  EXPECT_NE(integers.error().message.find("some.sign"), std::string::npos);
  EXPECT_NE(integers.error().message.find("I32"), std::string::npos);
}

TEST(Dequant, WholeModelIsFiniteAndFast) {
  if (!std::filesystem::exists(RABIT_MODEL)) {
    GTEST_SKIP() << "no model at " << RABIT_MODEL;
  }
  const auto file = GgufFile::open(RABIT_MODEL);
  ASSERT_TRUE(file) << file.error().message;
  int64_t elements = 0;
  double seconds = 0;
  for (const TensorInfo& tensor : (*file)->tensors()) {
    std::vector<float> floats(
        static_cast<size_t>(tensor.elements()));  // pages touched before timing
    const auto start = std::chrono::steady_clock::now();
    ASSERT_TRUE(dequantize(tensor, 0, floats));
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    elements += tensor.elements();
    float largest = 0;
    for (const float value : floats) {
      ASSERT_TRUE(std::isfinite(value)) << tensor.name;
      largest = std::max(largest, std::fabs(value));
    }
    EXPECT_GT(largest, 0) << tensor.name;
    EXPECT_LT(largest, 1000) << tensor.name;
  }
  EXPECT_GT(elements, 100000000);
  RecordProperty("seconds", std::to_string(seconds));
  std::printf("%lld elements in %.3f s\n", static_cast<long long>(elements), seconds);
}

}  // namespace
}  // namespace rabit
