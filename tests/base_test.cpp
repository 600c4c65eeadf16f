// Base library: files appear whole or not at all, half precision rounds as IEEE 754 says, loops are
// split as promised.
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "base/files.h"
#include "base/half.h"
#include "base/interrupt.h"
#include "base/threads.h"
#include "few_stacks.h"

namespace rabit {
namespace {

class Files : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(testing::TempDir()) /
              ("rabit_base_" + std::to_string(::getpid()) + "_" +
               testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path put(const std::string& name, const std::string& content) {
    std::ofstream(folder_ / name, std::ios::binary) << content;
    return folder_ / name;
  }
  size_t files_in_folder() const {
    return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder_), {}));
  }

  std::filesystem::path folder_;
};

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST_F(Files, ReadsWhatIsThere) {
  const std::string content("a\0b\n\xFF", 5);
  const auto text = read_file(put("x", content));
  ASSERT_TRUE(text);
  EXPECT_EQ(*text, content);
  const auto map = MappedFile::open(folder_ / "x");
  ASSERT_TRUE(map);
  EXPECT_EQ((*map)->bytes().size(), 5U);
  const std::string pages(100000, 'p');
  const auto long_map = MappedFile::open(put("pages", pages));
  ASSERT_TRUE(long_map);
  const auto bytes = (*long_map)->bytes();
  const auto as_text = [&] {
    return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  EXPECT_EQ(as_text(), pages);
  (*long_map)->release(bytes.subspan(5, 90000));
  EXPECT_EQ(as_text(), pages);  // it comes back
  const auto empty = read_file(put("empty", ""));
  ASSERT_TRUE(empty);
  EXPECT_EQ(*empty, "");
}

TEST_F(Files, RefusesWhatIsNoReadableFile) {
  for (const std::filesystem::path& path : {folder_ / "missing", folder_}) {
    const auto result = read_file(path);
    ASSERT_FALSE(result);
    EXPECT_TRUE(contains(result.error().message, path.string())) << result.error().message;
    EXPECT_FALSE(contains(result.error().message, "\n"));
    EXPECT_FALSE(sha256_file(path));
  }
  ASSERT_EQ(::mkfifo((folder_ / "fifo").c_str(), 0600), 0);
  EXPECT_FALSE(read_file(folder_ / "fifo"));  // and does not wait for a writer
}

TEST_F(Files, TextMustBeUtf8AndNotEmpty) {
  EXPECT_TRUE(read_text_file(put("good", "gr\xC3\xBC\xC3\x9F dich")));
  EXPECT_EQ(*read_text_file(put("marked",
                                "\xEF\xBB\xBF"
                                "a\xEF\xBB\xBF")),
            "a\xEF\xBB\xBF");
  for (const char* nothing : {"", "\xEF\xBB\xBF"}) {
    const auto empty = read_text_file(put("empty", nothing));
    ASSERT_FALSE(empty);
    EXPECT_TRUE(contains(empty.error().message, "empty: empty;"));
  }
  const auto bad = read_text_file(put("bad", "abc\xFF"));
  ASSERT_FALSE(bad);
  EXPECT_TRUE(contains(bad.error().message, "byte 3")) << bad.error().message;
}

TEST_F(Files, AtomicFileAppearsOnCommitOnly) {
  const auto path = folder_ / "out";
  {
    auto file = AtomicFile::create(path);
    ASSERT_TRUE(file);
    ASSERT_TRUE(file->write("hello"));
    EXPECT_EQ(file->position(), 5U);
    EXPECT_FALSE(std::filesystem::exists(path));
  }
  EXPECT_EQ(files_in_folder(), 0U);  // dropped: nothing stays
  auto file = AtomicFile::create(path);
  ASSERT_TRUE(file);
  AtomicFile moved = std::move(*file);
  ASSERT_TRUE(moved.write("hello"));
  ASSERT_TRUE(moved.commit());
  EXPECT_EQ(*read_file(path), "hello");
  EXPECT_EQ(files_in_folder(), 1U);
}

TEST_F(Files, AtomicFileLeavesTheOldFileUntilCommit) {
  const auto path = put("out", "old");
  {
    auto file = AtomicFile::create(path);
    ASSERT_TRUE(file);
    ASSERT_TRUE(file->write("new"));
  }
  EXPECT_EQ(*read_file(path), "old");
}

TEST_F(Files, AtomicFileRefusesFoldersAndDevices) {
  EXPECT_FALSE(AtomicFile::create(folder_));
  EXPECT_FALSE(AtomicFile::create(folder_ / "no" / "such"));
  EXPECT_FALSE(AtomicFile::create(folder_ / std::string(5000, 'x')));
  ASSERT_EQ(::mkfifo((folder_ / "fifo").c_str(), 0600), 0);
  EXPECT_FALSE(AtomicFile::create(folder_ / "fifo"));
  EXPECT_EQ(files_in_folder(), 1U);
}

TEST_F(Files, AtomicFileReportsAFullDisk) {
  const auto path = folder_ / "out";
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // A limit on file size stands in for a full disk: write() fails after a part was written.
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1000, 1000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    int code = 1;
    if (auto file = AtomicFile::create(path)) {
      const Status status = file->write(std::string(5000, 'x'));
      code = !status && contains(status.error().message, path.string()) ? 0 : 2;
    }
    ::_exit(code);  // `file` is gone by now
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(files_in_folder(), 0U);
}

TEST_F(Files, OneHolderALock) {
  const auto place = folder_ / "out.gguf", lock = folder_ / "out.gguf.lock";
  {
    auto first = FileLock::take(place);
    ASSERT_TRUE(first);
    EXPECT_TRUE(std::filesystem::exists(lock));
    const auto second = FileLock::take(place);
    ASSERT_FALSE(second);
    EXPECT_NE(second.error().message.find("another process is writing it"), std::string::npos);
    EXPECT_TRUE(FileLock::take(folder_ / "other.gguf"));
    const FileLock moved = std::move(first).value();
    EXPECT_FALSE(FileLock::take(place));
  }
  EXPECT_FALSE(std::filesystem::exists(lock));
  put("out.gguf.lock", "");  // of a process that was killed
  EXPECT_TRUE(FileLock::take(place));
  EXPECT_FALSE(FileLock::take(folder_ / "none" / "out.gguf"));
  put("mine.gguf.lock", "somebody's");
  EXPECT_FALSE(FileLock::take(folder_ / "mine.gguf"));
  EXPECT_EQ(*read_file(folder_ / "mine.gguf.lock"), "somebody's");
}

TEST_F(Files, Sha256OfKnownStrings) {
  // FIPS 180-2, appendix B.1, and the empty message.
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(*sha256_file(put("abc", "abc")), sha256_hex("abc"));
  EXPECT_EQ(*sha256_file(put("empty", "")), sha256_hex(""));
}

// Well-formedness straight from the definition: decode, then reject overlong forms, surrogates and
// what lies above U+10FFFF.
bool decodes(const std::string& bytes) {
  const auto lead = static_cast<unsigned char>(bytes[0]);
  const size_t length = lead < 0x80 ? 1 : lead < 0xC0 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  if (length == 0 || lead >= 0xF8 || bytes.size() != length) {
    return false;
  }
  uint32_t point = length == 1 ? lead : lead & (0x7FU >> length);
  for (size_t i = 1; i < length; ++i) {
    const auto tail = static_cast<unsigned char>(bytes[i]);
    if ((tail & 0xC0) != 0x80) {
      return false;
    }
    point = point << 6 | (tail & 0x3F);
  }
  static constexpr uint32_t kLowest[] = {0, 0, 0x80, 0x800, 0x10000};
  return point >= kLowest[length] && point <= 0x10FFFF && (point < 0xD800 || point > 0xDFFF);
}

TEST(Utf8, AgreesWithTheDefinition) {
  // Bytes at every border of table 3-7.
  const std::string borders(
      "\x00\x41\x7F\x80\x8F\x90\x9F\xA0\xBF\xC0\xC1\xC2\xDF\xE0\xE1\xEC\xED\xEE\xEF\xF0\xF1\xF3"
      "\xF4\xF5\xF8\xFF",
      26);
  for (const char a : borders) {
    EXPECT_EQ(first_invalid_utf8({&a, 1}), decodes({a}) ? 1U : 0U);
    for (const char b : borders) {
      const std::string two{a, b};
      if (!decodes({a})) {
        EXPECT_EQ(first_invalid_utf8(two), decodes(two) ? 2U : 0U);
      }
      for (const char c : borders) {
        const std::string three{a, b, c};
        if (!decodes({a}) && !decodes(two)) {
          EXPECT_EQ(first_invalid_utf8(three), decodes(three) ? 3U : 0U);
        }
        for (const char d : borders) {
          const std::string four{a, b, c, d};
          if (!decodes({a}) && !decodes(two) && !decodes(three)) {
            EXPECT_EQ(first_invalid_utf8(four), decodes(four) ? 4U : 0U);
          }
        }
      }
    }
  }
  EXPECT_EQ(first_invalid_utf8("ab\xE2\x82"), 2U);  // cut short at the end
  EXPECT_EQ(first_invalid_utf8("\xE2\x82\xAC!"), 4U);
}

// The value of a half, from the definition.
double half_oracle(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 31) {
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  return sign *
         (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

// Nearest half to a finite value by search through all of them, ties to the even pattern.
uint16_t nearest_half(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  uint16_t low = 0, high = 0x7C00;  // patterns of positive halves ascend with their values
  const auto at = [](uint16_t bits) { return bits == 0x7C00 ? 65536.0 : half_oracle(bits); };
  while (high - low > 1) {
    const auto middle = static_cast<uint16_t>((low + high) / 2);
    (at(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - at(low), above = at(high) - magnitude;
  const bool up = above < below || (above == below && low % 2 == 1);
  return sign | (up ? high : low);
}

TEST(Half, EveryHalfToFloatAndBack) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const float value = half_to_float(bits);
    const double oracle = half_oracle(bits);
    if (std::isnan(oracle)) {
      ASSERT_TRUE(std::isnan(value)) << i;
      ASSERT_TRUE(std::isnan(half_to_float(float_to_half(value)))) << i;
      continue;
    }
    ASSERT_EQ(std::bit_cast<uint64_t>(static_cast<double>(value)), std::bit_cast<uint64_t>(oracle))
        << i;
    ASSERT_EQ(float_to_half(value), bits) << i;
  }
}

TEST(Half, RoundsToNearestEvenAroundEveryMidpoint) {
  for (uint32_t i = 0; i < 0x7C00; ++i) {
    const double a = half_oracle(static_cast<uint16_t>(i));
    const double b = i == 0x7BFF ? 65536.0 : half_oracle(static_cast<uint16_t>(i + 1));
    const auto middle = static_cast<float>((a + b) / 2);  // exact in float
    ASSERT_EQ(static_cast<double>(middle), (a + b) / 2);
    for (const float value :
         {middle, std::nextafterf(middle, 0.0F), std::nextafterf(middle, 1e9F),
          static_cast<float>(a), std::nextafterf(static_cast<float>(a), 1e9F)}) {
      ASSERT_EQ(float_to_half(value), nearest_half(value)) << value;
      ASSERT_EQ(float_to_half(-value), nearest_half(-value)) << -value;
    }
  }
  EXPECT_EQ(float_to_half(1e30F), 0x7C00);
  EXPECT_EQ(float_to_half(-std::numeric_limits<float>::infinity()), 0xFC00);
  EXPECT_EQ(float_to_half(std::numeric_limits<float>::denorm_min()), 0);
  EXPECT_EQ(float_to_half(-0.0F), 0x8000);
  EXPECT_TRUE(std::isnan(half_to_float(float_to_half(std::nanf("")))));
}

TEST(Half, BFloat16IsTheUpperHalfOfAFloat) {
  EXPECT_EQ(bfloat16_to_float(0x3F80), 1.0F);
  EXPECT_EQ(bfloat16_to_float(0xC2F7), -123.5F);
  EXPECT_TRUE(std::isinf(bfloat16_to_float(0x7F80)));
  EXPECT_TRUE(std::isnan(bfloat16_to_float(0x7FC0)));
}

TEST(Threads, CoversTheRangeOnceInGrains) {
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.size(), threads);
    for (const int64_t grain : {1, 2, 7, 32}) {
      for (const int64_t count : {0, 1, 2, 6, 7, 8, 31, 32, 33, 63, 64, 100, 257}) {
        std::mutex mutex;
        std::vector<std::tuple<int64_t, int64_t, int>> first, second;
        for (auto* ranges : {&first, &second}) {
          pool.parallel_for(count, grain, [&](int64_t begin, int64_t end, int thread) {
            std::lock_guard lock(mutex);
            ranges->emplace_back(begin, end, thread);
          });
          std::sort(ranges->begin(), ranges->end());
        }
        EXPECT_EQ(first, second);  // the split depends on nothing but the arguments
        EXPECT_LE(first.size(), static_cast<size_t>(threads));
        int64_t next = 0;
        for (const auto& [begin, end, thread] : first) {
          EXPECT_EQ(begin, next);
          EXPECT_LT(begin, end);
          EXPECT_EQ(begin % grain, 0);
          EXPECT_TRUE(end % grain == 0 || end == count);
          EXPECT_TRUE(thread >= 0 && thread < threads);
          next = end;
        }
        EXPECT_EQ(next, count);
      }
    }
  }
}

TEST(Threads, ManyLoopsInARow) {
  ThreadPool pool(3);
  std::vector<int64_t> cells(64);
  for (int64_t round = 0; round < 2000; ++round) {
    pool.parallel_for(64, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        cells[static_cast<size_t>(i)] += i;
      }
    });
  }
  for (int64_t i = 0; i < 64; ++i) {
    EXPECT_EQ(cells[static_cast<size_t>(i)], 2000 * i);
  }
}

TEST(Threads, StartsAndStopsWithoutWork) {
  for (int i = 0; i < 50; ++i) {
    ThreadPool pool(4);
  }
  EXPECT_EQ(ThreadPool(0).size(), 1);
  EXPECT_GE(usable_threads(), 1);
  EXPECT_LE(usable_threads(), static_cast<int>(std::thread::hardware_concurrency()));
}

// Trees of files as the kernel shows them under /proc and /sys.
class UsableThreads : public Files {
 protected:
  void file(const std::string& name, const std::string& text) const {
    const std::filesystem::path path = folder_ / "root" / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  void cores(int cpus, const std::function<std::string(int)>& siblings) const {
    for (int cpu = 0; cpu < cpus; ++cpu) {
      file("sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list",
           siblings(cpu) + "\n");
    }
  }
  int threads(const std::vector<int>& cpus) const { return usable_threads(cpus, folder_ / "root"); }
};

TEST_F(UsableThreads, OneForEachCore) {
  EXPECT_EQ(threads({0, 1, 2, 5}), 4);  // nothing is known of them
  EXPECT_EQ(threads({}), 1);
  cores(8, [](int cpu) { return std::to_string(cpu % 4) + "," + std::to_string(cpu % 4 + 4); });
  EXPECT_EQ(threads({0, 1, 2, 3, 4, 5, 6, 7}), 4);
  EXPECT_EQ(threads({1, 5}), 1);
  EXPECT_EQ(threads({2, 3, 4}), 3);
  EXPECT_EQ(threads({7}), 1);
  // Four cores with two threads each, four with one.
  cores(12, [](int cpu) {
    return cpu < 8 ? std::to_string(cpu / 2 * 2) + "-" + std::to_string(cpu / 2 * 2 + 1)
                   : std::to_string(cpu);
  });
  EXPECT_EQ(threads({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}), 8);
}

TEST_F(UsableThreads, AsManyAsQuotasAllow) {
  const std::vector<int> eight = {0, 1, 2, 3, 4, 5, 6, 7};
  file("proc/self/cgroup", "0::/a.slice/b\n");
  EXPECT_EQ(threads(eight), 8);
  file("sys/fs/cgroup/a.slice/b/cpu.max", "max 100000\n");
  EXPECT_EQ(threads(eight), 8);
  file("sys/fs/cgroup/a.slice/cpu.max", "250000 100000\n");  // of the group around it
  EXPECT_EQ(threads(eight), 3);
  EXPECT_EQ(threads({0, 1}), 2);
  file("sys/fs/cgroup/cpu.max", "10000 100000\n");  // what a container sees as the root
  EXPECT_EQ(threads(eight), 1);
  for (const char* text : {"", "0 0", "-1 100000", "5", "garbage", "900000 100000"}) {
    file("sys/fs/cgroup/a.slice/cpu.max", text);
    file("sys/fs/cgroup/cpu.max", text);
    EXPECT_EQ(threads(eight), 8) << text;
  }
}

TEST_F(UsableThreads, AsManyAsQuotasOfVersion1Allow) {
  const std::vector<int> eight = {0, 1, 2, 3, 4, 5, 6, 7};
  file("proc/self/cgroup", "12:cpuset:/\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/x\n0::/\n");
  const std::string group = "sys/fs/cgroup/cpu,cpuacct/docker/";
  file(group + "x/cpu.cfs_period_us", "100000\n");
  file(group + "x/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(threads(eight), 8);
  file(group + "x/cpu.cfs_quota_us", "400000\n");
  EXPECT_EQ(threads(eight), 4);
  file("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "150000\n");
  EXPECT_EQ(threads(eight), 4);  // a quota without its period
  file("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(threads(eight), 2);
  file("proc/self/cgroup", "4:cpuacct,cpu:/docker/x\n");
  file("sys/fs/cgroup/cpu/docker/cpu.cfs_quota_us", "300000\n");  // the link that systems make
  file("sys/fs/cgroup/cpu/docker/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(threads(eight), 3);
}

TEST_F(UsableThreads, CachesOfCpusCountOnce) {
  const auto bytes = [&](const std::vector<int>& cpus) {
    return last_level_caches(cpus, folder_ / "root");
  };
  EXPECT_EQ(bytes({0, 1}), 0);  // nothing is known of them
  const auto cache = [&](int cpu, int index, int level, const std::string& size,
                         const std::string& sharers) {
    const std::string folder = "sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cache/index" +
                               std::to_string(index) + "/";
    file(folder + "level", std::to_string(level) + "\n");
    file(folder + "size", size + "\n");
    file(folder + "shared_cpu_list", sharers + "\n");
  };
  for (int cpu = 0; cpu < 8; ++cpu) {
    const std::string alone = std::to_string(cpu);
    cache(cpu, 0, 1, "48K", alone);
    cache(cpu, 1, 1, "32K", alone);
    cache(cpu, 2, 2, "1024K", alone);
    if (cpu < 6) {
      cache(cpu, 3, 3, cpu < 4 ? "32768K" : "16M", cpu < 4 ? "0-3" : "4-5");
    }
  }
  EXPECT_EQ(bytes({0}), 32 << 20);
  EXPECT_EQ(bytes({0, 1, 3}), 32 << 20);
  EXPECT_EQ(bytes({3, 4, 5}), 48 << 20);
  EXPECT_EQ(bytes({6, 7}), 2 << 20);
  EXPECT_GE(last_level_caches(), 0);
}

TEST(Threads, AsManyAsCanBeStarted) {
  const FewStacks few;
  ThreadPool pool(1000);
  ASSERT_LT(pool.size(), 1000);
  std::atomic<int64_t> sum{0};
  pool.parallel_for(4000, 1, [&](int64_t begin, int64_t end, int) { sum += end - begin; });
  EXPECT_EQ(sum, 4000);
}

TEST(Threads, ExceptionsReachTheCaller) {
  ThreadPool pool(4);
  for (const int64_t thrower : {0, 39, 20}) {
    EXPECT_THROW(pool.parallel_for(40, 1,
                                   [&](int64_t begin, int64_t end, int) {
                                     if (begin <= thrower && thrower < end) {
                                       throw std::bad_alloc();
                                     }
                                   }),
                 std::bad_alloc);
    std::atomic<int64_t> sum{0};
    pool.parallel_for(40, 1, [&](int64_t begin, int64_t end, int) { sum += end - begin; });
    EXPECT_EQ(sum, 40);
  }
}

/// Holds all threads of the process on one CPU while it lives.
class OneCpu {
 public:
  OneCpu() {
    sched_getaffinity(0, sizeof before_, &before_);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    hold(one);
  }
  ~OneCpu() { hold(before_); }

 private:
  static void hold(const cpu_set_t& set) {
    for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
      sched_setaffinity(std::stoi(task.path().filename()), sizeof set, &set);
    }
  }
  cpu_set_t before_;
};

TEST(Threads, TwoThatShareACpuAreNotMuchSlowerThanOne) {
  if (usable_threads() < 2) {
    GTEST_SKIP() << "needs two CPUs";
  }
  ThreadPool one(1), two(2);  // which believes that it has two
  const OneCpu held;
  const auto seconds = [](ThreadPool& pool) {
    const auto started = std::chrono::steady_clock::now();
    for (int loop = 0; loop < 1000; ++loop) {
      pool.parallel_for(2, 1, [](int64_t begin, int64_t end, int) {
        volatile int work = 0;
        for (int64_t i = 0; i < (end - begin) * 10000; ++i) {
          work = work + 1;
        }
      });
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  };
  std::vector<double> ones, twos;
  for (int i = 0; i < 7; ++i) {
    ones.push_back(seconds(one));
    twos.push_back(seconds(two));
  }
  EXPECT_LT(*std::min_element(twos.begin(), twos.end()),
            2 * *std::min_element(ones.begin(), ones.end()));
}

TEST(Interrupt, IsAFlag) {
  set_interrupted(false);
  EXPECT_TRUE(check_interrupt());
  EXPECT_FALSE(set_interrupted(true));
  EXPECT_TRUE(interrupted());
  const Status status = check_interrupt();
  ASSERT_FALSE(status);
  EXPECT_TRUE(status.error().interrupted);
  EXPECT_TRUE(set_interrupted(false));
  EXPECT_TRUE(check_interrupt());
}

}  // namespace
}  // namespace rabit
