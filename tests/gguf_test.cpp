// GGUF: what is written is read back as it was; what is damaged, truncated or impossible is refused
// with one line that names the file and the place, without a crash or a large allocation.
#include "io/gguf.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <new>

namespace {
std::atomic<size_t> largest_allocation{0};
}

// Every allocation of this program passes here, so that a test can bound the largest.
[[gnu::noinline]] void* operator new(size_t size) {
  size_t seen = largest_allocation.load();
  while (size > seen && !largest_allocation.compare_exchange_weak(seen, size)) {
  }
  if (void* memory = std::malloc(std::max<size_t>(size, 1))) {
    return memory;
  }
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace rabit {
namespace {

/// Builds GGUF bytes by hand, independent of the writer, so that every field can be wrong.
class Bytes {
 public:
  template <typename T>
  Bytes& put(T value) {
    char raw[sizeof value];
    std::memcpy(raw, &value, sizeof value);
    bytes_.append(raw, sizeof value);
    return *this;
  }
  Bytes& u32(uint32_t value) { return put(value); }
  Bytes& u64(uint64_t value) { return put(value); }
  Bytes& raw(std::string_view text) {
    bytes_ += text;
    return *this;
  }
  Bytes& text(std::string_view text) { return u64(text.size()).raw(text); }
  Bytes& header(uint64_t tensors, uint64_t keys, uint32_t version = 3) {
    return raw("GGUF").u32(version).u64(tensors).u64(keys);
  }
  Bytes& key(std::string_view name, MetaType type) {
    return text(name).u32(static_cast<uint32_t>(type));
  }
  Bytes& tensor(std::string_view name, std::vector<uint64_t> ne, uint32_t type, uint64_t offset) {
    text(name).u32(static_cast<uint32_t>(ne.size()));
    for (const uint64_t extent : ne) {
      u64(extent);
    }
    return u32(type).u64(offset);
  }
  Bytes& pad(size_t alignment = 32) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment);
    return *this;
  }
  Bytes& zeros(size_t count) { return raw(std::string(count, '\0')); }
  const std::string& str() const { return bytes_; }
  size_t size() const { return bytes_.size(); }

 private:
  std::string bytes_;
};

class Gguf : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(testing::TempDir()) /
              ("rabit_gguf_" + std::to_string(::getpid()) + "_" +
               testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(folder_);
    path_ = folder_ / "file.gguf";
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  Result<std::shared_ptr<GgufFile>> open(const std::string& bytes) {
    std::ofstream(path_, std::ios::binary | std::ios::trunc) << bytes;
    return GgufFile::open(path_);
  }
  Result<std::shared_ptr<GgufFile>> open(const Bytes& bytes) { return open(bytes.str()); }

  /// The file is refused with one line that names it and contains every part.
  void refused(const std::string& bytes, std::initializer_list<std::string_view> parts) {
    const auto file = open(bytes);
    ASSERT_FALSE(file) << "accepted; expected " << *parts.begin();
    const std::string& message = file.error().message;
    EXPECT_EQ(message.rfind(path_.string() + ": ", 0), 0U) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const std::string_view part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks " << part;
    }
  }
  void refused(const Bytes& bytes, std::initializer_list<std::string_view> parts) {
    refused(bytes.str(), parts);
  }
  size_t files_in_folder() const {
    return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder_), {}));
  }

  std::filesystem::path folder_, path_;
};

constexpr uint32_t kF32 = 0, kQ4_1 = 3;

/// A small file with every metadata type and two tensors. The last byte is the last tensor's last.
Bytes sample(uint32_t version = 3) {
  Bytes b;
  b.header(2, 15, version);
  b.key("u8", MetaType::kUint8).put<uint8_t>(200);
  b.key("i8", MetaType::kInt8).put<int8_t>(-100);
  b.key("u16", MetaType::kUint16).put<uint16_t>(60000);
  b.key("i16", MetaType::kInt16).put<int16_t>(-30000);
  b.key("u32", MetaType::kUint32).put<uint32_t>(4000000000U);
  b.key("i32", MetaType::kInt32).put<int32_t>(-2000000000);
  b.key("f32", MetaType::kFloat32).put<float>(0.1F);
  b.key("bool", MetaType::kBool).put<uint8_t>(1);
  b.key("string", MetaType::kString).text("gr\xC3\xBC\xC3\x9F");
  b.key("u64", MetaType::kUint64).put<uint64_t>(std::numeric_limits<uint64_t>::max());
  b.key("i64", MetaType::kInt64).put<int64_t>(std::numeric_limits<int64_t>::min());
  b.key("f64", MetaType::kFloat64).put<double>(0.1);
  b.key("ints", MetaType::kArray).u32(5).u64(3).put<int32_t>(-1).put<int32_t>(0).put<int32_t>(7);
  b.key("floats", MetaType::kArray).u32(6).u64(2).put<float>(1.5F).put<float>(-0.0F);
  b.key("strings", MetaType::kArray).u32(8).u64(2).text("a").text("");
  b.tensor("first", {3, 2}, kF32, 0).tensor("second", {32, 2}, kQ4_1, 32).pad();
  for (int i = 0; i < 6; ++i) {
    b.put<float>(static_cast<float>(i));
  }
  return b.pad().raw(std::string(40, 'q'));
}

/// One tensor of 8 floats with these fields; its data is there.
Bytes one_tensor(const std::vector<uint64_t>& ne, uint32_t type, uint64_t offset = 0,
                 std::string_view name = "blk.0.w") {
  return Bytes().header(1, 0).tensor(name, ne, type, offset).pad().zeros(32);
}

Bytes one_key(std::string_view name, uint32_t type) {
  return Bytes().header(0, 1).text(name).u32(type);
}

TEST_F(Gguf, ReadsEveryType) {
  for (const uint32_t version : {2U, 3U}) {
    const auto result = open(sample(version));
    ASSERT_TRUE(result) << result.error().message;
    const GgufFile& file = **result;
    EXPECT_EQ(file.metadata().size(), 15U);
    EXPECT_EQ(*file.get_int("u8"), 200);
    EXPECT_EQ(*file.get_int("i8"), -100);
    EXPECT_EQ(*file.get_int("u16"), 60000);
    EXPECT_EQ(*file.get_int("i16"), -30000);
    EXPECT_EQ(*file.get_int("u32"), 4000000000);
    EXPECT_EQ(*file.get_int("i32"), -2000000000);
    EXPECT_EQ(*file.get_float("f32"), static_cast<double>(0.1F));
    EXPECT_EQ(*file.get_bool("bool"), true);
    EXPECT_EQ(*file.get_string("string"), "gr\xC3\xBC\xC3\x9F");
    EXPECT_EQ(std::get<uint64_t>(file.find_meta("u64")->value),
              std::numeric_limits<uint64_t>::max());
    EXPECT_EQ(*file.get_int("i64"), std::numeric_limits<int64_t>::min());
    EXPECT_EQ(*file.get_float("f64"), 0.1);
    EXPECT_EQ(*file.get_float("i8"), -100.0);
    EXPECT_EQ(*file.get_ints("ints"), (std::vector<int64_t>{-1, 0, 7}));
    EXPECT_EQ(*file.get_strings("strings"), (std::vector<std::string>{"a", ""}));
    const TensorInfo* first = file.find_tensor("first");
    ASSERT_NE(first, nullptr);
    EXPECT_EQ(first->ne, (std::vector<int64_t>{3, 2}));
    EXPECT_EQ(first->elements(), 6);
    float values[6];
    ASSERT_EQ(first->data.size(), sizeof values);
    std::memcpy(values, first->data.data(), sizeof values);
    EXPECT_EQ(values[5], 5.0F);
    const TensorInfo* second = file.find_tensor("second");
    ASSERT_NE(second, nullptr);
    EXPECT_EQ(second->type, TensorType::kQ4_1);
    EXPECT_EQ(second->data.size(), 40U);
    EXPECT_EQ(second->data.back(), std::byte{'q'});
  }
}

TEST_F(Gguf, LookUpsNameFileAndKey) {
  const auto file = open(sample());
  ASSERT_TRUE(file);
  const auto expect = [&](const auto& result, std::initializer_list<std::string_view> parts) {
    ASSERT_FALSE(result);
    EXPECT_NE(result.error().message.find(path_.string()), std::string::npos);
    for (const std::string_view part : parts) {
      EXPECT_NE(result.error().message.find(part), std::string::npos) << result.error().message;
    }
  };
  expect((*file)->get_int("nothing"), {"\"nothing\"", "missing"});
  expect((*file)->get_int("string"), {"\"string\"", "string", "integer"});
  expect((*file)->get_int("u64"), {"\"u64\"", "2^63"});
  expect((*file)->get_int("bool"), {"\"bool\"", "integer"});
  expect((*file)->get_float("strings"), {"\"strings\"", "array of string"});
  expect((*file)->get_bool("u8"), {"\"u8\"", "uint8"});
  expect((*file)->get_string("ints"), {"\"ints\"", "array of int32"});
  expect((*file)->get_strings("ints"), {"\"ints\"", "array of string"});
  expect((*file)->get_ints("floats"), {"\"floats\"", "integers"});
  const std::vector<int64_t> wrong = {2, 3}, right = {3, 2, 1, 1};
  expect((*file)->get_tensor("first", wrong), {"\"first\"", "[3, 2]", "[2, 3]"});
  expect((*file)->get_tensor("third", wrong), {"\"third\"", "missing"});
  EXPECT_TRUE((*file)->get_tensor("first", right));
}

TEST_F(Gguf, RefusesEveryTruncation) {
  const std::string whole = sample().str();
  ASSERT_TRUE(open(whole));
  for (size_t size = 0; size < whole.size(); ++size) {
    const auto file = open(whole.substr(0, size));
    ASSERT_FALSE(file) << size;
    EXPECT_NE(file.error().message.find(path_.string()), std::string::npos);
    EXPECT_EQ(file.error().message.find('\n'), std::string::npos);
  }
}

TEST_F(Gguf, SurvivesEveryDamagedByte) {
  const std::string whole = sample().str();
  size_t refusals = 0;
  for (size_t i = 0; i < whole.size(); ++i) {
    for (const int change : {0x01, 0x80, 0xFF}) {
      std::string damaged = whole;
      damaged[i] = static_cast<char>(damaged[i] ^ change);
      const auto file = open(damaged);
      if (!file) {
        ++refusals;
        EXPECT_EQ(file.error().message.find('\n'), std::string::npos);
        continue;
      }
      uint64_t sum = 0;  // whatever was accepted must be readable
      for (const TensorInfo& tensor : (*file)->tensors()) {
        ASSERT_EQ(*tensor_bytes(tensor.type, tensor.ne), tensor.data.size());
        for (const std::byte byte : tensor.data) {
          sum += static_cast<uint64_t>(byte);
        }
      }
      ASSERT_GT(sum, 0U);
    }
  }
  EXPECT_GT(refusals, whole.size());
}

TEST_F(Gguf, RefusesWhatIsNotGguf) {
  refused("", {"not a GGUF file", "empty"});
  refused("GG", {"not a GGUF file"});
  refused("hello world, this is text", {"not a GGUF file", "\"hell\""});
  refused("PK\x03\x04 and so on", {"not a GGUF file", "PyTorch"});
  refused("version https://git-lfs.github.com/spec/v1\n", {"not a GGUF file", "LFS"});
  refused("<!DOCTYPE html>", {"not a GGUF file", "HTML"});
  refused(Bytes().u64(100).raw("{\"__metadata__\"").str(), {"not a GGUF file", "safetensors"});
  refused("\n\n\n\n\x01", {"not a GGUF file", "\\x0a"});
  EXPECT_FALSE(GgufFile::open(folder_));
  EXPECT_FALSE(GgufFile::open(folder_ / "missing"));
}

TEST_F(Gguf, RefusesOtherVersions) {
  refused(Bytes().header(0, 0, 1), {"version 1 "});
  refused(Bytes().header(0, 0, 4), {"version 4 "});
  refused(Bytes().header(0, 0, 0), {"version 0 "});
  refused(Bytes().header(0, 0, 0x03000000), {"big-endian"});
  EXPECT_TRUE(open(Bytes().header(0, 0)));
}

TEST_F(Gguf, RefusesHugeCountsWithoutAllocating) {
  const uint64_t huge = uint64_t{1} << 60, most = std::numeric_limits<uint64_t>::max();
  largest_allocation = 0;
  for (const uint64_t count : {huge, most, uint64_t{1} << 33}) {
    const std::string number = std::to_string(count);
    refused(Bytes().header(count, 0), {number, "tensors", "cannot fit"});
    refused(Bytes().header(0, count), {number, "metadata values", "cannot fit"});
    refused(Bytes().header(0, 1).u64(count).zeros(64), {"metadata value 0", "key", number});
    refused(one_key("k", 8).u64(count), {"key \"k\"", "string value", number});
    for (const uint32_t item : {0U, 5U, 7U, 8U, 10U, 12U}) {
      refused(one_key("k", 9).u32(item).u64(count), {"key \"k\"", number, "cannot fit"});
    }
    refused(one_key("k", 9).u32(8).u64(1).u64(count), {"key \"k\"", "array item", number});
    refused(Bytes().header(1, 0).u64(count).zeros(64), {"tensor info 0", "tensor name", number});
  }
  EXPECT_GT(largest_allocation.load(), 0U);  // the counter is at work
  EXPECT_LT(largest_allocation.load(), size_t{1} << 20);
}

TEST_F(Gguf, RefusesBadKeysAndValues) {
  refused(Bytes()
              .header(0, 2)
              .key("a.b", MetaType::kUint8)
              .put<uint8_t>(1)
              .key("a.b", MetaType::kUint8)
              .put<uint8_t>(1),
          {"key \"a.b\"", "twice"});
  refused(one_key("", 0).zeros(8), {"metadata value 0", "key", "0 bytes"});
  refused(one_key("a\xFF", 0).zeros(8), {"metadata value 0", "UTF-8", "\\xff"});
  refused(one_key(std::string(65536, 'k'), 0).zeros(8), {"metadata value 0", "65536 bytes"});
  refused(one_key("k", 13).zeros(8), {"key \"k\"", "value type 13"});
  refused(one_key("k", 9).u32(13).u64(0), {"key \"k\"", "array item type 13"});
  refused(one_key("k", 9).u32(9).u64(0), {"key \"k\"", "array of arrays"});
  refused(one_key("k", 7).put<uint8_t>(2), {"key \"k\"", "bool is 2"});
  refused(one_key("k", 9).u32(7).u64(1).put<uint8_t>(9), {"key \"k\"", "bool is 9"});
  refused(one_key("k", 9).u32(10).u64(1).u64(uint64_t{1} << 63), {"key \"k\"", "2^63"});
  refused(one_key("line\nbreak", 13).zeros(8), {"key \"line\\x0abreak\""});
}

TEST_F(Gguf, RefusesBadAlignment) {
  const auto with_alignment = [](uint32_t value) {
    return Bytes().header(0, 1).key("general.alignment", MetaType::kUint32).u32(value);
  };
  for (const uint32_t value : {0U, 1U, 4U, 24U, 33U, 131072U, 0x80000000U}) {
    refused(with_alignment(value), {"general.alignment", "power of two"});
  }
  refused(Bytes().header(0, 1).key("general.alignment", MetaType::kUint64).u64(32),
          {"general.alignment", "uint32"});
  refused(Bytes().header(0, 1).key("general.alignment", MetaType::kString).text("32"),
          {"general.alignment", "uint32"});
  EXPECT_TRUE(open(with_alignment(64)));
  Bytes b;
  b.header(1, 1).key("general.alignment", MetaType::kUint32).u32(64);
  b.tensor("t", {1}, kF32, 0).pad(64).put<float>(2.5F);
  const auto file = open(b);
  ASSERT_TRUE(file) << file.error().message;
  float value = 0;
  std::memcpy(&value, (*file)->tensors()[0].data.data(), sizeof value);
  EXPECT_EQ(value, 2.5F);
}

TEST_F(Gguf, RefusesBadTensors) {
  EXPECT_TRUE(open(one_tensor({8}, kF32)));
  const uint64_t big = uint64_t{1} << 32;
  refused(one_tensor({}, kF32), {"\"blk.0.w\"", "0 extents"});
  refused(one_tensor({1, 1, 1, 1, 1}, kF32), {"\"blk.0.w\"", "5 extents"});
  refused(one_tensor({0}, kF32), {"\"blk.0.w\"", "extent 0 is 0"});
  refused(one_tensor({8, 0}, kF32), {"\"blk.0.w\"", "extent 1 is 0"});
  refused(one_tensor({uint64_t{1} << 63}, kF32), {"\"blk.0.w\"", "9223372036854775808"});
  refused(one_tensor({big, big}, kF32), {"\"blk.0.w\"", "2^63"});
  refused(one_tensor({big, big, big, big}, kF32), {"\"blk.0.w\"", "2^63"});
  refused(one_tensor({uint64_t{1} << 62}, kF32), {"\"blk.0.w\"", "2^63", "bytes"});
  refused(one_tensor({9}, kF32), {"\"blk.0.w\"", "36 bytes", "do not fit"});
  refused(one_tensor({8, 32}, kQ4_1), {"\"blk.0.w\"", "rows of 8", "Q4_1"});
  refused(one_tensor({128}, 12), {"\"blk.0.w\"", "rows of 128", "Q4_K", "256"});
  refused(one_tensor({4}, kF32, 8), {"\"blk.0.w\"", "offset 8", "alignment 32"});
  refused(one_tensor({8}, kF32, 32), {"\"blk.0.w\"", "offset 32", "do not fit"});
  refused(one_tensor({8}, kF32, std::numeric_limits<uint64_t>::max() - 31),
          {"\"blk.0.w\"", "do not fit"});
  refused(one_tensor({256}, 23), {"\"blk.0.w\"", "IQ4_XS", "not supported", "Q4_K", "BF16"});
  refused(one_tensor({256}, 10), {"\"blk.0.w\"", "Q2_K", "not supported"});
  refused(one_tensor({8}, 4), {"\"blk.0.w\"", "type 4 is not known"});
  refused(one_tensor({8}, 0xFFFFFFFF), {"\"blk.0.w\"", "type 4294967295 is not known"});
  refused(one_tensor({8}, kF32, 0, ""), {"tensor info 0", "0 bytes"});
  refused(one_tensor({8}, kF32, 0, "\xC0\xAF"), {"tensor info 0", "UTF-8"});
  refused(Bytes().header(2, 0).tensor("t", {8}, kF32, 0).tensor("t", {8}, kF32, 32).pad().zeros(64),
          {"tensor \"t\"", "twice"});
  refused(Bytes().header(2, 0).tensor("a", {9}, kF32, 0).tensor("b", {8}, kF32, 32).pad().zeros(64),
          {"tensor \"b\"", "overlaps", "\"a\""});
  refused(
      Bytes().header(2, 0).tensor("a", {8}, kF32, 32).tensor("b", {8}, kF32, 32).pad().zeros(64),
      {"overlaps"});
}

bool same(const MetaValue& a, const MetaValue& b) {
  return a.type == b.type && (a.type != MetaType::kArray || a.item_type == b.item_type) &&
         a.value == b.value;
}

Status copy(const GgufFile& file, const std::filesystem::path& path) {
  GgufWriter writer;
  for (const auto& [key, value] : file.metadata()) {
    writer.set(key, value);
  }
  for (const TensorInfo& tensor : file.tensors()) {
    RABIT_CHECK(writer.add_tensor(tensor.name, tensor.type, tensor.ne, tensor.data));
  }
  return writer.write(path);
}

TEST_F(Gguf, CopyIsTheSameFileByteForByte) {
  const std::string original = sample().pad().str();
  const auto file = open(original);
  ASSERT_TRUE(file);
  ASSERT_TRUE(copy(**file, folder_ / "copy"));
  EXPECT_EQ(*read_file(folder_ / "copy"), original);
  // Values whose bits a conversion could change, and empty arrays of every type.
  Bytes odd;
  odd.header(0, 7 + 12);
  for (const uint32_t bits : {0x80000000U, 0x00000001U, 0x7F800000U, 0xFF800001U, 0x7FC01234U}) {
    odd.key(std::to_string(bits), MetaType::kFloat32).u32(bits);
  }
  odd.key("d", MetaType::kFloat64).u64(0x7FF0000000000001U);
  odd.key("general.alignment", MetaType::kUint32).u32(64);
  for (uint32_t item = 0; item < 13; ++item) {
    if (item != 9) {
      odd.key(std::string("empty").append(std::to_string(item)), MetaType::kArray).u32(item).u64(0);
    }
  }
  odd.pad(64);
  const auto second = open(odd);
  ASSERT_TRUE(second) << second.error().message;
  ASSERT_TRUE(copy(**second, folder_ / "copy"));
  EXPECT_EQ(*read_file(folder_ / "copy"), odd.str());
}

TEST_F(Gguf, WriterMakesEachKindOfValue) {
  GgufWriter writer;
  const std::vector<std::pair<std::string, MetaValue>> values = {
      {"a", MetaValue::u32(7)},         {"b", MetaValue::u64(uint64_t{1} << 40)},
      {"c", MetaValue::i64(-5)},        {"d", MetaValue::f32(0.25F)},
      {"e", MetaValue::f64(1e300)},     {"f", MetaValue::boolean(false)},
      {"g", MetaValue::string("x\ny")}, {"h", MetaValue::strings({"one", "", "two"})}};
  writer.set("d", MetaValue::string("replaced below, keeps its place"));
  for (const auto& [key, value] : values) {
    writer.set(key, value);
  }
  const std::vector<float> data = {1, 2, 3};
  const auto bytes = std::as_bytes(std::span(data));
  ASSERT_TRUE(writer.add_tensor("t", TensorType::kF32, {3}, bytes));
  ASSERT_TRUE(writer.add_tensor("s", TensorType::kI32, {1, 3, 1}, bytes));
  ASSERT_TRUE(writer.write(path_));
  const auto file = GgufFile::open(path_);
  ASSERT_TRUE(file) << file.error().message;
  EXPECT_EQ((*file)->metadata()[0].first, "d");
  EXPECT_EQ((*file)->metadata().size(), values.size());
  for (const auto& [key, value] : values) {
    ASSERT_NE((*file)->find_meta(key), nullptr);
    EXPECT_TRUE(same(*(*file)->find_meta(key), value)) << key;
  }
  EXPECT_EQ((*file)->find_tensor("s")->ne, (std::vector<int64_t>{1, 3, 1}));
  EXPECT_TRUE(std::ranges::equal((*file)->find_tensor("s")->data, bytes));
  EXPECT_EQ((*file)->file_bytes() % 32, 0U);
}

TEST_F(Gguf, WriterRefusesWhatDoesNotFit) {
  GgufWriter writer;
  const std::vector<std::byte> data(40);
  EXPECT_TRUE(writer.add_tensor("t", TensorType::kQ4_1, {32, 2}, data));
  EXPECT_FALSE(writer.add_tensor("t", TensorType::kQ4_1, {32, 2}, data));
  EXPECT_FALSE(writer.add_tensor("u", TensorType::kQ4_1, {32, 3}, data));
  EXPECT_FALSE(writer.add_tensor("u", TensorType::kQ4_1, {16, 4}, data));
  EXPECT_FALSE(writer.add_tensor("u", TensorType::kQ4_1, {}, data));
  EXPECT_FALSE(writer.add_tensor("u", TensorType::kQ4_1, {-32, -2}, data));
  EXPECT_FALSE(writer.add_tensor("", TensorType::kQ4_1, {32, 2}, data));
  EXPECT_FALSE(writer.add_tensor("\xFF", TensorType::kQ4_1, {32, 2}, data));
  EXPECT_FALSE(writer.add_tensor(std::string(64, 'x'), TensorType::kQ4_1, {32, 2}, data));

  const MetaValue bad[] = {
      {.type = MetaType::kUint8, .value = uint64_t{256}},
      {.type = MetaType::kInt8, .value = int64_t{-129}},
      {.type = MetaType::kUint32, .value = int64_t{1}},
      {.type = MetaType::kFloat32, .value = 0.1},
      {.type = MetaType::kFloat32, .value = 1e300},
      {.type = MetaType::kString, .value = 1.0},
      {.type = MetaType::kBool, .value = uint64_t{1}},
      {.type = MetaType::kArray, .value = uint64_t{1}},
      {.type = MetaType::kArray, .item_type = MetaType::kUint8, .value = std::vector<int64_t>{-1}},
      {.type = MetaType::kArray, .item_type = MetaType::kBool, .value = std::vector<int64_t>{2}},
      {.type = MetaType::kArray, .item_type = MetaType::kInt32, .value = std::vector<double>{}},
      {.type = MetaType::kArray, .item_type = MetaType::kFloat32, .value = std::vector<int64_t>{}},
      {.type = MetaType::kArray,
       .item_type = MetaType::kInt32,
       .value = std::vector<std::string>{}},
  };
  for (const MetaValue& value : bad) {
    GgufWriter one;
    one.set("the.key", value);
    const Status status = one.write(path_);
    ASSERT_FALSE(status);
    EXPECT_NE(status.error().message.find("\"the.key\""), std::string::npos);
    EXPECT_NE(status.error().message.find(path_.string()), std::string::npos);
  }
  GgufWriter one;
  one.set("general.alignment", MetaValue::u32(48));
  EXPECT_FALSE(one.write(path_));
  one.set("general.alignment", MetaValue::u32(8));
  one.set("", MetaValue::u32(1));
  EXPECT_FALSE(one.write(path_));
  EXPECT_EQ(files_in_folder(), 0U);
}

TEST_F(Gguf, FullDiskLeavesTheOldFile) {
  ASSERT_TRUE(open("old content").error().message.size() > 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // A limit on file size stands in for a full disk; the header fits, the data does not.
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{4096, 4096};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const std::vector<std::byte> data(10000 * 4);
    GgufWriter writer;
    const bool added = writer.add_tensor("t", TensorType::kF32, {10000}, data).ok();
    const Status status = writer.write(path_);
    ::_exit(added && !status && status.error().message.find("file.gguf") != std::string::npos ? 0
                                                                                              : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(*read_file(path_), "old content");
  EXPECT_EQ(files_in_folder(), 1U);
  EXPECT_FALSE(GgufWriter().write(folder_ / "no" / "such"));
}

TEST(QuoteUntrusted, IsOneShortLine) {
  EXPECT_EQ(quote_untrusted("blk.0.w"), "\"blk.0.w\"");
  EXPECT_EQ(quote_untrusted("a\n\x7F\xFFz"), "\"a\\x0a\\x7f\\xffz\"");
  EXPECT_EQ(quote_untrusted("\xC3\xBC"), "\"\xC3\xBC\"");
  EXPECT_EQ(quote_untrusted("\xC2\x85"), "\"\\xc2\\x85\"");
  EXPECT_EQ(quote_untrusted("\xE2\x82"), "\"\\xe2\\x82\"");
  EXPECT_LT(quote_untrusted(std::string(100000, '\n')).size(), 120U);
}

TEST(GgufModel, CopyOfARealModelIsTheSame) {
  if (!std::filesystem::exists(RABIT_MODEL)) {
    GTEST_SKIP() << "no model at " << RABIT_MODEL;
  }
  const auto file = GgufFile::open(RABIT_MODEL);
  ASSERT_TRUE(file) << file.error().message;
  EXPECT_EQ(*(*file)->get_string("general.architecture"), "llama");
  const auto path = std::filesystem::path(testing::TempDir()) /
                    ("rabit_copy_" + std::to_string(::getpid()) + ".gguf");
  ASSERT_TRUE(copy(**file, path));
  EXPECT_EQ(*sha256_file(path), *sha256_file(RABIT_MODEL));
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace rabit
