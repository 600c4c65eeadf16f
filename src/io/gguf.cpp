// What reader and writer of GGUF share: the table of tensor types, sizes, and typed look-ups.
#include "io/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <numeric>
#include <utility>

namespace rabit {
namespace {

struct TypeTraits {
  std::string_view name;
  int64_t elements = 0;  // a block; 0 for types that we know by name only
  int64_t bytes = 0;
};

// Indexed by ggml's type number; an empty name is a number that ggml has retired.
constexpr std::array<TypeTraits, 42> kTypes = {{
    // clang-format off
    {"F32", 1, 4},      {"F16", 1, 2},      {"Q4_0", 32, 18},   {"Q4_1", 32, 20},   {},
    {},                 {"Q5_0", 32, 22},   {"Q5_1", 32, 24},   {"Q8_0", 32, 34},   {"Q8_1"},
    {"Q2_K"},           {"Q3_K"},           {"Q4_K", 256, 144}, {"Q5_K", 256, 176}, {"Q6_K", 256, 210},
    {"Q8_K"},           {"IQ2_XXS"},        {"IQ2_XS"},         {"IQ3_XXS"},        {"IQ1_S"},
    {"IQ4_NL"},         {"IQ3_S"},          {"IQ2_S"},          {"IQ4_XS"},         {"I8"},
    {"I16"},            {"I32", 1, 4},      {"I64"},            {"F64"},            {"IQ1_M"},
    {"BF16", 1, 2},     {"Q4_0_4_4"},       {"Q4_0_4_8"},       {"Q4_0_8_8"},       {"TQ1_0"},
    {"TQ2_0"},          {"IQ4_NL_4_4"},     {"IQ4_NL_4_8"},     {"IQ4_NL_8_8"},     {"MXFP4"},
    {"NVFP4"},          {"Q1_0"},
    // clang-format on
}};

const TypeTraits& traits_of(TensorType type) { return kTypes[static_cast<uint32_t>(type)]; }

std::string supported_types() {
  std::string list;
  for (const TypeTraits& type : kTypes) {
    if (type.elements > 0) {
      list += (list.empty() ? "" : ", ") + std::string(type.name);
    }
  }
  return list;
}

}  // namespace

Result<TensorType> tensor_type_from_number(uint32_t number) {
  if (number >= kTypes.size() || kTypes[number].name.empty()) {
    return Error{"tensor type " + std::to_string(number) + " is not known; supported are " +
                 supported_types()};
  }
  if (kTypes[number].elements == 0) {
    return Error{"tensor type " + std::string(kTypes[number].name) +
                 " is not supported; supported are " + supported_types()};
  }
  return static_cast<TensorType>(number);
}

std::string_view meta_type_name(MetaType type) {
  static constexpr std::array<std::string_view, 13> kNames = {
      "uint8", "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
      "bool",  "string", "array",  "uint64", "int64",  "float64"};
  return kNames[static_cast<uint32_t>(type)];
}

std::string_view tensor_type_name(TensorType type) { return traits_of(type).name; }
int64_t block_elements(TensorType type) { return traits_of(type).elements; }
int64_t block_bytes(TensorType type) { return traits_of(type).bytes; }

Result<uint64_t> tensor_bytes(TensorType type, std::span<const int64_t> ne) {
  if (ne.empty() || ne.size() > 4) {
    return Error{std::to_string(ne.size()) + " extents, 1 to 4 are allowed"};
  }
  int64_t elements = 1;
  for (const int64_t extent : ne) {
    if (extent < 1) {
      return Error{"extent " + std::to_string(extent) + ", it must be at least 1"};
    }
    if (__builtin_mul_overflow(elements, extent, &elements)) {
      return Error{"its extents multiply to more than 2^63 - 1 elements"};
    }
  }
  if (ne[0] % block_elements(type) != 0) {
    return Error{"rows of " + std::to_string(ne[0]) + " elements are not whole blocks of " +
                 std::string(tensor_type_name(type)) + " (" + std::to_string(block_elements(type)) +
                 " elements)"};
  }
  int64_t bytes = 0;
  if (__builtin_mul_overflow(elements / block_elements(type), block_bytes(type), &bytes)) {
    return Error{"it takes more than 2^63 - 1 bytes"};
  }
  return static_cast<uint64_t>(bytes);
}

std::string quote_untrusted(std::string_view text) {
  static constexpr size_t kMaxBytes = 100;
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  size_t i = 0;
  while (i < text.size() && out.size() <= kMaxBytes) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    const std::string_view point = text.substr(i, length);
    const bool control =
        lead < 0x20 || lead == 0x7F ||
        (lead == 0xC2 && point.size() == 2 && static_cast<unsigned char>(point[1]) < 0xA0);
    if (!control && first_invalid_utf8(point) == length) {
      out += point;
      i += length;
    } else {
      out += {'\\', 'x', kHex[lead >> 4], kHex[lead & 15]};
      i += 1;
    }
  }
  return out + (i < text.size() ? "\"..." : "\"");
}

int64_t TensorInfo::elements() const {
  return std::accumulate(ne.begin(), ne.end(), int64_t{1}, std::multiplies<>());
}

Result<uint64_t> checked_alignment(const MetaValue& value) {
  const auto* number = std::get_if<uint64_t>(&value.value);
  if (value.type != MetaType::kUint32 || number == nullptr || *number < 8 || *number > 65536 ||
      !std::has_single_bit(*number)) {
    return Error{"key \"general.alignment\" must be a uint32 power of two from 8 to 65536"};
  }
  return *number;
}

MetaValue MetaValue::u32(uint32_t v) { return {.type = MetaType::kUint32, .value = uint64_t{v}}; }
MetaValue MetaValue::u64(uint64_t v) { return {.type = MetaType::kUint64, .value = v}; }
MetaValue MetaValue::i64(int64_t v) { return {.type = MetaType::kInt64, .value = v}; }
MetaValue MetaValue::f32(float v) { return {.type = MetaType::kFloat32, .value = double{v}}; }
MetaValue MetaValue::f64(double v) { return {.type = MetaType::kFloat64, .value = v}; }
MetaValue MetaValue::boolean(bool v) { return {.type = MetaType::kBool, .value = v}; }
MetaValue MetaValue::string(std::string v) {
  return {.type = MetaType::kString, .value = std::move(v)};
}
MetaValue MetaValue::strings(std::vector<std::string> v) {
  return {.type = MetaType::kArray, .item_type = MetaType::kString, .value = std::move(v)};
}

MetaValue MetaValue::f32s(std::vector<double> v) {
  for (double& item : v) {
    item = static_cast<float>(item);
  }
  return {.type = MetaType::kArray, .item_type = MetaType::kFloat32, .value = std::move(v)};
}

const MetaValue* GgufFile::find_meta(std::string_view key) const {
  for (const auto& [name, value] : metadata_) {
    if (name == key) {
      return &value;
    }
  }
  return nullptr;
}

const TensorInfo* GgufFile::find_tensor(std::string_view name) const {
  for (const TensorInfo& tensor : tensors_) {
    if (tensor.name == name) {
      return &tensor;
    }
  }
  return nullptr;
}

namespace {

Error key_error(const GgufFile& file, std::string_view key, const std::string& what) {
  return Error{file.path().string() + ": key \"" + std::string(key) + "\" " + what};
}

Error wrong_type(const GgufFile& file, std::string_view key, const MetaValue& value,
                 const std::string& wanted) {
  std::string is(meta_type_name(value.type));
  if (value.type == MetaType::kArray) {
    is += " of " + std::string(meta_type_name(value.item_type));
  }
  return key_error(file, key, "is of type " + is + ", " + wanted + " is needed");
}

/// The value if it is held as a T.
template <typename T>
Result<T> get_as(const GgufFile& file, std::string_view key, const std::string& wanted) {
  const MetaValue* value = file.find_meta(key);
  if (value == nullptr) {
    return key_error(file, key, "is missing");
  }
  if (const T* held = std::get_if<T>(&value->value)) {
    return *held;
  }
  return wrong_type(file, key, *value, wanted);
}

}  // namespace

Result<int64_t> GgufFile::get_int(std::string_view key) const {
  const MetaValue* value = find_meta(key);
  if (value == nullptr) {
    return key_error(*this, key, "is missing");
  }
  if (const auto* number = std::get_if<uint64_t>(&value->value)) {
    if (!std::in_range<int64_t>(*number)) {
      return key_error(*this, key, "is " + std::to_string(*number) + ", above 2^63 - 1");
    }
    return static_cast<int64_t>(*number);
  }
  return get_as<int64_t>(*this, key, "an integer");
}

Result<double> GgufFile::get_float(std::string_view key) const {
  const MetaValue* value = find_meta(key);
  if (value != nullptr) {
    if (const auto* number = std::get_if<uint64_t>(&value->value)) {
      return static_cast<double>(*number);
    }
    if (const auto* number = std::get_if<int64_t>(&value->value)) {
      return static_cast<double>(*number);
    }
  }
  return get_as<double>(*this, key, "a number");
}

Result<bool> GgufFile::get_bool(std::string_view key) const {
  return get_as<bool>(*this, key, "bool");
}

Result<std::string> GgufFile::get_string(std::string_view key) const {
  return get_as<std::string>(*this, key, "string");
}

Result<std::vector<std::string>> GgufFile::get_strings(std::string_view key) const {
  return get_as<std::vector<std::string>>(*this, key, "array of string");
}

Result<std::vector<int64_t>> GgufFile::get_ints(std::string_view key) const {
  return get_as<std::vector<int64_t>>(*this, key, "array of integers");
}

Result<const TensorInfo*> GgufFile::get_tensor(std::string_view name,
                                               std::span<const int64_t> ne) const {
  const TensorInfo* tensor = find_tensor(name);
  const std::string place = path().string() + ": tensor " + quote_untrusted(name);
  if (tensor == nullptr) {
    return Error{place + " is missing"};
  }
  const auto extent = [](std::span<const int64_t> extents, size_t i) {
    return i < extents.size() ? extents[i] : 1;
  };
  for (size_t i = 0; i < std::max(ne.size(), tensor->ne.size()); ++i) {
    if (extent(ne, i) != extent(tensor->ne, i)) {
      const auto list = [](std::span<const int64_t> extents) {
        std::string text = "[";
        for (const int64_t value : extents) {
          text += (text.size() > 1 ? ", " : "") + std::to_string(value);
        }
        return text + "]";
      };
      return Error{place + " has extents " + list(tensor->ne) + ", " + list(ne) + " are needed"};
    }
  }
  return tensor;
}

}  // namespace rabit
