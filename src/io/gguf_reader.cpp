// Reading GGUF. Nothing in the file is believed: a length or count is compared with the bytes that
// are left before it is used, so that what is allocated stays within a small multiple of the file's
// size, and a tensor's span is made only after its whole range is known to lie inside the file.
// What is read moves through one Cursor, whose errors name file, place and byte offset.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <unordered_set>
#include <utility>

#include "io/gguf.h"

static_assert(std::endian::native == std::endian::little, "GGUF numbers are read as they lie");

namespace rabit {
namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr uint64_t kMaxNameBytes = 65535;  // the format's limit for keys
constexpr uint64_t kMinKeyValueBytes = 8 + 1 + 4 + 1;
constexpr uint64_t kMinTensorInfoBytes = 8 + 1 + 4 + 8 + 4 + 8;

/// Bytes of one value of the type as the file stores it; of a string and an array the smallest.
uint64_t min_bytes(MetaType type) {
  switch (type) {
    case MetaType::kUint8:
    case MetaType::kInt8:
    case MetaType::kBool:
      return 1;
    case MetaType::kUint16:
    case MetaType::kInt16:
      return 2;
    case MetaType::kUint32:
    case MetaType::kInt32:
    case MetaType::kFloat32:
      return 4;
    case MetaType::kArray:
      return 12;
    default:
      return 8;
  }
}

constexpr uint32_t kMetaTypes = 13;

/// What the first bytes of a file that is not GGUF look like, for the message.
std::string describe_stranger(std::string_view head) {
  const auto starts = [&](std::string_view prefix) {
    return head.substr(0, prefix.size()) == prefix;
  };
  if (starts("version https://git-lfs")) {
    return "it is a Git LFS pointer; fetch the real file with git lfs pull";
  }
  if (starts("<!DOCTYPE") || starts("<!doctype") || starts("<html")) {
    return "it is an HTML page; download the file again";
  }
  if (starts("PK\x03\x04")) {
    return "it looks like a PyTorch checkpoint or another zip file";
  }
  if (starts("tjgg") || starts("lmgg") || starts("fmgg")) {
    return "it is in a format that preceded GGUF; convert the model again";
  }
  if (starts("FUGG")) {
    return "its bytes are swapped";
  }
  if (head.size() > 8 && head[8] == '{' && head.substr(4, 4) == std::string_view("\0\0\0\0", 4)) {
    return "it looks like safetensors; convert the model to GGUF first";
  }
  return "it begins with " + quote_untrusted(head.substr(0, 4));
}

/// A float as the double of the same value; NaN keeps its sign and payload, which a conversion
/// would make quiet.
double widen(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) {
    return std::bit_cast<double>((uint64_t{bits & 0x80000000U} << 32) | 0x7FF0000000000000U |
                                 (uint64_t{bits & 0x007FFFFFU} << 29));
  }
  return value;
}

/// Walks the header. `where` is what is being read, for messages.
class Cursor {
 public:
  Cursor(std::string path, std::span<const std::byte> bytes)
      : path_(std::move(path)), bytes_(bytes) {}

  uint64_t position() const { return position_; }
  uint64_t remaining() const { return bytes_.size() - position_; }
  void set_where(std::string where) { where_ = std::move(where); }

  Error fail(const std::string& what) const { return Error{path_ + ": " + where_ + ": " + what}; }

  Status need(uint64_t bytes, std::string_view what) const {
    if (bytes > remaining()) {
      return fail("the file ends too early: " + std::string(what) + " at byte " +
                  std::to_string(position_) + " takes " + std::to_string(bytes) + " bytes, " +
                  std::to_string(remaining()) +
                  " are left; the file is truncated or damaged, get it again");
    }
    return {};
  }

  template <typename T>
  Result<T> number(std::string_view what) {
    RABIT_CHECK(need(sizeof(T), what));
    T value;
    std::memcpy(&value, bytes_.data() + position_, sizeof value);
    position_ += sizeof value;
    return value;
  }

  Result<std::string_view> string(std::string_view what) {
    RABIT_ASSIGN(const uint64_t length, number<uint64_t>(what));
    RABIT_CHECK(need(length, what));
    const std::string_view text(reinterpret_cast<const char*>(bytes_.data()) + position_, length);
    position_ += length;
    return text;
  }

  /// A key or a tensor's name.
  Result<std::string_view> name(std::string_view what) {
    const std::string place = std::string(what) + " at byte " + std::to_string(position_);
    RABIT_ASSIGN(const std::string_view text, string(what));
    if (text.empty() || text.size() > kMaxNameBytes) {
      return fail(place + " is " + std::to_string(text.size()) + " bytes long, 1 to " +
                  std::to_string(kMaxNameBytes) + " are allowed");
    }
    if (first_invalid_utf8(text) != text.size()) {
      return fail(place + " is not UTF-8: " + quote_untrusted(text));
    }
    return text;
  }

  Status check_count(uint64_t count, uint64_t bytes_each, std::string_view what) const {
    if (count > remaining() / bytes_each) {
      return fail(std::to_string(count) + " " + std::string(what) + " of at least " +
                  std::to_string(bytes_each) + " bytes each cannot fit in the " +
                  std::to_string(remaining()) + " bytes after byte " + std::to_string(position_) +
                  "; the file is truncated or damaged, get it again");
    }
    return {};
  }

 private:
  std::string path_;
  std::span<const std::byte> bytes_;
  uint64_t position_ = 0;
  std::string where_ = "header";
};

/// The integer or bool of this type at the cursor as `Wide`.
template <typename Wide>
Result<Wide> read_integer(Cursor& cursor, MetaType type) {
  const auto read = [&]<typename T>(T) -> Result<Wide> {
    RABIT_ASSIGN(const T value, cursor.number<T>("value"));
    if constexpr (std::is_same_v<T, uint64_t> && std::is_signed_v<Wide>) {
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return cursor.fail("array item " + std::to_string(value) + " is above 2^63 - 1");
      }
    }
    return static_cast<Wide>(value);
  };
  switch (type) {
    case MetaType::kUint8:
      return read(uint8_t{});
    case MetaType::kInt8:
      return read(int8_t{});
    case MetaType::kUint16:
      return read(uint16_t{});
    case MetaType::kInt16:
      return read(int16_t{});
    case MetaType::kUint32:
      return read(uint32_t{});
    case MetaType::kInt32:
      return read(int32_t{});
    case MetaType::kUint64:
      return read(uint64_t{});
    case MetaType::kInt64:
      return read(int64_t{});
    default:
      break;
  }
  RABIT_ASSIGN(const uint8_t value, cursor.number<uint8_t>("value"));
  if (value > 1) {
    return cursor.fail("a bool is " + std::to_string(value) + ", 0 and 1 are allowed");
  }
  return static_cast<Wide>(value);
}

Result<double> read_real(Cursor& cursor, MetaType type) {
  if (type == MetaType::kFloat64) {
    return cursor.number<double>("value");
  }
  RABIT_ASSIGN(const float value, cursor.number<float>("value"));
  return widen(value);
}

Result<MetaType> read_meta_type(Cursor& cursor, std::string_view what) {
  RABIT_ASSIGN(const uint32_t number, cursor.number<uint32_t>(what));
  if (number >= kMetaTypes) {
    return cursor.fail(std::string(what) + " " + std::to_string(number) + " at byte " +
                       std::to_string(cursor.position() - 4) + " is not known");
  }
  return static_cast<MetaType>(number);
}

Result<MetaValue> read_array(Cursor& cursor) {
  MetaValue out;
  out.type = MetaType::kArray;
  RABIT_ASSIGN(out.item_type, read_meta_type(cursor, "array item type"));
  if (out.item_type == MetaType::kArray) {
    return cursor.fail("an array of arrays is not supported");
  }
  RABIT_ASSIGN(const uint64_t count, cursor.number<uint64_t>("array length"));
  RABIT_CHECK(cursor.check_count(count, min_bytes(out.item_type), "array items"));
  const auto fill = [&](auto items, auto&& read) -> Status {
    items.reserve(count);
    for (uint64_t i = 0; i < count; ++i) {
      RABIT_ASSIGN(auto item, read());
      items.emplace_back(std::move(item));
    }
    out.value = std::move(items);
    return {};
  };
  switch (out.item_type) {
    case MetaType::kString:
      RABIT_CHECK(fill(std::vector<std::string>(), [&] { return cursor.string("array item"); }));
      break;
    case MetaType::kFloat32:
    case MetaType::kFloat64:
      RABIT_CHECK(fill(std::vector<double>(), [&] { return read_real(cursor, out.item_type); }));
      break;
    default:
      RABIT_CHECK(fill(std::vector<int64_t>(),
                       [&] { return read_integer<int64_t>(cursor, out.item_type); }));
  }
  return out;
}

Result<MetaValue> read_value(Cursor& cursor) {
  RABIT_ASSIGN(const MetaType type, read_meta_type(cursor, "value type"));
  MetaValue out;
  out.type = type;
  switch (type) {
    case MetaType::kArray:
      return read_array(cursor);
    case MetaType::kString: {
      RABIT_ASSIGN(const std::string_view text, cursor.string("string value"));
      out.value = std::string(text);
      return out;
    }
    case MetaType::kFloat32:
    case MetaType::kFloat64: {
      RABIT_ASSIGN(out.value, read_real(cursor, type));
      return out;
    }
    case MetaType::kBool: {
      RABIT_ASSIGN(const uint64_t value, read_integer<uint64_t>(cursor, type));
      out.value = value != 0;
      return out;
    }
    case MetaType::kInt8:
    case MetaType::kInt16:
    case MetaType::kInt32:
    case MetaType::kInt64: {
      RABIT_ASSIGN(out.value, read_integer<int64_t>(cursor, type));
      return out;
    }
    default: {
      RABIT_ASSIGN(out.value, read_integer<uint64_t>(cursor, type));
      return out;
    }
  }
}

Result<TensorType> read_tensor_type(Cursor& cursor) {
  RABIT_ASSIGN(const uint32_t number, cursor.number<uint32_t>("tensor type"));
  auto type = tensor_type_from_number(number);
  if (!type) {
    return cursor.fail(type.error().message);
  }
  return type;
}

/// A tensor's info and its offset from the start of the data section; its span is still empty.
Result<std::pair<TensorInfo, uint64_t>> read_tensor_info(Cursor& cursor) {
  TensorInfo tensor;
  RABIT_ASSIGN(tensor.name, cursor.name("tensor name"));
  cursor.set_where("tensor " + quote_untrusted(tensor.name));
  RABIT_ASSIGN(const uint32_t dims, cursor.number<uint32_t>("number of extents"));
  if (dims < 1 || dims > 4) {
    return cursor.fail(std::to_string(dims) + " extents, 1 to 4 are allowed");
  }
  for (uint32_t i = 0; i < dims; ++i) {
    RABIT_ASSIGN(const uint64_t extent, cursor.number<uint64_t>("extent"));
    if (extent < 1 || extent > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return cursor.fail("extent " + std::to_string(i) + " is " + std::to_string(extent) +
                         ", it must be 1 to 2^63 - 1");
    }
    tensor.ne.push_back(static_cast<int64_t>(extent));
  }
  RABIT_ASSIGN(tensor.type, read_tensor_type(cursor));
  RABIT_ASSIGN(const uint64_t offset, cursor.number<uint64_t>("data offset"));
  return std::pair(std::move(tensor), offset);
}

Status check_magic(Cursor& cursor, const MappedFile& file) {
  const auto bytes = file.bytes();
  const std::string_view head(reinterpret_cast<const char*>(bytes.data()),
                              std::min<size_t>(bytes.size(), 64));
  if (head.empty()) {
    return Error{file.path().string() + ": not a GGUF file: it is empty; get it again"};
  }
  if (head.substr(0, kMagic.size()) != kMagic) {
    return Error{file.path().string() + ": not a GGUF file: " + describe_stranger(head)};
  }
  RABIT_CHECK(cursor.number<uint32_t>("magic"));
  RABIT_ASSIGN(const uint32_t version, cursor.number<uint32_t>("version"));
  if (version != 0 && (version & 0xFFFFU) == 0) {
    return cursor.fail("a big-endian GGUF file is not supported; convert it to little-endian");
  }
  if (version != 2 && version != 3) {  // 3 added big-endian files and changed nothing else
    return cursor.fail("GGUF version " + std::to_string(version) +
                       " is not supported, 2 and 3 are; convert the model again");
  }
  return {};
}

/// Makes every tensor's span. `offsets` are relative to `data_start`, which may lie past the end of
/// a file that has no tensors.
Status place_tensors(const MappedFile& file, uint64_t header_end, uint64_t alignment,
                     std::span<const uint64_t> offsets, std::vector<TensorInfo>& tensors) {
  const uint64_t padding = (alignment - header_end % alignment) % alignment;
  const uint64_t file_bytes = file.bytes().size();
  // header_end <= file_bytes < 2^63 and alignment < 2^32, so the sum cannot wrap.
  const uint64_t data_start = header_end + padding;
  const auto fail = [&](const TensorInfo& tensor, const std::string& what) {
    return Error{file.path().string() + ": tensor " + quote_untrusted(tensor.name) + ": " + what};
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    TensorInfo& tensor = tensors[i];
    const auto size = tensor_bytes(tensor.type, tensor.ne);
    if (!size) {
      return fail(tensor, size.error().message);
    }
    if (offsets[i] % alignment != 0) {
      return fail(tensor, "data offset " + std::to_string(offsets[i]) +
                              " is not a multiple of the alignment " + std::to_string(alignment));
    }
    const uint64_t room = file_bytes > data_start ? file_bytes - data_start : 0;
    if (offsets[i] > room || *size > room - offsets[i]) {
      return fail(tensor, "its " + std::to_string(*size) + " bytes at offset " +
                              std::to_string(offsets[i]) + " of the data section (byte " +
                              std::to_string(data_start) +
                              " of the file) do not fit in the file's " +
                              std::to_string(file_bytes) +
                              " bytes; the file is truncated or damaged, get it again");
    }
    tensor.data = file.bytes().subspan(data_start + offsets[i], *size);
  }
  std::vector<size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return offsets[a] < offsets[b]; });
  for (size_t i = 1; i < order.size(); ++i) {
    const TensorInfo& before = tensors[order[i - 1]];
    if (offsets[order[i - 1]] + before.data.size() > offsets[order[i]]) {
      return fail(tensors[order[i]],
                  "its data overlaps that of tensor " + quote_untrusted(before.name));
    }
  }
  return {};
}

}  // namespace

Result<std::shared_ptr<GgufFile>> GgufFile::open(const std::filesystem::path& path) {
  std::shared_ptr<GgufFile> out(new GgufFile);
  RABIT_ASSIGN(out->file_, MappedFile::open(path));
  Cursor cursor(path.string(), out->file_->bytes());
  RABIT_CHECK(check_magic(cursor, *out->file_));
  RABIT_ASSIGN(const uint64_t tensor_count, cursor.number<uint64_t>("tensor count"));
  RABIT_ASSIGN(const uint64_t key_count, cursor.number<uint64_t>("metadata count"));
  RABIT_CHECK(cursor.check_count(key_count, kMinKeyValueBytes, "metadata values"));
  RABIT_CHECK(cursor.check_count(tensor_count, kMinTensorInfoBytes, "tensors"));

  std::unordered_set<std::string_view> seen;  // views into the map
  for (uint64_t i = 0; i < key_count; ++i) {
    cursor.set_where("metadata value " + std::to_string(i));
    RABIT_ASSIGN(const std::string_view key, cursor.name("key"));
    cursor.set_where("key " + quote_untrusted(key));
    if (!seen.insert(key).second) {
      return cursor.fail("it is there twice");
    }
    RABIT_ASSIGN(MetaValue value, read_value(cursor));
    out->metadata_.emplace_back(std::string(key), std::move(value));
  }

  uint64_t alignment = 32;
  if (const MetaValue* value = out->find_meta("general.alignment")) {
    const auto checked = checked_alignment(*value);
    if (!checked) {
      return Error{path.string() + ": " + checked.error().message};
    }
    alignment = *checked;
  }

  seen.clear();
  std::vector<uint64_t> offsets;
  for (uint64_t i = 0; i < tensor_count; ++i) {
    cursor.set_where("tensor info " + std::to_string(i));
    RABIT_ASSIGN(auto info, read_tensor_info(cursor));
    out->tensors_.push_back(std::move(info.first));
    offsets.push_back(info.second);
  }
  for (const TensorInfo& tensor : out->tensors_) {
    if (!seen.insert(tensor.name).second) {
      cursor.set_where("tensor " + quote_untrusted(tensor.name));
      return cursor.fail("it is there twice");
    }
  }
  RABIT_CHECK(place_tensors(*out->file_, cursor.position(), alignment, offsets, out->tensors_));
  return out;
}

}  // namespace rabit
