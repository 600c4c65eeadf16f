#include "train/diagnose.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <map>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "train/guard.h"
#include "train/host_tensor.h"
#include "train/path_diagnosis.h"
#include "train/session.h"

namespace rabit::train {
namespace {

// Shares of turned signs as the packing run noted them, layer by layer and path by path; empty
// where it did not.
std::vector<double> noted_turned_signs(const GgufFile& packed) {
  const MetaValue* meta = packed.find_meta(kTurnedSignsKey);
  const auto* shares = meta == nullptr ? nullptr : std::get_if<std::vector<double>>(&meta->value);
  return shares == nullptr ? std::vector<double>() : *shares;
}

// A packed file, block by block. read_model_config has checked types and extents of its tensors.
class PackedStudent {
 public:
  static Result<PackedStudent> open(const GgufFile& file, const ModelConfig& config) {
    PackedStudent student(file, config);
    size_t paths = 0;
    for (int64_t layer = 0; layer < config.layers; ++layer) {
      for (const Role role : kRoles) {
        const TensorInfo* sign = file.find_tensor(linear_name(layer, role) + ".sign");
        if (sign == nullptr) {
          return Error{file.path().string() + ": " + linear_name(layer, role) +
                       " is not packed; give a file that rabit quantize wrote, or its checkpoint"};
        }
        student.first_path_[{layer, role}] = paths;
        paths += static_cast<size_t>(sign->ne.size() > 2 ? sign->ne[2] : 1);
      }
    }
    if (student.turned_.size() != paths) {
      student.turned_.clear();
    }
    return student;
  }

  Result<BlockPaths> block(int64_t layer) const {
    BlockPaths out;
    for (const Role role : kRoles) {
      RABIT_ASSIGN(out.linear[index_of(role)], linear(layer, role));
    }
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    RABIT_ASSIGN(out.attn_norm, read_tensor(file_, prefix + "attn_norm.weight", {config_.d_model}));
    RABIT_ASSIGN(out.ffn_norm, read_tensor(file_, prefix + "ffn_norm.weight", {config_.d_model}));
    return out;
  }

 private:
  PackedStudent(const GgufFile& file, const ModelConfig& config)
      : file_(file), config_(config), turned_(noted_turned_signs(file)) {}

  Result<LayerPaths> linear(int64_t layer, Role role) const {
    const std::string name = linear_name(layer, role);
    const TensorInfo* sign = file_.find_tensor(name + ".sign");
    const LinearShape sizes = linear_shape(config_, role);
    LayerPaths out;
    out.shape = {sizes.d_out, sizes.d_in, sign->ne.size() > 2 ? sign->ne[2] : 1};
    RABIT_ASSIGN(out.signs, read_signs(file_, name + ".sign", out.shape));
    for (const auto& [part, extent, scales] :
         {std::tuple{".row_scale", sizes.d_out, &out.scales.g},
          std::tuple{".col_scale", sizes.d_in, &out.scales.h}}) {
      RABIT_ASSIGN(const at::Tensor values,
                   read_tensor(file_, name + part, {out.shape.paths, extent}));
      if (!values.isfinite().all().item<bool>()) {
        return Error{file_.path().string() + ": tensor " + name + part + ": a scale is not finite"};
      }
      *scales = to_vector(values);
    }
    if (!turned_.empty()) {
      const auto first =
          turned_.begin() + static_cast<std::ptrdiff_t>(first_path_.at({layer, role}));
      out.turned_signs.assign(first, first + out.shape.paths);
    }
    return out;
  }

  const GgufFile& file_;
  const ModelConfig& config_;
  std::vector<double> turned_;
  std::map<std::pair<int64_t, Role>, size_t> first_path_;  // in turned_
};

Result<nlohmann::json> measure(const GgufFile& student, const GgufFile& teacher_file,
                               std::span<const int32_t> tokens, const DiagnoseOptions& options,
                               const std::function<void(int64_t, int64_t)>& progress) {
  RABIT_ASSIGN(const at::Device device, pick_device(options.device));
  at::set_num_threads(pick_threads(options.threads));
  RABIT_ASSIGN(const std::string teacher_sha256, sha256_file(teacher_file.path()));
  RABIT_ASSIGN(const ModelConfig config, read_model_config(teacher_file));

  int64_t blocks = config.layers;
  BlockReader reader;
  if (is_checkpoint(student)) {
    RABIT_ASSIGN(CheckpointStudent saved, student_of_checkpoint(student, config, teacher_sha256));
    blocks = saved.blocks_done;
    reader = [saved = std::move(saved.student)](int64_t layer) -> Result<BlockPaths> {
      return block_paths(saved.blocks[static_cast<size_t>(layer)]);
    };
  } else {
    RABIT_ASSIGN(const ModelConfig own, read_model_config(student));
    if (student.find_meta("rabit.source.sha256") == nullptr) {
      return Error{student.path().string() +
                   ": is not packed; give a file that rabit quantize wrote, or its checkpoint"};
    }
    RABIT_ASSIGN(const std::string source, student.get_string("rabit.source.sha256"));
    if (source != teacher_sha256) {
      return Error{student.path().string() + ": was made from another model than --teacher " +
                   teacher_file.path().string()};
    }
    if (own.layers != config.layers || own.d_model != config.d_model || own.d_ff != config.d_ff ||
        own.d_q() != config.d_q() || own.d_kv() != config.d_kv()) {
      return Error{student.path().string() + ": its sizes are not those of --teacher " +
                   teacher_file.path().string()};
    }
    RABIT_ASSIGN(auto packed, PackedStudent::open(student, config));
    reader = [packed = std::move(packed)](int64_t layer) { return packed.block(layer); };
  }

  const int64_t seq_len = options.seq_len > 0
                              ? options.seq_len
                              : std::min(kDefaultDiagnoseWindow, config.context_length);
  if (seq_len > config.context_length) {
    return Error{fmt::format("--seq-len {}: the model was trained for at most {} positions",
                             seq_len, config.context_length)};
  }
  RABIT_ASSIGN(const TextWindows text, TextWindows::cut({{{.name = "the text", .tokens = tokens}}},
                                                        {}, seq_len, config.vocab_size, {}));
  const int64_t count = std::max<int64_t>(1, options.tokens / seq_len);
  const at::Tensor windows = text.distinct_range(0, std::min(count, text.distinct()));

  RABIT_ASSIGN(const Network teacher,
               load_network(teacher_file, device, pick_compute(options.compute, device)));
  RABIT_ASSIGN(const auto layers, diagnose(teacher, blocks, reader, windows,
                                           [&](int64_t done) { progress(done, blocks); }));
  nlohmann::json out = to_json(layers);
  RABIT_ASSIGN(const std::string student_sha256, sha256_file(student.path()));
  out["model"] = student.path().filename().string();
  out["model_sha256"] = student_sha256;
  out["teacher_sha256"] = teacher_sha256;
  out["blocks"] = blocks;
  out["tokens"] = windows.numel();
  out["seq_len"] = seq_len;
  out["compute"] = teacher.compute == at::kBFloat16 ? "bf16" : "f32";
  return out;
}

}  // namespace

Result<nlohmann::json> diagnose_file(const GgufFile& student, const GgufFile& teacher,
                                     std::span<const int32_t> tokens,
                                     const DiagnoseOptions& options,
                                     const std::function<void(int64_t, int64_t)>& progress) {
  return without_exceptions([&] { return measure(student, teacher, tokens, options, progress); });
}

}  // namespace rabit::train
