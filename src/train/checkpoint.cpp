// Checkpoints: a GGUF file of float32 tensors (latents, scales, optimizer state) and metadata that
// says what it belongs to. Written whole or not at all. Of several processes each writes and reads
// the rows that it holds.

#include <ATen/ATen.h>
#include <c10/util/accumulate.h>
#include <fmt/format.h>

#include <optional>

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

// Gives the earlier checkpoints that are to be kept the names of older ones. The last keeps its own
// name, too, until the new one takes it, where the file system has hard links.
void make_room(const std::filesystem::path& checkpoint, int64_t kept) {
  const auto path = [&](int64_t age) { return earlier_checkpoint(checkpoint, age); };
  std::error_code failed;
  if (kept == 1 || !std::filesystem::exists(checkpoint, failed) ||
      std::filesystem::equivalent(path(0), path(1), failed)) {  // a kill may have left it so
    return;
  }
  for (int64_t age = kept - 1; age > 1; --age) {
    std::filesystem::rename(path(age - 1), path(age), failed);
  }
  std::filesystem::remove(path(1), failed);
  std::filesystem::create_hard_link(path(0), path(1), failed);
  if (failed) {
    std::filesystem::rename(path(0), path(1), failed);
  }
}

// The first process makes the file, every one writes what it has of the tensors; the first gives it
// its name when all have.
Status write_together(const TrainSession& session, const GgufWriter& writer) {
  std::optional<AtomicFile> file;
  int64_t tensors_begin = -1;  // until there is a header
  const auto begin = [&]() -> Status {
    RABIT_ASSIGN(AtomicFile created, AtomicFile::create(session.checkpoint_path));
    RABIT_ASSIGN(const uint64_t after, writer.write_header(created));
    RABIT_CHECK(created.flush());  // others see its size when they open it, on NFS too
    file.emplace(std::move(created));
    tensors_begin = static_cast<int64_t>(after);
    return {};
  };
  Status status = session.first() ? begin() : Status();
  if (session.ranks) {
    const at::Tensor shared = at::full({1}, tensors_begin, at::kLong).to(session.teacher.device);
    session.ranks->broadcast(shared);
    tensors_begin = shared.item<int64_t>();
  }
  const auto write = [&]() -> Status {
    if (!file) {
      RABIT_ASSIGN(AtomicFile joined, AtomicFile::join(session.checkpoint_path));
      file.emplace(std::move(joined));
    }
    RABIT_CHECK(writer.write_pieces(*file, static_cast<uint64_t>(tensors_begin)));
    return session.first() ? Status() : file->flush();
  };
  if (tensors_begin >= 0) {
    status = write();
  }
  if (session.anywhere(!status)) {
    return status ? Status(Error{"another process could not write its part of " +
                                 session.checkpoint_path.string()})
                  : status;
  }
  const auto finish = [&]() -> Status {
    RABIT_CHECK(file->flush());
    make_room(session.checkpoint_path, session.options.keep_checkpoints);
    return file->commit();
  };
  status = session.first() ? finish() : Status();
  if (session.anywhere(!status) && status) {  // none goes on before it has its name
    return Error{"process 0 could not finish " + session.checkpoint_path.string()};
  }
  return status;
}

constexpr uint64_t kValueBytes = 4;  // of a float32, or of a word of signs

// How a layer's tensors lie on the processes that share its block out, rows along `dim`.
LeafLayout rows_along(int64_t dim, const StudentBlock& block, Role role) {
  return block.ranks ? LeafLayout{dim, block.rows[index_of(role)]} : LeafLayout{};
}

std::vector<int64_t> whole_sizes(const at::Tensor& share, const LeafLayout& layout) {
  std::vector<int64_t> sizes = share.sizes().vec();
  if (layout.dim >= 0) {
    sizes[static_cast<size_t>(layout.dim)] = layout.rows;
  }
  return sizes;
}

// What this process writes of a tensor that begins at byte `base`, on the host only when it is
// written.
void add_pieces(std::vector<TensorPiece>& pieces, uint64_t base, const at::Tensor& share,
                const LeafLayout& layout, const Ranks* ranks) {
  const auto add = [&](int64_t begin, const at::Tensor& part) {
    pieces.push_back(
        {base + static_cast<uint64_t>(begin) * kValueBytes,
         static_cast<uint64_t>(part.numel()) * kValueBytes, [part] {
           const at::Tensor host =
               part.to(at::kCPU, part.scalar_type() == at::kInt ? at::kInt : at::kFloat)
                   .contiguous();
           const auto* bytes = static_cast<const std::byte*>(host.const_data_ptr());
           return std::shared_ptr<const std::byte>(std::make_shared<at::Tensor>(host), bytes);
         }});
  };
  const at::Tensor own = share.detach();
  if (layout.dim < 0) {
    if (ranks == nullptr || ranks->first()) {
      add(0, own);
    }
    return;
  }
  // A run of rows for every index before them.
  const RowShare rows = rows_of(layout.rows, ranks->rank(), ranks->size());
  const int64_t count =
      c10::multiply_integers(own.sizes().slice(0, static_cast<size_t>(layout.dim)));
  const at::Tensor runs = own.reshape({count, -1});
  const int64_t row = runs.size(1) / rows.count;  // its values
  for (int64_t i = 0; i < count; ++i) {
    add((i * layout.rows + rows.begin) * row, runs[i]);
  }
}

Status add_tensor(GgufWriter& writer, const std::string& name, const at::Tensor& share,
                  const LeafLayout& layout, const Ranks* ranks) {
  const std::vector<int64_t> sizes = whole_sizes(share, layout);
  std::vector<TensorPiece> pieces;
  add_pieces(pieces, 0, share, layout, ranks);
  return writer.add_tensor(name,
                           share.scalar_type() == at::kInt ? TensorType::kI32 : TensorType::kF32,
                           {sizes.rbegin(), sizes.rend()}, std::move(pieces));
}

// One vector of what an optimizer keeps of these leaves, one after the other.
Status add_flat(GgufWriter& writer, const std::string& name, const at::Tensor& flat,
                const std::vector<at::Tensor>& leaves, const std::vector<LeafLayout>& layouts,
                const Ranks* ranks) {
  std::vector<TensorPiece> pieces;
  int64_t begin = 0, whole_begin = 0;
  for (size_t i = 0; i < leaves.size(); ++i) {
    const at::Tensor share = flat.narrow(0, begin, leaves[i].numel()).view(leaves[i].sizes());
    add_pieces(pieces, static_cast<uint64_t>(whole_begin) * kValueBytes, share, layouts[i], ranks);
    begin += leaves[i].numel();
    whole_begin += c10::multiply_integers(whole_sizes(leaves[i], layouts[i]));
  }
  return writer.add_tensor(name, TensorType::kF32, {whole_begin}, std::move(pieces));
}

}  // namespace

std::filesystem::path earlier_checkpoint(const std::filesystem::path& checkpoint, int64_t age) {
  std::filesystem::path path = checkpoint;
  if (age > 0) {
    path += fmt::format(".{}", age);
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
  paths.push_back(checkpoint);
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
  writer.set("general.architecture", MetaValue::string("rabit-checkpoint"));
  writer.set(key("version"), MetaValue::u32(kCheckpointVersion));
  writer.set(key("fingerprint"), MetaValue::string(settings_fingerprint(session)));
  nlohmann::json log = session.log;
  log["seconds"] = session.seconds();
  writer.set(key("log"),
             MetaValue::string(log.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)));
  writer.set(key("blocks_done"), MetaValue::u32(static_cast<uint32_t>(blocks_done)));
  const Ranks* ranks = session.ranks.get();
  const auto add = [&](const std::string& name, const at::Tensor& share, const LeafLayout& layout) {
    return add_tensor(writer, name, share, layout, ranks);
  };
  // Steps may have been taken none of which was usable: then there is no state to keep.
  const TrainerState none;
  const TrainerState& state = distill != nullptr ? distill->trainer : none;
  size_t matrix = 0;
  for (int64_t layer = 0; layer < blocks_done; ++layer) {
    const StudentBlock& block = session.student.blocks[static_cast<size_t>(layer)];
    for (const Role role : kRoles) {
      const StudentLinear& linear = block[role];
      const std::string name = linear_name(layer, role);
      const LeafLayout rows = rows_along(linear.latent.dim() - 2, block, role);
      RABIT_CHECK(add(name + ".latent", linear.latent, rows));
      RABIT_CHECK(add(name + ".g", linear.g, rows_along(1, block, role)));
      RABIT_CHECK(add(name + ".h", linear.h, {}));
      RABIT_CHECK(add(name + ".start_sign", sign_word_tensor(linear.start_signs, linear.shape),
                      rows_along(1, block, role)));
      if (!state.momentum.empty()) {
        RABIT_CHECK(add(name + ".momentum", state.momentum[matrix], rows));
      }
      if (distill != nullptr && !distill->average.empty()) {
        RABIT_CHECK(add(name + ".average", distill->average[matrix], rows));
      }
      ++matrix;
    }
    for (const auto& [name, norm] : block_norms(block, layer)) {
      if (norm->defined()) {
        RABIT_CHECK(add(name, *norm, {}));
      }
    }
  }
  if (session.student.output_norm.defined()) {
    RABIT_CHECK(add("output_norm", session.student.output_norm, {}));
  }
  if (distill != nullptr) {
    writer.set(key("distill_step"), MetaValue::u64(static_cast<uint64_t>(distill->step)));
    const SharedLeaves shared = shared_leaves(session.student, session.ranks);
    const auto add_adam = [&](const char* of, const AdamW::State& adam,
                              const std::vector<at::Tensor>& leaves,
                              const std::vector<LeafLayout>& layouts) -> Status {
      if (!adam.mean.defined()) {
        return {};
      }
      const std::string part = std::string("adam.") + of;
      writer.set(key(part.c_str()), MetaValue::u64(static_cast<uint64_t>(adam.steps)));
      RABIT_CHECK(add_flat(writer, part + ".mean", adam.mean, leaves, layouts, ranks));
      return add_flat(writer, part + ".square", adam.square, leaves, layouts, ranks);
    };
    RABIT_CHECK(add_adam("scales", state.scales, scales_and_norms(session.student), shared.scales));
    RABIT_CHECK(
        add_adam("latents", state.latents, latents(session.student.blocks), shared.latents));
  }
  RABIT_CHECK(write_together(session, writer));
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

// A tensor of float32 as it lies in the file, (sizes) slowest first.
Result<at::Tensor> find_floats(const GgufFile& file, const std::string& name,
                               at::IntArrayRef sizes) {
  const std::vector<int64_t> ne(sizes.rbegin(), sizes.rend());
  RABIT_ASSIGN(const TensorInfo* tensor, file.get_tensor(name, ne));
  if (tensor->type != TensorType::kF32) {
    return Error{file.path().string() + ": tensor " + name + " is not of type F32"};
  }
  return at::from_blob(const_cast<std::byte*>(tensor->data.data()), sizes, at::kFloat);
}

// What a process has of a tensor, which must be finite.
Result<at::Tensor> own_finite(const GgufFile& file, const std::string& name,
                              const at::Tensor& whole, const LeafLayout& layout,
                              const Ranks* ranks) {
  at::Tensor own = (ranks != nullptr ? share_of(whole, layout, *ranks) : whole).clone();
  if (!own.isfinite().all().item<bool>()) {
    return Error{file.path().string() + ": damaged: tensor " + name +
                 " holds values that are not finite"};
  }
  return own;
}

// This process's share of a tensor of these sizes.
Result<at::Tensor> read_share(const GgufFile& file, const std::string& name, at::IntArrayRef sizes,
                              const LeafLayout& layout, const Ranks* ranks) {
  RABIT_ASSIGN(const at::Tensor whole, find_floats(file, name, sizes));
  return own_finite(file, name, whole, layout, ranks);
}

// As add_flat() wrote it.
Result<at::Tensor> read_flat(const GgufFile& file, const std::string& name,
                             const std::vector<at::Tensor>& leaves,
                             const std::vector<LeafLayout>& layouts, const Ranks* ranks) {
  int64_t count = 0;
  for (size_t i = 0; i < leaves.size(); ++i) {
    count += c10::multiply_integers(whole_sizes(leaves[i], layouts[i]));
  }
  RABIT_ASSIGN(const at::Tensor flat, find_floats(file, name, {count}));
  std::vector<at::Tensor> shares;
  int64_t begin = 0;
  for (size_t i = 0; i < leaves.size(); ++i) {
    const std::vector<int64_t> sizes = whole_sizes(leaves[i], layouts[i]);
    const int64_t values = c10::multiply_integers(sizes);
    RABIT_ASSIGN(
        const at::Tensor share,
        own_finite(file, name, flat.narrow(0, begin, values).view(sizes), layouts[i], ranks));
    shares.push_back(share.flatten());
    begin += values;
  }
  return at::cat(shares);
}

// What `body` returns; metadata of other types than were written are damage.
template <typename Body>
auto as_written(const std::string& where, const Body& body) -> decltype(body()) try {
  return body();
} catch (const nlohmann::json::exception&) {
  return Error{where + ": damaged: what it says of its run is not what rabit quantize wrote"};
}

// The layers of blocks [0, blocks_done) and their norms, or what a process has of them; the blocks
// after them stay empty.
Result<Student> read_student(const GgufFile& file, int64_t blocks_done, const ModelConfig& config,
                             const QuantizeOptions& options, const PathPlan& bits,
                             at::Device device, const std::shared_ptr<Ranks>& ranks) {
  const auto read_norm = [&](const std::string& name) -> Result<at::Tensor> {
    RABIT_ASSIGN(const at::Tensor norm, read_share(file, name, {config.d_model}, {}, nullptr));
    return norm.to(device).clone().set_requires_grad(true);
  };
  Student student;
  student.blocks.resize(static_cast<size_t>(config.layers));
  for (int64_t layer = 0; layer < blocks_done; ++layer) {
    StudentBlock& block = student.blocks[static_cast<size_t>(layer)];
    block.ranks = ranks;
    for (const Role role : kRoles) {
      RABIT_CHECK(check_interrupt());
      const LinearShape sizes = linear_shape(config, role);
      const quant::Shape shape = {sizes.d_out, sizes.d_in, bits.paths(layer, role)};
      const std::string name = linear_name(layer, role);
      const auto read = [&](const char* part, at::IntArrayRef of, const LeafLayout& layout) {
        return read_share(file, name + part, of, layout, ranks.get());
      };
      block.rows[index_of(role)] = shape.d_out;
      std::vector<int64_t> latent_sizes = {shape.d_out, shape.d_in};
      if (has_independent_latents(options.method)) {
        latent_sizes.insert(latent_sizes.begin(), shape.paths);
      }
      const auto row_dim = static_cast<int64_t>(latent_sizes.size()) - 2;
      const LeafLayout path_rows = rows_along(1, block, role);
      RABIT_ASSIGN(const at::Tensor latent,
                   read(".latent", latent_sizes, rows_along(row_dim, block, role)));
      RABIT_ASSIGN(const at::Tensor g, read(".g", {shape.paths, shape.d_out}, path_rows));
      RABIT_ASSIGN(const at::Tensor h, read(".h", {shape.paths, shape.d_in}, {}));
      RABIT_ASSIGN(std::vector<uint32_t> signs, read_signs(file, name + ".start_sign", shape));
      if (ranks) {
        signs = sign_words(share_of(sign_word_tensor(signs, shape), path_rows, *ranks));
      }
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
  if (const auto before =
          log.value("settings", nlohmann::json::object()).value("tokens", nlohmann::json());
      before.is_number_integer() && before.get<int64_t>() != session.options.tokens) {
    const auto say = [](int64_t tokens) {
      return tokens < 0 ? std::string("by default") : std::to_string(tokens);
    };
    session.observer.message(fmt::format("note: begun with --tokens {}, here {}",
                                         say(before.get<int64_t>()), say(session.options.tokens)));
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
                            session.bits, session.teacher.device, session.ranks));
  if (!resumed.distilling) {
    return resumed;
  }
  const Ranks* ranks = session.ranks.get();
  const SharedLeaves shared = shared_leaves(session.student, session.ranks);
  const std::vector<at::Tensor> matrices = latents(session.student.blocks);
  size_t matrix = 0;
  for (int64_t layer = 0; layer < resumed.blocks_done; ++layer) {
    for (const Role role : kRoles) {
      const std::string name = linear_name(layer, role);
      const LeafLayout& rows = shared.latents[matrix];
      const std::vector<int64_t> sizes = whole_sizes(matrices[matrix], rows);
      ++matrix;
      if (momentum) {
        RABIT_ASSIGN(at::Tensor share, read_share(*file, name + ".momentum", sizes, rows, ranks));
        resumed.distill.trainer.momentum.push_back(std::move(share));
      }
      if (session.options.ema > 0.0) {
        RABIT_ASSIGN(const at::Tensor share,
                     read_share(*file, name + ".average", sizes, rows, ranks));
        resumed.distill.average.push_back(share.to(session.teacher.device));
      }
    }
  }
  const auto adam = [&](const std::string& part, const std::vector<at::Tensor>& leaves,
                        const std::vector<LeafLayout>& layouts) -> Result<AdamW::State> {
    AdamW::State state;
    RABIT_ASSIGN(state.steps, file->get_int(key(part.c_str())));
    RABIT_ASSIGN(state.mean, read_flat(*file, part + ".mean", leaves, layouts, ranks));
    RABIT_ASSIGN(state.square, read_flat(*file, part + ".square", leaves, layouts, ranks));
    return state;
  };
  if (optimized) {
    RABIT_ASSIGN(resumed.distill.trainer.scales,
                 adam("adam.scales", scales_and_norms(session.student), shared.scales));
    if (!momentum) {
      RABIT_ASSIGN(resumed.distill.trainer.latents, adam("adam.latents", matrices, shared.latents));
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
               read_student(file, run.blocks_done, config, options, bits, at::kCPU, nullptr));
  // Where there is an average, it is what would be packed.
  const at::NoGradGuard no_grad;
  for (int64_t layer = 0; layer < run.blocks_done; ++layer) {
    for (const Role role : kRoles) {
      const std::string name = linear_name(layer, role) + ".average";
      at::Tensor latent = student.at(layer, role).latent;
      if (file.find_tensor(name) != nullptr) {
        RABIT_ASSIGN(const at::Tensor average, find_floats(file, name, latent.sizes()));
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
