// Byte-pair merges over token ids, and the alphabet of byte-level vocabularies.
// Such a vocabulary spells every token with 256 printable characters, one a byte. A piece starts as
// the tokens of its bytes; then, as long as two neighbours have a merge, the most frequent merge
// (lowest rank, leftmost first) joins them. A heap over a linked list makes this O(n log n).
// Byte tokens that a vocabulary lacks: its tokenizer was trained on text that never had the byte.
// The byte is dropped and its neighbours become adjacent, which is what the Hugging Face
// `tokenizers` package does for a model without an unknown token. This is the one case in which
// decoded ids are not the text again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "rabit/result.h"

namespace rabit {

/// The character that stands for `byte` in byte-level vocabularies, as UTF-8: printable bytes of
/// Latin-1 are themselves, the 68 others follow from U+0100 on in order.
std::string byte_character(uint8_t byte);

/// The bytes that a byte-level token spells. A token that has any other character was not spelled
/// in the alphabet and is returned as it is.
std::string token_bytes(std::string_view token);

class Bpe {
 public:
  /// Memory that encode() reuses from piece to piece; one a thread.
  struct Scratch {
    struct Symbol {
      int32_t id;  // -1: joined into an earlier one
      uint32_t previous, next;
    };
    std::vector<Symbol> symbols;
    std::vector<uint64_t> heap;  // rank in the upper half, place of the left symbol in the lower
  };

  Bpe() = default;

  /// `tokens` by id; `merges` "left right", most frequent first. Where a string occurs twice in
  /// `tokens` or in `merges`, the first counts.
  /// Errors: a merge that is not two tokens with a token as their result; no token for a byte of
  /// plain text (printable ASCII, tab, line feed), which no vocabulary made for text lacks.
  static Result<Bpe> create(const std::vector<std::string>& tokens,
                            const std::vector<std::string>& merges);

  /// Appends the ids of one piece, any bytes, fewer than 2^32.
  void encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    uint64_t pair = kNoPair;  // ids of left and right
    uint32_t rank = 0;
    int32_t id = -1;  // the result
  };
  static constexpr uint64_t kNoPair = UINT64_MAX;

  static uint64_t pair_key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  /// The pair's slot, or the empty one where it belongs.
  size_t slot(uint64_t pair) const {
    size_t at = (pair * 0x9E3779B97F4A7C15u) >> slot_shift_;
    while (merges_[at].pair != pair && merges_[at].pair != kNoPair) {
      at = (at + 1) & (merges_.size() - 1);
    }
    return at;
  }
  /// nullptr: these two do not merge.
  const Merge* find(int32_t left, int32_t right) const {
    const Merge& merge = merges_[slot(pair_key(left, right))];
    return merge.pair == kNoPair ? nullptr : &merge;
  }
  void consider(Scratch& scratch, uint32_t left) const;

  std::array<int32_t, 256> byte_ids_{};  // -1: no such token
  // Open addressing: a power of two of slots, at most half of them taken.
  std::vector<Merge> merges_;
  int slot_shift_ = 0;  // 64 - log2 of the slots
};

}  // namespace rabit
