// `rabit bench`: speed of reading a prompt (pp) and of generating (tg), as llama-bench reports it.
// Each row is repeated; a run before the first is not counted. Before every repetition the memory
// is read once, so that both are measured under the same conditions.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <utility>

#include "cli/common.h"
#include "cli/engine_flags.h"
#include "cli/read_bandwidth.h"
#include "cli/size_report.h"
#include "engine/gpu.h"
#include "kernels/api/kernels.h"
#include "model/random_model.h"
#include "rabit/engine.h"

namespace rabit::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMostSequences = 1024;
constexpr int64_t kDenseBits = 16;

struct BenchOptions {
  std::string model, shape, save, threads, depths, sequences = "1", output = "md";
  int64_t layers = 0, bits = 2, prompt = 512, generate = 128, repetitions = 5;
  EngineFlags engine;
};

struct Row {
  std::string test;
  int64_t prompt = 0, generated = 0, depth = 0, sequences = 1;
  int threads = 0;
  std::string kernels, device;
  bool on_gpu = false;
  double load_seconds = 0;
  int64_t load_memory = 0;        // bytes that the process held at most until then
  uint64_t weight_bytes = 0;      // of a token
  int64_t position_bytes = 0;     // of the KV cache, all layers
  std::vector<double> samples;    // tokens per second, by repetition
  std::vector<double> bandwidth;  // bytes per second that could be read before each
  int64_t caches = 0;             // bytes, see last_level_caches(); 0 on a GPU

  double mean() const {
    return std::accumulate(samples.begin(), samples.end(), 0.0) /
           static_cast<double>(samples.size());
  }
  /// Sample standard deviation; 0 for a single repetition.
  double stddev() const {
    if (samples.size() < 2) {
      return 0;
    }
    const double centre = mean();
    double sum = 0;
    for (const double sample : samples) {
      sum += (sample - centre) * (sample - centre);
    }
    return std::sqrt(sum / static_cast<double>(samples.size() - 1));
  }
  /// Bytes that a generated token reads: the weights, shared by the sequences, and the cache of
  /// what is before it and of itself, a mean over the tokens.
  double bytes_per_token() const {
    const double positions = static_cast<double>(depth) + static_cast<double>(generated + 1) / 2;
    return static_cast<double>(weight_bytes) / static_cast<double>(sequences) +
           positions * static_cast<double>(position_bytes);
  }
  double bytes_per_second() const { return mean() * bytes_per_token(); }
  /// Whether the caches of the CPUs may hold all that a token of each sequence reads.
  bool in_cache() const {
    return bytes_per_token() * static_cast<double>(sequences) <= static_cast<double>(caches);
  }
  /// Of what could be read, the mean over repetitions.
  double share_of_read() const {
    double sum = 0;
    for (size_t i = 0; i < samples.size(); ++i) {
      sum += samples[i] * bytes_per_token() / bandwidth[i];
    }
    return sum / static_cast<double>(samples.size());
  }
};

/// "1,2,4" as numbers; throws CLI::ValidationError.
std::vector<int64_t> parse_list(const std::string& option, const std::string& text, int64_t most,
                                int64_t least = 0) {
  std::vector<int64_t> out;
  size_t begin = 0;
  while (true) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    out.push_back(parse_integer(option, text.substr(begin, comma - begin), least, most));
    if (comma == text.size()) {
      return out;
    }
    begin = comma + 1;
  }
}

/// Token ids that differ from each other and are the same in every run; their values do not matter
/// for speed.
std::vector<int32_t> filler_tokens(int64_t count, int64_t vocab) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  uint64_t state = 1;
  for (int32_t& token : tokens) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    token = static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(vocab));
  }
  return tokens;
}

/// Seconds for one pass over the row's tokens: all at once, or one at a time, in as many sequences
/// as it has; after the positions of its depth.
Result<double> time_once(std::span<Session* const> sessions, const Row& row,
                         std::span<const int32_t> tokens) {
  const auto own = sessions.first(static_cast<size_t>(row.sequences));
  for (Session* session : own) {
    session->truncate(row.depth);
  }
  std::vector<int32_t> next(own.size());
  const double started = now_seconds();
  if (row.prompt > 0) {
    RABIT_CHECK(own.front()->forward(tokens));
  } else {
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (own.size() == 1) {
        RABIT_CHECK(own.front()->forward(tokens.subspan(i, 1)));
      } else {
        std::fill(next.begin(), next.end(), tokens[i]);
        RABIT_CHECK(Session::forward_each(own, next));
      }
    }
  }
  return now_seconds() - started;
}

std::string where(const Row& row) {
  return row.on_gpu ? row.device : counted(row.threads, "thread");
}

/// Bytes that the process has held at most since forget_peak_memory(), what it read of mapped files
/// included; 0: not known.
int64_t peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) {
      return std::atoll(line.c_str() + 6) * 1024;
    }
  }
  return 0;
}
void forget_peak_memory() { std::ofstream("/proc/self/clear_refs") << "5"; }

/// Bytes a second at which what computes reads its memory, measured when called.
using Bandwidth = std::function<Result<double>()>;

/// The rows of one depth, prompt first. loaded: what all rows of the model have in common.
Status measure_depth(const BenchOptions& options, const Model& model, const Row& loaded,
                     std::span<Session* const> sessions, const std::vector<int64_t>& sequences,
                     const Bandwidth& bandwidth, int64_t depth, std::vector<Row>& rows) {
  const std::vector<int32_t> before = filler_tokens(depth, model.vocab_size());
  Progress preparing("bench, positions before on " + where(loaded));
  for (size_t i = 0; i < sessions.size(); ++i) {
    sessions[i]->truncate(0);
    for (int64_t at = 0; at < depth; at += kMostTogether) {
      const auto part = static_cast<size_t>(std::min(kMostTogether, depth - at));
      RABIT_CHECK(sessions[i]->forward(std::span(before).subspan(static_cast<size_t>(at), part)));
      preparing.update(static_cast<int64_t>(i) * depth + at + static_cast<int64_t>(part),
                       depth * static_cast<int64_t>(sessions.size()), "");
    }
  }
  std::vector<std::pair<bool, int64_t>> tests = {{true, 1}};  // a prompt? sequences
  for (const int64_t count : sequences) {
    tests.emplace_back(false, count);
  }
  for (const auto& [prompt, count] : tests) {
    const int64_t length = prompt ? options.prompt : options.generate;
    if (length == 0) {
      continue;
    }
    Row row = loaded;
    row.test = (prompt ? "pp" : "tg") + std::to_string(length) +
               (count > 1 ? fmt::format(" x {}", count) : "") +
               (depth > 0 ? fmt::format(" @ d{}", depth) : "");
    (prompt ? row.prompt : row.generated) = length;
    row.depth = depth;
    row.sequences = count;
    const auto tokens = filler_tokens(length, model.vocab_size());
    Progress progress(fmt::format("bench, {} on {}", row.test, where(row)));
    RABIT_CHECK(time_once(sessions, row, tokens));
    for (int64_t i = 0; i < options.repetitions; ++i) {
      RABIT_ASSIGN(const double read, bandwidth());
      row.bandwidth.push_back(read);
      RABIT_ASSIGN(const double seconds, time_once(sessions, row, tokens));
      row.samples.push_back(static_cast<double>(length * count) / std::max(seconds, 1e-9));
      progress.update(i + 1, options.repetitions, fmt::format("{:.2f} t/s", row.mean()));
    }
    rows.push_back(std::move(row));
  }
  return {};
}

/// Bytes of a position in the KV cache of all layers.
int64_t position_bytes(const EngineFlags& flags, const ModelConfig& config) {
  const std::string type = cache_type(flags);
  return cache_bytes(type == "F32"    ? CacheFormat::kF32
                     : type == "Q8_0" ? CacheFormat::kQ8_0
                                      : CacheFormat::kF16,
                     2 * config.layers * config.d_kv());
}

/// `rows` takes each as it is done.
Status measure(const BenchOptions& options, const std::filesystem::path& path,
               const ModelConfig& config, const std::vector<int64_t>& threads,
               const std::vector<int64_t>& depths, const std::vector<int64_t>& sequences,
               std::vector<Row>& rows) {
  const int64_t deepest = *std::max_element(depths.begin(), depths.end());
  for (const int64_t count : threads) {
    forget_peak_memory();
    const double started = now_seconds();
    RABIT_ASSIGN(const auto model, load_model(path, options.engine, count));
    const Row loaded = {.threads = model->threads(),
                        .kernels = model->kernels(),
                        .device = model->device(),
                        .on_gpu = model->on_gpu(),
                        .load_seconds = now_seconds() - started,
                        .load_memory = peak_memory(),
                        .weight_bytes = model->weight_bytes(),
                        .position_bytes = position_bytes(options.engine, config),
                        .caches = model->on_gpu() ? 0 : last_level_caches()};
    std::vector<std::unique_ptr<Session>> owned;
    std::vector<Session*> sessions;
    for (int64_t i = 0; i < *std::max_element(sequences.begin(), sequences.end()); ++i) {
      const int64_t longest =
          i == 0 ? std::max(options.prompt, options.generate) : options.generate;
      RABIT_ASSIGN(auto session, Session::create(model, std::max<int64_t>(deepest + longest, 1)));
      sessions.push_back(session.get());
      owned.push_back(std::move(session));
    }
    std::optional<ReadBandwidth> host;
    if (!model->on_gpu()) {
      RABIT_ASSIGN(host, ReadBandwidth::make(model->threads()));
    }
    const Bandwidth bandwidth = [&]() -> Result<double> {
      return host ? Result<double>(host->measure()) : gpu_read_speed(*model);
    };
    for (const int64_t depth : depths) {
      RABIT_CHECK(
          measure_depth(options, *model, loaded, sessions, sequences, bandwidth, depth, rows));
    }
    if (model->on_gpu()) {
      break;  // it computes no faster with more threads of the host
    }
  }
  return {};
}

/// In MiB, from 1024 of them on in GiB; as llama-bench has it.
std::string size_text(uint64_t bytes) {
  const double mib = static_cast<double>(bytes) / 1048576.0;
  return mib < 1024 ? fmt::format("{:.2f} MiB", mib) : fmt::format("{:.2f} GiB", mib / 1024);
}

/// In millions, from 1000 of them on in billions.
std::string count_text(int64_t count) {
  const double millions = static_cast<double>(count) / 1e6;
  return millions < 1000 ? fmt::format("{:.2f} M", millions)
                         : fmt::format("{:.2f} B", millions / 1000);
}

std::string to_markdown(const ModelConfig& config, const SizeReport& size,
                        const std::vector<Row>& rows) {
  const std::vector<std::string> head = {"model", "size", "params", "backend", "threads",
                                         "test",  "t/s",  "GB/s",   "of read"};
  std::vector<std::vector<std::string>> cells;
  for (const Row& row : rows) {
    cells.push_back({model_label(config, size), size_text(size.tensor_bytes),
                     count_text(size.parameters), row.on_gpu ? "CUDA, " + row.device : row.kernels,
                     row.on_gpu ? "" : std::to_string(row.threads), row.test,
                     fmt::format("{:.2f} ± {:.2f}", row.mean(), row.stddev()),
                     row.generated == 0 ? "" : fmt::format("{:.2f}", row.bytes_per_second() / 1e9),
                     row.generated == 0 ? ""
                     : row.in_cache()   ? "in cache"
                                        : fmt::format("{:.0f} %", 100 * row.share_of_read())});
  }
  std::string line = "|", rule = "|", body;
  std::vector<size_t> widths;
  for (size_t column = 0; column < head.size(); ++column) {
    size_t width = head[column].size();
    for (const auto& row : cells) {
      // "±" is two bytes but one column.
      width = std::max(width, row[column].size() - (column == 6 ? 1 : 0));
    }
    widths.push_back(width);
    const bool right = column == 1 || column == 2 || column == 4 || column >= 5;
    line += right ? fmt::format(" {:>{}} |", head[column], width)
                  : fmt::format(" {:<{}} |", head[column], width);
    rule += " " + std::string(width - 1, '-') + (right ? ":" : "-") + " |";
  }
  for (const auto& row : cells) {
    body += "|";
    for (size_t column = 0; column < head.size(); ++column) {
      const bool left = column == 0 || column == 3;
      body += left ? fmt::format(" {:<{}} |", row[column], widths[column])
                   : fmt::format(" {:>{}} |", row[column], widths[column]);
    }
    body += "\n";
  }
  return line + "\n" + rule + "\n" + body;
}

Json to_json(const BenchOptions& options, const GgufFile& file, const ModelConfig& config,
             const SizeReport& size, const std::vector<Row>& rows) {
  Json out = {{"model", options.shape.empty() ? options.model : "random " + options.shape},
              {"model_label", model_label(config, size)},
              {"model_sha256", file.sha256()},
              {"model_size", size.tensor_bytes},
              {"file_bytes", size.file_bytes},
              {"params", size.parameters},
              {"bits_per_weight", size.bits_per_weight()},
              {"file_bits_per_weight", size.file_bits_per_weight()},
              {"backend", rows.front().on_gpu ? "CUDA" : "CPU"},
              {"device", rows.front().device},
              {"kernels", rows.front().kernels},
              {"weight_bytes_per_token", rows.front().weight_bytes},
              {"cache_bytes_per_position", rows.front().position_bytes},
              {"last_level_cache_bytes", rows.front().caches},
              {"dense_weights", dense_type(options.engine)},
              {"kv_cache", cache_type(options.engine)},
              {"repetitions", options.repetitions}};
  for (const Row& row : rows) {
    out["rows"].push_back({{"test", row.test},
                           {"n_prompt", row.prompt},
                           {"n_gen", row.generated},
                           {"depth", row.depth},
                           {"sequences", row.sequences},
                           {"threads", row.threads},
                           {"load_seconds", row.load_seconds},
                           {"load_memory_bytes", row.load_memory},
                           {"tokens_per_second", row.mean()},
                           {"stddev", row.stddev()},
                           {"samples", row.samples},
                           {"read_bytes_per_second", row.bandwidth}});
    if (row.generated > 0) {
      out["rows"].back()["bytes_per_token"] = row.bytes_per_token();
      out["rows"].back()["bytes_per_second"] = row.bytes_per_second();
      out["rows"].back()["share_of_read"] = row.share_of_read();
    }
    if (row.on_gpu) {
      out["rows"].back().erase("threads");
    }
  }
  return out;
}

/// A folder of its own among the system's temporary ones, gone with this.
class TemporaryFolder {
 public:
  /// Errors: a folder that cannot be made.
  static Result<TemporaryFolder> make() {
    const char* given = std::getenv("TMPDIR");
    std::string name =
        std::string(given != nullptr && *given != 0 ? given : "/tmp") + "/rabit-bench-XXXXXX";
    if (::mkdtemp(name.data()) == nullptr) {
      return Error{"cannot make a folder " + name + ": " + std::strerror(errno)};
    }
    TemporaryFolder folder;
    folder.path_ = name;
    return folder;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    if (!path_.empty()) {
      std::filesystem::remove_all(path_, ignored);
    }
  }
  TemporaryFolder(TemporaryFolder&& other) noexcept : path_(std::exchange(other.path_, {})) {}
  TemporaryFolder& operator=(TemporaryFolder&& other) noexcept {
    std::swap(path_, other.path_);
    return *this;
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  TemporaryFolder() = default;
  std::filesystem::path path_;
};

/// A file that stays until this goes, even without a name.
class OpenFile {
 public:
  OpenFile() = default;
  /// Errors: a file that cannot be read.
  static Result<OpenFile> open(const std::filesystem::path& path) {
    OpenFile file;
    file.fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file.fd_ < 0) {
      return Error{"cannot open " + path.string() + ": " + std::strerror(errno)};
    }
    return file;
  }
  ~OpenFile() {
    if (fd_ >= 0) {
      ::close(fd_);
    }
  }
  OpenFile(OpenFile&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  OpenFile& operator=(OpenFile&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  std::filesystem::path path() const { return fmt::format("/proc/self/fd/{}", fd_); }

 private:
  int fd_ = -1;
};

Status bench(const BenchOptions& options) {
  if (options.model.empty() && options.shape.empty()) {
    throw CLI::RequiredError("-m or --shape");
  }
  if (options.prompt == 0 && options.generate == 0) {
    throw CLI::ValidationError("-p,--n-prompt and -n,--n-gen", "0 and 0 leave nothing to measure");
  }
  if (options.engine.device.empty() || options.engine.device == "cpu") {
    RABIT_CHECK(Model::check_kernels(options.engine.kernels));  // before a model is made for it
  }
  const std::vector<int64_t> threads = parse_list("-t,--threads", options.threads, 1024);
  const std::vector<int64_t> depths = parse_list("-d,--depth", options.depths, 1 << 20);
  const std::vector<int64_t> sequences =
      parse_list("-s,--sequences", options.sequences, kMostSequences, 1);
  std::filesystem::path path = options.model;
  OpenFile made;
  if (!options.shape.empty()) {
    RABIT_ASSIGN(ModelConfig config, named_shape(options.shape));
    config.layers = options.layers > 0 ? options.layers : config.layers;
    if (options.bits > kMostPackedPaths && options.bits != kDenseBits) {
      throw CLI::ValidationError("--bits", "the model of --shape has 1 to 4, or 16");
    }
    const int64_t paths = options.bits == kDenseBits ? 0 : options.bits;
    path = options.save;
    if (!path.empty()) {
      RABIT_CHECK(write_random_model(path, config, paths));
    } else {
      RABIT_ASSIGN(const auto temporary, TemporaryFolder::make());
      RABIT_CHECK(write_random_model(temporary.path() / "model.gguf", config, paths));
      RABIT_ASSIGN(made, OpenFile::open(temporary.path() / "model.gguf"));
      path = made.path();  // which outlives its folder, and no kill leaves it behind
    }
  }
  RABIT_ASSIGN(const auto file, GgufFile::open(path));
  RABIT_ASSIGN(const ModelConfig config, read_model_config(*file));
  RABIT_ASSIGN(const SizeReport size, size_report(*file, config));
  warn_of_context(config.context_length, *std::max_element(depths.begin(), depths.end()) +
                                             std::max(options.prompt, options.generate));
  std::vector<Row> rows;
  const Status measured = measure(options, path, config, threads, depths, sequences, rows);
  if (!rows.empty() && options.output == "md") {  // also of a measurement that was interrupted
    RABIT_CHECK(write_stdout(to_markdown(config, size, rows)));
  } else if (!rows.empty()) {
    Json told = to_json(options, *file, config, size, rows);
    told["interrupted"] = !measured && measured.error().interrupted;
    RABIT_CHECK(write_stdout(json_text(told)));
  }
  return measured;
}

}  // namespace

Command add_bench(CLI::App& app) {
  auto options = std::make_shared<BenchOptions>();
  options->threads = options->depths = "0";
  CLI::App* sub = app.add_subcommand("bench", "Measure speed: reading a prompt and generating");
  CLI::Option* model =
      sub->add_option("-m,--model", options->model, "GGUF model, packed or ordinary")
          ->type_name("FILE");
  CLI::Option* shape =
      sub->add_option("--shape", options->shape,
                      "Instead of -m: a random packed model of the shape of one of " +
                          shape_names() + "; made for the time, in TMPDIR or /tmp")
          ->check([](const std::string& name) {
            const auto config = named_shape(name);
            return config ? std::string() : config.error().message;
          })
          ->type_name("NAME")
          ->excludes(model);
  add_integer(sub, "--layers", options->layers, 0, 1024, "Blocks of --shape; 0: all")->needs(shape);
  add_integer(sub, "--bits", options->bits, 1, kDenseBits,
              "Paths of --shape, 1 to 4, and a head in Q8_0; 16: all in F16 instead")
      ->needs(shape);
  sub->add_option("--save", options->save, "Leave the model of --shape in this file")
      ->type_name("FILE")
      ->needs(shape);
  add_integer(sub, "-p,--n-prompt", options->prompt, 0, 1 << 20,
              "Tokens of the prompt; 0: no pp row");
  add_integer(sub, "-n,--n-gen", options->generate, 0, 1 << 20, "Tokens to generate; 0: no tg row");
  add_integer(sub, "-r,--repetitions", options->repetitions, 1, 10000, "Repetitions of each row");
  sub->add_option("-t,--threads", options->threads,
                  "Thread counts, comma-separated; 0: one for each core")
      ->type_name("N,...")
      ->capture_default_str();
  sub->add_option("-d,--depth", options->depths,
                  "Positions that are there before, comma-separated: rows for each")
      ->type_name("N,...")
      ->capture_default_str();
  sub->add_option("-s,--sequences", options->sequences,
                  "Sequences that generate at once, comma-separated: a tg row for each, of the "
                  "tokens of all")
      ->type_name("N,...")
      ->capture_default_str();
  sub->add_option("-o,--output", options->output, "Output: md or json")
      ->check(one_of({"md", "json"}))
      ->type_name("FORMAT")
      ->capture_default_str();
  add_engine_flags(sub, options->engine);
  sub->footer(
      "Examples:\n"
      "  rabit bench -m model.gguf\n"
      "  rabit bench -m model.gguf -p 64 -n 8 -r 2 -t 1,2\n"
      "  rabit bench -m model.gguf -p 0 -n 8 -r 2 -d 0,64 -o json\n"
      "  rabit bench -m model.gguf -p 0 -n 8 -r 2 -s 1,3\n"
      "  rabit bench --shape llama2-7b --layers 4\n"
      "  rabit bench -m model.gguf --device cpu -p 512 -n 16");
  return {sub, [options] { return bench(*options); }};
}

}  // namespace rabit::cli
