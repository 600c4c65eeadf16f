// Documents of texts, plain and as JSON Lines, compressed in every way that is read, cut and
// damaged; folders of them.
#include "io/documents.h"

#include <archive.h>
#include <archive_entry.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <random>

#include "base/files.h"

namespace rabit {
namespace {

using Texts = std::vector<std::string>;

class Documents : public testing::Test {
 protected:
  Documents()
      : folder_(std::filesystem::temp_directory_path() /
                ("rabit_documents_" + std::to_string(::getpid()) + "_" +
                 testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::filesystem::create_directories(folder_);
  }
  ~Documents() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path write(const std::string& name, const std::string& text) const {
    const auto path = folder_ / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }

  using Filter = int (*)(archive*);
  std::filesystem::path compress(const std::string& name, const std::string& text,
                                 Filter filter) const {
    const auto path = folder_ / name;
    archive* a = archive_write_new();
    EXPECT_EQ(filter(a), ARCHIVE_OK);
    EXPECT_EQ(archive_write_set_format_raw(a), ARCHIVE_OK);
    EXPECT_EQ(archive_write_open_filename(a, path.c_str()), ARCHIVE_OK);
    archive_entry* entry = archive_entry_new();
    archive_entry_set_filetype(entry, AE_IFREG);
    EXPECT_EQ(archive_write_header(a, entry), ARCHIVE_OK);
    EXPECT_EQ(archive_write_data(a, text.data(), text.size()),
              static_cast<la_ssize_t>(text.size()));
    archive_entry_free(entry);
    EXPECT_EQ(archive_write_close(a), ARCHIVE_OK);
    archive_write_free(a);
    return path;
  }

  static Result<Texts> read(const std::filesystem::path& path, const std::string& field = "text",
                            size_t part_bytes = 1 << 20) {
    Texts documents;
    bool open = false;
    RABIT_CHECK(read_documents(
        path, field,
        [&](std::string_view part, bool last) -> Status {
          EXPECT_FALSE(part.empty());
          if (!open) {
            documents.emplace_back();
          }
          documents.back() += part;
          open = !last;
          return {};
        },
        part_bytes));
    EXPECT_FALSE(open);
    return documents;
  }

  static void expect(const std::filesystem::path& path, const Texts& wanted,
                     const std::string& field = "text") {
    const auto got = read(path, field);
    ASSERT_TRUE(got) << got.error().message;
    EXPECT_EQ(*got, wanted) << path;
  }

  static void refuses(const std::filesystem::path& path, const std::string& says) {
    const auto got = read(path);
    ASSERT_FALSE(got) << says;
    EXPECT_NE(got.error().message.find(says), std::string::npos) << got.error().message;
    EXPECT_NE(got.error().message.find(path.filename().string()), std::string::npos);
    EXPECT_EQ(got.error().message.find('\n'), std::string::npos) << got.error().message;
  }

  std::filesystem::path folder_;
};

TEST_F(Documents, EndAtMarkerLinesAndWithTheFile) {
  expect(write("a.txt", "one\ntwo\n<|endoftext|>\nthree"), {"one\ntwo\n", "three"});
  expect(write("b.txt", "one<|endoftext|>\n<|endoftext|>\r\ntwo\n <|endoftext|>\n"),
         {"one<|endoftext|>\n", "two\n <|endoftext|>\n"});
  expect(write("c.txt", "<|endoftext|>\n<|endoftext|>\none\n<|endoftext|>"), {"one\n"});
  expect(write("d.text", "\n\n"), {"\n\n"});
  const std::string mark = "\xEF\xBB\xBF";  // counts at the beginning alone
  expect(write("e.txt", mark + "one\n" + mark + "two"), {"one\n" + mark + "two"});
  expect(write("f.txt", mark + "<|endoftext|>\none"), {"one"});
  expect(write("g.jsonl", mark + "{\"text\": \"one\"}\n"), {"one"});
  expect(write("any name", "ü\n"), {"ü\n"});
}

TEST_F(Documents, JsonLines) {
  const std::string lines = R"({"text": "one\ntwo", "id": 1}

{"id": 2, "text": "zwei ü <|endoftext|>\n<|endoftext|>\n"}
{"text": ""}
{"text": "last"})";
  const Texts wanted = {"one\ntwo", "zwei ü <|endoftext|>\n<|endoftext|>\n", "last"};
  expect(write("a.jsonl", lines), wanted);
  expect(compress("a.ndjson.xz", lines, archive_write_add_filter_xz), wanted);
  expect(write("b.jsonl", R"({"body": "x", "text": 3})"), {"x"}, "body");
  refuses(write("c.jsonl", "{\"text\": \"x\"}\n[1]\n"), "line 2: no JSON object");
  refuses(write("d.jsonl", "{\"text\": \"x\"}\n\n{\"body\": \"x\"}\n"), "line 3: has no string");
  refuses(write("e.jsonl", "{\"text\": 3}"), "line 1: has no string \"text\"");
  refuses(write("f.jsonl", "{\"text\": \"x\""), "line 1: no JSON object");
  refuses(write("g.jsonl", "{\"text\": \"\"}\n"), "holds no text");
  refuses(write("h.jsonl", std::string(1000, '[')), "line 1: no JSON object");
}

TEST_F(Documents, Compressed) {
  std::string text;
  std::mt19937 random(1);
  for (int i = 0; i < 200'000; ++i) {
    text += static_cast<char>('a' + random() % 26);
    text += random() % 9 == 0 ? "\n" : "";
  }
  const std::map<std::string, Filter> filters = {{"x.gz", archive_write_add_filter_gzip},
                                                 {"x.xz", archive_write_add_filter_xz},
                                                 {"x.zst", archive_write_add_filter_zstd}};
  for (const auto& [name, filter] : filters) {
    const auto path = compress(name, text, filter);
    expect(path, {text});
    std::string bytes = *read_file(path);
    expect(write("no ending", bytes), {text});
    // Cut anywhere, it is damaged; it must never pass for the whole.
    for (const size_t share : {1, 10, 50, 90, 99}) {
      const auto cut = write("cut" + name, bytes.substr(0, bytes.size() * share / 100));
      const auto got = read(cut);
      EXPECT_FALSE(got) << name << " " << share;
    }
    for (size_t i = 40; i < bytes.size(); i += bytes.size() / 7) {
      std::string damaged = bytes;
      damaged[i] = static_cast<char>(damaged[i] ^ 0x55);
      const auto got = read(write("bad" + name, damaged));
      // libarchive checks no sums of gzip, and its zstd writes none: there a change may pass.
      EXPECT_TRUE(!got || *got == Texts{text} || name != "x.xz") << name << " " << i;
    }
  }
  // Two members one after the other are one text.
  const std::string two = *read_file(compress("1.gz", "one\n", archive_write_add_filter_gzip)) +
                          *read_file(compress("2.gz", "two\n", archive_write_add_filter_gzip));
  expect(write("12.gz", two), {"one\ntwo\n"});
}

TEST_F(Documents, HostileInput) {
  refuses(folder_ / "missing.txt", "cannot open");
  refuses(write("empty.txt", ""), "holds no text");
  refuses(write("only.txt", "<|endoftext|>\n<|endoftext|>\n"), "holds no text");
  refuses(write("latin.txt", "gut\n\xFC"), "not UTF-8 at byte 4");
  refuses(write("end.txt", "ends early \xE2\x82"), "not UTF-8 at byte 11");
  // Characters across the borders of what is read at once, and a wrong byte after many right ones.
  std::string text;
  while (text.size() < 3'000'001) {
    text += "ü€𝄞x";
  }
  expect(write("long.txt", text), {text});
  refuses(write("late.txt", text + "\xFF" + text),
          "not UTF-8 at byte " + std::to_string(text.size()));
  std::string lines;
  while (lines.size() < 1'000'000) {
    lines += "line\n";
  }
  refuses(write("lines.txt", lines + "\xC0"), "not UTF-8 at byte " + std::to_string(lines.size()));
  // What only looks compressed.
  refuses(write("x.txt", std::string("\x1f\x8b\x08\0", 4) + std::string(100, 'x')), "damaged");
}

TEST_F(Documents, PartsAreThePlainTextCutAtSafePlaces) {
  std::mt19937 random(3);
  const Texts pieces = {"word", " ", "\n", "\n", "9", ".", "\t", "ü", "\r\n", "A", "\u3000", "。"};
  for (int round = 0; round < 50; ++round) {
    std::string text = "x";
    for (int i = 0; i < 400; ++i) {
      text += pieces[random() % pieces.size()];
    }
    const auto path = write("t.txt", text);
    Texts parts;
    ASSERT_TRUE(read_documents(
        path, "",
        [&](std::string_view part, bool) -> Status {
          parts.emplace_back(part);
          return {};
        },
        20));
    std::string joined;
    for (size_t i = 0; i < parts.size(); ++i) {
      joined += parts[i];
      if (i + 1 < parts.size()) {
        const char last = parts[i].back(), first = parts[i + 1].front();
        const bool word = std::isalnum(static_cast<unsigned char>(last)) != 0;
        EXPECT_TRUE((first == ' ' && std::string("\t\n\r ").find(last) == std::string::npos) ||
                    (first == '\n' && word))
            << i;
        EXPECT_FALSE(parts[i].ends_with("\u3000"));
      }
    }
    EXPECT_EQ(joined, text);
    EXPECT_GT(parts.size(), 2U);
  }
}

TEST_F(Documents, TheSinkMayStopIt) {
  const auto path = write("t.txt", "a\n<|endoftext|>\nb\n<|endoftext|>\nc\n");
  int seen = 0;
  const Status status = read_documents(path, "", [&](std::string_view, bool) -> Status {
    return ++seen == 2 ? Status(Error{"enough"}) : Status();
  });
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().message, "enough");
  EXPECT_EQ(seen, 2);
}

TEST_F(Documents, Folders) {
  write("d/b.txt", "b");
  write("d/a.jsonl.gz", "a");
  write("d/sub/c.md.xz", "c");
  write("d/image.png", "p");
  write("d/.hidden/x.txt.zst", "x");
  const auto files = text_files(folder_ / "d");
  ASSERT_TRUE(files) << files.error().message;
  Texts names;
  for (const auto& file : *files) {
    names.push_back(std::filesystem::relative(file, folder_ / "d").generic_string());
  }
  EXPECT_EQ(names, (Texts{".hidden/x.txt.zst", "a.jsonl.gz", "b.txt", "sub/c.md.xz"}));
  const auto one = text_files(folder_ / "d" / "image.png");
  ASSERT_TRUE(one);
  EXPECT_EQ(one->size(), 1U);
  std::filesystem::create_directories(folder_ / "none");
  // A link to a folder above would lead round and round.
  std::filesystem::create_directory_symlink(folder_ / "d", folder_ / "d" / "sub" / "again");
  EXPECT_EQ(text_files(folder_ / "d")->size(), 4U);
  EXPECT_NE(text_files(folder_ / "none").error().message.find("holds no text"), std::string::npos);
  EXPECT_NE(text_files(folder_ / "missing").error().message.find("cannot open"), std::string::npos);
}

}  // namespace
}  // namespace rabit
