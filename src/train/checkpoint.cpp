// Checkpoints: a GGUF file of float32 tensors (latents, scales, optimizer state) and metadata that
// says what it belongs to. Written whole or not at all.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <deque>

#include "base/files.h"
#include "base/interrupt.h"
#include "base/json.h"
#include "train/host_tensor.h"
#include "train/session.h"
#include "train/shards.h"

namespace rabit::train {
namespace {

constexpr int64_t kCheckpointVersion = 1;
constexpr char kPrefix[] = "rabit.checkpoint.";

std::string key(const char* name) { return std::string(kPrefix) + name; }

std::filesystem::path unfinished_checkpoint(std::filesystem::path checkpoint) {
  return checkpoint += ".new";
}

// Writes the checkpoint whole, then gives the earlier ones that are to be kept the names of older
// ones. The last keeps its own name until the new one takes it, where the file system has hard
// links.
Status replace_checkpoint(const GgufWriter& writer, const std::filesystem::path& checkpoint,
                          int64_t kept) {
  const auto path = [&](int64_t age) { return earlier_checkpoint(checkpoint, age); };
  std::error_code failed;
  if (kept == 1 || !std::filesystem::exists(checkpoint, failed)) {
    return writer.write(checkpoint);
  }
  const std::filesystem::path made = unfinished_checkpoint(checkpoint);
  RABIT_CHECK(writer.write(made));
  // A kill may have left the last under two names.
  if (!std::filesystem::equivalent(path(0), path(1), failed)) {
    for (int64_t age = kept - 1; age > 1; --age) {
      std::filesystem::rename(path(age - 1), path(age), failed);
    }
    std::filesystem::remove(path(1), failed);
    std::filesystem::create_hard_link(path(0), path(1), failed);
    if (failed) {
      std::filesystem::rename(path(0), path(1), failed);
    }
  }
  std::filesystem::rename(made, checkpoint, failed);
  return failed ? Error{"cannot rename " + made.string() + ": " + failed.message()} : Status();
}

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

std::filesystem::path earlier_checkpoint(const std::filesystem::path& checkpoint, int64_t age) {
  std::filesystem::path path = checkpoint;
  if (age > 0) {
    path += "." + std::to_string(age);
  }
  return path;
}

std::vector<std::filesystem::path> checkpoints_beside(const std::filesystem::path& checkpoint) {
  const std::string prefix = checkpoint.filename().string();
  const auto folder = checkpoint.has_parent_path() ? checkpoint.parent_path() : ".";
  std::vector<std::filesystem::path> found;
  std::error_code failed;
  for (const auto& entry : std::filesystem::directory_iterator(folder, failed)) {
    const std::string name = entry.path().filename().string();
    const bool numbered = name.size() > prefix.size() + 1 && name[prefix.size()] == '.' &&
                          name.find_first_not_of("0123456789", prefix.size() + 1) == name.npos;
    if (name == prefix || (name.compare(0, prefix.size(), prefix) == 0 && numbered)) {
      found.push_back(entry.path());
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

void remove_checkpoints(const std::filesystem::path& checkpoint) {
  std::error_code ignored;
  std::vector<std::filesystem::path> paths = checkpoints_beside(checkpoint);
  paths.insert(paths.end(), {checkpoint, unfinished_checkpoint(checkpoint)});
  for (std::filesystem::path& path : paths) {
    std::filesystem::remove(path, ignored);
    std::filesystem::remove(path += kPartialEnding, ignored);
  }
}

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
  nlohmann::json log = session.log;
  log["seconds"] = session.seconds();
  writer.set(key("log"),
             MetaValue::string(log.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)));
  writer.set(key("blocks_done"), MetaValue::u32(static_cast<uint32_t>(blocks_done)));
  // Steps may have been taken none of which was usable: then there is no state to keep.
  const TrainerState none;
  const TrainerState& state = distill != nullptr ? distill->trainer : none;
  size_t matrix = 0;
  const SharedLeaves shared = shared_leaves(session.student, session.ranks);
  std::deque<StudentBlock> kept;  // until their signs are written
  for (int64_t layer = 0; layer < blocks_done; ++layer) {
    const StudentBlock& block =
        kept.emplace_back(whole_block(session.student.blocks[static_cast<size_t>(layer)]));
    for (const Role role : kRoles) {
      at::Tensor average;
      if (distill != nullptr && !distill->average.empty()) {
        average = distill->average[matrix];
        if (session.ranks) {
          average = whole_of(average, shared.latents[matrix], *session.ranks);
        }
      }
      if (!session.first()) {
        ++matrix;
        continue;
      }
      const StudentLinear& linear = block[role];
      const std::string name = linear_name(layer, role);
      RABIT_CHECK(tensors.add(writer, name + ".latent", linear.latent));
      RABIT_CHECK(tensors.add(writer, name + ".g", linear.g));
      RABIT_CHECK(tensors.add(writer, name + ".h", linear.h));
      RABIT_CHECK(writer.add_tensor(name + ".start_sign", TensorType::kI32,
                                    sign_extents(linear.shape),
                                    std::as_bytes(std::span(linear.start_signs))));
      if (!state.momentum.empty()) {
        RABIT_CHECK(tensors.add(writer, name + ".momentum", state.momentum[matrix]));
      }
      if (average.defined()) {
        RABIT_CHECK(tensors.add(writer, name + ".average", average));
      }
      ++matrix;
    }
    for (const auto& [name, norm] : block_norms(block, layer)) {
      if (norm->defined()) {
        RABIT_CHECK(tensors.add(writer, name, *norm));
      }
    }
  }
  if (!session.first()) {
    return {};
  }
  if (session.student.output_norm.defined()) {
    RABIT_CHECK(tensors.add(writer, "output_norm", session.student.output_norm));
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
  RABIT_CHECK(
      replace_checkpoint(writer, session.checkpoint_path, session.options.keep_checkpoints));
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
  const nlohmann::json defaults = describe(QuantizeOptions());
  for (const Setting& setting : settings()) {
    if (setting.may_change) {
      continue;
    }
    const std::string key(setting.key);
    // What an earlier version did not know, it did as by default.
    const auto old_value = old_settings.value(key, defaults[key]);
    const auto new_value = now["settings"].value(key, nlohmann::json());
    if (old_value == new_value) {
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

// A tensor of finite values.
Result<at::Tensor> read_finite(const GgufFile& file, const std::string& name,
                               at::IntArrayRef sizes) {
  RABIT_ASSIGN(at::Tensor tensor, read_tensor(file, name, sizes));
  if (!tensor.isfinite().all().item<bool>()) {
    return Error{file.path().string() + ": damaged: tensor " + name +
                 " holds values that are not finite"};
  }
  return tensor;
}

// What `body` returns; metadata of other types than were written are damage.
template <typename Body>
auto as_written(const std::string& where, const Body& body) -> decltype(body()) try {
  return body();
} catch (const nlohmann::json::exception&) {
  return Error{where + ": damaged: what it says of its run is not what rabit quantize wrote"};
}

// The layers of blocks [0, blocks_done) and their norms; the blocks after them stay empty.
Result<Student> read_student(const GgufFile& file, int64_t blocks_done, const ModelConfig& config,
                             const QuantizeOptions& options, const PathPlan& bits,
                             at::Device device) {
  const auto read_norm = [&](const std::string& name) -> Result<at::Tensor> {
    RABIT_ASSIGN(const at::Tensor norm, read_finite(file, name, {config.d_model}));
    return norm.to(device).clone().set_requires_grad(true);
  };
  Student student;
  student.blocks.resize(static_cast<size_t>(config.layers));
  for (int64_t layer = 0; layer < blocks_done; ++layer) {
    StudentBlock& block = student.blocks[static_cast<size_t>(layer)];
    for (const Role role : kRoles) {
      RABIT_CHECK(check_interrupt());
      const LinearShape sizes = linear_shape(config, role);
      const quant::Shape shape = {sizes.d_out, sizes.d_in, bits.paths(layer, role)};
      const std::string name = linear_name(layer, role);
      std::vector<int64_t> latent_sizes = {shape.d_out, shape.d_in};
      if (has_independent_latents(options.method)) {
        latent_sizes.insert(latent_sizes.begin(), shape.paths);
      }
      RABIT_ASSIGN(const at::Tensor latent, read_finite(file, name + ".latent", latent_sizes));
      RABIT_ASSIGN(const at::Tensor g, read_finite(file, name + ".g", {shape.paths, shape.d_out}));
      RABIT_ASSIGN(const at::Tensor h, read_finite(file, name + ".h", {shape.paths, shape.d_in}));
      RABIT_ASSIGN(std::vector<uint32_t> signs, read_signs(file, name + ".start_sign", shape));
      block[role] = restore_student_linear(options.method, latent, g, h, std::move(signs), device);
    }
    if (options.train_norms) {
      for (const auto& [name, norm] : block_norms(block, layer)) {
        RABIT_ASSIGN(*norm, read_norm(name));
      }
    }
  }
  if (options.train_norms) {
    RABIT_ASSIGN(student.output_norm, read_norm("output_norm"));
  }
  return student;
}

// What was saved of the run that wrote a checkpoint.
struct SavedRun {
  nlohmann::json fingerprint, log;
  int64_t blocks_done = 0;
};

Result<SavedRun> read_run(const GgufFile& file) {
  const std::string where = file.path().string();
  RABIT_ASSIGN(const int64_t version, file.get_int(key("version")));
  if (version != kCheckpointVersion) {
    return Error{where + ": checkpoint version " + std::to_string(version) + " is not known"};
  }
  RABIT_ASSIGN(const std::string fingerprint, file.get_string(key("fingerprint")));
  RABIT_ASSIGN(const std::string log, file.get_string(key("log")));
  auto parsed_fingerprint = parse_json(fingerprint), parsed_log = parse_json(log);
  if (!parsed_fingerprint || !parsed_log || !parsed_fingerprint->is_object() ||
      !parsed_log->is_object() ||
      !parsed_fingerprint->value("settings", nlohmann::json()).is_object()) {
    return Error{where + ": damaged: its settings are no JSON object"};
  }
  SavedRun run{std::move(parsed_fingerprint).value(), std::move(parsed_log).value()};
  RABIT_ASSIGN(run.blocks_done, file.get_int(key("blocks_done")));
  return run;
}

// What the run found by search, as search_settings() noted it.
Status take_searched(const nlohmann::json& log, QuantizeOptions& options, PathPlan& bits) {
  const auto found = log.value("searched", nlohmann::json());
  if (!found.is_object()) {
    return {};
  }
  const auto number = [&](const char* name, double otherwise) {
    return found.contains(name) && found[name].is_number() ? found[name].get<double>() : otherwise;
  };
  options.alpha_in = number("alpha_in", options.alpha_in);
  options.alpha_out = number("alpha_out", options.alpha_out);
  if (found.contains("bits") && found["bits"].is_string()) {
    RABIT_ASSIGN(bits, PathPlan::parse(found["bits"].get<std::string>()));
  }
  return {};
}

Result<Resumed> read_checkpoint(TrainSession& session) {
  const std::string where = session.checkpoint_path.string();
  RABIT_ASSIGN(const auto file, GgufFile::open(session.checkpoint_path));
  RABIT_ASSIGN(const SavedRun run, read_run(*file));
  const auto now = nlohmann::json::parse(settings_fingerprint(session));
  if (const std::string other = differences(run.fingerprint, now); !other.empty()) {
    return Error{where + ": made with " + other};
  }
  const nlohmann::json& log = run.log;
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

  if (log.contains("seconds") && log["seconds"].is_number()) {
    session.earlier_seconds = log["seconds"].get<double>();
  }

  Resumed resumed;
  resumed.blocks_done = run.blocks_done;
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
  RABIT_CHECK(take_searched(run.log, session.options, session.bits));
  if (run.log.contains("searched")) {
    session.log["searched"] = run.log["searched"];
  }
  RABIT_ASSIGN(session.student,
               read_student(*file, resumed.blocks_done, session.config(), session.options,
                            session.bits, session.teacher.device));
  int64_t scale_count = 0, latent_count = 0;
  for (const auto& tensor : scales_and_norms(session.student)) {
    scale_count += tensor.numel();
  }
  const auto done =
      std::span(session.student.blocks).first(static_cast<size_t>(resumed.blocks_done));
  size_t layer = 0;
  for (const StudentBlock& block : done) {
    for (const Role role : kRoles) {
      const std::string name = linear_name(static_cast<int64_t>(layer), role);
      const auto sizes = block[role].latent.sizes();
      latent_count += block[role].latent.numel();
      if (momentum) {
        RABIT_ASSIGN(at::Tensor tensor, read_finite(*file, name + ".momentum", sizes));
        resumed.distill.trainer.momentum.push_back(std::move(tensor));
      }
      if (resumed.distilling && session.options.ema > 0.0) {
        RABIT_ASSIGN(const at::Tensor tensor, read_finite(*file, name + ".average", sizes));
        resumed.distill.average.push_back(tensor.to(session.teacher.device));
      }
    }
    ++layer;
  }
  const auto adam = [&](const std::string& part, int64_t count) -> Result<AdamW::State> {
    AdamW::State state;
    RABIT_ASSIGN(state.steps, file->get_int(key(part.c_str())));
    RABIT_ASSIGN(state.mean, read_finite(*file, part + ".mean", {count}));
    RABIT_ASSIGN(state.square, read_finite(*file, part + ".square", {count}));
    return state;
  };
  if (optimized) {
    RABIT_ASSIGN(resumed.distill.trainer.scales, adam("adam.scales", scale_count));
    if (!momentum) {
      RABIT_ASSIGN(resumed.distill.trainer.latents, adam("adam.latents", latent_count));
    }
  }
  if (session.ranks) {
    for (int64_t done = 0; done < resumed.blocks_done; ++done) {
      StudentBlock& block = session.student.blocks[static_cast<size_t>(done)];
      block = shard_block(block, session.ranks);
    }
    const SharedLeaves shared = shared_leaves(session.student, session.ranks);
    for (size_t i = 0; i < resumed.distill.average.size(); ++i) {
      at::Tensor& average = resumed.distill.average[i];
      average = share_of(average, shared.latents[i], *session.ranks).clone();
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
  auto resumed = as_written(where, [&] { return read_checkpoint(session); });
  if (!resumed && !resumed.error().interrupted) {
    return Error{"cannot resume: " + resumed.error().message +
                 " (to start anew, remove the checkpoint and run without --resume)"};
  }
  return resumed;
}

namespace {

Result<CheckpointStudent> read_checkpoint_student(const GgufFile& file, const ModelConfig& config,
                                                  const std::string& source_sha256) {
  const std::string where = file.path().string();
  RABIT_ASSIGN(const SavedRun run, read_run(file));
  const auto digest = run.fingerprint.value("source", nlohmann::json::object()).value("sha256", "");
  if (digest != source_sha256) {
    return Error{where + ": made from another model than --teacher"};
  }
  if (run.blocks_done == 0) {
    return Error{where + ": no block is finished yet; there is nothing to diagnose"};
  }
  if (run.blocks_done < 0 || run.blocks_done > config.layers) {
    return Error{where + ": damaged: " + std::to_string(run.blocks_done) + " blocks done"};
  }
  const auto described = from_description(run.fingerprint["settings"]);
  if (!described) {
    return Error{where + ": damaged: " + described.error().message};
  }
  QuantizeOptions options = *described;
  RABIT_ASSIGN(PathPlan bits, PathPlan::parse(options.bits));
  RABIT_CHECK(take_searched(run.log, options, bits));
  RABIT_ASSIGN(Student student,
               read_student(file, run.blocks_done, config, options, bits, at::kCPU));
  // Where there is an average, it is what would be packed.
  const at::NoGradGuard no_grad;
  for (int64_t layer = 0; layer < run.blocks_done; ++layer) {
    for (const Role role : kRoles) {
      const std::string name = linear_name(layer, role) + ".average";
      at::Tensor latent = student.at(layer, role).latent;
      if (file.find_tensor(name) != nullptr) {
        RABIT_ASSIGN(const at::Tensor average, read_tensor(file, name, latent.sizes()));
        latent.copy_(average);
      }
    }
  }
  return CheckpointStudent{std::move(student), run.blocks_done};
}

}  // namespace

Result<CheckpointStudent> student_of_checkpoint(const GgufFile& file, const ModelConfig& config,
                                                const std::string& source_sha256) {
  return as_written(file.path().string(),
                    [&] { return read_checkpoint_student(file, config, source_sha256); });
}

bool is_checkpoint(const GgufFile& file) { return file.find_meta(key("version")) != nullptr; }

}  // namespace rabit::train
