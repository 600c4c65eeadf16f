#include "base/files.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "base/interrupt.h"

namespace rabit {
namespace {

Error system_error(const std::string& what, const std::filesystem::path& path) {
  return Error{what + " " + path.string() + ": " + std::strerror(errno)};
}

// What a path names when the links that it names are followed, there or not.
std::filesystem::path behind_links(std::filesystem::path path) {
  constexpr int kMostLinks = 40;  // as the system follows
  std::error_code ignored;
  for (int i = 0; i < kMostLinks && std::filesystem::is_symlink(path, ignored); ++i) {
    path = path.parent_path() / std::filesystem::read_symlink(path, ignored);
  }
  return path;
}

// Maps that live, for a signal handler: no lock, so no more than there are places.
std::array<std::atomic<const MappedFile*>, 64> g_maps{};
static_assert(std::atomic<const MappedFile*>::is_always_lock_free);

EVP_MD_CTX* evp(void* context) { return static_cast<EVP_MD_CTX*>(context); }

std::string sha256_of(std::span<const std::byte> bytes) {
  Sha256 sum;
  sum.add(bytes);
  return sum.hex();
}

}  // namespace

Result<std::shared_ptr<MappedFile>> MappedFile::open(const std::filesystem::path& path) {
  if (path.empty()) {
    return Error{"cannot open a file without a name: the name given is empty"};
  }
  // O_NONBLOCK: opening a FIFO would else wait for a writer before it can be refused.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    return system_error("cannot open", path);
  }
  struct stat info {};
  if (::fstat(fd, &info) != 0) {
    const Error error = system_error("cannot stat", path);
    ::close(fd);
    return error;
  }
  if (!S_ISREG(info.st_mode)) {
    ::close(fd);
    return Error{"cannot open " + path.string() + ": not a regular file"};
  }
  std::shared_ptr<MappedFile> file(new MappedFile);
  file->path_ = path;
  file->size_ = static_cast<size_t>(info.st_size);
  if (file->size_ > 0) {
    void* data = ::mmap(nullptr, file->size_, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) {
      const Error error = system_error("cannot map", path);
      ::close(fd);
      file->size_ = 0;
      return error;
    }
    file->data_ = static_cast<const std::byte*>(data);
    for (auto& place : g_maps) {
      const MappedFile* none = nullptr;
      if (place.compare_exchange_strong(none, file.get())) {
        break;
      }
    }
  }
  ::close(fd);
  return file;
}

const char* MappedFile::name_at(const void* address) {
  for (const auto& place : g_maps) {
    const MappedFile* file = place;
    if (file != nullptr && address >= file->data_ && address < file->data_ + file->size_) {
      return file->path_.c_str();
    }
  }
  return nullptr;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) {
    for (auto& place : g_maps) {
      const MappedFile* here = this;
      place.compare_exchange_strong(here, nullptr);
    }
    ::munmap(const_cast<std::byte*>(data_), size_);
  }
}

void MappedFile::release(std::span<const std::byte> bytes) const {
  const auto page = static_cast<uintptr_t>(std::max(1L, ::sysconf(_SC_PAGESIZE)));
  const auto begin = (reinterpret_cast<uintptr_t>(bytes.data()) + page - 1) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(bytes.data() + bytes.size()) / page * page;
  if (begin < end) {  // whole pages; advice, which may fail harmlessly
    ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }
}

AtomicFile::AtomicFile(const std::filesystem::path& path)
    : path_(behind_links(path)), partial_(path_) {
  partial_ += kPartialEnding;
}

Result<AtomicFile> AtomicFile::create(const std::filesystem::path& path) {
  AtomicFile file(path);
  // The final rename would replace even a device such as /dev/null.
  struct stat info {};
  if (::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    return Error{"cannot write " + path.string() + ": it is " +
                 (S_ISDIR(info.st_mode) ? "a directory" : "not a regular file")};
  }
  file.fd_ = ::open(file.partial_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file.fd_ < 0) {
    return system_error("cannot create", file.partial_);
  }
  return file;
}

Result<AtomicFile> AtomicFile::join(const std::filesystem::path& path) {
  AtomicFile file(path);
  file.joined_ = true;
  file.fd_ = ::open(file.partial_.c_str(), O_WRONLY | O_CLOEXEC);
  if (file.fd_ < 0) {
    return system_error("cannot open", file.partial_);
  }
  return file;
}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : path_(std::move(other.path_)),
      partial_(std::move(other.partial_)),
      fd_(std::exchange(other.fd_, -1)),
      position_(other.position_),
      joined_(other.joined_) {}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) {
    ::close(fd_);
    if (!joined_) {
      ::unlink(partial_.c_str());
    }
  }
}

Status AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written =
        ::pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(position_));
    if (written < 0) {
      if (errno == EINTR) {
        continue;
      }
      return system_error("cannot write", partial_);
    }
    position_ += static_cast<uint64_t>(written);
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
  return {};
}

Status AtomicFile::write(std::string_view text) {
  return write(std::as_bytes(std::span(text.data(), text.size())));
}

Status AtomicFile::flush() {
  return ::fsync(fd_) == 0 ? Status() : system_error("cannot flush", partial_);
}

Status AtomicFile::commit() {
  RABIT_CHECK(flush());
  if (::close(std::exchange(fd_, -1)) != 0) {
    const Error error = system_error("cannot close", partial_);
    ::unlink(partial_.c_str());
    return error;
  }
  if (::rename(partial_.c_str(), path_.c_str()) != 0) {
    const Error error = system_error("cannot rename to", path_);
    ::unlink(partial_.c_str());
    return error;
  }
  const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : ".";
  if (const int dir = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); dir >= 0) {
    ::fsync(dir);  // makes the rename itself durable; some file systems refuse, and may
    ::close(dir);
  }
  return {};
}

Status write_file(const std::filesystem::path& path, std::string_view text) {
  RABIT_ASSIGN(AtomicFile file, AtomicFile::create(path));
  RABIT_CHECK(file.write(text));
  return file.commit();
}

Status check_written(const std::string& option, const std::filesystem::path& written,
                     std::span<const std::filesystem::path> inputs) {
  const std::filesystem::path folder = written.has_parent_path() ? written.parent_path() : ".";
  std::error_code failed, ignored;
  if (!std::filesystem::is_directory(folder, failed)) {
    return Error{option + ": no such folder: " + folder.string() +
                 (failed ? " (" + failed.message() + ")" : "")};
  }
  if (std::filesystem::exists(written, ignored) &&
      !std::filesystem::is_regular_file(written, ignored)) {
    return Error{option + ": " + written.string() +
                 (std::filesystem::is_directory(written, ignored) ? " is a folder"
                                                                  : " is not a regular file") +
                 "; name another file"};
  }
  std::filesystem::path partial = behind_links(written);
  partial += kPartialEnding;
  for (const auto& input : inputs) {
    if (std::filesystem::equivalent(written, input, ignored) ||
        std::filesystem::equivalent(partial, input, ignored)) {
      return Error{option + ": would overwrite the input " + input.string() +
                   "; name another file"};
    }
  }
  return {};
}

Result<std::optional<FileLock>> FileLock::try_take(const std::filesystem::path& path) {
  FileLock lock;
  lock.lock_ = path;
  lock.lock_ += ".lock";
  while (true) {
    lock.fd_ = ::open(lock.lock_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (lock.fd_ < 0) {
      return Error{"cannot create " + lock.lock_.string() + ": " + std::strerror(errno)};
    }
    if (::flock(lock.fd_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      ::close(std::exchange(lock.fd_, -1));
      return std::optional<FileLock>();
    }
    // Its former holder may have removed the file between the two calls: then it locks nothing.
    struct stat held {
    }, named{};
    if (::fstat(lock.fd_, &held) == 0 && ::stat(lock.lock_.c_str(), &named) == 0 &&
        held.st_ino == named.st_ino && held.st_dev == named.st_dev) {
      if (held.st_size > 0) {
        ::close(std::exchange(lock.fd_, -1));
        return Error{lock.lock_.string() +
                     ": is no lock of ours, it holds something; name another file"};
      }
      return std::optional(std::move(lock));
    }
    ::close(std::exchange(lock.fd_, -1));
  }
}

Result<FileLock> FileLock::take(const std::filesystem::path& path) {
  RABIT_ASSIGN(auto lock, try_take(path));
  if (!lock) {
    return Error{path.string() +
                 ": another process is writing it; wait for it, or name another file"};
  }
  return std::move(*lock);
}

Result<FileLock> FileLock::wait(const std::filesystem::path& path,
                                const std::function<void()>& held) {
  constexpr auto kPause = std::chrono::milliseconds(100);
  for (bool first = true;; first = false) {
    RABIT_CHECK(check_interrupt());
    RABIT_ASSIGN(auto lock, try_take(path));
    if (lock) {
      return std::move(*lock);
    }
    if (first) {
      held();
    }
    std::this_thread::sleep_for(kPause);
  }
}

FileLock::FileLock(FileLock&& other) noexcept
    : lock_(std::move(other.lock_)), fd_(std::exchange(other.fd_, -1)) {}

FileLock::~FileLock() {
  if (fd_ >= 0) {
    ::unlink(lock_.c_str());
    ::close(fd_);
  }
}

Result<std::string> read_file(const std::filesystem::path& path) {
  RABIT_ASSIGN(const auto file, MappedFile::open(path));
  const auto bytes = file->bytes();
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Result<std::string> read_text_file(const std::filesystem::path& path) {
  RABIT_ASSIGN(const std::string bytes, read_file(path));
  return text_of(bytes, path.string());
}

Result<std::string> text_of(std::string_view bytes, const std::string& from) {
  if (const size_t bad = first_invalid_utf8(bytes); bad != bytes.size()) {
    return Error{from + ": not UTF-8 at byte " + std::to_string(bad) +
                 "; convert it to plain UTF-8 text first"};
  }
  const std::string_view text = without_byte_order_mark(bytes);
  if (text.empty()) {
    return Error{from + ": empty; give a plain UTF-8 text"};
  }
  return std::string(text);
}

std::string_view without_byte_order_mark(std::string_view text) {
  constexpr std::string_view kMark = "\xEF\xBB\xBF";
  return text.substr(text.starts_with(kMark) ? kMark.size() : 0);
}

size_t first_invalid_utf8(std::string_view text) {
  const auto byte = [&](size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U;
  };
  const auto in = [](unsigned value, unsigned low, unsigned high) {
    return low <= value && value <= high;
  };
  size_t i = 0;
  while (i < text.size()) {
    const unsigned a = byte(i), b = byte(i + 1), c = byte(i + 2), d = byte(i + 3);
    const bool tail2 = in(c, 0x80, 0xBF), tail3 = in(d, 0x80, 0xBF);
    if (a < 0x80) {
      i += 1;
    } else if (in(a, 0xC2, 0xDF) && in(b, 0x80, 0xBF)) {
      i += 2;
    } else if (tail2 && in(b, a == 0xE0 ? 0xA0 : 0x80, a == 0xED ? 0x9F : 0xBF) &&
               in(a, 0xE0, 0xEF)) {
      i += 3;
    } else if (tail2 && tail3 && in(a, 0xF0, 0xF4) &&
               in(b, a == 0xF0 ? 0x90 : 0x80, a == 0xF4 ? 0x8F : 0xBF)) {
      i += 4;
    } else {
      return i;
    }
  }
  return text.size();
}

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  EVP_DigestInit_ex(evp(context_.get()), EVP_sha256(), nullptr);
}

void Sha256::Free::operator()(void* context) const { EVP_MD_CTX_free(evp(context)); }

void Sha256::add(std::span<const std::byte> bytes) {
  EVP_DigestUpdate(evp(context_.get()), bytes.data(), bytes.size());
}

std::string Sha256::hex() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  EVP_DigestFinal_ex(evp(context_.get()), digest, &size);
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (unsigned int i = 0; i < size; ++i) {
    out += kHex[digest[i] >> 4];
    out += kHex[digest[i] & 15];
  }
  return out;
}

Result<std::string> sha256_file(const std::filesystem::path& path) {
  RABIT_ASSIGN(const auto file, MappedFile::open(path));
  return sha256_of(file->bytes());
}

std::string sha256_hex(std::string_view bytes) {
  return sha256_of(std::as_bytes(std::span(bytes.data(), bytes.size())));
}

}  // namespace rabit
