#include "train/path_diagnosis.h"

#include <ATen/ATen.h>

#include "base/interrupt.h"
#include "train/host_tensor.h"
#include "train/shards.h"

namespace rabit::train {

// Folders that may not include each other have a bound each.
static_assert(kMostDiagnosedPaths == quant::kMaxPaths && kMostPackedPaths == quant::kMaxPaths);

namespace {

// Keeps what the teacher's layers give.
class OutputTap : public LinearTap {
 public:
  std::array<at::Tensor, kRoleCount> outputs;
  void see(Role role, const at::Tensor&, const at::Tensor& output) override {
    outputs[index_of(role)] = output;
  }
};

// One block's student: paths as dense weights, and the sums that its layers' outputs add to.
class BlockDiagnosis : public LinearTap {
 public:
  BlockDiagnosis(const Network& teacher, const BlockWeights& weights, int64_t layer,
                 const BlockPaths& student)
      : teacher_(weights) {
    const auto own = [&](const at::Tensor& norm, const at::Tensor& otherwise) {
      return norm.defined() ? norm.to(teacher.device) : otherwise;
    };
    weights_.attn_norm = own(student.attn_norm, teacher_.attn_norm);
    weights_.ffn_norm = own(student.ffn_norm, teacher_.ffn_norm);
    for (const Role role : kRoles) {
      const LayerPaths& linear = student.linear[index_of(role)];
      paths_[index_of(role)] = dense_paths(linear).to(teacher.device);
      originals_[index_of(role)] = teacher_.linear[index_of(role)].to(at::kFloat);
      const at::Tensor what = paths_[index_of(role)].sum(0);
      weights_.linear[index_of(role)] = what.to(teacher.compute);
      LayerDiagnosis& layer_diagnosis = diagnoses_.emplace_back(linear.shape.paths);
      layer_diagnosis.name = linear_name(layer, role);
      layer_diagnosis.d_out = linear.shape.d_out;
      layer_diagnosis.d_in = linear.shape.d_in;
      layer_diagnosis.bits = quant::packed_bits(linear.shape);
      layer_diagnosis.turned_signs = linear.turned_signs;
      layer_diagnosis.row_scales = spreads(linear.scales.g, linear.shape.paths);
      layer_diagnosis.column_scales = spreads(linear.scales.h, linear.shape.paths);
      const at::Tensor& original = originals_[index_of(role)];
      layer_diagnosis.weight_error =
          ((what - original).square().sum() / original.square().sum().clamp_min(1e-30))
              .item<double>();
    }
  }

  const BlockWeights& weights() const { return weights_; }

  // With the moments of all that was seen: the device is waited for here, once a layer.
  const std::vector<LayerDiagnosis>& diagnoses() {
    for (const Role role : kRoles) {
      LayerDiagnosis& diagnosis = diagnoses_[index_of(role)];
      const at::Tensor sums = sums_[index_of(role)].cpu();
      const at::Tensor products = products_[index_of(role)].cpu();
      const int64_t paths = diagnosis.against_teacher.paths();
      for (int64_t reference : {0, 1}) {
        at::Tensor picks = at::arange(1, paths + 2, at::TensorOptions().dtype(at::kLong));
        picks[0] = reference;
        const at::Tensor s = sums.index_select(0, picks);
        const at::Tensor p = products.index_select(0, picks).index_select(1, picks).contiguous();
        (reference == 0 ? diagnosis.against_teacher : diagnosis.on_own_inputs)
            .add(counts_[index_of(role)],
                 {s.const_data_ptr<double>(), static_cast<size_t>(s.numel())},
                 std::span(p.const_data_ptr<double>(), static_cast<size_t>(p.numel())));
      }
    }
    return diagnoses_;
  }

  void set_teacher_outputs(std::array<at::Tensor, kRoleCount> outputs) {
    teacher_outputs_ = std::move(outputs);
  }

  void see(Role role, const at::Tensor& input, const at::Tensor&) override {
    const at::Tensor x = input.flatten(0, -2).to(at::kFloat);  // (tokens, d_in)
    const at::Tensor& original = originals_[index_of(role)];
    const at::Tensor& paths = paths_[index_of(role)];
    std::vector<at::Tensor> signals = {teacher_outputs_[index_of(role)].flatten().to(at::kDouble),
                                       at::matmul(x, original.t()).flatten().to(at::kDouble)};
    for (int64_t i = 0; i < paths.size(0); ++i) {
      signals.push_back(at::matmul(x, paths[i].t()).flatten().to(at::kDouble));
    }
    const at::Tensor all = at::stack(signals);  // (2 + k, tokens d_out)
    const at::Tensor sums = all.sum(1), products = at::matmul(all, all.t());
    const size_t i = index_of(role);
    sums_[i] = sums_[i].defined() ? sums_[i] + sums : sums;
    products_[i] = products_[i].defined() ? products_[i] + products : products;
    counts_[i] += all.size(1);
  }

 private:
  // (k, d_out, d_in) float32
  static at::Tensor dense_paths(const LayerPaths& linear) {
    const auto [d_out, d_in, paths] = linear.shape;
    const auto words = static_cast<size_t>(d_out * ((d_in + 31) / 32));
    const auto part = [](const auto& values, size_t i, size_t size) {
      return std::span(values).subspan(i * size, size);
    };
    std::vector<at::Tensor> out;
    for (size_t i = 0; i < static_cast<size_t>(paths); ++i) {
      out.push_back(
          to_tensor(quant::reconstruct({d_out, d_in, 1}, part(linear.signs, i, words),
                                       part(linear.scales.g, i, static_cast<size_t>(d_out)),
                                       part(linear.scales.h, i, static_cast<size_t>(d_in))),
                    {d_out, d_in}));
    }
    return at::stack(out);
  }

  static std::vector<Spread> spreads(const std::vector<float>& scales, int64_t paths) {
    std::vector<Spread> out;
    const size_t size = scales.size() / static_cast<size_t>(paths);
    for (size_t i = 0; i < static_cast<size_t>(paths); ++i) {
      out.push_back(spread(std::span(scales).subspan(i * size, size)));
    }
    return out;
  }

  const BlockWeights& teacher_;
  BlockWeights weights_;
  std::array<at::Tensor, kRoleCount> originals_;  // (d_out, d_in) float32
  std::array<at::Tensor, kRoleCount> paths_;      // (k, d_out, d_in) float32
  std::array<at::Tensor, kRoleCount> teacher_outputs_;
  // Sums and products of the signals: the teacher's output, the original weight's on the student's
  // inputs, then the paths'.
  std::array<at::Tensor, kRoleCount> sums_;      // (2 + k) float64
  std::array<at::Tensor, kRoleCount> products_;  // (2 + k, 2 + k) float64
  std::array<int64_t, kRoleCount> counts_{};
  std::vector<LayerDiagnosis> diagnoses_;
};

}  // namespace

BlockPaths block_paths(const StudentBlock& block) {
  BlockPaths out{{}, block.attn_norm, block.ffn_norm};
  for (size_t i = 0; i < kRoleCount; ++i) {
    const StudentLinear& linear = block.linear[i];
    auto signs = student_signs(linear);
    auto turned = turned_signs(linear, signs);
    out.linear[i] = {linear.shape, std::move(signs), host_scales(linear), std::move(turned)};
  }
  return out;
}

Result<std::vector<LayerDiagnosis>> diagnose(const Network& teacher, int64_t blocks,
                                             const BlockReader& student, const at::Tensor& windows,
                                             const std::function<void(int64_t)>& progress) {
  const at::NoGradGuard no_grad;
  const ModelConfig& config = teacher.config;
  const Rotary rotary = make_rotary(config, windows.size(1), teacher.device);
  at::Tensor x_teacher = embed(teacher, windows.to(teacher.device));
  at::Tensor x_student = x_teacher.clone();
  std::vector<LayerDiagnosis> out;
  for (int64_t layer = 0; layer < blocks; ++layer) {
    RABIT_ASSIGN(const BlockPaths paths, student(layer));
    const BlockWeights weights = whole_weights(teacher, layer);
    BlockDiagnosis diagnosis(teacher, weights, layer, paths);
    for (int64_t i = 0; i < windows.size(0); ++i) {
      RABIT_CHECK(check_interrupt());
      const auto forward = [&](const at::Tensor& x, const BlockWeights& by, LinearTap& tap) {
        at::Tensor window = x.narrow(0, i, 1);
        window.copy_(block_forward(config, by, rotary, window, teacher.compute, &tap));
      };
      OutputTap outputs;
      forward(x_teacher, weights, outputs);
      diagnosis.set_teacher_outputs(std::move(outputs.outputs));
      forward(x_student, diagnosis.weights(), diagnosis);
    }
    const auto& layers = diagnosis.diagnoses();
    out.insert(out.end(), layers.begin(), layers.end());
    progress(layer + 1);
  }
  return out;
}

}  // namespace rabit::train
