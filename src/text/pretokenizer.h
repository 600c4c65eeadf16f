// The cut of text into pieces that byte-level BPE works on: no merge crosses a piece's edge.
// A pre-tokenizer is a table row: a name and a few patterns. The first pattern cuts the text into
// its matches and what lies between them, the next cuts each of these again, and so on. A pattern
// sees one piece at a time as if it were a whole text, so look-ahead ends at the piece's end: the
// blank before a digit that the first pattern split off is blank at the end of a text.
// The pieces in order, joined, are the text.
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "rabit/result.h"

namespace rabit {

/// One family's patterns, in PCRE2's syntax except that `\s` and `\S` mean Unicode's White_Space.
struct PreTokenizerRow {
  std::string_view name;
  std::array<std::string_view, 3> patterns;  // unused ones empty, at the end
};

inline constexpr std::array kPreTokenizers = {
    PreTokenizerRow{
        "smollm",
        {R"(\p{N})",
         R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)"}},
};

class PreTokenizer {
 public:
  /// What matching needs besides the patterns; one a thread.
  class Scratch {
   public:
    Scratch()
        : match_(pcre2_match_data_create(1, nullptr)),
          context_(pcre2_match_context_create(nullptr)) {
      if (context_) {
        pcre2_set_match_limit(context_.get(), UINT32_MAX);
      }
    }

   private:
    friend class PreTokenizer;
    struct Free {
      void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
      void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
    };
    std::unique_ptr<pcre2_match_data, Free> match_;
    std::unique_ptr<pcre2_match_context, Free> context_;
  };

  PreTokenizer() = default;

  /// Errors: a name that is not in the table, with the list of those that are.
  static Result<PreTokenizer> create(std::string_view name) {
    std::string known;
    for (const PreTokenizerRow& row : kPreTokenizers) {
      if (row.name == name) {
        return compile(row);
      }
      known += (known.empty() ? "" : ", ") + std::string(row.name);
    }
    return Error{"unknown pre-tokenizer '" + std::string(name) + "'; known: " + known};
  }

  /// Calls `emit(std::string_view)` for each piece of `text` in order. `text` is valid UTF-8; the
  /// pieces are views into it and never empty.
  template <typename Emit>
  void split(std::string_view text, Scratch& scratch, Emit&& emit) const {
    split_from(0, text, scratch, emit);
  }

 private:
  struct FreeCode {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  };
  using Code = std::unique_ptr<pcre2_code, FreeCode>;

  static Result<PreTokenizer> compile(const PreTokenizerRow& row) {
    PreTokenizer made;
    for (std::string_view pattern : row.patterns) {
      if (pattern.empty()) {
        break;
      }
      const std::string expanded = spell_out_white_space(pattern);
      int code = 0;
      PCRE2_SIZE offset = 0;
      Code compiled(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expanded.data()), expanded.size(),
                                  PCRE2_UTF | PCRE2_UCP, &code, &offset, nullptr));
      if (!compiled) {
        return Error{"pre-tokenizer '" + std::string(row.name) + "': pattern refused at offset " +
                     std::to_string(offset) + " (PCRE2 error " + std::to_string(code) + ")"};
      }
      // A build without JIT matches all the same, slower.
      (void)pcre2_jit_compile(compiled.get(), PCRE2_JIT_COMPLETE);
      made.steps_.push_back(std::move(compiled));
    }
    return made;
  }

  // PCRE2 counts U+180E as a space; Unicode has not since 6.3, nor have the tokenizers that the
  // models were trained with.
  static std::string spell_out_white_space(std::string_view pattern) {
    constexpr std::string_view kWhiteSpace =
        R"(\x09-\x0d\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
    std::string out;
    bool in_class = false;
    for (size_t i = 0; i < pattern.size(); ++i) {
      const char c = pattern[i];
      if (c == '\\' && i + 1 < pattern.size()) {
        const char next = pattern[++i];
        if (next == 's') {
          (out += in_class ? "" : "[").append(kWhiteSpace) += in_class ? "" : "]";
        } else if (next == 'S' && !in_class) {
          out.append("[^").append(kWhiteSpace) += ']';
        } else {
          out.append({c, next});
        }
        continue;
      }
      in_class = in_class ? c != ']' : c == '[';
      out += c;
    }
    return out;
  }

  template <typename Emit>
  void split_from(size_t step, std::string_view text, Scratch& scratch, Emit& emit) const {
    if (step == steps_.size()) {
      if (!text.empty()) {
        emit(text);
      }
      return;
    }
    size_t done = 0;
    while (done < text.size()) {
      size_t begin = text.size(), end = text.size();
      find(steps_[step].get(), text, done, scratch, begin, end);
      if (begin > done) {
        split_from(step + 1, text.substr(done, begin - done), scratch, emit);
      }
      if (end > begin) {
        split_from(step + 1, text.substr(begin, end - begin), scratch, emit);
      }
      done = end;
    }
  }

  // The next match that is not empty; leaves `begin` and `end` alone if there is none.
  static void find(const pcre2_code* code, std::string_view text, size_t from, Scratch& scratch,
                   size_t& begin, size_t& end) {
    constexpr uint32_t kOptions = PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY;
    const auto match = [&](uint32_t options) {
      return pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                         options, scratch.match_.get(), scratch.context_.get());
    };
    int found = match(kOptions);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) {
      // Compiled matching stacks up a run of thousands of blanks; the interpreter does not.
      found = match(kOptions | PCRE2_NO_JIT);
    }
    if (found >= 0) {
      const PCRE2_SIZE* edges = pcre2_get_ovector_pointer(scratch.match_.get());
      begin = edges[0];
      end = edges[1];
    }
  }

  std::vector<Code> steps_;
};

}  // namespace rabit
