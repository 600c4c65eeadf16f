// `rabit inspect`: what a GGUF file holds, and how many bits it spends on a weight.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli/common.h"
#include "cli/size_report.h"

namespace rabit::cli {
namespace {

using Json = nlohmann::ordered_json;

struct InspectOptions {
  std::string file;
  bool json = false, all_tensors = false;
};

/// What is known of the file as a model; `problem` says why it is none that this program can run.
struct Facts {
  std::optional<ModelConfig> config;
  std::optional<SizeReport> size;
  std::string problem, sha256;
};

Result<Facts> gather(const GgufFile& file) {
  Facts facts;
  facts.sha256 = file.sha256();
  auto config = read_model_config(file);
  if (!config) {
    facts.problem = config.error().message;
    return facts;
  }
  facts.config = *config;
  auto size = size_report(file, *config);
  if (!size) {
    facts.problem = size.error().message;
    return facts;
  }
  facts.size = *size;
  return facts;
}

std::string extents_text(const std::vector<int64_t>& ne) {
  std::string text;
  for (const int64_t extent : ne) {
    text += (text.empty() ? "" : " x ") + std::to_string(extent);
  }
  return text;
}

Json config_json(const ModelConfig& config) {
  return {{"architecture", config.architecture},
          {"name", config.name},
          {"layers", config.layers},
          {"d_model", config.d_model},
          {"heads", config.heads},
          {"kv_heads", config.kv_heads},
          {"head_dim", config.head_dim},
          {"d_ff", config.d_ff},
          {"vocab_size", config.vocab_size},
          {"context_length", config.context_length},
          {"norm_epsilon", config.norm_epsilon},
          {"rope_theta", config.rope_theta},
          {"tied_head", config.tied_head}};
}

Json to_json(const GgufFile& file, const Facts& facts) {
  Json out = {{"file", file.path().string()},
              {"sha256", facts.sha256},
              {"file_bytes", file.file_bytes()},
              {"runnable", facts.problem.empty()}};
  if (!facts.problem.empty()) {
    out["problem"] = facts.problem;
  }
  out["model"] = facts.config ? config_json(*facts.config) : Json(nullptr);
  if (facts.size) {
    const SizeReport& size = *facts.size;
    out["label"] = model_label(*facts.config, size);
    out["parameters"] = size.parameters;
    out["paths"] = size.paths;
    out["packed_layers"] = size.packed_layers;
    out["bits_per_weight"] = size.bits_per_weight();
    out["file_bits_per_weight"] = size.file_bits_per_weight();
    for (const RoleSize& role : size.roles) {
      out["roles"].push_back({{"role", role.role},
                              {"d_out", role.shape.d_out},
                              {"d_in", role.shape.d_in},
                              {"layers", role.layers},
                              {"weights", role.weights},
                              {"type", role.type},
                              {"paths", role.paths},
                              {"bits_per_weight", role.bits_per_weight()}});
    }
  }
  out["metadata"] = Json::object();
  for (const auto& [key, value] : file.metadata()) {
    out["metadata"][key] = meta_json(value, 16);
  }
  out["tensors"] = Json::array();
  for (const TensorInfo& tensor : file.tensors()) {
    out["tensors"].push_back({{"name", tensor.name},
                              {"type", tensor_type_name(tensor.type)},
                              {"ne", tensor.ne},
                              {"bytes", tensor.data.size()}});
  }
  return out;
}

std::string meta_text(const MetaValue& value) {
  const Json json = meta_json(value, 8);
  if (json.is_object()) {
    return fmt::format("array of {}", json["length"].get<size_t>());
  }
  // A chat template is a page of text: one line of it is enough here, --json has all.
  std::string text =
      one_line(json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
  constexpr size_t kWidth = 90;
  if (text.size() > kWidth) {
    size_t cut = kWidth;
    while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) {
      --cut;
    }
    text = text.substr(0, cut) + "...";
  }
  return text;
}

void append_tensors(std::string& out, const GgufFile& file, bool all) {
  constexpr size_t kShown = 16;
  const auto& tensors = file.tensors();
  const size_t shown = all ? tensors.size() : std::min(kShown, tensors.size());
  out += "\n" + counted(static_cast<int64_t>(tensors.size()), "tensor") + "\n";
  for (size_t i = 0; i < shown; ++i) {
    out += fmt::format("  {:<32} {:<5} {:>22} {:>12} bytes\n", one_line(tensors[i].name),
                       tensor_type_name(tensors[i].type), extents_text(tensors[i].ne),
                       tensors[i].data.size());
  }
  if (shown < tensors.size()) {
    out += fmt::format("  ... and {} more (--tensors lists all)\n", tensors.size() - shown);
  }
}

std::string to_text(const GgufFile& file, const Facts& facts, bool all_tensors) {
  std::string out = fmt::format("file       {}\nsha256     {}\nbytes      {}\n",
                                one_line(file.path().string()), facts.sha256, file.file_bytes());
  if (facts.config) {
    const ModelConfig& c = *facts.config;
    out += fmt::format("model      {}{}{}\n", one_line(c.name), c.name.empty() ? "" : ", ",
                       c.architecture);
    out += fmt::format(
        "sizes      {}, d_model {}, {} of {} ({} for keys and values), d_ff {}, "
        "vocabulary {}, context {}\n",
        counted(c.layers, "layer"), c.d_model, counted(c.heads, "head"), c.head_dim, c.kv_heads,
        c.d_ff, c.vocab_size, c.context_length);
  }
  if (facts.size) {
    const SizeReport& size = *facts.size;
    out += fmt::format("parameters {}\n", size.parameters);
    out +=
        fmt::format("bits       {:.4f} per weight over the linear layers, {:.4f} over the file\n",
                    size.bits_per_weight(), size.file_bits_per_weight());
    out += fmt::format("\n  {:<12} {:>14} {:>7} {:>12} {:>8} {:>6} {:>16}\n", "role",
                       "d_out x d_in", "layers", "weights", "stored", "paths", "bits per weight");
    for (const RoleSize& role : size.roles) {
      out += fmt::format("  {:<12} {:>14} {:>7} {:>12} {:>8} {:>6} {:>16.4f}\n", role.role,
                         fmt::format("{} x {}", role.shape.d_out, role.shape.d_in), role.layers,
                         role.weights, role.type, role.paths, role.bits_per_weight());
    }
  }
  out += fmt::format("\n{} metadata values\n", file.metadata().size());
  for (const auto& [key, value] : file.metadata()) {
    out += fmt::format("  {:<44} {}\n", one_line(key), meta_text(value));
  }
  append_tensors(out, file, all_tensors);
  return out;
}

Status inspect(const InspectOptions& options) {
  RABIT_ASSIGN(const auto file, GgufFile::open(options.file));
  RABIT_ASSIGN(const Facts facts, gather(*file));
  if (!facts.problem.empty()) {
    note("note: not a model this program can run: " + facts.problem);
  }
  return write_stdout(options.json ? json_text(to_json(*file, facts))
                                   : to_text(*file, facts, options.all_tensors));
}

}  // namespace

Command add_inspect(CLI::App& app) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* sub = app.add_subcommand("inspect", "Show what a GGUF file holds");
  sub->add_option("file", options->file, "GGUF file")->required()->type_name("FILE");
  sub->add_flag("--tensors", options->all_tensors, "List all tensors, not only the first");
  sub->add_flag("--json", options->json, "Print one JSON object");
  sub->footer(
      "Examples:\n"
      "  rabit inspect model.gguf\n"
      "  rabit inspect model.gguf --tensors\n"
      "  rabit inspect model.gguf --json");
  return {sub, [options] { return inspect(*options); }};
}

}  // namespace rabit::cli
