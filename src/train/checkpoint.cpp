// Checkpoints: a GGUF file of float32 tensors (latents, scales, optimizer state) and metadata that
// says what it belongs to. Written whole or not at all.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "base/files.h"
#include "train/host_tensor.h"
#include "train/session.h"

namespace rabit::train {
namespace {

constexpr int64_t kCheckpointVersion = 1;
constexpr char kPrefix[] = "rabit.checkpoint.";

std::string key(const char* name) { return std::string(kPrefix) + name; }

// Host copies that stay alive until the writer has written them.
class Tensors {
 public:
  Status add(GgufWriter& writer, const std::string& name, const at::Tensor& tensor) {
    const at::Tensor host = tensor.detach().to(at::kCPU, at::kFloat).contiguous();
    kept_.push_back(host);
    std::vector<int64_t> ne(host.sizes().rbegin(), host.sizes().rend());
    const auto bytes =
        std::as_bytes(std::span(host.const_data_ptr<float>(), static_cast<size_t>(host.numel())));
    return writer.add_tensor(name, TensorType::kF32, std::move(ne), bytes);
  }

 private:
  std::vector<at::Tensor> kept_;
};

}  // namespace

std::string settings_fingerprint(const TrainSession& session) {
  nlohmann::json out = session.log["settings"];
  for (const Setting& setting : settings()) {
    if (setting.may_change) {
      out.erase(std::string(setting.key));
    }
  }
  return nlohmann::json{
      {"settings", out}, {"data", session.log["data"]}, {"source", session.log["source"]}}
      .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

Status save_checkpoint(const TrainSession& session, int64_t blocks_done,
                       const DistillState* distill) {
  GgufWriter writer;
  Tensors tensors;
  writer.set("general.architecture", MetaValue::string("rabit-checkpoint"));
  writer.set(key("version"), MetaValue::u32(kCheckpointVersion));
  writer.set(key("fingerprint"), MetaValue::string(settings_fingerprint(session)));
  writer.set(key("log"), MetaValue::string(session.log.dump(
                             -1, ' ', false, nlohmann::json::error_handler_t::replace)));
  writer.set(key("blocks_done"), MetaValue::u32(static_cast<uint32_t>(blocks_done)));
  // Steps may have been taken none of which was usable: then there is no state to keep.
  const TrainerState none;
  const TrainerState& state = distill != nullptr ? distill->trainer : none;
  size_t matrix = 0;
  for (int64_t layer = 0; layer < blocks_done; ++layer) {
    for (const Role role : kRoles) {
      const StudentLinear& linear =
          session.student.blocks[static_cast<size_t>(layer)][index_of(role)];
      const std::string name = linear_name(layer, role);
      RABIT_CHECK(tensors.add(writer, name + ".latent", linear.latent));
      RABIT_CHECK(tensors.add(writer, name + ".g", linear.g));
      RABIT_CHECK(tensors.add(writer, name + ".h", linear.h));
      if (!state.momentum.empty()) {
        RABIT_CHECK(tensors.add(writer, name + ".momentum", state.momentum[matrix]));
      }
      if (distill != nullptr && !distill->average.empty()) {
        RABIT_CHECK(tensors.add(writer, name + ".average", distill->average[matrix]));
      }
      ++matrix;
    }
  }
  if (distill != nullptr) {
    writer.set(key("distill_step"), MetaValue::u64(static_cast<uint64_t>(distill->step)));
    for (const auto& [name, adam] :
         {std::pair{"scales", &state.scales}, std::pair{"latents", &state.latents}}) {
      if (adam->mean.defined()) {
        const std::string part = std::string("adam.") + name;
        writer.set(key(part.c_str()), MetaValue::u64(static_cast<uint64_t>(adam->steps)));
        RABIT_CHECK(tensors.add(writer, part + ".mean", adam->mean));
        RABIT_CHECK(tensors.add(writer, part + ".square", adam->square));
      }
    }
  }
  RABIT_CHECK(writer.write(session.checkpoint_path));
  if (session.observer.message) {
    session.observer.message("checkpoint: " + session.checkpoint_path.string());
  }
  return {};
}

void save_or_say(const TrainSession& session, int64_t blocks_done, const DistillState* distill) {
  if (const Status saved = save_checkpoint(session, blocks_done, distill); !saved) {
    session.observer.message("no checkpoint: " + saved.error().message + "; going on without");
  }
}

namespace {

// What differs between a checkpoint's run and this one, in the command line's words; empty:
// nothing.
std::string differences(const nlohmann::json& before, const nlohmann::json& now) {
  std::string found;
  const auto add = [&](const std::string& what) { found += (found.empty() ? "" : ", ") + what; };
  const auto digest = [](const nlohmann::json& side) {
    return side.value("source", nlohmann::json::object()).value("sha256", "");
  };
  const auto digests = [](const nlohmann::json& side) {
    std::vector<std::string> out;
    for (const auto& file :
         side.value("data", nlohmann::json::object()).value("files", nlohmann::json::array())) {
      out.push_back(file.value("sha256", ""));
    }
    return out;
  };
  if (digest(before) != digest(now)) {
    add("another MODEL");
  }
  if (digests(before) != digests(now)) {
    add("other texts of --data");
  }
  const auto old_settings = before.value("settings", nlohmann::json::object());
  for (const Setting& setting : settings()) {
    const std::string key(setting.key);
    const auto old_value = old_settings.value(key, nlohmann::json());
    const auto& new_value = now["settings"][key];
    if (setting.may_change || old_value == new_value) {
      continue;
    }
    if (const auto* flag = std::get_if<Setting::Flag>(&setting.value)) {
      const bool here = new_value == flag->when_given;
      add(fmt::format("{}{}", here ? "no " : "", setting.option));
    } else {
      add(fmt::format("{} {} ({} here)", setting.option, old_value.dump(), new_value.dump()));
    }
  }
  return found;
}

Result<Resumed> read_checkpoint(TrainSession& session) {
  const std::string where = session.checkpoint_path.string();
  RABIT_ASSIGN(const auto file, GgufFile::open(session.checkpoint_path));
  RABIT_ASSIGN(const int64_t version, file->get_int(key("version")));
  if (version != kCheckpointVersion) {
    return Error{where + ": checkpoint version " + std::to_string(version) + " is not known"};
  }
  RABIT_ASSIGN(const std::string saved, file->get_string(key("fingerprint")));
  RABIT_ASSIGN(const std::string saved_log, file->get_string(key("log")));
  const auto before = nlohmann::json::parse(saved, nullptr, false);
  const auto log = nlohmann::json::parse(saved_log, nullptr, false);
  if (!before.is_object() || !before.value("settings", nlohmann::json()).is_object() ||
      !log.is_object()) {
    return Error{where + ": damaged: its settings are no JSON object"};
  }
  const auto now = nlohmann::json::parse(settings_fingerprint(session));
  if (const std::string other = differences(before, now); !other.empty()) {
    return Error{where + ": made with " + other};
  }
  for (const char* phase : {"warm_start", "distill"}) {
    if (log.contains(phase) && log[phase].is_array()) {
      session.log[phase] = log[phase];
    }
  }
  for (const char* count : {"calib_tokens_used", "distill_planned", "distill_tokens"}) {
    if (log.contains(count) && log[count].is_number_integer()) {
      session.log[count] = log[count];
    }
  }

  Resumed resumed;
  RABIT_ASSIGN(resumed.blocks_done, file->get_int(key("blocks_done")));
  if (resumed.blocks_done < 0 || resumed.blocks_done > session.config().layers) {
    return Error{where + ": damaged: " + std::to_string(resumed.blocks_done) + " blocks done"};
  }
  resumed.distilling = file->find_meta(key("distill_step")) != nullptr;
  if (resumed.distilling) {
    RABIT_ASSIGN(resumed.distill.step, file->get_int(key("distill_step")));
    if (resumed.blocks_done != session.config().layers) {
      return Error{where + ": damaged: distillation before all blocks are done"};
    }
  }
  const bool optimized = resumed.distilling && file->find_meta(key("adam.scales")) != nullptr;
  const bool momentum = optimized && session.options.optimizer == Optimizer::kMuon;
  const at::Device device = session.teacher.device;
  int64_t scale_count = 0, latent_count = 0;
  for (int64_t layer = 0; layer < resumed.blocks_done; ++layer) {
    for (const Role role : kRoles) {
      const LinearShape sizes = linear_shape(session.config(), role);
      const int64_t paths = session.bits.paths(layer, role);
      const std::string name = linear_name(layer, role);
      const Method method = session.options.method;
      std::vector<int64_t> latent_sizes = {sizes.d_out, sizes.d_in};
      if (has_independent_latents(method)) {
        latent_sizes.insert(latent_sizes.begin(), paths);
      }
      RABIT_ASSIGN(const at::Tensor latent, read_tensor(*file, name + ".latent", latent_sizes));
      RABIT_ASSIGN(const at::Tensor g, read_tensor(*file, name + ".g", {paths, sizes.d_out}));
      RABIT_ASSIGN(const at::Tensor h, read_tensor(*file, name + ".h", {paths, sizes.d_in}));
      StudentLinear& linear = session.student.blocks[static_cast<size_t>(layer)][index_of(role)];
      linear = restore_student_linear(method, latent, g, h, device);
      scale_count += linear.g.numel() + (linear.h.requires_grad() ? linear.h.numel() : 0);
      latent_count += linear.latent.numel();
      if (momentum) {
        RABIT_ASSIGN(at::Tensor tensor, read_tensor(*file, name + ".momentum", latent_sizes));
        resumed.distill.trainer.momentum.push_back(std::move(tensor));
      }
      if (resumed.distilling && session.options.ema > 0.0) {
        RABIT_ASSIGN(const at::Tensor tensor, read_tensor(*file, name + ".average", latent_sizes));
        resumed.distill.average.push_back(tensor.to(device));
      }
    }
  }
  const auto adam = [&](const std::string& part, int64_t count) -> Result<AdamW::State> {
    AdamW::State state;
    RABIT_ASSIGN(state.steps, file->get_int(key(part.c_str())));
    RABIT_ASSIGN(state.mean, read_tensor(*file, part + ".mean", {count}));
    RABIT_ASSIGN(state.square, read_tensor(*file, part + ".square", {count}));
    return state;
  };
  if (optimized) {
    RABIT_ASSIGN(resumed.distill.trainer.scales, adam("adam.scales", scale_count));
    if (!momentum) {
      RABIT_ASSIGN(resumed.distill.trainer.latents, adam("adam.latents", latent_count));
    }
  }
  return resumed;
}

}  // namespace

Result<Resumed> load_checkpoint(TrainSession& session) {
  const std::string where = session.checkpoint_path.string();
  if (!std::filesystem::exists(session.checkpoint_path)) {
    return Error{where + ": no checkpoint to resume from; run without --resume"};
  }
  auto resumed = read_checkpoint(session);
  if (!resumed && !resumed.error().interrupted) {
    return Error{"cannot resume: " + resumed.error().message +
                 " (to start anew, remove the checkpoint and run without --resume)"};
  }
  return resumed;
}

}  // namespace rabit::train
