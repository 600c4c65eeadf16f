#include "io/documents.h"

#include <archive.h>
#include <archive_entry.h>

#include <algorithm>
#include <array>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/json.h"

namespace rabit {
namespace {

constexpr std::array kCompressed = {".gz", ".xz", ".zst"};
constexpr std::array kTexts = {".txt", ".text", ".md", ".jsonl", ".ndjson"};
constexpr size_t kReadBytes = size_t{1} << 18;
constexpr size_t kLongestLine = size_t{1} << 30;

// The file's name without what says that it is compressed.
std::filesystem::path plain_name(const std::filesystem::path& path) {
  const auto is = [&](const char* ending) { return path.extension() == ending; };
  return std::any_of(kCompressed.begin(), kCompressed.end(), is) ? path.stem() : path.filename();
}

bool is_text_name(const std::filesystem::path& path) {
  const auto ending = plain_name(path).extension();
  return std::any_of(kTexts.begin(), kTexts.end(),
                     [&](const char* text) { return ending == text; });
}

// A file's bytes as they were before they were compressed.
class ByteStream {
 public:
  static Result<ByteStream> open(const std::filesystem::path& path) {
    RABIT_CHECK(MappedFile::open(path));  // says best what is wrong with the name
    ByteStream stream;
    stream.where_ = path.string();
    stream.archive_.reset(archive_read_new());
    archive* a = stream.archive_.get();
    archive_read_support_filter_gzip(a);
    archive_read_support_filter_xz(a);
    archive_read_support_filter_zstd(a);
    archive_read_support_format_raw(a);
    archive_read_support_format_empty(a);
    if (archive_read_open_filename(a, path.c_str(), kReadBytes) != ARCHIVE_OK) {
      return stream.error();
    }
    archive_entry* entry = nullptr;
    const int found = archive_read_next_header(a, &entry);
    if (found != ARCHIVE_OK && found != ARCHIVE_EOF) {
      return stream.error();
    }
    stream.ended_ = found == ARCHIVE_EOF;
    return stream;
  }

  // The next bytes, which stay until the next call; none at the end.
  Result<std::string_view> next() {
    const void* data = nullptr;
    size_t size = 0;
    la_int64_t offset = 0;
    while (!ended_ && size == 0) {
      const int got = archive_read_data_block(archive_.get(), &data, &size, &offset);
      ended_ = got == ARCHIVE_EOF;
      if (got != ARCHIVE_OK && got != ARCHIVE_EOF) {
        return error();
      }
    }
    return std::string_view(static_cast<const char*>(data), ended_ ? 0 : size);
  }

 private:
  Error error() const {
    const char* said = archive_error_string(archive_.get());
    return Error{where_ + ": damaged, or not what its first bytes say: " +
                 (said != nullptr ? said : "it cannot be decompressed")};
  }

  struct Free {
    void operator()(archive* a) const { archive_read_free(a); }
  };
  std::unique_ptr<archive, Free> archive_;
  std::string where_;
  bool ended_ = false;
};

// Calls `line(text, number)` for every line, its line feed included where it has one.
template <typename Line>
Status for_each_line(const std::filesystem::path& path, const Line& line) {
  RABIT_ASSIGN(ByteStream stream, ByteStream::open(path));
  std::string held;    // begins with the current line
  size_t offset = 0;   // of `held` in the text
  size_t checked = 0;  // bytes of `held` that are UTF-8
  int64_t number = 0;
  const auto whole = [&](size_t begin, size_t end) {
    const auto text = std::string_view(held).substr(begin, end - begin);
    ++number;
    return line(number == 1 ? without_byte_order_mark(text) : text, number);
  };
  while (true) {
    RABIT_ASSIGN(const std::string_view more, stream.next());
    held += more;
    // The last bytes may be the first of a character that goes on.
    const size_t valid = checked + first_invalid_utf8(std::string_view(held).substr(checked));
    constexpr size_t kLongestCharacter = 4;
    if (valid < held.size() && (more.empty() || held.size() - valid >= kLongestCharacter)) {
      return Error{path.string() + ": not UTF-8 at byte " + std::to_string(offset + valid) +
                   "; convert the file to plain UTF-8 text first"};
    }
    size_t begin = 0;
    for (size_t end = held.find('\n', checked); end < valid; end = held.find('\n', begin)) {
      RABIT_CHECK(whole(begin, end + 1));
      begin = end + 1;
    }
    if (more.empty()) {
      return begin < held.size() ? whole(begin, held.size()) : Status();
    }
    offset += begin;
    held.erase(0, begin);
    if (held.size() > kLongestLine) {
      return Error{path.string() + ": line " + std::to_string(number + 1) +
                   " is longer than a gigabyte; is this a text?"};
    }
    checked = valid - begin;
  }
}

// The character that ends before `end` is white space, of Unicode's property White_Space. text is
// UTF-8.
bool is_space_before(std::string_view text, size_t end) {
  size_t begin = end - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0U) == 0x80U) {
    --begin;
  }
  const std::string_view c = text.substr(begin, end - begin);
  if (c.size() == 1) {
    return c[0] == ' ' || (c[0] >= '\t' && c[0] <= '\r');
  }
  static constexpr std::array<std::string_view, 19> kSpaces = {
      "\u0085", "\u00A0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003",
      "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200A",
      "\u2028", "\u2029", "\u202F", "\u205F", "\u3000"};
  return std::find(kSpaces.begin(), kSpaces.end(), c) != kSpaces.end();
}

bool is_letter_or_digit(char c) {
  return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
}

// The last place in (0, text.size()), not before `from`, where a part may begin; 0: none.
size_t last_cut(std::string_view text, size_t from) {
  for (size_t i = text.size(); i-- > std::max<size_t>(1, from);) {
    if ((text[i] == ' ' && !is_space_before(text, i)) ||
        (text[i] == '\n' && is_letter_or_digit(text[i - 1]))) {
      return i;
    }
  }
  return 0;
}

// A document that grows line by line and leaves in parts.
class Document {
 public:
  Document(const DocumentSink& sink, size_t part_bytes) : sink_(sink), part_bytes_(part_bytes) {}

  Status add(std::string_view line) {
    const size_t before = text_.size();
    text_ += line;
    if (text_.size() < part_bytes_) {
      return {};
    }
    const size_t cut = last_cut(text_, before);
    if (cut > 0) {
      RABIT_CHECK(sink_(std::string_view(text_).substr(0, cut), false));
      text_.erase(0, cut);
    }
    return {};
  }

  Status end() {
    if (text_.empty()) {
      return {};
    }
    any_ = true;
    const Status status = sink_(text_, true);
    text_.clear();
    return status;
  }

  bool any() const { return any_; }

 private:
  const DocumentSink& sink_;
  size_t part_bytes_;
  std::string text_;
  bool any_ = false;
};

std::string_view without_line_end(std::string_view line) {
  while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) {
    line.remove_suffix(1);
  }
  return line;
}

Status read_plain(const std::filesystem::path& path, Document& document) {
  RABIT_CHECK(for_each_line(path, [&](std::string_view line, int64_t) -> Status {
    return without_line_end(line) == kDocumentEnd ? document.end() : document.add(line);
  }));
  return document.end();
}

Status read_json_lines(const std::filesystem::path& path, const std::string& field,
                       Document& document) {
  return for_each_line(path, [&](std::string_view line, int64_t number) -> Status {
    if (line.find_first_not_of(" \t\r\n") == std::string_view::npos) {
      return {};
    }
    const auto value = parse_json(line);
    const auto wrong = [&](const std::string& what) {
      return Error{path.string() + ": line " + std::to_string(number) + ": " + what};
    };
    if (!value || !value->is_object()) {
      return wrong("no JSON object; a .jsonl file has one a line");
    }
    const auto found = value->find(field);
    if (found == value->end() || !found->is_string()) {
      return wrong("has no string \"" + field + "\"; name the field with --data-field");
    }
    // Lines again, so that a long document leaves in parts.
    const auto& text = found->get_ref<const std::string&>();
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find('\n', begin), text.size() - 1) + 1;
      RABIT_CHECK(document.add(std::string_view(text).substr(begin, end - begin)));
      begin = end;
    }
    return document.end();
  });
}

}  // namespace

bool is_json_lines(const std::filesystem::path& path) {
  const auto ending = plain_name(path).extension();
  return ending == ".jsonl" || ending == ".ndjson";
}

Result<std::vector<std::filesystem::path>> text_files(const std::filesystem::path& path) {
  std::error_code failed;
  if (!std::filesystem::is_directory(path, failed)) {
    RABIT_CHECK(MappedFile::open(path));
    return std::vector{path};
  }
  std::vector<std::filesystem::path> found;
  auto at = std::filesystem::recursive_directory_iterator(path, failed);
  for (; !failed && at != std::filesystem::recursive_directory_iterator(); at.increment(failed)) {
    std::error_code unknown;
    if (at->is_regular_file(unknown) && is_text_name(at->path())) {
      found.push_back(at->path());
    }
  }
  if (failed) {
    return Error{"cannot read the folder " + path.string() + ": " + failed.message()};
  }
  if (found.empty()) {
    return Error{path.string() +
                 ": the folder holds no text: no .txt, .text, .md, .jsonl or .ndjson, nor such "
                 "with .gz, .xz or .zst"};
  }
  std::sort(found.begin(), found.end());
  return found;
}

Status read_documents(const std::filesystem::path& path, const std::string& field,
                      const DocumentSink& sink, size_t part_bytes) {
  Document document(sink, std::max<size_t>(2, part_bytes));
  RABIT_CHECK(is_json_lines(path) ? read_json_lines(path, field, document)
                                  : read_plain(path, document));
  if (!document.any()) {
    return Error{path.string() + ": holds no text; give a UTF-8 text that is not empty"};
  }
  return {};
}

}  // namespace rabit
