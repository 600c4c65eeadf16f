// From the trained student to the packed file (docs/format.md), and the proof that they agree.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "base/half.h"
#include "base/interrupt.h"
#include "io/dequant.h"
#include "train/host_tensor.h"
#include "train/session.h"
#include "train/shards.h"

namespace rabit::train {
namespace {

constexpr int64_t kQ8Block = 32;

template <typename T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values.data(), values.size()));
}

std::vector<uint16_t> to_f16(std::span<const float> values) {
  std::vector<uint16_t> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    out[i] = float_to_half(values[i]);
  }
  return out;
}

// ggml's Q8_0: blocks of 32, an F16 scale of the largest magnitude / 127, then int8 values.
std::vector<std::byte> to_q8_0(std::span<const float> values) {
  constexpr size_t kBytes = 2 + kQ8Block;
  std::vector<std::byte> out(values.size() / kQ8Block * kBytes);
  for (size_t block = 0; block < values.size() / kQ8Block; ++block) {
    const float* x = values.data() + block * kQ8Block;
    float largest = 0.0F;
    for (int64_t i = 0; i < kQ8Block; ++i) {
      largest = std::max(largest, std::fabs(x[i]));
    }
    const float scale = largest / 127.0F;
    const uint16_t scale_bits = float_to_half(scale);
    std::byte* bytes = out.data() + block * kBytes;
    std::memcpy(bytes, &scale_bits, 2);
    for (int64_t i = 0; i < kQ8Block; ++i) {
      const auto q = static_cast<int8_t>(scale > 0.0F ? std::lround(x[i] / scale) : 0);
      bytes[2 + i] = static_cast<std::byte>(q);
    }
  }
  return out;
}

struct NamedLayer {
  std::string name;
  quant::PackedLinear packed;
};

Status add_layer(GgufWriter& writer, const NamedLayer& layer) {
  const auto& [d_out, d_in, paths] = layer.packed.shape;
  RABIT_CHECK(writer.add_tensor(layer.name + ".sign", TensorType::kI32,
                                sign_extents(layer.packed.shape), bytes_of(layer.packed.signs)));
  RABIT_CHECK(writer.add_tensor(layer.name + ".row_scale", TensorType::kF16, {d_out, paths},
                                bytes_of(layer.packed.row_scale)));
  return writer.add_tensor(layer.name + ".col_scale", TensorType::kF16, {d_in, paths},
                           bytes_of(layer.packed.col_scale));
}

// The products g h of all paths, each factor rounded to F16: within 2^-11 of itself, or, below the
// smallest normal half, within half of the smallest subnormal.
bool same_products(const quant::Shape& shape, const quant::Scales& trained,
                   const std::vector<float>& g, const std::vector<float>& h) {
  constexpr double kRelative = 0x1p-11, kAbsolute = 0x1p-25;
  const auto slack = [&](double v) { return std::max(std::fabs(v) * kRelative, kAbsolute); };
  for (int64_t i = 0; i < shape.paths; ++i) {
    for (int64_t r = 0; r < shape.d_out; ++r) {
      const double row = g[i * shape.d_out + r];
      for (int64_t c = 0; c < shape.d_in; ++c) {
        const double column = h[i * shape.d_in + c];
        const double want =
            static_cast<double>(trained.g[i * shape.d_out + r]) * trained.h[i * shape.d_in + c];
        const double bound = 1.001 * (slack(row) * std::fabs(column) +
                                      slack(column) * std::fabs(row) + slack(row) * slack(column));
        if (!(std::fabs(row * column - want) <= bound)) {
          return false;
        }
      }
    }
  }
  return true;
}

// Compares the file with the student: signs through the float scales they were trained with give
// the fake-quant weight to the bit, and the F16 scales are those scales, rounded.
Status verify(const TrainSession& session, const std::map<std::string, at::Tensor>& norms,
              const std::filesystem::path& path) {
  RABIT_ASSIGN(const auto file, GgufFile::open(path));
  for (const auto& [name, norm] : norms) {
    RABIT_ASSIGN(const at::Tensor packed, read_tensor(*file, name, norm.sizes()));
    if (!at::equal(packed, norm)) {
      return Error{path.string() + ": " + name + ": is not the trained norm; nothing was kept"};
    }
  }
  RABIT_ASSIGN(const ModelConfig config, read_model_config(*file));
  const at::NoGradGuard no_grad;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const StudentBlock block = whole_block(session.student.blocks[static_cast<size_t>(layer)]);
    for (const Role role : kRoles) {
      const StudentLinear& linear = block[role];
      const auto& shape = linear.shape;
      const std::string name = linear_name(layer, role);
      const auto read = [&](const char* part, std::vector<int64_t> ne) {
        return file->get_tensor(name + part, ne);
      };
      RABIT_ASSIGN(const std::vector<uint32_t> words, read_signs(*file, name + ".sign", shape));
      RABIT_ASSIGN(const TensorInfo* rows, read(".row_scale", {shape.d_out, shape.paths}));
      RABIT_ASSIGN(const TensorInfo* columns, read(".col_scale", {shape.d_in, shape.paths}));
      const quant::Scales scales = host_scales(linear);
      const std::vector<float> unpacked = quant::reconstruct(shape, words, scales.g, scales.h);
      const at::Tensor trained = fake_quant_weight(linear, at::kFloat).to(at::kCPU).contiguous();
      // By value: where every scale is zero, one may say 0 and the other -0.
      if (!std::equal(unpacked.begin(), unpacked.end(), trained.const_data_ptr<float>())) {
        return Error{path.string() + ": " + name +
                     ": the packed signs are not those of the trained weights; nothing was kept"};
      }
      RABIT_ASSIGN(const std::vector<float> g, dequantize(*rows));
      RABIT_ASSIGN(const std::vector<float> h, dequantize(*columns));
      if (!same_products(shape, scales, g, h)) {
        return Error{path.string() + ": " + name +
                     ": the stored scales are not those of the trained layer; nothing was kept"};
      }
    }
  }
  return {};
}

}  // namespace

Status write_packed_model(TrainSession& session, const GgufFile& model,
                          const std::filesystem::path& out) {
  const ModelConfig& config = session.config();
  const QuantizeOptions& options = session.options;
  if (!session.first()) {  // gives the first what it packs and what it compares with
    for (int time = 0; time < 2; ++time) {
      for (const StudentBlock& block : session.student.blocks) {
        (void)whole_block(block, /*gives_only=*/true);
      }
    }
    return {};
  }
  std::vector<NamedLayer> layers;
  std::vector<double> turned;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const StudentBlock block = whole_block(session.student.blocks[static_cast<size_t>(layer)]);
    for (const Role role : kRoles) {
      RABIT_CHECK(check_interrupt());
      const StudentLinear& linear = block[role];
      auto signs = student_signs(linear);
      for (const double share : turned_signs(linear, signs)) {
        turned.push_back(share);
      }
      auto packed = quant::pack(linear.shape, std::move(signs), host_scales(linear));
      if (!packed) {
        return Error{linear_name(layer, role) + ": " + packed.error().message};
      }
      layers.push_back({linear_name(layer, role), std::move(packed).value()});
    }
  }
  const double bits_per_weight = plan_size(config, session.bits).bits_per_weight();
  session.log["bits_per_weight"] = bits_per_weight;

  GgufWriter writer;
  for (const auto& [key, value] : model.metadata()) {
    if (key != "general.file_type" && key != "general.quantization_version") {
      writer.set(key, value);
    }
  }
  writer.set("rabit.format_version", MetaValue::u32(1));
  const int64_t paths = layers.front().packed.shape.paths;
  if (std::all_of(layers.begin(), layers.end(),
                  [&](const NamedLayer& l) { return l.packed.shape.paths == paths; })) {
    writer.set("rabit.paths", MetaValue::u32(static_cast<uint32_t>(paths)));
  }
  writer.set("rabit.method",
             MetaValue::string(session.log["settings"].value("method", std::string("rabit"))));
  writer.set("rabit.bits_per_weight", MetaValue::f64(bits_per_weight));
  writer.set("rabit.source.sha256",
             MetaValue::string(session.log["source"]["sha256"].get<std::string>()));
  writer.set("rabit.train.settings",
             MetaValue::string(session.log["settings"].dump(
                 -1, ' ', false, nlohmann::json::error_handler_t::replace)));
  writer.set("rabit.train.seed", MetaValue::u64(static_cast<uint64_t>(options.seed)));
  writer.set("rabit.train.tokens",
             MetaValue::u64(session.log.value("distill_tokens", uint64_t{0})));
  writer.set(kTurnedSignsKey, MetaValue::f32s(std::move(turned)));
  std::vector<std::string> digests;
  for (const auto& file : session.log["data"]["files"]) {
    digests.push_back(file["sha256"].get<std::string>());
  }
  writer.set("rabit.train.data_sha256", MetaValue::strings(digests));

  std::map<std::string, at::Tensor> norms;  // those that were trained, float32 on the host
  const auto keep_norm = [&](const std::string& name, const at::Tensor& norm) {
    if (norm.defined()) {
      norms[name] = norm.detach().to(at::kCPU).contiguous();
    }
  };
  keep_norm("output_norm.weight", session.student.output_norm);
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const StudentBlock& block = session.student.blocks[static_cast<size_t>(layer)];
    for (const auto& [name, norm] : block_norms(block, layer)) {
      keep_norm(name + ".weight", *norm);
    }
  }

  // Embedding, head and norms, in the source's order; packed layers in the place of their weights.
  std::vector<std::vector<std::byte>> q8_tensors;
  std::vector<std::vector<uint16_t>> f16_tensors;
  for (const auto& info : model.tensors()) {
    RABIT_CHECK(check_interrupt());
    const std::string base = info.name.substr(0, info.name.rfind(".weight"));
    const auto layer = std::find_if(layers.begin(), layers.end(),
                                    [&](const NamedLayer& l) { return l.name == base; });
    if (layer != layers.end()) {
      RABIT_CHECK(add_layer(writer, *layer));
    } else if (info.name == "token_embd.weight" || info.name == "output.weight") {
      RABIT_ASSIGN(const std::vector<float> values, dequantize(info));
      // Both types hold what they hold in F16: the values, or the scale of the largest of a block.
      const auto outside = [](float v) { return !(std::fabs(v) <= kHalfMax); };
      if (std::any_of(values.begin(), values.end(), outside)) {
        return Error{info.name + ": has a value that F16 cannot hold"};
      }
      if (options.embedding == EmbeddingType::kQ8_0 && info.ne[0] % kQ8Block == 0) {
        RABIT_CHECK(writer.add_tensor(info.name, TensorType::kQ8_0, info.ne,
                                      q8_tensors.emplace_back(to_q8_0(values))));
      } else {
        RABIT_CHECK(writer.add_tensor(info.name, TensorType::kF16, info.ne,
                                      bytes_of(f16_tensors.emplace_back(to_f16(values)))));
      }
    } else if (const auto norm = norms.find(info.name); norm != norms.end()) {
      const auto values = std::span(norm->second.const_data_ptr<float>(),
                                    static_cast<size_t>(norm->second.numel()));
      RABIT_CHECK(writer.add_tensor(info.name, TensorType::kF32, info.ne, std::as_bytes(values)));
    } else {
      RABIT_CHECK(writer.add_tensor(info.name, info.type, info.ne, info.data));
    }
  }

  std::filesystem::path unverified = out;
  unverified += ".unverified";
  RABIT_CHECK(writer.write(unverified));
  const Status verified = verify(session, norms, unverified);
  std::error_code ignored;
  if (!verified) {
    std::filesystem::remove(unverified, ignored);
    return verified;
  }
  std::error_code failed;
  std::filesystem::rename(unverified, out, failed);
  if (failed) {
    std::filesystem::remove(unverified, ignored);
    return Error{"cannot rename to " + out.string() + ": " + failed.message()};
  }
  return {};
}

}  // namespace rabit::train
