// Files: read-only memory maps, and writes that appear under their final name whole or not at all.
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

#include "rabit/result.h"

namespace rabit {

/// A read-only memory map of a whole file; unmapped when the last owner goes.
class MappedFile {
 public:
  static Result<std::shared_ptr<MappedFile>> open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  /// These of its bytes will hardly be read again: their memory may go, and comes back where they
  /// are.
  void release(std::span<const std::byte> bytes) const;
  const std::filesystem::path& path() const { return path_; }

  /// Path of the file mapped at `address` (of the first 64 that live at a time), null: of none.
  /// Safe in a signal handler: what was cut off a mapped file raises SIGBUS where it is read.
  static const char* name_at(const void* address);

 private:
  MappedFile() = default;
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// Writes to `<path>.partial`, then fsync and rename on `commit`. Dropped without a commit, it
/// removes the partial file, so a crash, a full disk or Ctrl-C never leaves half a file as `path`.
/// Where `path` is a link, all that happens to the file that it points to, and the link stays.
class AtomicFile {
 public:
  static Result<AtomicFile> create(const std::filesystem::path& path);
  /// The one that another process has created and not yet committed, to write parts of it; what
  /// becomes of it is the other's.
  static Result<AtomicFile> join(const std::filesystem::path& path);
  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;
  ~AtomicFile();

  const std::filesystem::path& path() const { return path_; }  // links followed
  /// After what was written last.
  Status write(std::span<const std::byte> bytes);
  Status write(std::string_view text);
  /// Goes on from this byte, which may lie beyond the end.
  void seek(uint64_t position) { position_ = position; }
  uint64_t position() const { return position_; }
  /// What was written is on the disk.
  Status flush();
  Status commit();

 private:
  explicit AtomicFile(const std::filesystem::path& path);
  std::filesystem::path path_, partial_;
  int fd_ = -1;
  uint64_t position_ = 0;
  bool joined_ = false;
};

/// Writes `text` as the whole file, by an AtomicFile.
Status write_file(const std::filesystem::path& path, std::string_view text);

/// What an AtomicFile adds to its name until it is whole: a kill may leave such a file.
inline constexpr char kPartialEnding[] = ".partial";

/// What `option` names can be written by an AtomicFile: its folder is there, and it would replace
/// nothing but a regular file that is none of `inputs`, nor would the file that it is written
/// through.
Status check_written(const std::string& option, const std::filesystem::path& written,
                     std::span<const std::filesystem::path> inputs);

/// Holds `<path>.lock` until it goes, so that no two processes write one output. The file vanishes
/// with it; left by a killed process, it locks nothing.
class FileLock {
 public:
  /// Errors: another process holds it; a folder that takes no files.
  static Result<FileLock> take(const std::filesystem::path& path);
  /// Calls `held` once and waits where another process holds it. Errors: a folder that takes no
  /// files, an interrupt.
  static Result<FileLock> wait(const std::filesystem::path& path,
                               const std::function<void()>& held);
  FileLock(FileLock&& other) noexcept;
  FileLock& operator=(FileLock&&) = delete;
  ~FileLock();

 private:
  FileLock() = default;
  // None where another process holds it.
  static Result<std::optional<FileLock>> try_take(const std::filesystem::path& path);
  std::filesystem::path lock_;
  int fd_ = -1;
};

/// Whole file as bytes. Errors: missing, a directory, unreadable.
Result<std::string> read_file(const std::filesystem::path& path);

/// Whole file as text. Errors: as read_file, and an empty file, or bytes that are not UTF-8 (with
/// the offset of the first bad byte). A byte order mark at its beginning is left out.
Result<std::string> read_text_file(const std::filesystem::path& path);
/// The same of bytes that came `from` elsewhere.
Result<std::string> text_of(std::string_view bytes, const std::string& from);
std::string_view without_byte_order_mark(std::string_view text);

/// Offset of the first byte that does not begin or continue a well-formed UTF-8 sequence
/// (Unicode 15, table 3-7), or text.size() if there is none.
size_t first_invalid_utf8(std::string_view text);

/// SHA-256 of bytes that come one after the other.
class Sha256 {
 public:
  Sha256();
  void add(std::span<const std::byte> bytes);
  /// 64 lower-case hex digits; nothing may be added after it.
  std::string hex();

 private:
  struct Free {
    void operator()(void* context) const;
  };
  std::unique_ptr<void, Free> context_;
};

/// SHA-256 of a whole file, 64 lower-case hex digits.
Result<std::string> sha256_file(const std::filesystem::path& path);

/// SHA-256 of a byte string, 64 lower-case hex digits.
std::string sha256_hex(std::string_view bytes);

}  // namespace rabit
