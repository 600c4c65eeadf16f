// The training text: sources that are tokenized once, into files that are mapped.
//
// A token file: int32 token ids, then 160 bytes that say what they are (`Footer` in corpus.cpp).
// Little-endian. Written whole or not at all, named by the digest of all that its tokens depend on.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/threads.h"
#include "rabit/result.h"
#include "text/tokenizer.h"

namespace rabit::train {

/// What one --data names: a text, or all texts of a folder one after the other.
struct TokenSource {
  std::string name;    // without folders
  std::string sha256;  // of the file; of a folder, of its files' names and digests
  std::span<const int32_t> tokens;
  std::shared_ptr<const void> owner;  // of the tokens' memory
  int64_t documents = 0;
};

struct TrainingText {
  std::vector<TokenSource> sources;
  int64_t tokens() const;
};

/// A source of these tokens.
TokenSource source_of(std::vector<int32_t> tokens, std::string name, std::string sha256);

struct TokenizeOptions {
  std::string field = "text";             // of JSON Lines
  std::filesystem::path cache;            // folder of the token files, made where it is missing
  std::function<void()> waiting = [] {};  // called where another process is tokenizing the same
};

/// Where token files go unless said otherwise: $XDG_CACHE_HOME/rabit/tokens, else
/// ~/.cache/rabit/tokens; empty where neither is set.
std::filesystem::path default_token_cache();

/// The source's tokens: every document, and after each the token that ends one (of the name
/// <|endoftext|>, or the end of a sequence). From the cache, or tokenized on all threads of `pool`;
/// `progress` gets the tokens so far. Errors: those of text_files() and read_documents(), a cache
/// that cannot be written, a text that changes, an interrupt.
Result<TokenSource> tokenize_source(const Tokenizer& tokenizer, const std::filesystem::path& path,
                                    const TokenizeOptions& options, ThreadPool& pool,
                                    const std::function<void(int64_t)>& progress);

}  // namespace rabit::train
