// Writing GGUF v3, through AtomicFile: the final name shows a whole file or none. Tensors lie in
// the order in which they were added, each padded to the alignment, the last one too. Values are
// narrowed back to the type that they carry; one that does not fit it is refused instead of written
// changed.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "base/interrupt.h"
#include "io/gguf.h"

namespace rabit {
namespace {

constexpr uint64_t kDefaultAlignment = 32;
constexpr size_t kMaxKeyBytes = 65535;
constexpr size_t kMaxTensorNameBytes = 63;  // ggml keeps names in 64 bytes with a zero at the end

template <typename T>
void append(std::string& out, T value) {
  static_assert(std::is_arithmetic_v<T> && std::endian::native == std::endian::little);
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  out.append(bytes, sizeof value);
}

void append_string(std::string& out, std::string_view text) {
  append<uint64_t>(out, text.size());
  out += text;
}

/// Appends an integer or bool narrowed to the type; false if it does not fit.
template <typename Wide>
bool append_integer(std::string& out, MetaType type, Wide value) {
  const auto narrow = [&]<typename T>(T) {
    if (!std::in_range<T>(value)) {
      return false;
    }
    append(out, static_cast<T>(value));
    return true;
  };
  switch (type) {
    case MetaType::kUint8:
      return narrow(uint8_t{});
    case MetaType::kInt8:
      return narrow(int8_t{});
    case MetaType::kUint16:
      return narrow(uint16_t{});
    case MetaType::kInt16:
      return narrow(int16_t{});
    case MetaType::kUint32:
      return narrow(uint32_t{});
    case MetaType::kInt32:
      return narrow(int32_t{});
    case MetaType::kUint64:
      return narrow(uint64_t{});
    case MetaType::kInt64:
      return narrow(int64_t{});
    case MetaType::kBool:
      return (value == 0 || value == 1) && narrow(uint8_t{});
    default:
      return false;
  }
}

/// Appends a float32 or float64. A double that no float32 holds is refused, not rounded; NaN keeps
/// sign and the payload's upper bits, as the reader widened it.
bool append_real(std::string& out, MetaType type, double value) {
  if (type == MetaType::kFloat64) {
    append(out, value);
    return true;
  }
  if (type != MetaType::kFloat32) {
    return false;
  }
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  if ((bits & 0x7FFFFFFFFFFFFFFFU) > 0x7FF0000000000000U) {
    const auto payload = static_cast<uint32_t>((bits >> 29) & 0x007FFFFFU);
    append(out, static_cast<uint32_t>((bits >> 32) & 0x80000000U) | 0x7F800000U |
                    (payload != 0 ? payload : 0x00400000U));
    return true;
  }
  if (std::abs(value) > std::numeric_limits<float>::max() && !std::isinf(value)) {
    return false;
  }
  const auto narrow = static_cast<float>(value);
  append(out, narrow);
  return static_cast<double>(narrow) == value;
}

bool is_signed(MetaType type) {
  return type == MetaType::kInt8 || type == MetaType::kInt16 || type == MetaType::kInt32 ||
         type == MetaType::kInt64;
}

/// Appends an array's item type, length and items; false if the items are not of the item type.
bool append_array(std::string& out, const MetaValue& value) {
  append(out, static_cast<uint32_t>(value.item_type));
  if (const auto* texts = std::get_if<std::vector<std::string>>(&value.value)) {
    append<uint64_t>(out, texts->size());
    for (const std::string& text : *texts) {
      append_string(out, text);
    }
    return value.item_type == MetaType::kString;
  }
  const auto append_all = [&](const auto& items, auto&& append_one) {
    append<uint64_t>(out, items.size());
    for (const auto item : items) {
      if (!append_one(out, value.item_type, item)) {
        return false;
      }
    }
    return true;
  };
  if (const auto* reals = std::get_if<std::vector<double>>(&value.value)) {
    return (value.item_type == MetaType::kFloat32 || value.item_type == MetaType::kFloat64) &&
           append_all(*reals, append_real);
  }
  if (const auto* integers = std::get_if<std::vector<int64_t>>(&value.value)) {
    const bool integral =
        value.item_type != MetaType::kString && value.item_type != MetaType::kArray &&
        value.item_type != MetaType::kFloat32 && value.item_type != MetaType::kFloat64;
    return integral && append_all(*integers, append_integer<int64_t>);
  }
  return false;
}

/// Appends type and value; false if the variant holds something that the type does not mean.
bool append_value(std::string& out, const MetaValue& value) {
  append(out, static_cast<uint32_t>(value.type));
  if (value.type == MetaType::kArray) {
    return append_array(out, value);
  }
  if (const auto* text = std::get_if<std::string>(&value.value)) {
    append_string(out, *text);
    return value.type == MetaType::kString;
  }
  if (const auto* real = std::get_if<double>(&value.value)) {
    return append_real(out, value.type, *real);
  }
  if (const auto* flag = std::get_if<bool>(&value.value)) {
    append(out, static_cast<uint8_t>(*flag));
    return value.type == MetaType::kBool;
  }
  if (const auto* number = std::get_if<int64_t>(&value.value)) {
    return is_signed(value.type) && append_integer(out, value.type, *number);
  }
  if (const auto* number = std::get_if<uint64_t>(&value.value)) {
    return !is_signed(value.type) && value.type != MetaType::kBool &&
           append_integer(out, value.type, *number);
  }
  return false;
}

uint64_t padding_to(uint64_t alignment, uint64_t position) {
  return (alignment - position % alignment) % alignment;
}

}  // namespace

void GgufWriter::set(std::string key, MetaValue value) {
  for (auto& [name, old] : metadata_) {
    if (name == key) {
      old = std::move(value);
      return;
    }
  }
  metadata_.emplace_back(std::move(key), std::move(value));
}

Status GgufWriter::add_tensor(std::string name, TensorType type, std::vector<int64_t> ne,
                              std::span<const std::byte> data) {
  const auto bytes = tensor_bytes(type, ne);
  if (bytes && *bytes != data.size()) {
    return Error{"cannot write tensor " + quote_untrusted(name) + ": its extents need " +
                 std::to_string(*bytes) + " bytes, " + std::to_string(data.size()) + " are given"};
  }
  return add_tensor(std::move(name), type, std::move(ne),
                    {{0, data.size(), [data] {
                        return std::shared_ptr<const std::byte>(std::shared_ptr<void>(),
                                                                data.data());
                      }}});
}

Status GgufWriter::add_tensor(std::string name, TensorType type, std::vector<int64_t> ne,
                              std::vector<TensorPiece> pieces) {
  const auto fail = [&](const std::string& what) {
    return Error{"cannot write tensor " + quote_untrusted(name) + ": " + what};
  };
  if (name.empty() || name.size() > kMaxTensorNameBytes) {
    return fail("its name is " + std::to_string(name.size()) + " bytes long, 1 to " +
                std::to_string(kMaxTensorNameBytes) + " are allowed");
  }
  if (first_invalid_utf8(name) != name.size()) {
    return fail("its name is not UTF-8");
  }
  for (const Tensor& tensor : tensors_) {
    if (tensor.info.name == name) {
      return fail("it is there already");
    }
  }
  const auto bytes = tensor_bytes(type, ne);
  if (!bytes) {
    return fail(bytes.error().message);
  }
  for (const TensorPiece& piece : pieces) {
    if (piece.begin > *bytes || piece.size > *bytes - piece.begin) {
      return fail("a piece of it ends beyond its " + std::to_string(*bytes) + " bytes");
    }
  }
  tensors_.push_back({{std::move(name), type, std::move(ne), {}}, *bytes, std::move(pieces)});
  return {};
}

Result<uint64_t> GgufWriter::alignment() const {
  for (const auto& [key, value] : metadata_) {
    if (key == "general.alignment") {
      return checked_alignment(value);
    }
  }
  return kDefaultAlignment;
}

Result<uint64_t> GgufWriter::write_header(AtomicFile& file) const {
  const auto fail = [&](const std::string& what) {
    return Error{"cannot write " + file.path().string() + ": " + what};
  };
  const auto aligned = alignment();
  if (!aligned) {
    return fail(aligned.error().message);
  }
  std::string header = "GGUF";
  append<uint32_t>(header, 3);
  append<uint64_t>(header, tensors_.size());
  append<uint64_t>(header, metadata_.size());
  for (const auto& [key, value] : metadata_) {
    if (key.empty() || key.size() > kMaxKeyBytes || first_invalid_utf8(key) != key.size()) {
      return fail("key " + quote_untrusted(key) + " is empty, too long or not UTF-8");
    }
    append_string(header, key);
    if (!append_value(header, value)) {
      return fail("key " + quote_untrusted(key) + ": its value does not fit its type");
    }
  }
  uint64_t offset = 0;
  for (const auto& [info, size, pieces] : tensors_) {
    append_string(header, info.name);
    append(header, static_cast<uint32_t>(info.ne.size()));
    for (const int64_t extent : info.ne) {
      append(header, static_cast<uint64_t>(extent));
    }
    append(header, static_cast<uint32_t>(info.type));
    append(header, offset);
    offset += size + padding_to(*aligned, size);
  }
  header.append(padding_to(*aligned, header.size()), '\0');
  RABIT_CHECK(file.write(header));
  if (offset > 0) {  // the last tensor's padding; what is left out in between reads as zeros
    file.seek(header.size() + offset - 1);
    RABIT_CHECK(file.write(std::string(1, '\0')));
  }
  return uint64_t{header.size()};
}

Status GgufWriter::write_pieces(AtomicFile& file, uint64_t tensors_begin) const {
  RABIT_ASSIGN(const uint64_t alignment, this->alignment());
  uint64_t begin = tensors_begin;
  for (const auto& [info, size, pieces] : tensors_) {
    for (const TensorPiece& piece : pieces) {
      const std::shared_ptr<const std::byte> bytes = piece.bytes();
      if (bytes == nullptr) {
        RABIT_CHECK(check_interrupt());
        return Error{"tensor " + info.name + " could not be made"};
      }
      file.seek(begin + piece.begin);
      RABIT_CHECK(file.write(std::span(bytes.get(), piece.size)));
    }
    begin += size + padding_to(alignment, size);
  }
  return {};
}

Status GgufWriter::write(const std::filesystem::path& path) const {
  RABIT_ASSIGN(AtomicFile file, AtomicFile::create(path));
  RABIT_ASSIGN(const uint64_t tensors_begin, write_header(file));
  RABIT_CHECK(write_pieces(file, tensors_begin));
  return file.commit();
}

}  // namespace rabit
