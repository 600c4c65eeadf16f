// A symbol's place in the list never changes, so a heap entry is (rank, place). An entry is stale
// when the pair at its place has another rank by now; it is dropped when it comes up.
#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <optional>
#include <unordered_map>

namespace rabit {
namespace {

constexpr uint32_t kEnd = UINT32_MAX;

bool stands_for_itself(int c) {
  return (c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xFF && c != 0xAD);
}

/// The code point of each byte's character.
std::array<uint16_t, 256> make_alphabet() {
  std::array<uint16_t, 256> alphabet{};
  uint16_t next = 0x100;
  for (int b = 0; b < 256; ++b) {
    alphabet[b] = stands_for_itself(b) ? static_cast<uint16_t>(b) : next++;
  }
  return alphabet;
}

const std::array<uint16_t, 256>& alphabet() {
  static const std::array<uint16_t, 256> table = make_alphabet();
  return table;
}

/// The byte of each code point below kAlphabetEnd, -1 for those outside the alphabet.
constexpr int kAlphabetEnd = 0x100 + 68;

const std::array<int16_t, kAlphabetEnd>& inverse_alphabet() {
  static const std::array<int16_t, kAlphabetEnd> table = [] {
    std::array<int16_t, kAlphabetEnd> made;
    made.fill(-1);
    for (int b = 0; b < 256; ++b) {
      made[alphabet()[b]] = static_cast<int16_t>(b);
    }
    return made;
  }();
  return table;
}

/// "merge 12 ('a b')".
std::string name_merge(size_t rank, const std::string& merge) {
  return "merge " + std::to_string(rank) + " ('" + merge + "')";
}

}  // namespace

std::string byte_character(uint8_t byte) {
  const uint16_t c = alphabet()[byte];
  if (c < 0x80) {
    return std::string(1, static_cast<char>(c));
  }
  return {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
}

std::string token_bytes(std::string_view token) {
  std::string bytes;
  for (size_t i = 0; i < token.size(); ++i) {
    int c = static_cast<uint8_t>(token[i]);
    if (c >= 0xC2 && c <= 0xDF && i + 1 < token.size()) {  // the alphabet ends below U+0800
      const int low = static_cast<uint8_t>(token[++i]);
      c = (low & 0xC0) == 0x80 ? (c & 0x1F) << 6 | (low & 0x3F) : kAlphabetEnd;
    } else if (c >= 0x80) {
      c = kAlphabetEnd;
    }
    if (c >= kAlphabetEnd || inverse_alphabet()[c] < 0) {
      return std::string(token);
    }
    bytes += static_cast<char>(inverse_alphabet()[c]);
  }
  return bytes;
}

Result<Bpe> Bpe::create(const std::vector<std::string>& tokens,
                        const std::vector<std::string>& merges) {
  std::unordered_map<std::string_view, int32_t> vocabulary;
  vocabulary.reserve(tokens.size());
  for (size_t id = 0; id < tokens.size(); ++id) {
    vocabulary.emplace(tokens[id], static_cast<int32_t>(id));
  }
  const auto find = [&](std::string_view token) -> std::optional<int32_t> {
    const auto found = vocabulary.find(token);
    return found == vocabulary.end() ? std::nullopt : std::optional(found->second);
  };

  Bpe made;
  for (int b = 0; b < 256; ++b) {
    made.byte_ids_[b] = find(byte_character(static_cast<uint8_t>(b))).value_or(-1);
    if (made.byte_ids_[b] < 0 && ((b >= 0x20 && b <= 0x7E) || b == '\t' || b == '\n')) {
      return Error{"no token for byte " + std::to_string(b) +
                   " of plain text; this is not a whole byte-level vocabulary"};
    }
  }

  if (merges.size() >= UINT32_MAX) {
    return Error{"too many merges: " + std::to_string(merges.size())};
  }
  const size_t slots = std::bit_ceil(2 * merges.size() + 2);
  made.merges_.resize(slots);
  made.slot_shift_ = 64 - std::countr_zero(slots);
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const std::string_view merge = merges[rank];
    const size_t gap = merge.find(' ');
    if (gap == std::string_view::npos || merge.find(' ', gap + 1) != std::string_view::npos) {
      return Error{name_merge(rank, merges[rank]) + " is not two parts with one blank between"};
    }
    const auto left = find(merge.substr(0, gap)), right = find(merge.substr(gap + 1));
    if (!left || !right) {
      return Error{name_merge(rank, merges[rank]) + " has a part that is not in the vocabulary"};
    }
    const std::string joined = std::string(merge.substr(0, gap)).append(merge.substr(gap + 1));
    const auto result = find(joined);
    if (!result) {
      return Error{name_merge(rank, merges[rank]) + " gives a token that is not in the vocabulary"};
    }
    const uint64_t pair = pair_key(*left, *right);
    Merge& slot = made.merges_[made.slot(pair)];
    if (slot.pair == kNoPair) {
      slot = {pair, static_cast<uint32_t>(rank), *result};
    }
  }
  return made;
}

void Bpe::consider(Scratch& scratch, uint32_t left) const {
  const auto& symbols = scratch.symbols;
  const uint32_t right = symbols[left].next;
  if (right == kEnd) {
    return;
  }
  if (const Merge* merge = find(symbols[left].id, symbols[right].id)) {
    scratch.heap.push_back(static_cast<uint64_t>(merge->rank) << 32 | left);
  }
}

void Bpe::encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  symbols.clear();
  heap.clear();
  for (const char c : piece) {
    const int32_t id = byte_ids_[static_cast<uint8_t>(c)];
    if (id >= 0) {
      const auto place = static_cast<uint32_t>(symbols.size());
      symbols.push_back({id, place == 0 ? kEnd : place - 1, place + 1});
    }
  }
  if (symbols.empty()) {
    return;
  }
  symbols.back().next = kEnd;
  for (uint32_t place = 0; place + 1 < symbols.size(); ++place) {
    consider(scratch, place);
  }
  const std::greater<uint64_t> lowest_on_top;
  std::make_heap(heap.begin(), heap.end(), lowest_on_top);

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), lowest_on_top);
    const auto rank = static_cast<uint32_t>(heap.back() >> 32);
    const auto left = static_cast<uint32_t>(heap.back());
    heap.pop_back();
    auto& symbol = symbols[left];
    if (symbol.id < 0 || symbol.next == kEnd) {
      continue;
    }
    const Merge* merge = find(symbol.id, symbols[symbol.next].id);
    if (merge == nullptr || merge->rank != rank) {
      continue;
    }
    symbols[symbol.next].id = -1;
    symbol.id = merge->id;
    symbol.next = symbols[symbol.next].next;
    if (symbol.next != kEnd) {
      symbols[symbol.next].previous = left;
    }
    for (const uint32_t place : {symbol.previous, left}) {
      if (place == kEnd) {
        continue;
      }
      const size_t before = heap.size();
      consider(scratch, place);
      if (heap.size() > before) {
        std::push_heap(heap.begin(), heap.end(), lowest_on_top);
      }
    }
  }
  for (uint32_t place = 0; place != kEnd; place = symbols[place].next) {
    ids.push_back(symbols[place].id);
  }
}

}  // namespace rabit
