// GGUF v3 files, read through a memory map and written whole (v2, which has the same layout, is
// read too).
// Layout: header (magic, version, counts), metadata key/value pairs, tensor infos, padding to
// `general.alignment` (32 unless said), tensor data. Everything is little-endian. A file is hostile
// until checked: open() verifies every length, count, offset and size with checked arithmetic
// against the file's own size before anything is allocated for it or pointed at.
// Format: the ggml project's docs/gguf.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/files.h"
#include "rabit/result.h"

namespace rabit {

/// Tensor element types that we can read the data of, with ggml's numbers. Other numbers known to
/// ggml are refused by name, numbers unknown to it as such.
enum class TensorType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kI32 = 26,
  kBF16 = 30,
};

/// The type of this number. Errors (without a place: the caller knows it): a type that ggml knows
/// and we do not read, by name, and a number that it does not know; both list what we read.
Result<TensorType> tensor_type_from_number(uint32_t number);
/// "Q4_1" and so on.
std::string_view tensor_type_name(TensorType type);
/// Elements a block: 1, 32 or 256.
int64_t block_elements(TensorType type);
/// Bytes a block.
int64_t block_bytes(TensorType type);
/// Bytes of a tensor with these extents. Errors (without a place: the caller knows it): not 1 to 4
/// extents, one below 1, ne[0] not a multiple of the block, more than 2^63 - 1 elements or bytes.
Result<uint64_t> tensor_bytes(TensorType type, std::span<const int64_t> ne);

/// Text that comes from a file, in double quotes and fit for a one-line message: control characters
/// and bytes that are not UTF-8 as \xNN, cut after about 100 bytes.
std::string quote_untrusted(std::string_view text);

enum class MetaType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

/// "uint32" and so on.
std::string_view meta_type_name(MetaType type);

/// One metadata value. Scalars are widened (all unsigned to uint64_t, signed to int64_t, floats to
/// double) and `type` keeps what the file said, so that a value can be written back as it was.
/// Arrays are one of the four vectors: integers and bools as int64_t (uint64 above 2^63 is
/// refused), floats as double, strings; nested arrays are refused.
struct MetaValue {
  MetaType type = MetaType::kUint32;
  MetaType item_type = MetaType::kUint32;  // of an array's items
  std::variant<uint64_t, int64_t, double, bool, std::string, std::vector<int64_t>,
               std::vector<double>, std::vector<std::string>>
      value;

  static MetaValue u32(uint32_t v);
  static MetaValue u64(uint64_t v);
  static MetaValue i64(int64_t v);
  static MetaValue f32(float v);
  static MetaValue f64(double v);
  static MetaValue boolean(bool v);
  static MetaValue string(std::string v);
  static MetaValue strings(std::vector<std::string> v);
  static MetaValue f32s(std::vector<double> v);  // rounded to float
};

/// The value of `general.alignment`: a uint32 power of two, at least 8 (below, float data could lie
/// where a CPU may not read it) and at most 65536 (padding stays small). Errors: anything else.
Result<uint64_t> checked_alignment(const MetaValue& value);

struct TensorInfo {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<int64_t> ne;  // 1 to 4 extents, fastest first, each >= 1
  std::span<const std::byte> data;

  int64_t elements() const;
};

/// An open GGUF file. Spans and string views into it live as long as it does.
class GgufFile {
 public:
  /// Errors: missing, not GGUF, another version, big-endian, truncated, any count, length, type,
  /// duplicate name, extent, alignment or offset that does not hold.
  static Result<std::shared_ptr<GgufFile>> open(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_->path(); }
  uint64_t file_bytes() const { return file_->bytes().size(); }
  /// SHA-256 in hex of the bytes that were opened, whatever the path names by now.
  std::string sha256() const {
    return sha256_hex({reinterpret_cast<const char*>(file_->bytes().data()), file_bytes()});
  }

  /// Metadata in file order.
  const std::vector<std::pair<std::string, MetaValue>>& metadata() const { return metadata_; }
  const MetaValue* find_meta(std::string_view key) const;

  /// Typed look-ups; the error names file and key, and says missing or of another type.
  Result<int64_t> get_int(std::string_view key) const;
  Result<double> get_float(std::string_view key) const;  // integers accepted
  Result<bool> get_bool(std::string_view key) const;
  Result<std::string> get_string(std::string_view key) const;
  Result<std::vector<std::string>> get_strings(std::string_view key) const;
  Result<std::vector<int64_t>> get_ints(std::string_view key) const;

  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  const TensorInfo* find_tensor(std::string_view name) const;
  /// The tensor's data will hardly be read again.
  void release(const TensorInfo& tensor) const { file_->release(tensor.data); }
  /// The tensor, or an error if it is missing or its extents are not `ne` (extents of 1 at the end
  /// may be left out or added: some writers drop them).
  Result<const TensorInfo*> get_tensor(std::string_view name, std::span<const int64_t> ne) const;

 private:
  GgufFile() = default;
  std::shared_ptr<MappedFile> file_;
  std::vector<std::pair<std::string, MetaValue>> metadata_;
  std::vector<TensorInfo> tensors_;
};

/// Part of a tensor's bytes, made when it is their turn to be written; null ends the writing, by an
/// interrupt or else as an error.
struct TensorPiece {
  uint64_t begin = 0, size = 0;  // bytes
  std::function<std::shared_ptr<const std::byte>()> bytes;
};

/// Collects metadata and tensors, then writes the file atomically. Tensor bytes given as a span are
/// borrowed: they must live until all is written.
class GgufWriter {
 public:
  /// Sets a key, replacing an earlier value under it.
  void set(std::string key, MetaValue value);
  /// Errors: a name that is there already, empty, not UTF-8 or over 63 bytes (ggml's limit),
  /// extents that do not fit the data.
  Status add_tensor(std::string name, TensorType type, std::vector<int64_t> ne,
                    std::span<const std::byte> data);
  /// A tensor of which this process writes these pieces and others the rest. Errors: as above, and
  /// a piece outside the tensor.
  Status add_tensor(std::string name, TensorType type, std::vector<int64_t> ne,
                    std::vector<TensorPiece> pieces);
  /// Writes the file. Errors: those of AtomicFile; a key or value that GGUF cannot hold (a variant
  /// that is not of the value's type, an array item out of its type's range).
  /// `general.alignment`, where set, is obeyed; else data is aligned to 32 bytes.
  Status write(const std::filesystem::path& path) const;

  /// The steps of write(), for processes that write one file together: all have added the same
  /// tensors. One creates the file and gives it its header, all write their pieces, and when all
  /// have flushed theirs the first commits. Returns where the tensors begin. Errors: as write().
  Result<uint64_t> write_header(AtomicFile& file) const;
  Status write_pieces(AtomicFile& file, uint64_t tensors_begin) const;

 private:
  struct Tensor {
    TensorInfo info;  // without data
    uint64_t size = 0;
    std::vector<TensorPiece> pieces;
  };
  Result<uint64_t> alignment() const;

  std::vector<std::pair<std::string, MetaValue>> metadata_;
  std::vector<Tensor> tensors_;
};

}  // namespace rabit
