#include "train/options.h"

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/AllocatorConfig.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "base/files.h"
#include "io/gguf.h"
#include "train/place.h"
#include "train/session.h"

namespace rabit::train {
namespace {

using nlohmann::json;
using Q = QuantizeOptions;

constexpr int64_t kMany = int64_t{1} << 40;

// -1 for the CPU, else the number of the GPU.
Result<int> device_index(const std::string& name) {
  if (name == "cpu") {
    return -1;
  }
  if (name == "cuda") {
    return 0;
  }
  const bool form = name.rfind("cuda:", 0) == 0 && name.size() > 5 && name.size() < 8 &&
                    name.find_first_not_of("0123456789", 5) == std::string::npos;
  if (!form) {
    return Error{"--device " + name + ": not a device; use cpu, cuda or cuda:N"};
  }
  return std::stoi(name.substr(5));
}

template <auto Member>
Setting::Choice choice(std::vector<std::string> names) {
  using Enum = std::remove_reference_t<decltype(std::declval<Q&>().*Member)>;
  return {[](const Q& o) { return static_cast<int>(o.*Member); },
          [](Q& o, int value) { o.*Member = static_cast<Enum>(value); }, std::move(names)};
}

Status check_bits(const std::string& text) {
  RABIT_CHECK(PathPlan::parse(text));
  return {};
}

Status check_field(const std::string& text) {
  return text.empty() ? Status(Error{"--data-field is empty; name a field"}) : Status();
}

Status check_weights(const std::string& text) {
  RABIT_CHECK(parse_weights(text));
  return {};
}

Status check_device(const std::string& text) {
  RABIT_CHECK(device_index(text));
  return {};
}

std::vector<Setting> make_settings() {
  using Integer = Setting::Integer;
  using Number = Setting::Number;
  using Flag = Setting::Flag;
  using Text = Setting::Text;
  constexpr bool kMayChange = true;
  return {
      {"method", "--method", "",
       choice<&Q::method>({"rabit", "standard", "dbllm", "mbok", "onebit"}),
       "How the paths are trained: rabit (coupled), or a baseline: standard, mbok, dbllm (with "
       "--no-error-feedback), onebit (with --bits 1)"},
      {"bits", "--bits", "", Text{&Q::bits, check_bits},
       "Binary paths, 1 to 4, one bit a weight each; also by role or block: 2,ffn_down=3,0-3=4"},
      {"target_bpw", "--target-bpw", "", Number{&Q::target_bpw, 0, 16},
       "Bits a weight, scales counted, to spend on further paths where they help most by a "
       "measurement; 0: none"},

      {"minutes", "--minutes", "How long", Number{&Q::minutes, 0, 1e6},
       "Bound on the whole run's time; 0: none", kMayChange},
      {"tokens", "--tokens", "How long", Integer{&Q::tokens, -1, kMany},
       "Tokens of end-to-end distillation; -1: 4 million, or 0 on a CPU with --minutes",
       kMayChange},
      {"calib_tokens", "--calib-tokens", "How long", Integer{&Q::calib_tokens, 1, kMany},
       "Tokens for error feedback and the block-by-block warm start"},
      {"warm_epochs", "--warm-epochs", "How long", Number{&Q::warm_epochs, 0, 1e4},
       "Passes over them for each block; 0: no warm start"},
      {"warm_blocks", "--warm-blocks", "How long", Integer{&Q::warm_blocks, 0, 1 << 20},
       "Train only so many blocks in the warm start, the last ones; 0: all"},

      {"device", "--device", "Where", Text{&Q::device, check_device}, "cpu, cuda or cuda:N",
       kMayChange},
      {"threads", "-t,--threads", "Where", Integer{&Q::threads, 0, 1024},
       "Threads; 0 takes as many as the process may use", kMayChange},
      {"compute", "--compute", "Where", choice<&Q::compute>({"auto", "bf16", "f32"}),
       "Arithmetic of the products: auto, bf16 or f32", kMayChange},
      {"", "--dry-run", "Where", Flag{&Q::dry_run, true},
       "Load, measure the speed, say the plan, and stop", kMayChange},
      {"", "--resume", "Where", Flag{&Q::resume, true},
       "Go on from OUT.ckpt, which an interrupted run left", kMayChange},
      {"checkpoint_minutes", "--checkpoint-minutes", "Where",
       Number{&Q::checkpoint_minutes, 0.01, 1e6}, "Time between checkpoints", kMayChange},
      {"checkpoint_steps", "--checkpoint-steps", "Where",
       Integer{&Q::checkpoint_steps, 0, int64_t{1} << 40},
       "Also write one after so many steps end to end; 0: by time alone", kMayChange},
      {"keep_checkpoints", "--keep-checkpoints", "Where", Integer{&Q::keep_checkpoints, 1, 1000},
       "Checkpoints to keep while the run lasts: OUT.ckpt, before it OUT.ckpt.1, and so on",
       kMayChange},

      {"data_field", "--data-field", "Text", Text{&Q::data_field, check_field},
       "Of JSON Lines, the field that holds a document"},
      {"data_weights", "--data-weights", "Text", Text{&Q::data_weights, check_weights},
       "How often a pass sees each of --data, a number for every one: 2,1,0.5; not given: once"},

      {"error_feedback", "--no-error-feedback", "Start", Flag{&Q::error_feedback, false},
       "Fit the scales by importance alone, without error feedback"},
      {"ef_damp", "--ef-damp", "Start", Number{&Q::ef_damp, 1e-8, 1e3},
       "Damping of the inputs' second moment, in parts of its mean diagonal"},
      {"ef_order", "--ef-order", "Start", choice<&Q::ef_order>({"natural", "diagonal"}),
       "Order of the columns: natural, or diagonal: largest inputs first"},
      {"ef_inputs", "--ef-inputs", "Start", choice<&Q::ef_inputs>({"student", "teacher"}),
       "Whose activations are the inputs: student (the quantized layers before) or teacher"},
      {"ef_target", "--ef-target", "Start", choice<&Q::ef_target>({"weight", "output", "stream"}),
       "What a layer is fitted to: its own weight, the teacher layer's output, or that and what "
       "the "
       "stream lacks"},
      {"ef_rounds", "--ef-rounds", "Start", Integer{&Q::ef_rounds, 0, 100},
       "Refits of the scales under the signs reached, each with error feedback again"},
      {"ef_sweeps", "--ef-sweeps", "Start", Integer{&Q::ef_sweeps, 0, 100},
       "Sweeps of coordinate descent after error feedback"},
      {"alpha_in", "--alpha-in", "Start", Number{&Q::alpha_in, 0, 4},
       "Exponent of the columns' importance"},
      {"alpha_out", "--alpha-out", "Start", Number{&Q::alpha_out, 0, 4},
       "Exponent of the rows' importance"},
      {"alpha_search", "--alpha-search", "Start", Flag{&Q::alpha_search, true},
       "Look for both exponents on a small grid, by the divergence after a quick start"},
      {"init_sweeps", "--init-sweeps", "Start", Integer{&Q::init_sweeps, 1, 1000},
       "Gauss-Seidel sweeps of SVID"},
      {"als_steps", "--als-steps", "Start", Integer{&Q::als_steps, 0, 1000},
       "Least-squares refits of the scales"},

      {"seq_len", "--seq-len", "Training", Integer{&Q::seq_len, 16, int64_t{1} << 20},
       "Tokens a window"},
      {"seed", "--seed", "Training", Integer{&Q::seed, 0, (int64_t{1} << 53) - 1},
       "Seed of every random choice"},
      {"optimizer", "--optimizer", "Training", choice<&Q::optimizer>({"muon", "adamw"}),
       "What updates the latents: muon or adamw (scales: always adamw)"},
      {"momentum", "--momentum", "Training", choice<&Q::momentum>({"f32", "bf16"}),
       "What the latents' optimizer keeps its moments in: f32, or bf16 in half of the memory"},
      {"warm_batch", "--warm-batch", "Training", Integer{&Q::warm_batch, 1, 1 << 20},
       "Windows a step in the warm start"},
      {"warm_latent_lr", "--warm-latent-lr", "Training", Number{&Q::warm_latent_lr, 0, 10},
       "The latents' rate in the warm start"},
      {"warm_scale_lr", "--warm-scale-lr", "Training", Number{&Q::warm_scale_lr, 0, 10},
       "The scales' rate in the warm start"},
      {"batch", "--batch", "Training", Integer{&Q::batch, 1, 1 << 20}, "Windows a step end to end"},
      {"micro_batch", "--micro-batch", "Training", Integer{&Q::micro_batch, 0, 1 << 20},
       "Windows of a step that go through the model at once, to save memory; 0: all", kMayChange},
      {"recompute", "--recompute", "Training", Flag{&Q::recompute, true},
       "Keep only the stream between blocks end to end and compute a block again for its "
       "gradients: "
       "far less memory, up to a third more work",
       kMayChange},
      {"share_original", "--share-original", "Training", Flag{&Q::share_original, true},
       "Of several processes each holds a part of the original, too, and all gather a block when "
       "it is its turn: less memory, more exchanges",
       kMayChange},
      {"latent_lr", "--latent-lr", "Training", Number{&Q::latent_lr, 0, 10},
       "The latents' rate end to end"},
      {"scale_lr", "--scale-lr", "Training", Number{&Q::scale_lr, 0, 10},
       "The scales' rate end to end"},
      {"ema", "--ema", "Training", Number{&Q::ema, 0, 0.99999},
       "Decay of a moving average of the latents, which gives the signs at the end; 0: none"},
      {"train_norms", "--train-norms", "Training", Flag{&Q::train_norms, true},
       "Train the norms too, at the scales' rates"},
      {"warmup", "--warmup", "Training", Number{&Q::warmup, 0, 0.9},
       "Share of a phase with rising rates"},
      {"gamma", "--gamma", "Training", Number{&Q::gamma, 0, 1e6},
       "Weight of the normalised error of intermediate outputs end to end"},
      {"gamma_on", "--gamma-on", "Training", choice<&Q::gamma_on>({"blocks", "layers"}),
       "Those outputs: blocks (the stream after each) or layers (of every linear layer)"},
      {"reverse_kl", "--reverse-kl", "Training", Number{&Q::reverse_kl, 0, 1},
       "Share of KL(student || teacher) in the divergence; the rest is KL(teacher || student)"},
      {"temperature", "--temperature", "Training", Number{&Q::temperature, 0.1, 100},
       "Temperature of both distributions end to end"},
      {"cross_entropy", "--cross-entropy", "Training", Number{&Q::cross_entropy, 0, 1},
       "Share of the text's own next token in the loss"},
      {"clip", "--clip", "Training", Number{&Q::clip, 1e-9, 1e9},
       "Largest norm of the gradients of scales and norms"},

      {"embedding", "--embedding", "Output", choice<&Q::embedding>({"q8_0", "f16"}),
       "Type of embedding and head: q8_0 or f16", kMayChange},
      {"diagnose_tokens", "--diagnose-tokens", "Output",
       Integer{&Q::diagnose_tokens, 0, int64_t{1} << 24},
       "Tokens of the text, in whole windows, to measure every layer's paths on at the end (see "
       "rabit diagnose); 0: none; their time comes on top of --minutes",
       kMayChange},
  };
}

// What the command line has checked already, for callers that come without it.
Status check_ranges(const QuantizeOptions& o) {
  for (const Setting& setting : settings()) {
    const auto outside = [&](auto value, auto low, auto high) -> Status {
      if (!(value >= low && value <= high)) {
        return Error{
            fmt::format("{} {}: must lie between {} and {}", setting.option, value, low, high)};
      }
      return {};
    };
    if (const auto* integer = std::get_if<Setting::Integer>(&setting.value)) {
      RABIT_CHECK(outside(o.*integer->member, integer->low, integer->high));
    } else if (const auto* number = std::get_if<Setting::Number>(&setting.value)) {
      RABIT_CHECK(outside(o.*number->member, number->low, number->high));
    } else if (const auto* text = std::get_if<Setting::Text>(&setting.value)) {
      RABIT_CHECK(text->check(o.*text->member));
    }
  }
  return {};
}

Status check_combination(const QuantizeOptions& o) {
  if (o.method == Method::kOnebit && o.bits != "1") {
    return Error{"--method onebit has one path everywhere: give --bits 1"};
  }
  if (o.method == Method::kDbllm && (o.bits != "2" || o.error_feedback)) {
    return Error{
        "--method dbllm has two paths everywhere and a start of its own: give --bits 2 and "
        "--no-error-feedback"};
  }
  if (o.target_bpw > 0.0 && (o.method == Method::kOnebit || o.method == Method::kDbllm)) {
    return Error{"--target-bpw adds paths, and --method onebit and dbllm have a fixed number"};
  }
  if (o.alpha_search && o.method == Method::kDbllm) {
    return Error{"--alpha-search: --method dbllm has a start without importances"};
  }
  if (o.recompute && o.gamma > 0.0 && o.gamma_on == GammaOn::kLayers) {
    return Error{"--recompute keeps no outputs of layers: give --gamma-on blocks"};
  }
  if (o.tokens > 0 && o.tokens < o.batch * o.seq_len) {
    return Error{
        fmt::format("--tokens {}: less than one step of {} windows of {}; give 0, or at least "
                    "{}, or a smaller --batch or --seq-len",
                    o.tokens, o.batch, o.seq_len, o.batch * o.seq_len)};
  }
  if (o.minutes > 0.0 && o.minutes * 60.0 <= kFinishSeconds) {
    return Error{fmt::format("--minutes {}: too short; at least {} s are needed to pack and check",
                             o.minutes, kFinishSeconds)};
  }
  if (o.calib_tokens < o.seq_len) {
    return Error{fmt::format(
        "--calib-tokens {}: less than one window of {}; give more, or a smaller --seq-len",
        o.calib_tokens, o.seq_len)};
  }
  if (o.ef_inputs == EfInputs::kTeacher && o.ef_target != EfTarget::kWeight) {
    return Error{
        "--ef-inputs teacher goes with --ef-target weight only: the other targets correct "
        "what the student's inputs lack"};
  }
  return {};
}

constexpr char kProbe[] = ".test-write";  // as long as the longest ending that will be written

// The folder is there and takes files, and what the run writes replaces nothing but its own kind:
// the rename at the end would replace even a device such as /dev/null.
Status check_output(const std::filesystem::path& out, std::span<const std::filesystem::path> inputs,
                    bool fresh) {
  if (out.empty()) {
    return Error{"-o is empty; name the packed file to write"};
  }
  for (const char* ending : {"", ".json", ".html", ".ckpt", ".unverified", ".lock", kProbe}) {
    std::filesystem::path written = out;
    written += ending;
    RABIT_CHECK(check_written("-o " + out.string(), written, inputs));
  }
  std::filesystem::path checkpoint = out;
  checkpoint += ".ckpt";
  std::error_code ignored;
  if (const auto left = checkpoints_beside(checkpoint); fresh && !left.empty()) {
    return Error{left.front().string() + " is there, what an earlier run left: " +
                 (left.front() == checkpoint
                      ? "add --resume to go on from it, or remove it"
                      : "rename it to " + checkpoint.string() +
                            " and add --resume to go on from it, or remove it")};
  }
  std::filesystem::path probe = out;
  probe += kProbe;
  RABIT_ASSIGN(const AtomicFile file, AtomicFile::create(probe));  // dropped: leaves nothing
  if (std::filesystem::exists(out, ignored) && std::filesystem::file_size(out, ignored) > 0) {
    const auto before = GgufFile::open(out);
    if (!before || (*before)->find_meta("rabit.format_version") == nullptr) {
      return Error{"-o " + out.string() +
                   ": is there and no file that rabit quantize wrote; name another file, or remove "
                   "it"};
    }
  }
  return {};
}

}  // namespace

Result<std::vector<double>> parse_weights(const std::string& text) {
  std::vector<double> weights;
  for (size_t begin = 0; !text.empty() && begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    double weight = 0.0;
    const auto [stop, status] = std::from_chars(text.data() + begin, text.data() + end, weight);
    constexpr double kMost = 1000.0;
    if (status != std::errc() || stop != text.data() + end || !(weight > 0.0 && weight <= kMost)) {
      return Error{"--data-weights " + text + ": '" + text.substr(begin, end - begin) +
                   "' is not a number above 0 and up to 1000"};
    }
    weights.push_back(weight);
    begin = end + 1;
  }
  return weights;
}

Result<PathPlan> PathPlan::parse(const std::string& text) {
  PathPlan plan;
  plan.text_ = text;
  bool has_default = false;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string item = text.substr(begin, end - begin);
    begin = end + 1;
    const auto wrong = [&](const std::string& why) {
      return Error{"--bits " + text + ": '" + item + "' " + why};
    };
    const size_t equals = item.find('=');
    const std::string number = equals == std::string::npos ? item : item.substr(equals + 1);
    if (number.size() != 1 || number[0] < '1' || number[0] > '0' + quant::kMaxPaths) {
      return wrong("is not a number of paths from 1 to " + std::to_string(quant::kMaxPaths) +
                   ", nor WHERE=PATHS");
    }
    Item parsed{.paths = number[0] - '0'};
    if (equals == std::string::npos) {
      has_default = true;
    } else {
      std::string where = item.substr(0, equals);
      if (!where.empty() && where[0] >= '0' && where[0] <= '9') {
        const size_t dot = std::min(where.find('.'), where.size());
        const std::string blocks = where.substr(0, dot);
        const size_t dash = std::min(blocks.find('-'), blocks.size());
        const std::string first = blocks.substr(0, dash);
        const std::string last = dash < blocks.size() ? blocks.substr(dash + 1) : first;
        const auto whole = [](const std::string& digits) {
          return !digits.empty() && digits.size() < 6 &&
                 digits.find_first_not_of("0123456789") == std::string::npos;
        };
        if (!whole(first) || !whole(last) || std::stoi(first) > std::stoi(last)) {
          return wrong("names no block N or blocks N-M");
        }
        parsed.first_layer = std::stoi(first);
        parsed.last_layer = std::stoi(last);
        where = dot < where.size() ? where.substr(dot + 1) : "";
        if (dot + 1 == item.substr(0, equals).size()) {
          return wrong("names no role");
        }
      } else if (where.empty()) {
        return wrong("names no role or block");
      }
      const bool known = where.empty() || where == "attn" || where == "ffn" ||
                         std::any_of(kRoles.begin(), kRoles.end(),
                                     [&](Role role) { return role_name(role) == where; });
      if (!known) {
        return wrong(
            "names no role: attn, ffn, attn_q, attn_k, attn_v, attn_output, ffn_gate, "
            "ffn_up or ffn_down");
      }
      parsed.roles = where;
    }
    plan.items_.push_back(std::move(parsed));
  }
  if (!has_default) {
    plan.items_.insert(plan.items_.begin(), Item{.paths = 2});
  }
  return plan;
}

int64_t PathPlan::paths(int64_t layer, Role role) const {
  int64_t paths = 0;
  const std::string name = role_name(role);
  for (const Item& item : items_) {
    const bool here =
        item.last_layer < 0 || (item.first_layer <= layer && layer <= item.last_layer);
    if (here && name.rfind(item.roles, 0) == 0) {
      paths = item.paths;
    }
  }
  return paths;
}

void PathPlan::set(int64_t layer, Role role, int64_t paths) {
  items_.push_back({layer, layer, role_name(role), paths});
  text_ += fmt::format(",{}.{}={}", layer, role_name(role), paths);
}

int64_t PathPlan::last_layer() const {
  int64_t last = -1;
  for (const Item& item : items_) {
    last = std::max(last, item.last_layer);
  }
  return last;
}

std::span<const Setting> settings() {
  static const std::vector<Setting> table = make_settings();
  return table;
}

json describe(const QuantizeOptions& options) {
  json out;
  for (const Setting& setting : settings()) {
    const auto value = [&](const auto& kind) -> json {
      using Kind = std::decay_t<decltype(kind)>;
      if constexpr (std::is_same_v<Kind, Setting::Choice>) {
        return kind.names[static_cast<size_t>(kind.get(options))];
      } else {
        return options.*kind.member;
      }
    };
    if (!setting.key.empty()) {
      out[std::string(setting.key)] = std::visit(value, setting.value);
    }
  }
  return out;
}

std::string arguments_of(const Q& options) {
  const json given = describe(options), defaults = describe(Q());
  std::string out;
  for (const Setting& setting : settings()) {
    const std::string key(setting.key);
    if (key.empty() || given[key] == defaults[key]) {
      continue;
    }
    out += fmt::format(" {}", setting.option.substr(setting.option.rfind(',') + 1));
    if (!std::holds_alternative<Setting::Flag>(setting.value)) {
      out += ' ';
      out += given[key].is_string() ? given[key].get<std::string>() : given[key].dump();
    }
  }
  return out;
}

Result<Q> from_description(const json& description) {
  Q options;
  for (const Setting& setting : settings()) {
    const auto found = description.find(std::string(setting.key));
    if (setting.key.empty() || found == description.end()) {
      continue;
    }
    const Error wrong{fmt::format("the setting {} is {}", setting.key, found->dump())};
    if (const auto* integer = std::get_if<Setting::Integer>(&setting.value)) {
      if (!found->is_number_integer()) {
        return wrong;
      }
      options.*integer->member = found->get<int64_t>();
    } else if (const auto* number = std::get_if<Setting::Number>(&setting.value)) {
      if (!found->is_number()) {
        return wrong;
      }
      options.*number->member = found->get<double>();
    } else if (const auto* flag = std::get_if<Setting::Flag>(&setting.value)) {
      if (!found->is_boolean()) {
        return wrong;
      }
      options.*flag->member = found->get<bool>();
    } else if (const auto* text = std::get_if<Setting::Text>(&setting.value)) {
      if (!found->is_string()) {
        return wrong;
      }
      options.*text->member = found->get<std::string>();
    } else {
      const auto& choice = std::get<Setting::Choice>(setting.value);
      const auto at = std::find(choice.names.begin(), choice.names.end(),
                                found->is_string() ? found->get<std::string>() : std::string());
      if (at == choice.names.end()) {
        return wrong;
      }
      choice.set(options, static_cast<int>(at - choice.names.begin()));
    }
  }
  RABIT_CHECK(check_ranges(options));
  return options;
}

Result<at::Device> pick_device(const std::string& name) {
  RABIT_ASSIGN(const int index, device_index(name));
  if (index < 0) {
    return at::Device(at::kCPU);
  }
  if (!at::globalContext().hasCUDA()) {
    return Error{"--device " + name +
                 ": no GPU can be used: this build has no CUDA support, or no driver or device was "
                 "found; use --device cpu, or build with the cuda preset on a machine with a GPU"};
  }
  const int devices = at::detail::getCUDAHooks().deviceCount();
  if (index >= devices) {
    return Error{fmt::format("--device {}: this machine has {} CUDA device{}, numbered from 0",
                             name, devices, devices == 1 ? "" : "s")};
  }
  // What one phase has freed serves the next in other sizes.
  if (std::getenv("PYTORCH_CUDA_ALLOC_CONF") == nullptr &&
      std::getenv("PYTORCH_ALLOC_CONF") == nullptr) {
    c10::CachingAllocator::setAllocatorSettings("expandable_segments:True");
  }
  return at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(index));
}

int pick_threads(int64_t asked) { return asked > 0 ? static_cast<int>(asked) : usable_threads(); }

at::ScalarType pick_compute(Compute compute, at::Device device) {
  if (compute == Compute::kAuto) {
#if defined(__x86_64__)
    const bool fast_bf16 = device.is_cuda() || __builtin_cpu_supports("avx512bf16") != 0;
#else
    const bool fast_bf16 = device.is_cuda();
#endif
    return fast_bf16 ? at::kBFloat16 : at::kFloat;
  }
  return compute == Compute::kBF16 ? at::kBFloat16 : at::kFloat;
}

Status check_options(const Q& options) {
  RABIT_CHECK(check_ranges(options));
  return check_combination(options);
}

std::vector<std::string> idle_settings(const Q& o, int64_t distill_tokens) {
  const bool warm = o.warm_epochs > 0.0, distilled = distill_tokens > 0;
  const json given = describe(o), defaults = describe(Q());
  std::vector<std::string> idle;
  const auto note = [&](bool used, std::initializer_list<const char*> keys) {
    for (const Setting& setting : settings()) {
      const bool meant = std::find(keys.begin(), keys.end(), setting.key) != keys.end();
      const std::string key(setting.key);
      if (!used && meant && given[key] != defaults[key]) {
        idle.emplace_back(setting.option);
      }
    }
  };
  note(o.error_feedback,
       {"ef_damp", "ef_order", "ef_inputs", "ef_target", "ef_rounds", "ef_sweeps"});
  note(o.method != Method::kDbllm, {"alpha_in", "alpha_out", "init_sweeps", "als_steps"});
  note(warm, {"warm_blocks", "warm_batch", "warm_latent_lr", "warm_scale_lr"});
  note(warm || distilled, {"optimizer", "momentum", "train_norms", "warmup", "reverse_kl",
                           "temperature", "cross_entropy", "clip"});
  note(distilled, {"batch", "micro_batch", "recompute", "checkpoint_steps", "latent_lr", "scale_lr",
                   "ema", "gamma"});
  note(distilled && o.gamma > 0.0, {"gamma_on"});
  return idle;
}

Status check_run(const QuantizeOptions& options, const std::filesystem::path& out,
                 std::span<const std::filesystem::path> inputs) {
  RABIT_CHECK(check_options(options));
  RABIT_CHECK(pick_device(options.device));
  RABIT_ASSIGN(const Place place, Place::from_environment());
  // Of several processes the first writes.
  return place.first() ? check_output(out, inputs, !options.resume && !options.dry_run) : Status();
}

}  // namespace rabit::train
