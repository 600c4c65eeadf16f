#include "train/fake_quant.h"

#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <bit>

#ifdef RABIT_CUDA
#include "train/gpu_ops.h"
#endif
#include "train/host_tensor.h"
#include "train/shards.h"

namespace rabit::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

quant::Shape shape_of(const at::Tensor& latent, const at::Tensor& g) {
  return {latent.size(0), latent.size(1), g.size(0)};
}

constexpr int64_t kRowGrain = 32;

// On the CPU: quant/'s own functions, rows over torch's threads.
struct HostArithmetic {
  static at::Tensor forward(const at::Tensor& w, const at::Tensor& g, const at::Tensor& h) {
    const quant::Shape shape = shape_of(w, g);
    at::Tensor out = at::empty_like(w);
    at::parallel_for(0, shape.d_out, kRowGrain, [&](int64_t begin, int64_t end) {
      quant::coupled_forward(shape, w.const_data_ptr<float>(), g.const_data_ptr<float>(),
                             h.const_data_ptr<float>(), begin, end, out.mutable_data_ptr<float>());
    });
    return out;
  }

  static std::pair<at::Tensor, at::Tensor> backward(const at::Tensor& w, const at::Tensor& g,
                                                    const at::Tensor& h, const at::Tensor& grad) {
    const quant::Shape shape = shape_of(w, g);
    at::Tensor dg = at::empty_like(g);
    // Ranges of fixed size, summed in their order: the result does not depend on the threads.
    const int64_t rows = std::max<int64_t>(kRowGrain, (shape.d_out + 7) / 8);
    const int64_t parts = (shape.d_out + rows - 1) / rows;
    at::Tensor dh = at::zeros({parts, shape.paths, shape.d_in}, h.options());
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        quant::coupled_backward(shape, w.const_data_ptr<float>(), g.const_data_ptr<float>(),
                                h.const_data_ptr<float>(), grad.const_data_ptr<float>(),
                                part * rows, std::min(shape.d_out, (part + 1) * rows),
                                dg.mutable_data_ptr<float>(),
                                dh.mutable_data_ptr<float>() + part * shape.paths * shape.d_in);
      }
    });
    return {dg, dh.sum(0)};
  }
};

// The same in torch operations, each rounded on its own as quant/ rounds.
struct OperationArithmetic {
  // Takes a path's level off the residual and returns it; see `peel` in quant/peel.h.
  static at::Tensor peel(at::Tensor& residual, const at::Tensor& g, const at::Tensor& h,
                         int64_t path) {
    const at::Tensor p = g.select(0, path).unsqueeze(1) * h.select(0, path).unsqueeze(0);
    at::Tensor level = at::where(residual < 0, -p, p);
    residual = residual - level;
    return level;
  }

  static at::Tensor forward(const at::Tensor& w, const at::Tensor& g, const at::Tensor& h) {
    at::Tensor residual = w;
    at::Tensor sum = peel(residual, g, h, 0);
    for (int64_t i = 1; i < g.size(0); ++i) {
      sum = sum + peel(residual, g, h, i);
    }
    return sum;
  }

  static std::pair<at::Tensor, at::Tensor> backward(const at::Tensor& w, const at::Tensor& g,
                                                    const at::Tensor& h, const at::Tensor& grad) {
    at::Tensor residual = w;
    std::vector<at::Tensor> dg, dh;
    for (int64_t i = 0; i < g.size(0); ++i) {
      const at::Tensor signed_grad = at::where(residual < 0, -grad, grad);
      dg.push_back(at::mv(signed_grad, h.select(0, i)));
      dh.push_back(at::mv(signed_grad.t(), g.select(0, i)));
      peel(residual, g, h, i);
    }
    return {at::stack(dg), at::stack(dh)};
  }
};

template <typename Arithmetic>
class CoupledBinarize : public torch::autograd::Function<CoupledBinarize<Arithmetic>> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& w, const at::Tensor& g,
                            const at::Tensor& h, at::ScalarType compute) {
    context->save_for_backward({w, g, h});
    return Arithmetic::forward(w, g, h).to(compute);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor grad = grads[0].to(at::kFloat).contiguous();
    auto [dg, dh] = Arithmetic::backward(saved[0], saved[1], saved[2], grad);
    return {grad, dg, dh, at::Tensor()};
  }
};

}  // namespace

namespace {

at::Tensor coupled_weight(const at::Tensor& latent, const at::Tensor& g, const at::Tensor& h,
                          at::ScalarType compute) {
  if (latent.is_cpu()) {
    return CoupledBinarize<HostArithmetic>::apply(latent, g, h, compute);
  }
#ifdef RABIT_CUDA
  return gpu_coupled_weights(std::array{CoupledLeaves{latent, g, h}}, compute);
#else
  return CoupledBinarize<OperationArithmetic>::apply(latent, g, h, compute);
#endif
}

// Layers that share an input, one below the other, where all are coupled layers on a GPU; else
// undefined. The layers' own weights become views of it.
at::Tensor joined_weights(const StudentBlock& student, std::span<const Role> roles,
                          at::ScalarType compute, BlockWeights& weights) {
#ifdef RABIT_CUDA
  std::vector<CoupledLeaves> leaves;
  for (const Role role : roles) {
    const StudentLinear& linear = student[role];
    if (!linear.defined() || linear.independent() || linear.latent.is_cpu()) {
      return {};
    }
    leaves.push_back({linear.latent, linear.g, linear.h});
  }
  at::Tensor all = gpu_coupled_weights(leaves, compute);
  int64_t row = 0;
  for (const Role role : roles) {
    const int64_t rows = student[role].shape.d_out;
    weights.linear[index_of(role)] = all.narrow(0, row, rows);
    row += rows;
  }
  return all;
#else
  (void)student, (void)roles, (void)compute, (void)weights;
  return {};
#endif
}

}  // namespace

StudentLinear restore_student_linear(Method method, const at::Tensor& latent, const at::Tensor& g,
                                     const at::Tensor& h, std::vector<uint32_t> start_signs,
                                     at::Device device) {
  const auto leaf = [&](const at::Tensor& tensor, bool trained) {
    return tensor.detach().to(device).clone().set_requires_grad(trained);
  };
  const int64_t paths = g.size(0);
  return {{latent.size(-2), latent.size(-1), paths},
          leaf(latent, true),
          leaf(g, true),
          leaf(h, method != Method::kDbllm),
          method == Method::kMbok ? paths - 1 : 0,
          std::move(start_signs)};
}

namespace {

// As restore_student_linear, at the beginning.
StudentLinear begin_student_linear(Method method, const at::Tensor& latent, const at::Tensor& g,
                                   const at::Tensor& h, at::Device device) {
  StudentLinear linear = restore_student_linear(method, latent, g, h, {}, device);
  linear.start_signs = student_signs(linear);
  return linear;
}

}  // namespace

StudentLinear make_student_linear(Method method, const at::Tensor& latent, const at::Tensor& g,
                                  const at::Tensor& h, at::Device device) {
  if (!has_independent_latents(method)) {
    return begin_student_linear(method, latent, g, h, device);
  }
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> residuals = {latent};
  for (int64_t i = 0; i + 1 < g.size(0); ++i) {
    const at::Tensor& left = residuals.back();
    residuals.push_back(left -
                        coupled_weight(left, g.narrow(0, i, 1), h.narrow(0, i, 1), at::kFloat));
  }
  return begin_student_linear(method, at::stack(residuals), g, h, device);
}

at::Tensor fake_quant_weight(const StudentLinear& linear, at::ScalarType compute) {
  if (!linear.independent()) {
    return coupled_weight(linear.latent, linear.g, linear.h, compute);
  }
  at::Tensor sum;
  for (int64_t i = 0; i < linear.shape.paths; ++i) {
    const at::Tensor latent = linear.latent.select(0, i);
    const at::Tensor path =
        coupled_weight(i < linear.held_paths ? latent.detach() : latent, linear.g.narrow(0, i, 1),
                       linear.h.narrow(0, i, 1), at::kFloat);
    sum = sum.defined() ? sum + path : path;
  }
  return sum.to(compute);
}

std::vector<uint32_t> student_signs(const StudentLinear& linear) {
  const at::Tensor latent = linear.latent.detach().to(at::kCPU).contiguous();
  const float* w = latent.const_data_ptr<float>();
  const quant::Scales scales = host_scales(linear);
  const auto [d_out, d_in, paths] = linear.shape;
  if (!linear.independent()) {
    return quant::coupled_signs(linear.shape, w, scales);
  }
  std::vector<uint32_t> signs;
  for (int64_t i = 0; i < paths; ++i) {
    const quant::Scales own = {{scales.g.begin() + i * d_out, scales.g.begin() + (i + 1) * d_out},
                               {scales.h.begin() + i * d_in, scales.h.begin() + (i + 1) * d_in}};
    const auto part = quant::coupled_signs({d_out, d_in, 1}, w + i * d_out * d_in, own);
    signs.insert(signs.end(), part.begin(), part.end());
  }
  return signs;
}

std::vector<double> turned_signs(const StudentLinear& linear, std::span<const uint32_t> now) {
  const auto [d_out, d_in, paths] = linear.shape;
  const size_t words = now.size() / static_cast<size_t>(paths);
  std::vector<double> share;
  for (size_t i = 0; i < static_cast<size_t>(paths); ++i) {
    int64_t turned = 0;
    for (size_t word = i * words; word < (i + 1) * words; ++word) {
      turned += std::popcount(now[word] ^ linear.start_signs[word]);
    }
    share.push_back(static_cast<double>(turned) / static_cast<double>(d_out * d_in));
  }
  return share;
}

at::Tensor coupled_weight_by_operations(const StudentLinear& linear, at::ScalarType compute) {
  return CoupledBinarize<OperationArithmetic>::apply(linear.latent, linear.g, linear.h, compute);
}

BlockWeights student_weights(const StudentBlock& student, const BlockWeights& teacher,
                             at::ScalarType compute) {
  if (student.ranks) {
    return begin_weights(student, teacher, compute)();
  }
  const auto own = [](const at::Tensor& norm, const at::Tensor& otherwise) {
    return norm.defined() ? norm : otherwise;
  };
  BlockWeights weights{
      {}, own(student.attn_norm, teacher.attn_norm), own(student.ffn_norm, teacher.ffn_norm)};
  weights.qkv = joined_weights(student, kJoinedQkv, compute, weights);
  weights.gate_up = joined_weights(student, kJoinedGateUp, compute, weights);
  for (size_t i = 0; i < kRoleCount; ++i) {
    if (!weights.linear[i].defined()) {
      weights.linear[i] = student.linear[i].defined()
                              ? fake_quant_weight(student.linear[i], compute)
                              : teacher.linear[i];
    }
  }
  return weights;
}

std::vector<at::Tensor> latents(std::span<const StudentBlock> blocks) {
  std::vector<at::Tensor> out;
  for (const auto& block : blocks) {
    for (const auto& linear : block.linear) {
      out.push_back(linear.latent);
    }
  }
  return out;
}

std::vector<at::Tensor> scales_and_norms(std::span<const StudentBlock> blocks) {
  std::vector<at::Tensor> out;
  const auto add = [&](const at::Tensor& tensor) {
    if (tensor.defined() && tensor.requires_grad()) {
      out.push_back(tensor);
    }
  };
  for (const auto& block : blocks) {
    for (const auto& linear : block.linear) {
      add(linear.g);
      add(linear.h);
    }
    add(block.attn_norm);
    add(block.ffn_norm);
  }
  return out;
}

std::vector<at::Tensor> scales_and_norms(const Student& student) {
  std::vector<at::Tensor> out = scales_and_norms(student.blocks);
  if (student.output_norm.defined()) {
    out.push_back(student.output_norm);
  }
  return out;
}

quant::Scales host_scales(const StudentLinear& linear) {
  return {to_vector(linear.g), to_vector(linear.h)};
}

}  // namespace rabit::train
