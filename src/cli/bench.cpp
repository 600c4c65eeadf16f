// `rabit bench`: speed of reading a prompt (pp) and of generating (tg), as llama-bench reports it.
// Each row is repeated; a run before the first is not counted.
#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "cli/common.h"
#include "cli/size_report.h"
#include "rabit/engine.h"

namespace rabit::cli {
namespace {

using Json = nlohmann::ordered_json;

struct BenchOptions {
  std::string model, threads, output = "md", kernels;
  int64_t prompt = 512, generate = 128, repetitions = 5;
  bool dense_f32 = false;
};

struct Row {
  std::string test;
  int64_t prompt = 0, generated = 0;
  int threads = 0;
  std::string kernels;
  std::vector<double> samples;  // tokens per second, by repetition

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
};

/// "1,2,4" as numbers; throws CLI::ValidationError.
std::vector<int64_t> parse_threads(const std::string& text) {
  std::vector<int64_t> out;
  size_t begin = 0;
  while (true) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    out.push_back(parse_integer("-t", text.substr(begin, comma - begin), 0, 1024));
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

/// Seconds for one pass over the row's tokens: all at once, or one at a time.
Result<double> time_once(Session& session, const Row& row, std::span<const int32_t> tokens) {
  session.truncate(0);
  const double started = now_seconds();
  if (row.prompt > 0) {
    RABIT_CHECK(session.forward(tokens));
  } else {
    for (size_t i = 0; i < tokens.size(); ++i) {
      RABIT_CHECK(session.forward(tokens.subspan(i, 1)));
    }
  }
  return now_seconds() - started;
}

Result<std::vector<Row>> measure(const BenchOptions& options, const std::vector<int64_t>& threads) {
  std::vector<Row> rows;
  for (const int64_t count : threads) {
    RABIT_ASSIGN(const auto model, Model::load(options.model, {.threads = static_cast<int>(count),
                                                               .dense_as_f32 = options.dense_f32,
                                                               .kernels = options.kernels}));
    RABIT_ASSIGN(const auto session,
                 Session::create(model, std::max(options.prompt, options.generate)));
    for (const bool prompt : {true, false}) {
      const int64_t length = prompt ? options.prompt : options.generate;
      if (length == 0) {
        continue;
      }
      Row row{.test = (prompt ? "pp" : "tg") + std::to_string(length),
              .prompt = prompt ? length : 0,
              .generated = prompt ? 0 : length,
              .threads = model->threads(),
              .kernels = model->kernels()};
      const auto tokens = filler_tokens(length, model->vocab_size());
      Progress progress(fmt::format("bench, {} on {} threads", row.test, row.threads));
      RABIT_CHECK(time_once(*session, row, tokens));
      for (int64_t i = 0; i < options.repetitions; ++i) {
        RABIT_ASSIGN(const double seconds, time_once(*session, row, tokens));
        row.samples.push_back(static_cast<double>(length) / std::max(seconds, 1e-9));
        progress.update(i + 1, options.repetitions, fmt::format("{:.2f} t/s", row.mean()));
      }
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

std::string to_markdown(const ModelConfig& config, const SizeReport& size,
                        const std::vector<Row>& rows) {
  const std::vector<std::string> head = {"model",   "size", "params", "backend",
                                         "threads", "test", "t/s"};
  std::vector<std::vector<std::string>> cells;
  for (const Row& row : rows) {
    cells.push_back({model_label(config, size),
                     fmt::format("{:.2f} MiB", static_cast<double>(size.tensor_bytes) / 1048576.0),
                     fmt::format("{:.2f} M", static_cast<double>(size.parameters) / 1e6), "CPU",
                     std::to_string(row.threads), row.test,
                     fmt::format("{:.2f} ± {:.2f}", row.mean(), row.stddev())});
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

Result<Json> to_json(const BenchOptions& options, const ModelConfig& config, const SizeReport& size,
                     const std::vector<Row>& rows) {
  RABIT_ASSIGN(const std::string sha256, sha256_file(options.model));
  Json out = {{"model", options.model},
              {"model_label", model_label(config, size)},
              {"model_sha256", sha256},
              {"model_size", size.tensor_bytes},
              {"file_bytes", size.file_bytes},
              {"params", size.parameters},
              {"bits_per_weight", size.bits_per_weight()},
              {"file_bits_per_weight", size.file_bits_per_weight()},
              {"backend", "CPU"},
              {"kernels", rows.front().kernels},
              {"dense_weights", options.dense_f32 ? "F32" : "F16"},
              {"repetitions", options.repetitions}};
  for (const Row& row : rows) {
    out["rows"].push_back({{"test", row.test},
                           {"n_prompt", row.prompt},
                           {"n_gen", row.generated},
                           {"threads", row.threads},
                           {"tokens_per_second", row.mean()},
                           {"stddev", row.stddev()},
                           {"samples", row.samples}});
  }
  return out;
}

Status bench(const BenchOptions& options) {
  if (options.prompt == 0 && options.generate == 0) {
    throw CLI::ValidationError("-p, -n", "0 and 0 leave nothing to measure");
  }
  const std::vector<int64_t> threads = parse_threads(options.threads);
  RABIT_ASSIGN(const auto file, GgufFile::open(options.model));
  RABIT_ASSIGN(const ModelConfig config, read_model_config(*file));
  RABIT_ASSIGN(const SizeReport size, size_report(*file, config));
  warn_of_context(config.context_length, std::max(options.prompt, options.generate));
  RABIT_ASSIGN(const std::vector<Row> rows, measure(options, threads));
  if (options.output == "md") {
    return write_stdout(to_markdown(config, size, rows));
  }
  RABIT_ASSIGN(const Json json, to_json(options, config, size, rows));
  return write_stdout(json_text(json));
}

}  // namespace

Command add_bench(CLI::App& app) {
  auto options = std::make_shared<BenchOptions>();
  options->threads = "0";
  CLI::App* sub = app.add_subcommand("bench", "Measure speed: reading a prompt and generating");
  sub->add_option("-m,--model", options->model, "GGUF model, packed or ordinary")
      ->required()
      ->type_name("FILE");
  add_integer(sub, "-p,--n-prompt", options->prompt, 0, 1 << 20,
              "Tokens of the prompt; 0: no pp row");
  add_integer(sub, "-n,--n-gen", options->generate, 0, 1 << 20, "Tokens to generate; 0: no tg row");
  add_integer(sub, "-r,--repetitions", options->repetitions, 1, 10000, "Repetitions of each row");
  sub->add_option("-t,--threads", options->threads,
                  "Thread counts, comma-separated; 0: as many as the process may use")
      ->type_name("N,...")
      ->capture_default_str();
  sub->add_option("-o,--output", options->output, "Output: md or json")
      ->check(CLI::IsMember({"md", "json"}))
      ->type_name("FORMAT")
      ->capture_default_str();
  sub->add_flag("--dense-f32", options->dense_f32, "Hold dense weights in F32 instead of F16");
  sub->add_option("--kernels", options->kernels,
                  "Kernel table instead of the best that runs here, or that RABIT_ISA names")
      ->type_name("NAME");
  sub->footer(
      "Examples:\n"
      "  rabit bench -m model.gguf\n"
      "  rabit bench -m model.gguf -p 64 -n 8 -r 2 -t 1,2\n"
      "  rabit bench -m model.gguf -p 0 -n 8 -r 2 -o json");
  return {sub, [options] { return bench(*options); }};
}

}  // namespace rabit::cli
