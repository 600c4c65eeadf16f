#include "cli/size_report.h"

#include <fmt/format.h>

#include <array>

#include "quant/residual_binary.h"

namespace rabit::cli {
namespace {

struct LayerSize {
  uint64_t bits = 0;
  int64_t paths = 0;
  std::string type;
};

Result<LayerSize> packed_size(const GgufFile& file, const TensorInfo& sign, const std::string& name,
                              LinearShape shape) {
  const int64_t paths = sign.ne.size() >= 3 ? sign.ne[2] : 1;
  RABIT_CHECK(file.get_tensor(sign.name, std::array{(shape.d_in + 31) / 32, shape.d_out, paths}));
  RABIT_CHECK(file.get_tensor(name + ".row_scale", std::array{shape.d_out, paths}));
  RABIT_CHECK(file.get_tensor(name + ".col_scale", std::array{shape.d_in, paths}));
  const int64_t bits = quant::packed_bits({shape.d_out, shape.d_in, paths});
  return LayerSize{static_cast<uint64_t>(bits), paths, "packed"};
}

Result<LayerSize> layer_size(const GgufFile& file, const std::string& name, LinearShape shape) {
  if (const TensorInfo* sign = file.find_tensor(name + ".sign")) {
    return packed_size(file, *sign, name, shape);
  }
  const std::array ne = {shape.d_in, shape.d_out};
  RABIT_ASSIGN(const TensorInfo* weight, file.get_tensor(name + ".weight", ne));
  return LayerSize{8 * weight->data.size(), 0, std::string(tensor_type_name(weight->type))};
}

/// What two parts have in common: their value, or `differs`.
template <typename T>
void merge(T& into, const T& value, const T& differs, bool first) {
  into = first || into == value ? value : differs;
}

bool packed_part(const std::string& name) {
  return name.ends_with(".sign") || name.ends_with(".row_scale") || name.ends_with(".col_scale");
}

}  // namespace

Result<SizeReport> size_report(const GgufFile& file, const ModelConfig& config) {
  SizeReport report;
  report.file_bytes = file.file_bytes();
  for (const TensorInfo& tensor : file.tensors()) {
    report.tensor_bytes += tensor.data.size();
    if (!packed_part(tensor.name)) {
      report.parameters += tensor.elements();
    }
  }
  for (const Role role : kRoles) {
    RoleSize size{role_name(role), linear_shape(config, role)};
    for (int64_t layer = 0; layer < config.layers; ++layer) {
      RABIT_ASSIGN(const LayerSize one, layer_size(file, linear_name(layer, role), size.shape));
      const int64_t weights = size.shape.d_out * size.shape.d_in;
      merge(size.paths, one.paths, int64_t{-1}, size.layers == 0);
      merge(size.type, one.type, std::string("mixed"), size.layers == 0);
      ++size.layers;
      size.weights += weights;
      size.bits += one.bits;
      if (one.paths > 0) {
        ++report.packed_layers;
        report.parameters += weights;
      }
    }
    merge(report.paths, size.paths, int64_t{-1}, report.roles.empty());
    merge(report.type, size.type, std::string("mixed"), report.roles.empty());
    report.linear_weights += size.weights;
    report.linear_bits += size.bits;
    report.roles.push_back(std::move(size));
  }
  return report;
}

std::string model_label(const ModelConfig& config, const SizeReport& report) {
  const auto millions = static_cast<double>(report.parameters) / 1e6;
  const std::string size = millions < 1     ? fmt::format("{:.2f}M", millions)
                           : millions < 1e3 ? fmt::format("{:.0f}M", millions)
                                            : fmt::format("{:.1f}B", millions / 1e3);
  const std::string type = report.paths > 0 ? fmt::format("{}-path", report.paths) : report.type;
  return config.architecture + " " + size + " " + type;
}

nlohmann::ordered_json meta_json(const MetaValue& value, size_t max_items) {
  return std::visit(
      [max_items](const auto& v) -> nlohmann::ordered_json {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_arithmetic_v<T> || std::is_same_v<T, std::string>) {
          return v;
        } else {
          if (v.size() > max_items) {
            return {{"type", "array"}, {"length", v.size()}};
          }
          return v;
        }
      },
      value.value);
}

std::string json_text(const nlohmann::ordered_json& json) {
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace rabit::cli
