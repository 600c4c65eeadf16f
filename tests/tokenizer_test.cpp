// Tokenizers against ids that the Python `tokenizers` package gave for the same vocabulary
// (tests/golden/tokenizer.json, made by tools/make_tokenizer_golden.py), and what must hold for any
// bytes. A small vocabulary made here keeps most of this running without the model file.
#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "base/files.h"
#include "io/gguf.h"
#include "text/bpe.h"
#include "text/pretokenizer.h"

namespace rabit {
namespace {

using Ids = std::vector<int32_t>;

std::string utf8(uint32_t c) {
  std::string out;
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
  } else if (c < 0x10000) {
    out += {static_cast<char>(0xE0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 0x3F)),
            static_cast<char>(0x80 | (c & 0x3F))};
  } else {
    out += {static_cast<char>(0xF0 | c >> 18), static_cast<char>(0x80 | (c >> 12 & 0x3F)),
            static_cast<char>(0x80 | (c >> 6 & 0x3F)), static_cast<char>(0x80 | (c & 0x3F))};
  }
  return out;
}

/// All bytes have tokens: id of byte b is b. Merged tokens follow, then two that overlap (a control
/// and a longer user-defined one), one that is unused, and one with characters of no byte.
TokenizerSpec small_spec() {
  TokenizerSpec spec;
  spec.model = "gpt2";
  spec.pre = "smollm";
  for (int b = 0; b < 256; ++b) {
    spec.tokens.push_back(byte_character(static_cast<uint8_t>(b)));
  }
  const std::string blank = byte_character(' ');
  for (const auto& [left, right] : std::vector<std::pair<std::string, std::string>>{
           {"a", "b"}, {"b", "c"}, {"ab", "c"}, {blank, "ab"}, {"abc", "abc"}, {"a", "a"}}) {
    spec.tokens.push_back(left + right);  // 256 ..
    spec.merges.push_back(left + " " + right);
  }
  spec.token_types.assign(spec.tokens.size(), 1);
  for (const auto& [text, type] : std::vector<std::pair<std::string, int>>{
           {"<s>", 3}, {"<s>>", 4}, {"[PAD]", 5}, {"<日本>", 4}}) {
    spec.tokens.push_back(text);  // 262 ..
    spec.token_types.push_back(type);
  }
  spec.bos_id = 262;
  return spec;
}

std::shared_ptr<Tokenizer> small() {
  auto made = Tokenizer::create(small_spec());
  EXPECT_TRUE(made.ok()) << made.error().message;
  return made.value();
}

std::string create_error(const TokenizerSpec& spec) {
  auto made = Tokenizer::create(spec);
  return made.ok() ? "" : made.error().message;
}

std::vector<std::string> pieces(std::string_view text) {
  const auto pre = PreTokenizer::create("smollm");
  EXPECT_TRUE(pre.ok());
  PreTokenizer::Scratch scratch;
  std::vector<std::string> out;
  pre->split(text, scratch, [&](std::string_view piece) { out.emplace_back(piece); });
  return out;
}

using Pieces = std::vector<std::string>;

TEST(PreTokenizer, SmollmCuts) {
  EXPECT_EQ(pieces(""), Pieces{});
  EXPECT_EQ(pieces("Hello, it's  me"), (Pieces{"Hello", ",", " it", "'s", " ", " me"}));
  EXPECT_EQ(pieces("IT'S"), (Pieces{"IT", "'", "S"}));
  EXPECT_EQ(pieces("in 1987,"), (Pieces{"in", " ", "1", "9", "8", "7", ","}));
  EXPECT_EQ(pieces("a \n\n b  "), (Pieces{"a", " \n\n", " b", "  "}));
  EXPECT_EQ(pieces("½x²"), (Pieces{"½", "x", "²"}));
}

TEST(PreTokenizer, LookAheadEndsAtAPiece) {
  EXPECT_EQ(pieces("   7"), (Pieces{"   ", "7"}));
  EXPECT_EQ(pieces("   x"), (Pieces{"  ", " x"}));
}

TEST(PreTokenizer, WhiteSpaceIsUnicodes) {
  for (uint32_t c = 1; c < 0x3100; ++c) {
    const bool space = (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
                       (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
                       c == 0x205F || c == 0x3000;
    // A blank joins whatever follows it unless that is space, or a number, which stands alone.
    const std::string character = utf8(c);
    std::string after_blank(1, ' '), twice(1, '\n');
    after_blank += character;
    (twice += character) += character;
    EXPECT_EQ(space, pieces(after_blank).size() == 1 && pieces(twice).size() == 1) << std::hex << c;
  }
}

TEST(PreTokenizer, PiecesJoinedAreTheText) {
  std::mt19937 random(1);
  const std::vector<std::string> parts = {" ", "  ", "\n", "\t", "a", "'s",     "7",
                                          "½", "日", "!",  "'",  "́",  "\u2003", "\U0001F600"};
  for (int round = 0; round < 2000; ++round) {
    std::string text, joined;
    for (size_t n = random() % 20; n > 0; --n) {
      text += parts[random() % parts.size()];
    }
    for (const std::string& piece : pieces(text)) {
      EXPECT_FALSE(piece.empty());
      joined += piece;
    }
    EXPECT_EQ(joined, text);
  }
}

TEST(PreTokenizer, LongRunsOfBlanks) {
  const std::string blanks(1 << 20, ' ');
  EXPECT_EQ(pieces(blanks), Pieces{blanks});
  EXPECT_EQ(pieces(blanks + "x"), (Pieces{blanks.substr(1), " x"}));
}

TEST(ByteAlphabet, IsOneToOne) {
  std::set<std::string> seen;
  for (int b = 0; b < 256; ++b) {
    const std::string c = byte_character(static_cast<uint8_t>(b));
    EXPECT_TRUE(seen.insert(c).second);
    EXPECT_EQ(token_bytes(c), std::string(1, static_cast<char>(b)));
  }
  EXPECT_EQ(byte_character(' '), "Ġ");
  EXPECT_EQ(byte_character('\n'), "Ċ");
  EXPECT_EQ(byte_character('A'), "A");
  EXPECT_EQ(token_bytes("Ġthe"), " the");
}

TEST(ByteAlphabet, OtherCharactersStayAsTheyAre) {
  for (const char* token : {"日", "a b", "Ġ日", "\xFF", "a\xC4", "\xC4\x20", "\u0144", "\u00AD"}) {
    EXPECT_EQ(token_bytes(token), token);
  }
}

TEST(SmallTokenizer, Merges) {
  const auto tokenizer = small();
  EXPECT_EQ(tokenizer->encode("", false), Ids{});
  EXPECT_EQ(tokenizer->encode("ab", false), Ids{256});
  EXPECT_EQ(tokenizer->encode("bc", false), Ids{257});
  EXPECT_EQ(tokenizer->encode("abc", false), Ids{258});  // "a b" ranks before "b c"
  EXPECT_EQ(tokenizer->encode("abcabc", false), Ids{260});
  EXPECT_EQ(tokenizer->encode("aaa", false), (Ids{261, 'a'}));  // the leftmost of equals
  EXPECT_EQ(tokenizer->encode("aaaab", false), (Ids{261, 'a', 256}));
  EXPECT_EQ(tokenizer->encode(" ab abc", false), (Ids{259, ' ', 258}));
  EXPECT_EQ(tokenizer->encode("ab\nab ab ab", false), (Ids{256, '\n', 256, 259, 259}));
}

TEST(SmallTokenizer, SpecialTokensParsedOrNot) {
  const auto tokenizer = small();
  EXPECT_EQ(tokenizer->encode("<s>", true), Ids{262});
  EXPECT_EQ(tokenizer->encode("<s>", false), (Ids{'<', 's', '>'}));
  EXPECT_EQ(tokenizer->encode("a<s>>ab<s>", true), (Ids{'a', 263, 256, 262}));
  EXPECT_EQ(tokenizer->encode("<<s<s>", true), (Ids{'<', '<', 's', 262}));
  EXPECT_EQ(tokenizer->encode("<日本>", true), Ids{265});
  EXPECT_EQ(tokenizer->encode("[PAD]", true), (Ids{'[', 'P', 'A', 'D', ']'}));
  EXPECT_EQ(tokenizer->encode("\xFF<s>\xFF", true), (Ids{255, 262, 255}));
}

TEST(SmallTokenizer, Decodes) {
  const auto tokenizer = small();
  const Ids ids = {262, 256, 263, 264, 265, -1, 266, 1 << 30, 255};
  EXPECT_EQ(tokenizer->decode(ids, true), "<s>ab<s>>[PAD]<日本>\xFF");
  EXPECT_EQ(tokenizer->decode(ids, false), "ab<s>><日本>\xFF");
}

TEST(SmallTokenizer, RoundTripOfAnyBytes) {
  const auto tokenizer = small();
  const auto check = [&](const std::string& text) {
    for (const bool parse : {false, true}) {
      ASSERT_EQ(tokenizer->decode(tokenizer->encode(text, parse), true), text);
    }
  };
  for (int a = 0; a < 256; ++a) {
    check(std::string(1, static_cast<char>(a)));
    for (int b = 0; b < 256; ++b) {
      check({static_cast<char>(a), static_cast<char>(b)});
    }
  }
  std::mt19937 random(2);
  for (int round = 0; round < 3000; ++round) {
    std::string text;
    for (size_t n = random() % 60; n > 0; --n) {
      switch (random() % 4) {
        case 0:
          text += static_cast<char>(random());
          break;
        case 1:
          text += utf8(random() % 0x110000);  // surrogates, too: invalid bytes
          break;
        case 2:
          text += "abc <s>>"[random() % 8];
          break;
        default:
          text += static_cast<char>(0x80 | random() % 0x80);
      }
    }
    check(text);
  }
}

TEST(SmallTokenizer, InvalidStretchesAreTheirOwnPieces) {
  const auto tokenizer = small();
  EXPECT_EQ(tokenizer->encode("ab\xC3 ab", false), (Ids{256, 0xC3, 259}));
  EXPECT_EQ(tokenizer->encode("\xE6\x97\xE6\x97\xA5", false), (Ids{0xE6, 0x97, 0xE6, 0x97, 0xA5}));
  // Bytes on both sides of an edge do not merge: valid U+00C3 against a lone byte.
  TokenizerSpec spec = small_spec();
  spec.tokens.push_back(byte_character(0x83) + byte_character(0x83));
  spec.token_types.push_back(1);
  spec.merges.push_back(byte_character(0x83) + " " + byte_character(0x83));
  const auto merging = Tokenizer::create(spec);
  ASSERT_TRUE(merging.ok());
  EXPECT_EQ((*merging)->encode("\xC3\x83\x83", false), (Ids{0xC3, 0x83, 0x83}));
  EXPECT_EQ((*merging)->encode("\x83\x83", false), Ids{266});
}

TEST(SmallTokenizer, DropsAByteWithoutAToken) {
  TokenizerSpec spec = small_spec();
  spec.tokens[4] = "[none]";
  const auto tokenizer = Tokenizer::create(spec);
  ASSERT_TRUE(tokenizer.ok());
  EXPECT_EQ((*tokenizer)->encode("\x04", false), Ids{});
  EXPECT_EQ((*tokenizer)->encode("!\x04!", false), (Ids{'!', '!'}));
}

TEST(SmallTokenizer, LongPiecesTakeLinearTime) {
  const auto tokenizer = small();
  const auto seconds = [&](const std::string& text) {
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(text, true), true), text);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  std::string mixed;
  for (uint32_t i = 0, x = 1; i < 1 << 20; ++i) {
    x = x * 1664525 + 1013904223;
    mixed += static_cast<char>('a' + (x >> 16) % 3);
  }
  for (const std::string& text :
       {mixed, std::string(1 << 20, 'a'), std::string(1 << 20, ' '), std::string(1 << 20, '7'),
        std::string(1 << 20, '\xFF'), std::string(1 << 20, '<')}) {
    EXPECT_LT(seconds(text), 5.0) << text.substr(0, 4);  // a quadratic one takes minutes
  }
}

TEST(CreateTokenizer, RefusesWhatItDoesNotKnow) {
  TokenizerSpec spec = small_spec();
  spec.model = "llama";
  EXPECT_EQ(create_error(spec), "unknown tokenizer model 'llama'; known: gpt2");
  spec = small_spec();
  spec.pre = "qwen9";
  EXPECT_EQ(create_error(spec), "unknown pre-tokenizer 'qwen9'; known: smollm");
}

TEST(CreateTokenizer, RefusesBrokenVocabularies) {
  EXPECT_EQ(create_error(small_spec()), "");
  const auto with = [](auto change) {
    TokenizerSpec spec = small_spec();
    change(spec);
    return create_error(spec);
  };
  const auto names = [](const std::string& message, const char* part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  names(with([](auto& s) { s.tokens.clear(), s.token_types.clear(), s.bos_id = -1; }),
        "no token for byte 9");
  names(with([](auto& s) { s.tokens['e'] = "?!"; }), "no token for byte 101");
  names(with([](auto& s) { s.token_types.pop_back(); }), "265 token types for 266 tokens");
  names(with([](auto& s) { s.merges[1] = "b q"; }), "merge 1 ('b q') gives");
  names(with([](auto& s) { s.merges[0] = "zz b"; }), "merge 0 ('zz b') has a part");
  names(with([](auto& s) { s.merges[0] = "b zz"; }), "has a part");
  for (const char* merge : {"", " ", "ab", " b", "a ", "a  b", "a b c"}) {
    names(with([&](auto& s) { s.merges[2] = merge; }), "merge 2 (");
  }
  names(with([](auto& s) { s.bos_id = 266; }), "BOS token id 266");
  names(with([](auto& s) { s.eos_id = -2; }), "EOS token id -2");
  names(with([](auto& s) { s.bos_id = -1, s.add_bos = true; }), "none is named");
  EXPECT_EQ(with([](auto& s) { s.token_types.clear(); }), "");
}

/// The model's tokenizer, its golden data; skipped where the file is absent.
class ModelTokenizer : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (!std::filesystem::exists(RABIT_MODEL)) {
      return;
    }
    const auto file = GgufFile::open(RABIT_MODEL);
    ASSERT_TRUE(file.ok()) << file.error().message;
    const GgufFile& gguf = **file;
    TokenizerSpec spec;
    spec.model = gguf.get_string("tokenizer.ggml.model").value();
    spec.pre = gguf.get_string("tokenizer.ggml.pre").value();
    spec.tokens = gguf.get_strings("tokenizer.ggml.tokens").value();
    spec.token_types = gguf.get_ints("tokenizer.ggml.token_type").value();
    spec.merges = gguf.get_strings("tokenizer.ggml.merges").value();
    auto made = Tokenizer::create(std::move(spec));
    ASSERT_TRUE(made.ok()) << made.error().message;
    tokenizer_ = *made;
    std::ifstream in(RABIT_SOURCE_DIR "/tests/golden/tokenizer.json");
    golden_ = nlohmann::json::parse(in);
    for (int b = 0; b < 256; ++b) {
      missing_[b] = false;
    }
    for (const int b : golden_["missing_bytes"]) {
      missing_[b] = true;
    }
  }
  static void TearDownTestSuite() { tokenizer_.reset(); }
  void SetUp() override {
    if (!tokenizer_) {
      GTEST_SKIP() << "no model file " RABIT_MODEL;
    }
  }

  /// What must come back: `text` less the bytes that the vocabulary has no tokens for.
  static std::string kept(const std::string& text) {
    std::string out;
    for (const char c : text) {
      if (!missing_[static_cast<uint8_t>(c)]) {
        out += c;
      }
    }
    return out;
  }

  static inline std::shared_ptr<Tokenizer> tokenizer_;
  static inline nlohmann::json golden_;
  static inline bool missing_[256];
};

TEST_F(ModelTokenizer, GoldenStrings) {
  ASSERT_GE(golden_["strings"].size(), 60u);
  for (const auto& row : golden_["strings"]) {
    const std::string text = row["text"];
    const Ids ids = tokenizer_->encode(text, row["parse_special"]);
    EXPECT_EQ(ids, row["ids"].get<Ids>()) << row.dump();
    EXPECT_EQ(tokenizer_->decode(ids, true), kept(text));
  }
}

TEST_F(ModelTokenizer, GoldenText) {
  const auto& want = golden_["text"];
  const std::string path = RABIT_DATA_DIR "/wikitext2/" + want["file"].get<std::string>();
  if (!std::filesystem::exists(path)) {
    GTEST_SKIP() << "no text " << path;
  }
  const std::string text = read_text_file(path).value();
  ASSERT_EQ(sha256_hex(text), want["sha256"].get<std::string>());
  const auto start = std::chrono::steady_clock::now();
  const Ids ids = tokenizer_->encode(text, false);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  RecordProperty("megabytes_per_second", std::to_string(text.size() / 1e6 / took.count()));
  EXPECT_EQ(ids.size(), want["ids"].get<size_t>());
  const std::string_view bytes(reinterpret_cast<const char*>(ids.data()), ids.size() * 4);
  EXPECT_EQ(sha256_hex(bytes), want["ids_sha256"].get<std::string>());
  EXPECT_EQ(tokenizer_->decode(ids, false), text);
}

TEST_F(ModelTokenizer, EveryCodePointRoundTrips) {
  for (uint32_t c = 0; c < 0x110000; ++c) {
    const std::string text = utf8(c);
    ASSERT_EQ(tokenizer_->decode(tokenizer_->encode(text, false), false), kept(text)) << c;
  }
}

TEST_F(ModelTokenizer, SpecialTokensHideUnlessAsked) {
  const std::string text = "<|im_start|>user\nHi<|im_end|>";
  const Ids ids = tokenizer_->encode(text, true);
  EXPECT_EQ(ids.front(), 1);
  EXPECT_EQ(ids.back(), 2);
  EXPECT_EQ(tokenizer_->decode(ids, true), text);
  EXPECT_EQ(tokenizer_->decode(ids, false), "user\nHi");
  EXPECT_EQ(tokenizer_->decode(tokenizer_->encode(text, false), false), text);
}

}  // namespace
}  // namespace rabit
