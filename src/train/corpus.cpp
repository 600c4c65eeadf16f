#include "train/corpus.h"

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/files.h"
#include "base/interrupt.h"
#include "io/documents.h"
#include "train/guard.h"

namespace rabit::train {
namespace {

constexpr std::array<char, 8> kMagic = {'R', 'A', 'B', 'I', 'T', 'T', 'O', 'K'};
constexpr uint32_t kVersion = 1;
constexpr size_t kBatchBytes = size_t{4} << 20;  // of text, for each thread
constexpr size_t kBatchesAhead = 2;

using Digest = std::array<char, 64>;  // in hex

struct Footer {
  std::array<char, 8> magic = kMagic;
  uint32_t version = kVersion, reserved = 0;
  uint64_t tokens = 0, documents = 0;
  Digest key{};     // of what the tokens depend on; names the file
  Digest sha256{};  // of the tokens
};
static_assert(sizeof(Footer) == 160);

Digest digest_of(const std::string& hex) {
  Digest out{};
  std::copy_n(hex.begin(), out.size(), out.begin());
  return out;
}

// A part of a document, and whether the document ends with it.
struct Part {
  std::string text;
  bool last = false;
};
using Batch = std::vector<Part>;

// Batches from the thread that reads to the one that has them tokenized.
class BatchQueue {
 public:
  // Waits for room. False: nobody will take it.
  bool put(Batch batch) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return abandoned_ || batches_.size() < kBatchesAhead; });
    if (!abandoned_) {
      batches_.push_back(std::move(batch));
      changed_.notify_all();
    }
    return !abandoned_;
  }
  // Waits for one; none after finish().
  std::optional<Batch> take() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return finished_ || !batches_.empty(); });
    if (batches_.empty()) {
      return std::nullopt;
    }
    Batch batch = std::move(batches_.front());
    batches_.pop_front();
    changed_.notify_all();
    return batch;
  }
  void finish() { set(finished_); }
  void abandon() { set(abandoned_); }

 private:
  void set(bool& flag) {
    const std::lock_guard lock(mutex_);
    flag = true;
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Batch> batches_;
  bool finished_ = false, abandoned_ = false;
};

// Puts the texts of all files into the queue, as long as anybody takes them.
Status read_batches(std::span<const std::filesystem::path> files, const std::string& field,
                    size_t batch_bytes, BatchQueue& queue) {
  Batch batch;
  size_t bytes = 0;
  bool wanted = true;
  const auto flush = [&]() -> Status {
    bytes = 0;
    wanted = queue.put(std::exchange(batch, {}));
    return wanted ? Status() : Error{"not wanted any more"};
  };
  const auto read_all = [&]() -> Status {
    for (const auto& file : files) {
      RABIT_CHECK(read_documents(file, field, [&](std::string_view part, bool last) -> Status {
        RABIT_CHECK(check_interrupt());
        bytes += part.size();
        batch.push_back({std::string(part), last});
        return bytes < batch_bytes ? Status() : flush();
      }));
    }
    return flush();
  };
  const Status status = read_all();
  return wanted ? status : Status();
}

// read_batches on a thread of its own.
class Reader {
 public:
  Reader(std::span<const std::filesystem::path> files, const std::string& field, size_t batch_bytes)
      : thread_([=, this, &field] {
          status_ =
              without_exceptions([&] { return read_batches(files, field, batch_bytes, queue); });
          queue.finish();
        }) {}
  ~Reader() { (void)join(); }

  // Ends it. Errors: what was wrong with the files.
  Status join() {
    queue.abandon();
    if (thread_.joinable()) {
      thread_.join();
    }
    return status_;
  }

  BatchQueue queue;

 private:
  Status status_;
  std::thread thread_;
};

int32_t document_end_token(const Tokenizer& tokenizer) {
  const std::vector<int32_t> parsed = tokenizer.encode(kDocumentEnd, true);
  return parsed.size() == 1 ? parsed[0] : static_cast<int32_t>(tokenizer.spec().eos_id);
}

// Of one file, its own; of a folder's, of their names and digests.
Result<std::string> files_digest(std::span<const std::filesystem::path> files,
                                 const std::filesystem::path& source, bool folder) {
  std::string digest, all;
  for (const auto& file : files) {
    RABIT_CHECK(check_interrupt());
    RABIT_ASSIGN(digest, sha256_file(file));
    const std::string name = file.lexically_relative(source).generic_string();
    all += digest + ' ' + std::to_string(name.size()) + ':' + name + '\n';
  }
  return folder ? sha256_hex(all) : digest;
}

// All that a tokenizer's ids depend on.
std::string tokenizer_digest(const Tokenizer& tokenizer) {
  const TokenizerSpec& spec = tokenizer.spec();
  std::string all = spec.model + '\n' + spec.pre + '\n' + std::to_string(spec.eos_id) + '\n';
  const auto add = [&](const std::string& text) {
    all += std::to_string(text.size()) + ':' + text;
  };
  for (size_t id = 0; id < spec.tokens.size(); ++id) {
    add(spec.tokens[id]);
    add(id < spec.token_types.size() ? std::to_string(spec.token_types[id]) : "");
  }
  for (const std::string& merge : spec.merges) {
    add(merge);
  }
  return sha256_hex(all);
}

// The token file's tokens, or nothing where it is not one of this key.
std::optional<TokenSource> open_tokens(const std::filesystem::path& path, const std::string& key) {
  const auto file = MappedFile::open(path);
  if (!file) {
    return std::nullopt;
  }
  const auto bytes = (*file)->bytes();
  Footer footer;
  if (bytes.size() < sizeof(footer)) {
    return std::nullopt;
  }
  const size_t body = bytes.size() - sizeof(footer);
  std::memcpy(&footer, bytes.data() + body, sizeof(footer));
  if (footer.magic != kMagic || footer.version != kVersion || footer.key != digest_of(key) ||
      body % sizeof(int32_t) != 0 || footer.tokens != body / sizeof(int32_t)) {
    return std::nullopt;
  }
  Sha256 sum;
  sum.add(bytes.first(body));
  if (footer.sha256 != digest_of(sum.hex())) {
    return std::nullopt;
  }
  TokenSource source;
  source.tokens = {reinterpret_cast<const int32_t*>(bytes.data()),
                   static_cast<size_t>(footer.tokens)};
  source.owner = *file;
  source.documents = static_cast<int64_t>(footer.documents);
  return source;
}

// Tokenizes batch after batch into `out`.
Status write_tokens(const Tokenizer& tokenizer, BatchQueue& queue, ThreadPool& pool,
                    const std::string& key, AtomicFile& out,
                    const std::function<void(int64_t)>& progress) {
  const int32_t end = document_end_token(tokenizer);
  Footer footer;
  footer.key = digest_of(key);
  Sha256 sum;
  while (const auto batch = queue.take()) {
    RABIT_CHECK(check_interrupt());
    std::vector<std::vector<int32_t>> ids(batch->size());
    pool.parallel_for(static_cast<int64_t>(ids.size()), 1, [&](int64_t begin, int64_t stop, int) {
      for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(stop); ++i) {
        const Part& part = (*batch)[i];
        ids[i] = tokenizer.encode(part.text, /*parse_special=*/false);
        if (part.last && end >= 0) {
          ids[i].push_back(end);
        }
      }
    });
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto bytes = std::as_bytes(std::span(ids[i]));
      RABIT_CHECK(out.write(bytes));
      sum.add(bytes);
      footer.tokens += ids[i].size();
      footer.documents += (*batch)[i].last ? 1 : 0;
    }
    progress(static_cast<int64_t>(footer.tokens));
  }
  footer.sha256 = digest_of(sum.hex());
  return out.write(std::as_bytes(std::span(&footer, 1)));
}

}  // namespace

int64_t TrainingText::tokens() const {
  size_t sum = 0;
  for (const TokenSource& source : sources) {
    sum += source.tokens.size();
  }
  return static_cast<int64_t>(sum);
}

TokenSource source_of(std::vector<int32_t> tokens, std::string name, std::string sha256) {
  const auto owner = std::make_shared<const std::vector<int32_t>>(std::move(tokens));
  return {std::move(name), std::move(sha256), *owner, owner};
}

std::filesystem::path default_token_cache() {
  const auto set = [](const char* name) {
    const char* value = std::getenv(name);
    return std::filesystem::path(value != nullptr ? value : "");
  };
  const std::filesystem::path tail = std::filesystem::path("rabit") / "tokens";
  if (const auto cache = set("XDG_CACHE_HOME"); cache.is_absolute()) {
    return cache / tail;
  }
  if (const auto home = set("HOME"); home.is_absolute()) {
    return home / ".cache" / tail;
  }
  return {};
}

Result<TokenSource> tokenize_source(const Tokenizer& tokenizer, const std::filesystem::path& path,
                                    const TokenizeOptions& options, ThreadPool& pool,
                                    const std::function<void(int64_t)>& progress) {
  if (options.cache.empty()) {
    return Error{
        "no folder for tokens: neither $XDG_CACHE_HOME nor $HOME is set; give --token-cache"};
  }
  RABIT_ASSIGN(const auto files, text_files(path));
  std::error_code failed;
  const bool folder = std::filesystem::is_directory(path, failed);
  RABIT_ASSIGN(const std::string digest, files_digest(files, path, folder));
  const bool json_lines = std::any_of(files.begin(), files.end(), is_json_lines);
  const std::string key =
      sha256_hex("tokens " + std::to_string(kVersion) + '\n' + digest + '\n' +
                 tokenizer_digest(tokenizer) + '\n' + (json_lines ? options.field : ""));
  const std::filesystem::path kept = options.cache / (key + ".tokens");
  const auto in_cache = [](const Error& error) {
    return error.interrupted
               ? error
               : Error{error.message + "; another folder for tokens: --token-cache FOLDER"};
  };
  auto found = open_tokens(kept, key);
  std::optional<FileLock> lock;
  if (!found) {
    std::filesystem::create_directories(options.cache, failed);
    auto waited = FileLock::wait(kept, options.waiting);
    if (!waited) {
      return in_cache(waited.error());
    }
    lock.emplace(std::move(*waited));
    found = open_tokens(kept, key);  // what the other process has made
  }
  if (!found) {
    auto file = AtomicFile::create(kept);
    if (!file) {
      return in_cache(file.error());
    }
    Reader reader(files, options.field, kBatchBytes * static_cast<size_t>(pool.size()));
    const Status written = write_tokens(tokenizer, reader.queue, pool, key, *file, progress);
    RABIT_CHECK(reader.join());
    if (!written) {
      return in_cache(written.error());
    }
    RABIT_ASSIGN(const std::string after, files_digest(files, path, folder));
    if (after != digest) {
      return Error{path.string() + ": changed while it was read; run this again"};
    }
    if (const Status committed = file->commit(); !committed) {
      return in_cache(committed.error());
    }
    found = open_tokens(kept, key);
    if (!found) {
      return Error{kept.string() + ": cannot be read back; is its disk damaged?"};
    }
  }
  std::filesystem::path named = path;
  if (!named.has_filename()) {
    named = named.parent_path();  // "folder/"
  }
  found->name = named.filename().string();
  found->sha256 = digest;
  return std::move(*found);
}

}  // namespace rabit::train
