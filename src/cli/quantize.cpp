// `rabit quantize`: a pretrained model in, a packed model out.

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/interrupt.h"
#include "base/threads.h"
#include "cli/common.h"
#include "cli/metrics_file.h"
#include "cli/samples.h"
#include "cli/size_report.h"
#include "model/config.h"
#ifdef RABIT_TRAIN
#include "train/place.h"
#include "train/quantize.h"
#endif

namespace rabit::cli {

#ifndef RABIT_TRAIN

Command add_quantize(CLI::App& app) { return not_in_this_build(app, "quantize"); }

#else

namespace {

struct Arguments {
  std::string model, out, eval_text, report, token_cache, metrics;
  std::vector<std::string> data;
  std::vector<std::string> prompts = {"The capital of France is", "Water boils when",
                                      "The children went down to the river, and"};
  int64_t eval_ctx = 2048, sample_tokens = 48;
  bool json = false;
  train::QuantizeOptions options;
};

// What the packed file and the runtime add to the log of training.
Status complete_log(const Arguments& arguments, nlohmann::json& log) {
  const train::QuantizeOptions& options = arguments.options;
  RABIT_ASSIGN(const auto packed, GgufFile::open(arguments.out));
  RABIT_ASSIGN(const ModelConfig config, read_model_config(*packed));
  RABIT_ASSIGN(const SizeReport size, size_report(*packed, config));
  log["file"] = {{"bytes", size.file_bytes},
                 {"bits_per_weight", size.file_bits_per_weight()},
                 {"parameters", size.parameters}};
  log["output"] = std::filesystem::path(arguments.out).filename().string();
  log["version"] = RABIT_VERSION;
  const auto quoted = [](const std::string& text) {
    const auto plain = [](char c) {
      return std::isalnum(static_cast<unsigned char>(c)) != 0 || std::strchr("-_./=:,+@%", c);
    };
    if (!text.empty() && std::all_of(text.begin(), text.end(), plain)) {
      return text;
    }
    std::string out = "'";
    for (const char c : text) {
      out += c == '\'' ? std::string("'\\''") : std::string(1, c);
    }
    return out + "'";
  };
  const auto name = [&](const std::filesystem::path& path) {
    return quoted((path.has_filename() ? path : path.parent_path()).filename().string());
  };
  std::string command =
      "rabit quantize " + name(arguments.model) + " -o " + name(arguments.out) + " --data";
  for (const std::string& file : arguments.data) {
    command += " " + name(file);
  }
  command += train::arguments_of(options);
  if (!arguments.eval_text.empty()) {
    command +=
        fmt::format(" --eval {} --eval-ctx {}", name(arguments.eval_text), arguments.eval_ctx);
  }
  log["command"] = command;
  if (arguments.sample_tokens == 0) {
    return {};
  }
  Progress progress("samples");
  const auto total = static_cast<int64_t>(2 * arguments.prompts.size());
  int64_t done = 0;
  const auto write = [&](const std::string& model) {
    return write_samples(model, arguments.prompts, arguments.sample_tokens, options.threads,
                         [&] { progress.update(++done, total, ""); });
  };
  RABIT_ASSIGN(const auto teacher, write(arguments.model));
  RABIT_ASSIGN(const auto student, write(arguments.out));
  log["samples"] = nlohmann::json::array();
  for (size_t i = 0; i < teacher.size(); ++i) {
    log["samples"].push_back(
        {{"prompt", arguments.prompts[i]}, {"teacher", teacher[i]}, {"student", student[i]}});
  }
  log["samples_protocol"] =
      fmt::format("{} tokens at most, temperature {}, top-k 40, top-p 0.95, min-p 0.05, seed {}",
                  arguments.sample_tokens, kSampleTemperature, kSampleSeed);
  return {};
}

Status report(const Arguments& arguments) {
  const std::string path = arguments.out + ".json";
  RABIT_ASSIGN(const std::string text, read_file(path));
  auto log = nlohmann::json::parse(text, nullptr, false);
  if (!log.is_object()) {
    return Error{path + ": it was changed by another program"};
  }
  RABIT_CHECK(complete_log(arguments, log));
  const std::string whole =
      log.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  RABIT_CHECK(write_file(path, whole));
  const std::string page = arguments.report.empty() ? arguments.out + ".html" : arguments.report;
  // As it was written: samples may end within a character, which the file holds repaired.
  RABIT_CHECK(write_report(nlohmann::json::parse(whole), page));
  write_stderr("report in " + one_line(page) + "\n");
  return {};
}

// `told`: whether this process tells how it goes.
Result<train::TrainingText> tokenize(const Arguments& arguments, const Tokenizer& tokenizer,
                                     bool told) {
  train::TokenizeOptions options{arguments.options.data_field, arguments.token_cache};
  if (options.cache.empty()) {
    options.cache = train::default_token_cache();
  }
  ThreadPool pool(arguments.options.threads > 0 ? static_cast<int>(arguments.options.threads)
                                                : usable_threads());
  train::TrainingText text;
  for (const auto& path : arguments.data) {
    Progress progress("tokenize");
    options.waiting = [&] {
      if (told) {
        progress.update(0, 0, "waiting for another process that tokenizes " + one_line(path));
      }
    };
    RABIT_ASSIGN(train::TokenSource source,
                 train::tokenize_source(tokenizer, path, options, pool, [&](int64_t tokens) {
                   if (told) {
                     progress.update(tokens, 0, "tokens of " + one_line(path));
                   }
                 }));
    text.sources.push_back(std::move(source));
  }
  return text;
}

// Of several processes one tells and writes.
Status run_among(const std::shared_ptr<train::Ranks>& ranks, const train::Place& place,
                 const Arguments& arguments) {
  const train::QuantizeOptions& options = arguments.options;
  std::vector<std::filesystem::path> inputs = {arguments.model};
  inputs.insert(inputs.end(), arguments.data.begin(), arguments.data.end());
  if (!arguments.eval_text.empty()) {
    inputs.emplace_back(arguments.eval_text);
  }
  RABIT_CHECK(train::check_run(options, arguments.out, inputs));
  // Files that the run writes, and the option that names them.
  std::vector<std::pair<std::string, std::string> > written;
  const auto apart = [&](const std::string& option, const std::string& path) -> Status {
    std::error_code unknown;
    const auto place = [&](const std::string& name) {
      return std::filesystem::weakly_canonical(name, unknown);
    };
    for (const auto& [other, by] : written) {
      if (place(path) == place(other)) {
        return Error{option + " " + path + ": is what " + by + " writes; name another file"};
      }
    }
    return {};
  };
  const std::string& out = arguments.out;
  for (const char* tail : {"", ".json", ".ckpt", ".lock", ".unverified"}) {
    written.emplace_back(out + tail, "-o");
  }
  for (int64_t older = 1; older < options.keep_checkpoints; ++older) {
    written.emplace_back(fmt::format("{}.ckpt.{}", out, older), "-o");
  }
  if (!arguments.report.empty()) {
    const std::string option = "--report " + arguments.report;
    RABIT_CHECK(check_written(option, arguments.report, inputs));
    RABIT_CHECK(check_page(option, arguments.report));
    RABIT_CHECK(apart("--report", arguments.report));
  }
  MetricsFile metrics(arguments.metrics, options.resume);
  if (!arguments.metrics.empty() && place.first()) {
    RABIT_CHECK(metrics.check(inputs));
    written.emplace_back(arguments.report.empty() ? out + ".html" : arguments.report, "--report");
    RABIT_CHECK(apart("--metrics", arguments.metrics));
  }
  RABIT_ASSIGN(const auto model, GgufFile::open(arguments.model));
  if (model->find_meta("rabit.checkpoint.version") != nullptr) {
    return Error{arguments.model +
                 ": is the checkpoint of a run; give the original model, and --resume to go on"};
  }
  RABIT_ASSIGN(const auto tokenizer, load_tokenizer(*model));
  RABIT_ASSIGN(const train::TrainingText text, tokenize(arguments, *tokenizer, place.first()));
  train::HeldOut held_out;
  if (!arguments.eval_text.empty()) {
    RABIT_ASSIGN(const std::string content, read_text_file(arguments.eval_text));
    held_out.tokens = tokens_of_text(*tokenizer, content);
    held_out.ctx = arguments.eval_ctx;
    held_out.sha256 = sha256_hex(content);
  }

  std::unique_ptr<Progress> progress;
  std::string phase;
  train::TrainObserver observer;
  observer.progress = [&](const train::TrainProgress& p) {
    if (p.phase != phase) {
      progress.reset();  // ends its line
      progress = std::make_unique<Progress>(phase = p.phase, p.done);
    }
    std::vector<std::string> details;
    if (!std::isnan(p.loss)) {
      details.push_back(fmt::format("loss {:.4f}", p.loss));
    }
    if (p.tokens_per_second > 0.0) {
      details.push_back(fmt::format("{:.0f} tokens/s", p.tokens_per_second));
    }
    progress->update(p.done, p.total, fmt::format("{}", fmt::join(details, ", ")));
  };
  observer.message = [&](const std::string& line) {
    progress.reset();
    phase.clear();
    write_stderr(line + "\n");
  };
  if (!arguments.metrics.empty()) {
    observer.metrics = [&](const nlohmann::json& line) {
      if (const Status added = place.first() ? metrics.add(line) : Status(); !added) {
        observer.message("no metrics: " + added.error().message + "; going on without");
      }
    };
  }
  if (!place.first()) {
    observer.message = [](const std::string&) {};
    observer.progress = nullptr;
  }
  observer.message(fmt::format("{} tokens of training text", text.tokens()));
  std::filesystem::path checkpoint = arguments.out;
  checkpoint += ".ckpt";
  const Status status =
      train::quantize(*model, text, held_out, arguments.out, options, observer, ranks);
  progress.reset();
  if (!status) {
    std::error_code unknown;
    if (status.error().interrupted && std::filesystem::exists(checkpoint, unknown)) {
      if (terminated()) {  // as asked: nothing is lost, and nothing went wrong
        if (place.first()) {
          note("stopped by SIGTERM; " + checkpoint.string() +
               " holds what was done, go on with the same command and --resume");
        }
        return {};
      }
      if (!place.first()) {
        return Error{"", true};
      }
      return Error{"interrupted; " + checkpoint.string() +
                       " holds what was done, go on with the same command and --resume",
                   true};
    }
    if (status.error().interrupted) {
      return Error{"interrupted before anything was finished; nothing was written", true};
    }
    return status;
  }
  if (options.dry_run || !place.first()) {
    return {};
  }
  std::error_code unknown;
  const auto bytes = static_cast<double>(std::filesystem::file_size(arguments.out, unknown));
  write_stderr(fmt::format("wrote {} ({:.1f} MB), log in {}.json\n", one_line(arguments.out),
                           bytes / 1e6, one_line(arguments.out)));
  const Status reported = report(arguments);
  if (!reported) {  // the model is there, whatever became of its page
    return Error{"no report: " + reported.error().message +
                     "; the model is whole, and rabit "
                     "report makes the page from its log",
                 reported.error().interrupted};
  }
  if (arguments.json) {
    RABIT_ASSIGN(const std::string log, read_file(arguments.out + ".json"));
    RABIT_CHECK(write_stdout(log));
  }
  return {};
}

Status run(const Arguments& arguments) {
  if (arguments.json && arguments.options.dry_run) {
    throw CLI::ValidationError("--json prints the log of a run, and --dry-run makes none");
  }
  if (const Status consistent = train::check_options(arguments.options); !consistent) {
    throw CLI::ValidationError(consistent.error().message);
  }
  RABIT_ASSIGN(const train::Place place, train::Place::from_environment());
  // Called where nothing else can end this process: it may wait for a lost one for ever.
  const auto lost = [](const std::string& what) {
    write_stderr("rabit: " + one_line(what) + "\n");
    std::_Exit(kFailure);
  };
  const auto waiting = [](const std::string& what) { write_stderr(what + "\n"); };
  RABIT_ASSIGN(const auto ranks, train::join_processes(arguments.options, lost, waiting));
  const Status done = run_among(ranks, place, arguments);
  train::leave_processes(ranks, done);
  return done;
}

/// The option of a setting of training.
void add_setting(CLI::App* group, const train::Setting& setting, train::QuantizeOptions& options) {
  using train::Setting;
  const std::string name(setting.option), help(setting.help);
  if (const auto* integer = std::get_if<Setting::Integer>(&setting.value)) {
    add_integer(group, name, options.*integer->member, integer->low, integer->high, help);
  } else if (const auto* number = std::get_if<Setting::Number>(&setting.value)) {
    add_number(group, name, options.*number->member, number->low, number->high, help);
  } else if (const auto* text = std::get_if<Setting::Text>(&setting.value)) {
    group->add_option(name, options.*text->member, help)
        ->capture_default_str()
        ->check([text, name](const std::string& value) {
          const Status status = text->check(value);
          if (status) {
            return std::string();
          }
          // CLI11 puts the option's name before the message itself.
          const std::string& message = status.error().message;
          const std::string prefix = std::string(name) + " ";
          return message.rfind(prefix, 0) == 0 ? message.substr(prefix.size()) : message;
        });
  } else if (const auto* flag = std::get_if<Setting::Flag>(&setting.value)) {
    group->add_flag_callback(
        name, [&options, flag] { options.*flag->member = flag->when_given; }, help);
  } else {
    const auto* choice = std::get_if<Setting::Choice>(&setting.value);
    group
        ->add_option_function<std::string>(
            name,
            [&options, choice](const std::string& chosen) {
              const auto at = std::find(choice->names.begin(), choice->names.end(), chosen);
              choice->set(options, static_cast<int>(at - choice->names.begin()));
            },
            help)
        ->check(CLI::IsMember(choice->names))
        ->default_str(choice->names[static_cast<size_t>(choice->get(options))]);
  }
}

}  // namespace

Command add_quantize(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  auto& a = *arguments;
  CLI::App* command = app.add_subcommand(
      "quantize",
      "Turn a pretrained model into stacked +-1 matrices and train them to behave like it");
  command->add_option("MODEL", a.model, "GGUF file of the original model")
      ->required()
      ->type_name("FILE");
  command
      ->add_option("-o,--output", a.out,
                   "Packed GGUF file to write; OUT.json gets the run's log, OUT.html its report")
      ->required()
      ->type_name("FILE");
  command
      ->add_option("--data", a.data,
                   "UTF-8 texts to train on, or folders of them; .jsonl: one document an object; "
                   "else documents end at lines that hold only <|endoftext|>; .gz, .xz, .zst as "
                   "they are")
      ->required()
      ->type_name("FILE ...");
  command
      ->add_option("--token-cache", a.token_cache,
                   "Folder that keeps tokenized texts for further runs; may be removed (default: "
                   "rabit/tokens in $XDG_CACHE_HOME or ~/.cache)")
      ->type_name("FOLDER");

  std::map<std::string_view, CLI::App*> groups = {{"", command}};
  for (const train::Setting& setting : train::settings()) {
    auto& group = groups[setting.group];
    if (group == nullptr) {
      group = command->add_option_group(std::string(setting.group));
    }
    add_setting(group, setting, a.options);
  }
  CLI::App* output = groups["Output"];
  output
      ->add_option("--eval", a.eval_text,
                   "Text to measure teacher and student on after training, with torch; its time "
                   "comes on top of --minutes")
      ->type_name("FILE");
  add_integer(output, "--eval-ctx", a.eval_ctx, 2, int64_t{1} << 20, "Window of --eval");
  output->add_option("--report", a.report, "HTML page of the run (default: OUT.html)")
      ->type_name("FILE");
  output
      ->add_option("--sample-prompt", a.prompts,
                   "Prompts that original and result continue in the report")
      ->capture_default_str();
  add_integer(output, "--sample-tokens", a.sample_tokens, 0, 4096,
              "Tokens of each continuation; 0: none; their time comes on top of --minutes");
  output
      ->add_option(
          "--metrics", a.metrics,
          "JSON Lines to write while training: an object for every block and every step; a "
          "run that goes on with --resume adds to it")
      ->type_name("FILE");
  output->add_flag("--json", a.json, "Print the run's log as one JSON object");
  command->footer(
      "Examples:\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --minutes 10\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --device cuda --tokens "
      "4000000\n"
      "  rabit quantize model.gguf -o model.3bit.gguf --data text.txt --bits 3 --warm-epochs 0 "
      "--tokens 0\n"
      "  rabit quantize model.gguf -o model.mixed.gguf --data text.txt --bits 2,ffn_down=3 "
      "--tokens 0\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --dry-run\n"
      "  rabit quantize model.gguf -o model.2bit.gguf --data text.txt --resume");
  return {command, [arguments] { return run(*arguments); }};
}

#endif

}  // namespace rabit::cli
