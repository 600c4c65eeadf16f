// Texts tokenized into mapped files: whole, in parts and on several threads the same ids; the
// cache; windows of several sources by weight.
#include "train/corpus.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <thread>

#include "base/files.h"
#include "base/interrupt.h"
#include "text/bpe.h"
#include "train/windows.h"

namespace rabit::train {
namespace {

using Ids = std::vector<int32_t>;

constexpr int32_t kEndId = 256;

// A token for every byte, the one that ends a document, and what these merges make.
std::shared_ptr<Tokenizer> byte_tokenizer(const std::vector<std::string>& merges = {"a b", "ab c",
                                                                                    "a a", "b b"}) {
  TokenizerSpec spec;
  spec.model = "gpt2";
  spec.pre = "smollm";
  for (int b = 0; b < 256; ++b) {
    spec.tokens.push_back(byte_character(static_cast<uint8_t>(b)));
  }
  spec.token_types.assign(256, 1);
  spec.tokens.emplace_back("<|endoftext|>");
  spec.token_types.push_back(3);
  for (const std::string& merge : merges) {
    const size_t blank = merge.find(' ');
    spec.tokens.push_back(merge.substr(0, blank) + merge.substr(blank + 1));
    spec.token_types.push_back(1);
  }
  spec.merges = merges;
  auto tokenizer = Tokenizer::create(std::move(spec));
  EXPECT_TRUE(tokenizer) << tokenizer.error().message;
  return *tokenizer;
}

class Corpus : public testing::Test {
 protected:
  Corpus()
      : folder_(std::filesystem::temp_directory_path() /
                ("rabit_corpus_" + std::to_string(::getpid()) + "_" +
                 testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::filesystem::create_directories(folder_);
  }
  ~Corpus() override {
    set_interrupted(false);
    std::filesystem::remove_all(folder_);
  }

  std::filesystem::path write(const std::string& name, const std::string& text) const {
    std::filesystem::create_directories((folder_ / name).parent_path());
    std::ofstream(folder_ / name, std::ios::binary) << text;
    return folder_ / name;
  }

  Result<TokenSource> tokenize(const std::string& name, int threads = 2) {
    ThreadPool pool(threads);
    told_ = 0;
    return tokenize_source(*tokenizer_, folder_ / name,
                           {field_, folder_ / "cache", [&] { waited_ = true; }}, pool,
                           [&](int64_t tokens) { told_ = tokens; });
  }

  size_t cached() const {
    size_t files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder_ / "cache")) {
      EXPECT_EQ(entry.path().extension(), ".tokens") << entry.path();
      ++files;
    }
    return files;
  }

  static Ids ids(const TokenSource& source) { return {source.tokens.begin(), source.tokens.end()}; }

  std::filesystem::path folder_;
  std::shared_ptr<Tokenizer> tokenizer_ = byte_tokenizer();
  std::string field_ = "text";
  int64_t told_ = 0;
  std::atomic<bool> waited_ = false;
};

// Words and blanks of every kind, with places to cut.
std::string some_text(size_t bytes, unsigned seed) {
  const std::vector<std::string> pieces = {
      "ab", "abc", " ",  " ",   "\n",   "\n\n", "9",    "12",   ".",  "\t",     "ü",
      "A",  "aa",  "'s", "...", "\r\n", "-",    "b\na", " \n ", "。", "\u3000", "字"};
  std::mt19937 random(seed);
  std::string text;
  while (text.size() < bytes) {
    text += pieces[random() % pieces.size()];
  }
  return text;
}

TEST_F(Corpus, PartsAndThreadsChangeNoToken) {
  const std::string one = some_text(3 << 20, 1), two = some_text(1 << 20, 2);
  write("t.txt", one + "\n<|endoftext|>\n" + two);
  Ids wanted = tokenizer_->encode(one + "\n", false);
  wanted.push_back(kEndId);
  const Ids second = tokenizer_->encode(two, false);
  wanted.insert(wanted.end(), second.begin(), second.end());
  wanted.push_back(kEndId);
  for (const int threads : {1, 3}) {
    std::filesystem::remove_all(folder_ / "cache");
    const auto source = tokenize("t.txt", threads);
    ASSERT_TRUE(source) << source.error().message;
    EXPECT_TRUE(ids(*source) == wanted) << threads;
    EXPECT_EQ(source->documents, 2);
    EXPECT_EQ(source->name, "t.txt");
    EXPECT_EQ(source->sha256, *sha256_file(folder_ / "t.txt"));
    EXPECT_EQ(told_, static_cast<int64_t>(wanted.size()));
  }
}

TEST_F(Corpus, CacheIsForTheSameTextAndFieldAndTokenizer) {
  write("t.txt", "ab abc");
  const auto first = tokenize("t.txt");
  ASSERT_TRUE(first);
  EXPECT_GT(told_, 0);
  const auto again = tokenize("t.txt");
  ASSERT_TRUE(again);
  EXPECT_EQ(told_, 0);
  EXPECT_EQ(ids(*first), ids(*again));
  EXPECT_EQ(again->documents, 1);
  EXPECT_EQ(cached(), 1U);
  write("other name.txt", "ab abc");
  ASSERT_TRUE(tokenize("other name.txt"));
  EXPECT_EQ(cached(), 1U);
  field_ = "body";  // of no matter to a plain text
  ASSERT_TRUE(tokenize("t.txt"));
  EXPECT_EQ(cached(), 1U);
  write("t.txt", "ab abd");
  ASSERT_TRUE(tokenize("t.txt"));
  EXPECT_EQ(cached(), 2U);
  tokenizer_ = byte_tokenizer({"a b"});
  const auto other = tokenize("t.txt");
  ASSERT_TRUE(other);
  EXPECT_EQ(cached(), 3U);
  write("j.jsonl", R"({"text": "ab", "body": "b"})");
  const auto body = tokenize("j.jsonl");
  field_ = "text";
  const auto text = tokenize("j.jsonl");
  ASSERT_TRUE(body && text);
  EXPECT_EQ(cached(), 5U);
  EXPECT_NE(ids(*body), ids(*text));
}

TEST_F(Corpus, WaitsForWhoeverTokenizesTheSame) {
  write("a.txt", some_text(1000, 1));
  const auto first = tokenize("a.txt");
  ASSERT_TRUE(first);
  const auto kept = std::filesystem::directory_iterator(folder_ / "cache")->path();
  const auto elsewhere = folder_ / "elsewhere";
  std::filesystem::rename(kept, elsewhere);
  auto other = std::make_optional(FileLock::take(kept));
  ASSERT_TRUE(*other);
  std::thread maker([&] {
    while (!waited_) {
      std::this_thread::yield();
    }
    std::filesystem::rename(elsewhere, kept);
    other.reset();
  });
  const auto second = tokenize("a.txt");
  maker.join();
  ASSERT_TRUE(second) << second.error().message;
  EXPECT_EQ(told_, 0);  // what the other has made
  EXPECT_EQ(ids(*second), ids(*first));
  // Nor does it wait for ever.
  std::filesystem::remove(kept);
  const auto held = FileLock::take(kept);
  ASSERT_TRUE(held);
  waited_ = false;
  std::thread user([&] {
    while (!waited_) {
      std::this_thread::yield();
    }
    set_interrupted(true);
  });
  const auto stopped = tokenize("a.txt");
  user.join();
  ASSERT_FALSE(stopped);
  EXPECT_TRUE(stopped.error().interrupted) << stopped.error().message;
}

TEST_F(Corpus, DamagedCacheIsMadeAgain) {
  write("t.txt", some_text(1000, 4));
  const Ids wanted = ids(*tokenize("t.txt"));
  const auto file = std::filesystem::directory_iterator(folder_ / "cache")->path();
  const std::string whole = *read_file(file);
  for (const std::string& bytes :
       {std::string(), whole.substr(0, 159), whole.substr(0, whole.size() - 1), whole + "x",
        whole.substr(4), std::string(whole.size(), '\0'),
        std::string(1, static_cast<char>(whole[0] ^ 1)) + whole.substr(1)}) {
    std::ofstream(file, std::ios::binary | std::ios::trunc) << bytes;
    const auto source = tokenize("t.txt");
    ASSERT_TRUE(source) << source.error().message;
    EXPECT_GT(told_, 0) << bytes.size();
    EXPECT_EQ(ids(*source), wanted);
    EXPECT_EQ(*read_file(file), whole);
    EXPECT_EQ(cached(), 1U);
  }
}

TEST_F(Corpus, Folders) {
  write("d/1.txt", "ab");
  write("d/2/2.jsonl", "{\"text\": \"abc\"}\n{\"text\": \"b\"}\n");
  const auto source = tokenize("d/");
  ASSERT_TRUE(source) << source.error().message;
  Ids wanted;
  for (const char* text : {"ab", "abc", "b"}) {
    const Ids part = tokenizer_->encode(text, false);
    wanted.insert(wanted.end(), part.begin(), part.end());
    wanted.push_back(kEndId);
  }
  EXPECT_EQ(ids(*source), wanted);
  EXPECT_EQ(source->name, "d");
  EXPECT_EQ(source->documents, 3);
  const std::string digest = source->sha256;
  std::filesystem::rename(folder_ / "d" / "1.txt", folder_ / "d" / "3.txt");
  EXPECT_NE(tokenize("d")->sha256, digest);
}

TEST_F(Corpus, Errors) {
  const auto fails = [&](const std::string& name, const std::string& says) {
    const auto source = tokenize(name);
    ASSERT_FALSE(source) << says;
    EXPECT_NE(source.error().message.find(says), std::string::npos) << source.error().message;
  };
  fails("missing.txt", "cannot open");
  write("bad.txt", some_text(20 << 20, 5) + "\xFF");
  fails("bad.txt", "not UTF-8 at byte");
  EXPECT_EQ(cached(), 0U);
  write("good.txt", "good");
  write("cache/file", "");
  const auto cache = folder_ / "cache";
  std::filesystem::remove_all(cache);
  write("cache", "a file where the folder should be");
  fails("good.txt", "--token-cache FOLDER");
  std::filesystem::remove(cache);
  set_interrupted(true);
  const auto stopped = tokenize("good.txt");
  ASSERT_FALSE(stopped);
  EXPECT_TRUE(stopped.error().interrupted);
}

// A source of n windows of length 4: window w is {base + w, 0, 0, 0}.
TokenSource numbered(int64_t n, int32_t base, bool tail = true) {
  Ids ids;
  for (int64_t w = 0; w < n; ++w) {
    ids.insert(ids.end(), {base + static_cast<int32_t>(w), 0, 0, 0});
  }
  if (tail) {
    ids.push_back(1);  // that no window holds
  }
  return source_of(ids, "s", "");
}

std::map<int64_t, int> counts(const TextWindows& windows, int64_t epoch) {
  std::vector<int64_t> places;
  for (int64_t i = 0; i < windows.count(); ++i) {
    places.push_back(epoch * windows.count() + i);
  }
  const at::Tensor picked = windows.pick(places);
  std::map<int64_t, int> seen;
  for (int64_t i = 0; i < picked.size(0); ++i) {
    ++seen[picked[i][0].item<int64_t>()];
    EXPECT_EQ(picked[i].narrow(0, 1, 3).abs().sum().item<int64_t>(), 0);
  }
  return seen;
}

TEST(TextWindows, AnEpochSeesEveryWindowOnceInAnOrderOfItsSeed) {
  const TrainingText text = {{numbered(20, 0, false), numbered(30, 100)}};
  const auto windows = TextWindows::cut(text, {}, 4, 200, 7);
  const auto same = TextWindows::cut(text, {}, 4, 200, 7),
             other = TextWindows::cut(text, {}, 4, 200, 8);
  const auto plain = TextWindows::cut(text, {}, 4, 200, {});
  ASSERT_TRUE(windows && same && other && plain);
  EXPECT_EQ(windows->count(), 50);
  EXPECT_EQ(windows->distinct_tokens(), 200);
  const auto seen = counts(*windows, 0);
  EXPECT_EQ(seen.size(), 50U);
  EXPECT_EQ(seen, counts(*windows, 3));
  const auto all = [](const Result<TextWindows>& w) { return w->distinct_range(0, 50); };
  EXPECT_TRUE(all(windows).equal(all(same)));
  EXPECT_FALSE(all(windows).equal(all(other)));
  const std::vector<int64_t> some = {12, 10};
  EXPECT_TRUE(windows->pick(some).equal(windows->pick_distinct(some)));
  EXPECT_TRUE(windows->pick(some)[1].equal(windows->distinct_range(10, 1)[0]));
  EXPECT_EQ(all(plain).select(1, 0)[20].item<int64_t>(), 100);
}

TEST(TextWindows, WithoutWeightsSourcesAreOneText) {
  std::vector<TokenSource> sources;
  Ids all;
  for (int i = 0; i < 23; ++i) {  // shorter than a window, some of them empty
    Ids ids;
    for (int j = 0; j < i % 4; ++j) {
      ids.push_back(static_cast<int32_t>(all.size()));
      all.push_back(ids.back());
    }
    sources.push_back(source_of(ids, "s", ""));
  }
  const auto windows = TextWindows::cut({sources}, {}, 5, 100, {});
  ASSERT_TRUE(windows) << windows.error().message;
  ASSERT_EQ(windows->count(), static_cast<int64_t>(all.size()) / 5);
  const at::Tensor got = windows->distinct_range(0, windows->count()).flatten();
  for (int64_t i = 0; i < got.numel(); ++i) {
    EXPECT_EQ(got[i].item<int64_t>(), i);
  }
}

TEST(TextWindows, WeightsCountSources) {
  const TrainingText text = {{numbered(20, 0), numbered(30, 100), numbered(7, 150)}};
  const auto windows = TextWindows::cut(text, std::vector<double>{3.0, 0.5, 1.5}, 4, 200, 7);
  ASSERT_TRUE(windows) << windows.error().message;
  EXPECT_EQ(windows->count(), 60 + 15 + 11);
  std::map<int64_t, int> all;
  for (int64_t epoch = 0; epoch < 14; ++epoch) {
    for (const auto& [window, times] : counts(*windows, epoch)) {
      all[window] += times;
      EXPECT_TRUE(window >= 20 || times == 3);
      EXPECT_TRUE(window < 100 || window >= 150 || times == 1);
      EXPECT_TRUE(window < 150 || times == 1 || times == 2);
    }
  }
  // Over the epochs, every window of a source equally often.
  for (const auto& [window, times] : all) {
    EXPECT_EQ(times, window < 20 ? 42 : window < 150 ? 7 : 22) << window;
  }
  EXPECT_EQ(all.size(), 57U);
  // 20 once instead of thrice, 15 of the 30, all 7.
  EXPECT_EQ(windows->distinct(), 20 + 15 + 7);
  std::set<int64_t> once;
  const at::Tensor picked = windows->distinct_range(0, windows->distinct());
  for (int64_t i = 0; i < picked.size(0); ++i) {
    EXPECT_TRUE(once.insert(picked[i][0].item<int64_t>()).second);
  }
}

TEST(TextWindows, Errors) {
  const auto fails = [](TrainingText text, const std::vector<double>& weights, const char* says) {
    const auto windows = TextWindows::cut(std::move(text), weights, 4, 200, 1);
    ASSERT_FALSE(windows) << says;
    EXPECT_NE(windows.error().message.find(says), std::string::npos) << windows.error().message;
  };
  fails({}, {}, "less than one window");
  fails({{numbered(0, 0), numbered(0, 0)}}, {}, "the text has 2 tokens, less than one window of 4");
  fails({{numbered(5, 0), numbered(0, 0)}}, {1.0, 1.0}, "s has 1 tokens, less than one window");
  fails({{numbered(5, 198)}}, {}, "s: token 8 of the text is 200");
  fails({{numbered(5, 0)}}, {1.0, 2.0}, "2 weights for 1");
  fails({{numbered(5, 0)}}, {0.01}, "0.01 leaves not one of the 5 windows of s");
}

TEST(WindowOrder, SeesEveryWindowInEveryEpochAtAnyStep) {
  WindowOrder order(10, 3);
  std::vector<int64_t> all;
  for (int64_t step = 0; step < 10; ++step) {
    const auto batch = order.batch(step, 4);
    all.insert(all.end(), batch.begin(), batch.end());
  }
  for (int64_t epoch = 0; epoch < 4; ++epoch) {
    std::set<int64_t> seen;
    for (int64_t i = 0; i < 10; ++i) {
      const int64_t place = all[static_cast<size_t>(epoch * 10 + i)];
      EXPECT_EQ(place / 10, epoch);
      seen.insert(place % 10);
    }
    EXPECT_EQ(seen.size(), 10U);
  }
  EXPECT_EQ(WindowOrder(10, 3).batch(7, 4),
            std::vector<int64_t>(all.begin() + 28, all.begin() + 32));
}

}  // namespace
}  // namespace rabit::train
