// `rabit diagnose`: how the paths of every layer work together, beside the original model.

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/files.h"
#include "cli/common.h"
#include "cli/size_report.h"
#ifdef RABIT_TRAIN
#include "train/diagnose.h"
#endif

namespace rabit::cli {

#ifndef RABIT_TRAIN

Command add_diagnose(CLI::App& app) { return not_in_this_build(app, "diagnose"); }

#else

namespace {

using nlohmann::json;

struct Arguments {
  std::string student, teacher, text;
  train::DiagnoseOptions options;
  bool json = false;
};

std::string number(const json& value, int digits) {
  return value.is_number() ? fmt::format("{:.{}f}", value.get<double>(), digits) : "-";
}

std::string percent(const json& value) {
  return value.is_number() ? fmt::format("{:.1f}", 100.0 * value.get<double>()) : "-";
}

// Of all paths, "0.4/1.2".
std::string shares(const json& values) {
  std::string out;
  for (const json& value : values) {
    out += out.empty() ? "" : "/";
    out += percent(value);
  }
  return out.empty() ? "-" : out;
}

// Mean sizes of the paths' levels, relative to the first: "1/0.52".
std::string levels(const json& layer) {
  std::string out;
  double first = 0.0;
  for (size_t i = 0; i < layer["row_scales"].size(); ++i) {
    const double size = layer["row_scales"][i]["mean"].get<double>() *
                        layer["column_scales"][i]["mean"].get<double>();
    first = i == 0 ? size : first;
    out += (i == 0 ? std::string() : "/") +
           (i == 0 ? std::string("1") : fmt::format("{:.2f}", first > 0.0 ? size / first : 0.0));
  }
  return out;
}

// What the paths before the last leave, the last's own size, and what it cancels: "12.1+9.0-18.2".
std::string parts(const json& layer) {
  const json& found = layer["on_own_inputs"]["decomposition"];
  return percent(found["residual"]) + "+" + percent(found["last"]) + "-" +
         percent(found["cancelled"]);
}

std::string table(const json& found) {
  std::string out = fmt::format("{:<22} {:>5} {:>12} {:>12} {:>9} {:>9} {:>20} {:>9} {:>12} {}\n",
                                "layer", "paths", "corr(y1,y2)", "corr(R1,y2)", "output %", "own %",
                                "in parts", "weight %", "turned %", "levels");
  for (const json& layer : found["layers"]) {
    out +=
        fmt::format("{:<22} {:>5} {:>12} {:>12} {:>9} {:>9} {:>20} {:>9} {:>12} {}\n",
                    layer["layer"].get<std::string>(), layer["paths"].get<int64_t>(),
                    number(layer["path_correlation"], 3), number(layer["residual_alignment"], 3),
                    percent(layer["output_error"]), percent(layer["own_error"]), parts(layer),
                    percent(layer["weight_error"]), shares(layer["turned_signs"]), levels(layer));
  }
  for (const char* which : {"least", "median", "largest"}) {
    const auto of = [&](const char* key) {
      const json& summary = found["summary"];
      return summary.contains(key) ? summary[key][which] : json();
    };
    out += fmt::format("{:<22} {:>5} {:>12} {:>12} {:>9} {:>9} {:>20} {:>9}\n", which, "",
                       number(of("path_correlation"), 3), number(of("residual_alignment"), 3),
                       percent(of("output_error")), percent(of("own_error")), "",
                       percent(of("weight_error")));
  }
  return out;
}

Status run(const Arguments& arguments) {
  RABIT_ASSIGN(const auto student, GgufFile::open(arguments.student));
  RABIT_ASSIGN(const auto teacher, GgufFile::open(arguments.teacher));
  RABIT_ASSIGN(const auto tokenizer, load_tokenizer(*teacher));
  RABIT_ASSIGN(const std::string text, read_text_file(arguments.text));
  const std::vector<int32_t> tokens = tokens_of_text(*tokenizer, text);
  Progress progress("diagnose, blocks");
  auto found =
      train::diagnose_file(*student, *teacher, tokens, arguments.options,
                           [&](int64_t done, int64_t total) { progress.update(done, total, ""); });
  progress.finish();
  if (!found) {
    return found.error();
  }
  if (!arguments.json) {
    return write_stdout(table(*found));
  }
  (*found)["text"] = arguments.text;
  (*found)["text_sha256"] = sha256_hex(text);
  return write_stdout(json_text(*found));
}

}  // namespace

Command add_diagnose(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  auto& a = *arguments;
  CLI::App* command = app.add_subcommand(
      "diagnose", "Measure how the paths of every layer work together, beside the original");
  command->add_option("FILE", a.student, "A packed file, or the checkpoint of a run (OUT.ckpt)")
      ->required()
      ->type_name("FILE");
  command->add_option("--teacher", a.teacher, "GGUF file of the original model")
      ->required()
      ->type_name("FILE");
  command->add_option("--data", a.text, "UTF-8 text to run both on")->required()->type_name("FILE");
  add_integer(command, "--tokens", a.options.tokens, 1, int64_t{1} << 24,
              "Tokens of the text, from its start, in whole windows, one at least");
  add_integer(command, "--seq-len", a.options.seq_len, 0, int64_t{1} << 20,
              "Tokens a window; 0: 512, or the model's context where that is less");
  command->add_option("--device", a.options.device, "cpu, cuda or cuda:N")
      ->capture_default_str()
      ->type_name("NAME");
  add_threads(command, a.options.threads);
  command->add_flag("--json", a.json, "Print one JSON object");
  command->footer(
      "y1, y2: outputs of the first paths; R1: what the first leaves of what the original layer\n"
      "gives on the same inputs.\n"
      "output: error of the layer's output, relative, as the models run; own: of the same inputs;\n"
      "in parts: own as what the paths before the last leave, plus the last's size, minus what it\n"
      "cancels; weight: error of the weights; turned: share of each path's signs that training "
      "has\n"
      "turned; levels: sizes of the paths, relative to the first.\n\n"
      "Examples:\n"
      "  rabit diagnose model.2bit.gguf --teacher model.gguf --data text.txt\n"
      "  rabit diagnose model.2bit.gguf.ckpt --teacher model.gguf --data text.txt --json");
  return {command, [arguments] { return run(*arguments); }};
}

#endif

}  // namespace rabit::cli
