// `rabit eval --ppl`: perplexity of a model file on a text file, with the protocol beside it.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "cli/common.h"
#include "cli/engine_flags.h"
#include "cli/engine_logits.h"
#include "cli/size_report.h"
#include "eval/perplexity.h"
#include "rabit/engine.h"

namespace rabit::cli {
namespace {

struct EvalOptions {
  std::string model, teacher, text;
  int64_t ctx = 2048, windows = 0, together = 0, threads = 0;
  bool json = false;
  EngineFlags engine;
};

/// A teacher's predictions are for the same tokens.
Status check_vocabularies(const GgufFile& model, const GgufFile& teacher) {
  constexpr const char* kTokens = "tokenizer.ggml.tokens";
  RABIT_ASSIGN(const auto ours, model.get_strings(kTokens));
  RABIT_ASSIGN(const auto theirs, teacher.get_strings(kTokens));
  if (ours != theirs) {
    return Error{fmt::format("the teacher {} has another vocabulary than the model {}",
                             teacher.path().string(), model.path().string())};
  }
  return {};
}

Status eval(const EvalOptions& options) {
  RABIT_ASSIGN(const auto file, GgufFile::open(options.model));
  RABIT_ASSIGN(const ModelConfig config, read_model_config(*file));
  RABIT_ASSIGN(const SizeReport size, size_report(*file, config));
  RABIT_ASSIGN(const auto tokenizer, load_tokenizer(*file));
  std::shared_ptr<GgufFile> teacher_file;
  if (!options.teacher.empty()) {
    RABIT_ASSIGN(teacher_file, GgufFile::open(options.teacher));
    RABIT_CHECK(check_vocabularies(*file, *teacher_file));
  }
  RABIT_ASSIGN(const std::string text, read_text_file(options.text));
  const std::vector<int32_t> tokens = tokens_of_text(*tokenizer, text);
  const auto count = static_cast<int64_t>(tokens.size());
  if (count < options.ctx) {
    return Error{
        fmt::format("{} has {}, less than one window of --ctx {}: take a longer text "
                    "or a smaller --ctx",
                    options.text, counted(count, "token"), options.ctx)};
  }
  warn_of_context(config.context_length, options.ctx);

  RABIT_ASSIGN(const auto model, load_model(options.model, options.engine, options.threads));
  std::shared_ptr<Model> teacher;
  if (!options.teacher.empty()) {
    RABIT_ASSIGN(teacher,
                 Model::load(options.teacher,
                             {.threads = static_cast<int>(options.threads), .dense_as_f32 = true}));
  }
  RABIT_ASSIGN(const auto source,
               EngineLogitSource::create(model, options.ctx, options.together, teacher));
  Progress progress("eval, windows");
  const double started = now_seconds();
  PerplexityResult result;  // and the other two: of the windows scored so far
  DivergenceResult divergence;
  double seconds = 0;
  const auto scored =
      perplexity(*source, tokens, {.ctx = options.ctx, .max_windows = options.windows},
                 [&](const PerplexityResult& so_far, int64_t windows) {
                   result = so_far;
                   divergence = source->divergence();
                   seconds = now_seconds() - started;
                   progress.update(so_far.windows, windows,
                                   fmt::format("perplexity {:.4f}", so_far.perplexity));
                 });
  progress.finish();
  const bool interrupted = !scored && scored.error().interrupted;
  if (!scored && !(interrupted && result.windows > 0)) {
    return scored.error();
  }

  const double rate = static_cast<double>(result.windows * result.ctx) / std::max(seconds, 1e-9);
  const auto share = [&](int64_t part) {
    return static_cast<double>(part) /
           static_cast<double>(std::max<int64_t>(1, divergence.positions));
  };
  if (!options.json) {
    const std::string from_teacher =
        teacher
            ? fmt::format(
                  "KL from the teacher (F32, perplexity {:.4f}): mean {:.3g} nats a token, at most "
                  "{:.3g}; the same token first in {:.2f} %\n",
                  std::exp(divergence.teacher_nll), divergence.mean_kl, divergence.largest_kl,
                  100 * share(divergence.same_top))
            : "";
    RABIT_CHECK(write_stdout(
        from_teacher +
        fmt::format("perplexity {:.4f} ± {:.4f} ({} scored in {} of {}, {:.0f} tokens/s{}{})\n"
                    "{}\n"
                    "{:.4f} bits per weight over the linear layers, {:.4f} over the file\n",
                    result.perplexity, result.perplexity_stderr,
                    counted(result.tokens_scored, "token"), counted(result.windows, "window"),
                    result.ctx, rate, teacher ? " with the teacher" : "",
                    interrupted ? "; interrupted" : "", perplexity_protocol(options.ctx),
                    size.bits_per_weight(), size.file_bits_per_weight())));
    return scored ? Status() : scored.error();
  }
  nlohmann::ordered_json told = {{"perplexity", result.perplexity},
                                 {"perplexity_stderr", result.perplexity_stderr},
                                 {"mean_nll", result.mean_nll},
                                 {"tokens_scored", result.tokens_scored},
                                 {"tokens_total", count},
                                 {"windows", result.windows},
                                 {"interrupted", interrupted},
                                 {"ctx", result.ctx},
                                 {"protocol", perplexity_protocol(options.ctx)},
                                 {"model", options.model},
                                 {"model_label", model_label(config, size)},
                                 {"model_sha256", file->sha256()},
                                 {"text", options.text},
                                 {"text_sha256", sha256_hex(text)},
                                 {"bits_per_weight", size.bits_per_weight()},
                                 {"file_bits_per_weight", size.file_bits_per_weight()},
                                 {"file_bytes", size.file_bytes},
                                 {"parameters", size.parameters},
                                 {"seconds", seconds},
                                 {"tokens_per_second", rate},
                                 {"threads", model->threads()},
                                 {"kernels", model->kernels()},
                                 {"device", model->device()},
                                 {"dense_weights", dense_type(options.engine)},
                                 {"kv_cache", cache_type(options.engine)},
                                 {"together", source->together()}};
  if (teacher) {
    told["teacher"] = {{"model", options.teacher},
                       {"model_sha256", teacher_file->sha256()},
                       {"perplexity", std::exp(divergence.teacher_nll)},
                       {"mean_kl", divergence.mean_kl},
                       {"largest_kl", divergence.largest_kl},
                       {"same_top", share(divergence.same_top)},
                       {"positions", divergence.positions}};
  }
  RABIT_CHECK(write_stdout(json_text(told)));
  return scored ? Status() : scored.error();
}

}  // namespace

Command add_eval(CLI::App& app) {
  auto options = std::make_shared<EvalOptions>();
  CLI::App* sub = app.add_subcommand("eval", "Measure a model: perplexity on a text");
  sub->add_option("-m,--model", options->model, "GGUF model, packed or ordinary")
      ->required()
      ->type_name("FILE");
  sub->add_option("--ppl", options->text, "UTF-8 text to score")->required()->type_name("TEXT");
  add_integer(sub, "--ctx", options->ctx, 2, 1 << 20, "Tokens a window");
  add_integer(sub, "--windows", options->windows, 0, 1 << 30, "Score the first N only; 0: all");
  sub->add_option("--teacher", options->teacher,
                  "GGUF model to compare with, in F32: the divergence of the predictions")
      ->check([](const std::string& name) { return name.empty() ? "names no file" : ""; })
      ->type_name("FILE");
  add_integer(sub, "--together", options->together, 0, 1 << 20,
              "Tokens that go through the model at once; 1: as in generation; 0: many");
  add_threads(sub, options->threads);
  add_engine_flags(sub, options->engine);
  sub->add_flag("--json", options->json, "Print one JSON object");
  sub->footer(
      "The text is tokenized once and cut into windows that do not overlap; every token but a\n"
      "window's first is scored, a short last window is dropped.\n\n"
      "Examples:\n"
      "  rabit eval -m model.gguf --ppl text.txt\n"
      "  rabit eval -m model.gguf --ppl text.txt --ctx 512 --windows 4 --json\n"
      "  rabit eval -m model.2bit.gguf --teacher model.gguf --ppl text.txt --together 1");
  return {sub, [options] { return eval(*options); }};
}

}  // namespace rabit::cli
