// Text to token ids and back. Ids of any byte string decode to exactly those bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "rabit/result.h"

namespace rabit {

/// What a model file says of its tokenizer (GGUF `tokenizer.ggml.*`).
struct TokenizerSpec {
  std::string model;                 // "gpt2": byte-level BPE
  std::string pre;                   // pre-tokenizer's name: "smollm"
  std::vector<std::string> tokens;   // by id
  std::vector<int64_t> token_types;  // by id: 1 normal, 2 unknown, 3 control, 4 user-defined, ...
  std::vector<std::string> merges;   // "left right", most frequent first
  int64_t bos_id = -1;
  int64_t eos_id = -1;
  bool add_bos = false;
};

class Tokenizer {
 public:
  /// Errors: a model or pre-tokenizer that is not known (with the list of those that are), a merge
  /// whose parts or result are not in the vocabulary, a missing byte token.
  static Result<std::shared_ptr<Tokenizer>> create(TokenizerSpec spec);
  virtual ~Tokenizer() = default;

  /// Token ids of `text`, any bytes. With `parse_special`, control and user-defined tokens that
  /// occur in the text become their ids (longest match first); without, they are plain text.
  /// No BOS is added here.
  virtual std::vector<int32_t> encode(std::string_view text, bool parse_special) const = 0;

  /// The bytes of the ids; control tokens give their text if `show_special`, else nothing. Ids
  /// outside the vocabulary give nothing.
  virtual std::string decode(std::span<const int32_t> ids, bool show_special) const = 0;

  const TokenizerSpec& spec() const { return spec_; }
  int64_t vocab_size() const { return static_cast<int64_t>(spec_.tokens.size()); }

 protected:
  TokenizerSpec spec_;
};

}  // namespace rabit
