#include "report/run_report.h"

#include <fmt/format.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "report/chart.h"

namespace rabit {
namespace {

using nlohmann::json;

constexpr char kStyle[] = R"css(
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --text: #1d2126; --soft: #5c6670; --line: #dfe3e6;
  --c0: #2166ac; --c1: #d6604d; --c2: #1b7837; --c3: #9970ab; --c4: #b8860b; --c5: #01857a;
  --c6: #7f7f7f; --c7: #c51b7d; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --card: #1c2024; --text: #e6e9ec; --soft: #9aa4ad; --line: #343a40;
  --c0: #6baed6; --c1: #fb8a72; --c2: #74c476; --c3: #bfa0d0; --c4: #e0b84c; --c5: #4fc4b7;
  --c6: #a8a8a8; --c7: #f07ab8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
p { margin: 0 0 12px; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 20px 0; }
.tile, figure, .sample { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.tile { padding: 12px 14px; } .tile b { display: block; font-size: 21px; font-weight: 600;
  font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); font-size: 13px; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 14px; }
figure { margin: 0; padding: 12px 14px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
svg.chart { width: 100%; height: auto; display: block; }
.chart .grid { stroke: var(--line); } .chart text { fill: var(--soft); font-size: 12px; }
.chart .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; }
path.s0 { stroke: var(--c0); } path.s1 { stroke: var(--c1); } path.s2 { stroke: var(--c2); }
path.s3 { stroke: var(--c3); } path.s4 { stroke: var(--c4); } path.s5 { stroke: var(--c5); }
path.s6 { stroke: var(--c6); } path.s7 { stroke: var(--c7); }
circle.s0 { fill: var(--c0); } circle.s1 { fill: var(--c1); } circle.s2 { fill: var(--c2); }
circle.s3 { fill: var(--c3); } circle.s4 { fill: var(--c4); } circle.s5 { fill: var(--c5); }
circle.s6 { fill: var(--c6); } circle.s7 { fill: var(--c7); }
i.s0 { background: var(--c0); } i.s1 { background: var(--c1); } i.s2 { background: var(--c2); }
i.s3 { background: var(--c3); } i.s4 { background: var(--c4); } i.s5 { background: var(--c5); }
i.s6 { background: var(--c6); } i.s7 { background: var(--c7); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); margin: 14px 0; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; }
.wrap td { white-space: normal; overflow-wrap: anywhere; text-align: left; }
.wrap th { text-align: left; }
.sample { padding: 12px 14px; margin-bottom: 12px; }
.sample h3 { margin: 0 0 8px; font-size: 14px; overflow-wrap: anywhere; }
.sample p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0 0; }
.sample .who { color: var(--soft); font-size: 13px; }
details > summary { cursor: pointer; margin-bottom: 10px; color: var(--soft); }
code { font: 13px/1.5 ui-monospace, "SFMono-Regular", Menlo, monospace; overflow-wrap: anywhere; }
)css";

// The value at a pointer such as "/perplexity/student/perplexity", or null.
json at(const json& log, const char* pointer) {
  const json::json_pointer where(pointer);
  return log.contains(where) ? log.at(where) : json();
}

double number_at(const json& log, const char* pointer) {
  const json value = at(log, pointer);
  return value.is_number() ? value.get<double>() : NAN;
}

std::string text_of(const json& value) {
  return value.is_string() ? value.get<std::string>()
                           : value.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string duration(double seconds) {
  if (!(seconds >= 0.0 && seconds < 1e12)) {
    return "-";
  }
  if (seconds < 120.0) {
    return fmt::format("{:.0f} s", seconds);
  }
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  const int64_t minutes = whole / 60;
  return minutes < 120 ? fmt::format("{} min {:02} s", minutes, whole % 60)
                       : fmt::format("{} h {:02} min", minutes / 60, minutes % 60);
}

std::string number(double value, int digits) {
  return std::isfinite(value) ? fmt::format("{:.{}f}", value, digits) : "-";
}

std::string megabytes(double bytes) {
  return bytes < 1e9 ? fmt::format("{:.1f} MB", bytes / 1e6)
                     : fmt::format("{:.2f} GB", bytes / 1e9);
}

class Page {
 public:
  explicit Page(const json& log) : log_(log) {}

  std::string html() {
    const std::string name = text_of(log_.value("output", log_["source"].value("name", json(""))));
    out_ = fmt::format(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
        "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
        "<title>rabit: {0}</title>\n<style>{1}</style></head>\n<body><main>\n<h1>{0}</h1>\n",
        escape_html(name), kStyle);
    out_ += fmt::format(
        "<p class=\"soft\">made by <code>rabit quantize</code> from {}; method {}, --bits {}</p>\n",
        escape_html(text_of(log_["source"].value("name", json("")))),
        escape_html(text_of(at(log_, "/settings/method"))),
        escape_html(
            text_of(at(log_, log_.contains("/searched/bits"_json_pointer) ? "/searched/bits"
                                                                          : "/settings/bits"))));
    tiles();
    curves();
    diagnostics();
    samples();
    protocol();
    return out_ + "</main></body></html>\n";
  }

 private:
  void tile(const std::string& value, const std::string& what) {
    out_ += fmt::format("<div class=\"tile\"><b>{}</b><span>{}</span></div>\n", escape_html(value),
                        escape_html(what));
  }

  void tiles() {
    out_ += "<div class=\"tiles\">\n";
    const auto show = [&](const char* pointer, const char* format, const char* what) {
      if (const double value = number_at(log_, pointer); std::isfinite(value)) {
        tile(fmt::format(fmt::runtime(format), value), what);
      }
    };
    show("/bits_per_weight", "{:.3f}", "bits a weight, quantized layers");
    show("/file/bits_per_weight", "{:.3f}", "bits a weight, whole file");
    if (const double bytes = number_at(log_, "/file/bytes"); std::isfinite(bytes)) {
      tile(megabytes(bytes), "file");
    }
    for (const auto& [who, what] :
         {std::pair{"student", "perplexity"}, std::pair{"teacher", "perplexity of the original"}}) {
      const std::string base = std::string("/perplexity/") + who;
      const double value = number_at(log_, (base + "/perplexity").c_str());
      const double error = number_at(log_, (base + "/perplexity_stderr").c_str());
      if (std::isfinite(value)) {
        tile(number(value, 2) + (std::isfinite(error) ? " ± " + number(error, 2) : ""), what);
      }
    }
    if (const double seconds = number_at(log_, "/seconds"); std::isfinite(seconds)) {
      tile(duration(seconds), "time");
    }
    for (const auto& [key, what] : {std::pair{"/memory/host_bytes", "memory, at most"},
                                    std::pair{"/memory/device_bytes", "GPU memory, at most"}}) {
      if (const double bytes = number_at(log_, key); bytes > 0.0) {
        tile(megabytes(bytes), what);
      }
    }
    out_ += "</div>\n";
  }

  // One series from a list of objects: x and y by their keys, y through `map`.
  template <typename Map>
  static Series series(const std::string& name, const json& list, const char* x, const char* y,
                       const Map& map) {
    Series out{name, {}, {}};
    for (const json& item : list) {
      const auto number = [&](const char* key) {
        const auto found = item.find(key);
        return found != item.end() && found->is_number() ? found->get<double>() : NAN;
      };
      out.x.push_back(number(x));
      out.y.push_back(map(number(y)));
    }
    return out;
  }

  void charts(const char* heading, const char* note, const std::vector<Chart>& all) {
    std::string figures;
    for (const Chart& chart : all) {
      figures += chart_html(chart);
    }
    if (!figures.empty()) {
      out_ +=
          fmt::format("<h2>{}</h2>\n<p class=\"soft\">{}</p>\n<div class=\"grid2\">\n{}</div>\n",
                      heading, note, figures);
    }
  }

  void curves() {
    const auto same = [](double v) { return v; };
    const json blocks = list("warm_start"), steps = list("distill");
    json by_error = json::array();  // blocks that were trained by their outputs' error
    for (const json& block : blocks) {
      if (block.is_object() && block.value("loss", json()) != "head") {
        by_error.push_back(block);
      }
    }
    charts("Block by block",
           "The error of each block's output, relative to what the original block adds to the "
           "stream. “First” and “last” are of training batches, without the last "
           "block, which is trained by what the head makes of it; the last line is measured over "
           "the whole calibration text after the block is done.",
           {{"Error of the blocks' outputs",
             "block",
             "relative squared error",
             {series("first step", by_error, "block", "loss_first", same),
              series("last steps", by_error, "block", "loss_last", same),
              series("whole text, when done", blocks, "block", "output_error", same)},
             true,
             false,
             true},
            {"Time",
             "block",
             "seconds",
             {series("start", blocks, "block", "init_seconds", same),
              series("training", blocks, "block", "train_seconds", same)},
             false,
             true,
             true}});
    const auto perplexity = [](double nll) { return std::exp(nll); };
    charts("End to end", "Perplexity is of the training text, each batch before its own step.",
           {{"Loss",
             "tokens",
             "nats a token",
             {series("loss", steps, "tokens", "loss", same)},
             true,
             false,
             false},
            {"Error that --gamma counts",
             "tokens",
             "relative squared error",
             {series("last step", steps, "tokens", "gamma_error", same)},
             true,
             false,
             false},
            {"Perplexity of the training text",
             "tokens",
             "perplexity",
             {series("student", steps, "tokens", "text_nll", perplexity),
              series("original", steps, "tokens", "text_nll_teacher", perplexity)},
             true,
             false,
             false},
            {"Norm of the gradients of scales and norms",
             "tokens",
             "norm",
             {series("norm", steps, "tokens", "scale_grad_norm", same)},
             true,
             false,
             false},
            {"Speed",
             "tokens",
             "tokens/s",
             {series("speed", steps, "tokens", "tokens_per_second", same)},
             false,
             true,
             false}});
  }

  json list(const char* key) const {
    const auto found = log_.find(key);
    return found != log_.end() && found->is_array() ? *found : json::array();
  }

  // Layers of one role each are a line over the blocks.
  static std::vector<Series> by_role(const json& layers, const char* key) {
    std::vector<std::string> order;
    std::map<std::string, Series> roles;
    for (const json& layer : layers) {
      if (!layer.is_object()) {
        continue;
      }
      const std::string name = text_of(layer.value("layer", json("")));
      const size_t first = name.find('.'), second = name.find('.', first + 1);
      if (first == std::string::npos || second == std::string::npos) {
        continue;
      }
      const std::string role = name.substr(second + 1);
      if (roles.count(role) == 0) {
        order.push_back(role);
        roles[role].name = role;
      }
      const json value = layer.value(key, json());
      const json shown = value.is_array() && !value.empty() ? value.back() : value;
      roles[role].x.push_back(std::atof(name.substr(first + 1, second - first - 1).c_str()));
      roles[role].y.push_back(shown.is_number() ? shown.get<double>() : NAN);
    }
    std::vector<Series> out;
    for (const std::string& role : order) {
      out.push_back(roles[role]);
    }
    return out;
  }

  // Block by block the mean over its layers of what `value` says of one.
  template <typename Value>
  static Series by_block(const std::string& name, const json& layers, const Value& value) {
    std::map<int, std::pair<double, int>> sums;
    for (const json& layer : layers) {
      int block = 0;
      const double one = value(layer);
      if (std::isfinite(one) &&
          std::sscanf(text_of(at(layer, "/layer")).c_str(), "blk.%d.", &block) == 1) {
        sums[block].first += one;
        ++sums[block].second;
      }
    }
    Series out{name, {}, {}};
    for (const auto& [block, sum] : sums) {
      out.x.push_back(block);
      out.y.push_back(sum.first / sum.second);
    }
    return out;
  }

  static std::vector<Series> error_parts(const json& layers) {
    std::vector<Series> out;
    for (const auto& [key, name] :
         {std::pair{"residual", "left by the paths before"},
          std::pair{"last", "the last path itself"}, std::pair{"cancelled", "cancelled by it"}}) {
      const std::string pointer = std::string("/on_own_inputs/decomposition/") + key;
      out.push_back(by_block(name, layers,
                             [&](const json& layer) { return number_at(layer, pointer.c_str()); }));
    }
    return out;
  }

  // Mean row scale times mean column scale of each path but the first, relative to the first's.
  static std::vector<Series> path_levels(const json& layers) {
    std::vector<Series> out;
    const auto level = [](const json& layer, size_t path) {
      const auto mean = [&](const char* scales) {
        return number_at(layer, fmt::format("/{}/{}/mean", scales, path).c_str());
      };
      return mean("row_scales") * mean("column_scales");
    };
    for (size_t path = 1;; ++path) {
      Series one = by_block(fmt::format("path {}", path + 1), layers, [&](const json& layer) {
        return level(layer, path) / level(layer, 0);
      });
      if (one.x.empty()) {
        return out;
      }
      out.push_back(std::move(one));
    }
  }

  void diagnostics() {
    const json layers = at(log_, "/diagnostics/layers");
    if (!layers.is_array() || layers.empty()) {
      return;
    }
    const auto chart = [&](const char* title, const char* label, const char* key, bool log) {
      return Chart{title, "block", label, by_role(layers, key), log, false, true};
    };
    charts(
        "The paths of every layer",
        "y1 and y2 are what the first two paths give; R1 is what the first leaves of what the "
        "original layer gives on the same inputs. Paths that work together correlate negatively, "
        "and the second points where the first is wrong. What the paths before the last leave, and "
        "the size of the last, less what it cancels is the error of a layer's own output.",
        {chart("Correlation of the paths, Corr(y1, y2)", "correlation", "path_correlation", false),
         chart("Alignment with the residual, Corr(R1, y2)", "correlation", "residual_alignment",
               false),
         chart("Error of the outputs", "relative squared error", "output_error", true),
         chart("Error of the weights", "relative squared error", "weight_error", true),
         {"The error in parts", "block", "in parts of the output's mean square",
          error_parts(layers), false, true, true},
         {"Sizes of the paths, relative to the first", "block",
          "mean row scale x mean column scale", path_levels(layers), false, true, true},
         chart("Signs of the last path turned by training", "share", "turned_signs", false)});
    const json summary = at(log_, "/diagnostics/summary");
    if (!summary.is_object()) {
      return;
    }
    out_ +=
        "<div class=\"scroll\"><table><tr><th>over all layers</th><th>least</th><th>median</th>"
        "<th>largest</th></tr>\n";
    const std::map<std::string, const char*> names = {
        {"path_correlation", "Corr(y1, y2)"},
        {"residual_alignment", "Corr(R1, y2), same inputs"},
        {"running_alignment", "Corr(R1, y2), as the models run"},
        {"output_error", "error of the output, as the models run"},
        {"own_error", "error of the output, same inputs"},
        {"weight_error", "error of the weights"}};
    for (const auto& [key, value] : summary.items()) {
      const auto name = names.find(key);
      if (name == names.end() || !value.is_object()) {
        continue;
      }
      out_ += fmt::format("<tr><td>{}</td>", name->second);
      for (const char* which : {"/least", "/median", "/largest"}) {
        out_ += "<td>" + number(number_at(value, which), 4) + "</td>";
      }
      out_ += "</tr>\n";
    }
    out_ += "</table></div>\n";
  }

  void samples() {
    const json all = list("samples");
    if (all.empty()) {
      return;
    }
    out_ += "<h2>What they write</h2>\n";
    if (const json how = at(log_, "/samples_protocol"); how.is_string()) {
      out_ += "<p class=\"soft\">" + escape_html(text_of(how)) + "</p>\n";
    }
    for (const json& sample : all) {
      if (!sample.is_object()) {
        continue;
      }
      out_ += "<div class=\"sample\"><h3>" +
              escape_html(text_of(sample.value("prompt", json("")))) + "</h3><div class=\"grid2\">";
      for (const auto& [key, who] :
           {std::pair{"teacher", "original"}, std::pair{"student", "quantized"}}) {
        out_ += fmt::format("<div><span class=\"who\">{}</span><p>{}</p></div>", who,
                            escape_html(text_of(sample.value(key, json("")))));
      }
      out_ += "</div></div>\n";
    }
  }

  void row(const std::string& key, const json& value) {
    out_ += fmt::format("<tr><td>{}</td><td>{}</td></tr>\n", escape_html(key),
                        escape_html(text_of(value)));
  }

  void open_table(const char* title, const char* second) {
    out_ +=
        fmt::format("<div class=\"scroll\"><table class=\"wrap\"><tr><th>{}</th><th>{}</th></tr>\n",
                    title, second);
  }
  void close_table() { out_ += "</table></div>\n"; }

  void protocol() {
    out_ += "<h2>How it was made</h2>\n";
    if (const json command = log_.value("command", json()); command.is_string()) {
      out_ += "<p><code>" + escape_html(text_of(command)) + "</code></p>\n";
    }
    open_table("data", "SHA-256");
    row(text_of(log_["source"].value("name", json(""))), log_["source"].value("sha256", json("")));
    const json files = at(log_, "/data/files");
    for (const json& file : files.is_array() ? files : json::array()) {
      if (file.is_object()) {
        row(text_of(file.value("name", json(""))), file.value("sha256", json("")));
      }
    }
    close_table();
    open_table("run", "");
    for (const char* key : {"version", "compute", "threads", "resumed", "calib_tokens_used",
                            "distill_tokens", "seconds", "phase_seconds", "memory", "searched"}) {
      const json value = log_.value(key, json());
      if (value.is_null()) {
        continue;
      }
      if (key == std::string("searched")) {
        for (const char* found : {"alpha_in", "alpha_out", "bits"}) {
          if (value.is_object() && value.contains(found)) {
            row(std::string("found: ") + found, value[found]);
          }
        }
        continue;
      }
      if (value.is_object()) {
        for (const auto& [part, amount] : value.items()) {
          const bool last = at(log_, "/resumed") == json(true);  // a continuation knows its own
          row(std::string(key) + (last ? ", last call: " : ": ") + part, amount);
        }
        continue;
      }
      row(key, value);
    }
    if (const json protocol = at(log_, "/perplexity/student/protocol"); protocol.is_string()) {
      row("perplexity", protocol);
    }
    close_table();
    out_ += "<details><summary>All settings</summary>\n";
    open_table("setting", "value");
    for (const auto& [key, value] : log_["settings"].items()) {
      row(key, value);
    }
    close_table();
    out_ += "</details>\n";
  }

  const json& log_;
  std::string out_;
};

}  // namespace

Result<std::string> run_report(const nlohmann::json& log) {
  const auto object = [&](const char* key) { return log.contains(key) && log[key].is_object(); };
  if (!log.is_object() || !object("settings") || !object("source")) {
    return Error{"it is not the log of a rabit quantize run: it has no settings and source"};
  }
  return Page(log).html();
}

}  // namespace rabit
