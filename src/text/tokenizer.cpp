// Byte-level BPE, from the outside in: special tokens are cut out of the text, what lies between is
// cut into valid UTF-8 and maximal stretches of other bytes, valid text is cut into pieces by the
// pre-tokenizer while each invalid stretch is one piece, and merges turn pieces into ids.
// A tokenizer never changes after create(), so threads may share it.
#include "text/tokenizer.h"

#include <algorithm>
#include <array>
#include <limits>
#include <unordered_map>
#include <utility>

#include "base/files.h"
#include "text/bpe.h"
#include "text/pretokenizer.h"

namespace rabit {
namespace {

// GGUF `tokenizer.ggml.token_type`.
constexpr int64_t kUnknownToken = 2;
constexpr int64_t kControlToken = 3;
constexpr int64_t kUserDefinedToken = 4;
constexpr int64_t kUnusedToken = 5;

// Pieces recur (words), so their ids are looked up in what this very call has put out already.
constexpr size_t kCachedPieceBytes = 64;
constexpr size_t kCachedPieces = size_t{1} << 17;

/// Control and user-defined tokens by their text.
class SpecialTokens {
 public:
  SpecialTokens() = default;

  /// The texts in `spec` must stay where they are as long as this lives.
  explicit SpecialTokens(const TokenizerSpec& spec) {
    for (size_t id = 0; id < spec.token_types.size(); ++id) {
      const int64_t type = spec.token_types[id];
      if ((type == kControlToken || type == kUserDefinedToken) && !spec.tokens[id].empty()) {
        tokens_.push_back({spec.tokens[id], static_cast<int32_t>(id)});
      }
    }
    std::stable_sort(tokens_.begin(), tokens_.end(), [](const Token& a, const Token& b) {
      const auto first_a = static_cast<uint8_t>(a.text[0]),
                 first_b = static_cast<uint8_t>(b.text[0]);
      return first_a != first_b ? first_a < first_b : a.text.size() > b.text.size();
    });
    for (size_t i = 0; i < tokens_.size(); ++i) {
      ++starts_[static_cast<uint8_t>(tokens_[i].text[0]) + 1];
    }
    for (size_t b = 0; b < 256; ++b) {
      starts_[b + 1] += starts_[b];
    }
  }

  struct Found {
    size_t begin = 0, size = 0;  // size 0: none
    int32_t id = -1;
  };

  /// The first special token at or after `from`, the longest of those that begin there.
  Found find(std::string_view text, size_t from) const {
    for (size_t i = from; !tokens_.empty() && i < text.size(); ++i) {
      const auto byte = static_cast<uint8_t>(text[i]);
      for (size_t t = starts_[byte]; t < starts_[byte + 1]; ++t) {
        if (text.substr(i).starts_with(tokens_[t].text)) {
          return {i, tokens_[t].text.size(), tokens_[t].id};
        }
      }
    }
    return {text.size(), 0, -1};
  }

 private:
  struct Token {
    std::string_view text;
    int32_t id;
  };
  std::vector<Token> tokens_;         // by first byte, then longest first
  std::array<size_t, 257> starts_{};  // tokens_ that begin with byte b: starts_[b] .. starts_[b+1]
};

class ByteLevelTokenizer final : public Tokenizer {
 public:
  static Result<std::shared_ptr<Tokenizer>> create(TokenizerSpec spec) {
    auto made = std::make_shared<ByteLevelTokenizer>();
    RABIT_ASSIGN(made->pre_, PreTokenizer::create(spec.pre));
    RABIT_ASSIGN(made->bpe_, Bpe::create(spec.tokens, spec.merges));
    made->spec_ = std::move(spec);
    made->special_ = SpecialTokens(made->spec_);
    made->spell_tokens();
    return std::shared_ptr<Tokenizer>(std::move(made));
  }

  std::vector<int32_t> encode(std::string_view text, bool parse_special) const override {
    std::vector<int32_t> ids;
    Work work;
    size_t done = 0;
    while (done < text.size()) {
      const SpecialTokens::Found special =
          parse_special ? special_.find(text, done) : SpecialTokens::Found{text.size(), 0, -1};
      encode_plain(text.substr(done, special.begin - done), work, ids);
      if (special.size > 0) {
        ids.push_back(special.id);
      }
      done = special.begin + special.size;
    }
    return ids;
  }

  std::string decode(std::span<const int32_t> ids, bool show_special) const override {
    std::string text;
    for (const int32_t id : ids) {
      if (id < 0 || id >= vocab_size() || (hidden_[id] && !show_special)) {
        continue;
      }
      text.append(spelled_, spelled_at_[id], spelled_at_[id + 1] - spelled_at_[id]);
    }
    return text;
  }

 private:
  /// What one call of encode() needs.
  struct Work {
    struct Range {
      size_t begin, size;  // of the ids put out so far
    };
    PreTokenizer::Scratch pre;
    Bpe::Scratch bpe;
    std::unordered_map<std::string_view, Range> seen;
  };

  void encode_plain(std::string_view text, Work& work, std::vector<int32_t>& ids) const {
    const auto piece_to_ids = [&](std::string_view piece) { encode_piece(piece, work, ids); };
    size_t done = 0;
    while (done < text.size()) {
      const size_t valid = first_invalid_utf8(text.substr(done));
      pre_.split(text.substr(done, valid), work.pre, piece_to_ids);
      done += valid;
      size_t end = done;
      // A UTF-8 sequence has at most four bytes: those are all that decide whether one begins here.
      while (end < text.size() && first_invalid_utf8(text.substr(end, 4)) == 0) {
        ++end;
      }
      if (end > done) {
        encode_piece(text.substr(done, end - done), work, ids);
      }
      done = end;
    }
  }

  void encode_piece(std::string_view piece, Work& work, std::vector<int32_t>& ids) const {
    if (piece.size() == 1 || piece.size() > kCachedPieceBytes) {
      bpe_.encode(piece, work.bpe, ids);
      return;
    }
    const auto seen = work.seen.find(piece);
    if (seen != work.seen.end()) {
      const auto [begin, size] = seen->second;
      for (size_t i = 0; i < size; ++i) {
        ids.push_back(ids[begin + i]);
      }
      return;
    }
    const size_t begin = ids.size();
    bpe_.encode(piece, work.bpe, ids);
    if (work.seen.size() < kCachedPieces) {
      work.seen.emplace(piece, Work::Range{begin, ids.size() - begin});
    }
  }

  void spell_tokens() {
    for (size_t id = 0; id < spec_.tokens.size(); ++id) {
      const int64_t type = spec_.token_types.empty() ? 1 : spec_.token_types[id];
      const bool literal = type == kControlToken || type == kUserDefinedToken;
      spelled_at_.push_back(spelled_.size());
      spelled_ += literal ? spec_.tokens[id] : token_bytes(spec_.tokens[id]);
      hidden_.push_back(type == kControlToken || type == kUnknownToken || type == kUnusedToken);
    }
    spelled_at_.push_back(spelled_.size());
  }

  PreTokenizer pre_;
  Bpe bpe_;
  SpecialTokens special_;
  std::string spelled_;             // the bytes of all tokens, one after the other
  std::vector<size_t> spelled_at_;  // (vocab_size + 1) where each begins
  std::vector<bool> hidden_;        // (vocab_size) shown by decode() only on request
};

Status check_spec(const TokenizerSpec& spec) {
  if (spec.model != "gpt2") {
    return Error{"unknown tokenizer model '" + spec.model + "'; known: gpt2"};
  }
  if (spec.tokens.size() >= static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    return Error{"too many tokens: " + std::to_string(spec.tokens.size())};
  }
  if (!spec.token_types.empty() && spec.token_types.size() != spec.tokens.size()) {
    return Error{std::to_string(spec.token_types.size()) + " token types for " +
                 std::to_string(spec.tokens.size()) + " tokens"};
  }
  const auto vocab_size = static_cast<int64_t>(spec.tokens.size());
  for (const auto& [name, id] : {std::pair{"BOS", spec.bos_id}, std::pair{"EOS", spec.eos_id}}) {
    if (id < -1 || id >= vocab_size) {
      return Error{std::string(name) + " token id " + std::to_string(id) +
                   " lies outside the vocabulary of " + std::to_string(vocab_size)};
    }
  }
  if (spec.add_bos && spec.bos_id < 0) {
    return Error{"a BOS token is to be added, but none is named"};
  }
  return {};
}

}  // namespace

Result<std::shared_ptr<Tokenizer>> Tokenizer::create(TokenizerSpec spec) {
  RABIT_CHECK(check_spec(spec));
  return ByteLevelTokenizer::create(std::move(spec));
}

}  // namespace rabit
