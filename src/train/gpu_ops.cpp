#include "train/gpu_ops.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#ifndef RABIT_CUDA_EMULATOR
#include <c10/cuda/CUDAStream.h>
#endif

#include <optional>
#include <vector>

#include "train/cuda/block_ops.h"
#include "train/cuda/coupled.h"
#include "train/cuda/kl.h"

namespace rabit::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Makes a tensor's device the current one, and gives the stream that torch uses there.
class On {
 public:
  explicit On(const at::Tensor& x) : guard_(x.device()) {
#ifndef RABIT_CUDA_EMULATOR
    stream = c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
#endif
  }
  cuda::Stream stream = nullptr;

 private:
  c10::DeviceGuard guard_;
};

void check(bool launched) {
  TORCH_CHECK(launched, "the GPU took no kernel; was this program built for a GPU of its kind?");
}

const cuda::Bf16* bf16(const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16);
  return static_cast<const cuda::Bf16*>(x.const_data_ptr());
}
cuda::Bf16* mutable_bf16(const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16);
  return static_cast<cuda::Bf16*>(x.mutable_data_ptr());
}
const float* f32(const at::Tensor& x) { return x.const_data_ptr<float>(); }
float* mutable_f32(const at::Tensor& x) { return x.mutable_data_ptr<float>(); }

cuda::CoupledShape shape_of(const at::Tensor& latent, const at::Tensor& g) {
  return {latent.size(0), latent.size(1), static_cast<int>(g.size(0))};
}

// Latent, g and h of layer after layer.
class CoupledWeights : public torch::autograd::Function<CoupledWeights> {
 public:
  static at::Tensor forward(AutogradContext* context, at::TensorList leaves,
                            at::ScalarType compute) {
    const at::Tensor& first = leaves[0];
    const On on(first);
    int64_t rows = 0;
    for (size_t i = 0; i < leaves.size(); i += 3) {
      rows += leaves[i].size(0);
    }
    at::Tensor out = at::empty({rows, first.size(1)}, first.options().dtype(compute));
    int64_t row = 0;
    for (size_t i = 0; i < leaves.size(); i += 3) {
      const at::Tensor &w = leaves[i], &g = leaves[i + 1], &h = leaves[i + 2];
      const cuda::CoupledShape shape = shape_of(w, g);
      const at::Tensor part = out.narrow(0, row, shape.d_out);
      check(compute == at::kFloat
                ? cuda::coupled_forward(shape, f32(w), f32(g), f32(h), mutable_f32(part), on.stream)
                : cuda::coupled_forward(shape, f32(w), f32(g), f32(h), mutable_bf16(part),
                                        on.stream));
      row += shape.d_out;
    }
    context->save_for_backward(variable_list(leaves.begin(), leaves.end()));
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto leaves = context->get_saved_variables();
    const at::Tensor grad = grads[0].contiguous();
    const On on(grad);
    variable_list out;
    int64_t row = 0;
    for (size_t i = 0; i < leaves.size(); i += 3) {
      const at::Tensor &w = leaves[i], &g = leaves[i + 1], &h = leaves[i + 2];
      const cuda::CoupledShape shape = shape_of(w, g);
      const at::Tensor part = grad.narrow(0, row, shape.d_out);
      const at::Tensor dg = at::empty_like(g), dh = at::empty_like(h);
      const at::Tensor scratch = at::empty({cuda::coupled_backward_scratch(shape)}, w.options());
      at::Tensor dw = part;
      if (grad.scalar_type() == at::kFloat) {
        check(cuda::coupled_backward(shape, f32(w), f32(g), f32(h), f32(part), nullptr,
                                     mutable_f32(dg), mutable_f32(dh), mutable_f32(scratch),
                                     on.stream));
      } else {
        dw = context->needs_input_grad(i) ? at::empty_like(w) : at::Tensor();
        check(cuda::coupled_backward(shape, f32(w), f32(g), f32(h), bf16(part),
                                     dw.defined() ? mutable_f32(dw) : nullptr, mutable_f32(dg),
                                     mutable_f32(dh), mutable_f32(scratch), on.stream));
      }
      out.insert(out.end(), {dw, dg, dh});
      row += shape.d_out;
    }
    out.emplace_back();  // compute
    return out;
  }
};

cuda::NormShape norm_shape(const at::Tensor& x, double epsilon) {
  const int64_t width = x.size(-1);
  return {x.numel() / width, width, static_cast<float>(epsilon)};
}

// {y}, or with a delta {x + delta, y}.
class AddNorm : public torch::autograd::Function<AddNorm> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& given_x,
                               const std::optional<at::Tensor>& given_delta,
                               const at::Tensor& weight, double epsilon) {
    const at::Tensor x = given_x.contiguous();
    const On on(x);
    const bool added = given_delta.has_value();
    const at::Tensor delta = added ? given_delta->contiguous() : at::Tensor();
    const cuda::NormShape shape = norm_shape(x, epsilon);
    const at::Tensor sum = added ? at::empty_like(x) : x;
    at::Tensor y = at::empty_like(x, x.options().dtype(at::kBFloat16));
    const at::Tensor inverse = at::empty({shape.rows}, x.options());
    check(cuda::add_norm(shape, f32(x), added ? bf16(delta) : nullptr, f32(weight),
                         added ? mutable_f32(sum) : nullptr, mutable_bf16(y), mutable_f32(inverse),
                         on.stream));
    context->save_for_backward({sum, inverse, weight});
    context->saved_data["epsilon"] = epsilon;
    context->saved_data["added"] = added;
    context->set_materialize_grads(false);
    return added ? variable_list{sum, y} : variable_list{y};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &sum = saved[0], &inverse = saved[1], &weight = saved[2];
    const On on(sum);
    const bool added = context->saved_data["added"].toBool();
    const cuda::NormShape shape = norm_shape(sum, context->saved_data["epsilon"].toDouble());
    const at::Tensor d_sum = added && grads[0].defined() ? grads[0].contiguous() : at::Tensor();
    const at::Tensor& of_y = grads[added ? 1 : 0];
    const at::Tensor d_y = of_y.defined() ? of_y.contiguous()
                                          : at::zeros_like(sum, sum.options().dtype(at::kBFloat16));
    // An absent delta is no input.
    const bool of_delta = added && context->needs_input_grad(1);
    const at::Tensor d = at::empty_like(sum);
    const at::Tensor d_delta = of_delta ? at::empty_like(d_y) : at::Tensor();
    check(cuda::add_norm_backward(shape, f32(sum), f32(inverse), f32(weight),
                                  d_sum.defined() ? f32(d_sum) : nullptr, bf16(d_y), mutable_f32(d),
                                  of_delta ? mutable_bf16(d_delta) : nullptr, on.stream));
    at::Tensor d_weight;
    if (context->needs_input_grad(added ? 2 : 1)) {
      d_weight = at::empty_like(weight);
      const at::Tensor scratch = at::empty({cuda::norm_weight_scratch(shape)}, sum.options());
      check(cuda::norm_weight_backward(shape, f32(sum), f32(inverse), bf16(d_y),
                                       mutable_f32(d_weight), mutable_f32(scratch), on.stream));
    }
    return {d, d_delta, d_weight, at::Tensor()};
  }
};

// Queries and keys of qkv (S, T, width) turned into `out`, values copied.
void turn(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, int64_t heads,
          int64_t head_dim, bool back, const at::Tensor& out) {
  const On on(qkv);
  const int64_t width = qkv.size(2), turned = heads * head_dim;
  check(cuda::rotate({qkv.size(0) * qkv.size(1), qkv.size(1), heads, head_dim, width, width},
                     f32(cos), f32(sin), bf16(qkv), mutable_bf16(out), back, on.stream));
  out.narrow(2, turned, width - turned).copy_(qkv.narrow(2, turned, width - turned));
}

class Rotate : public torch::autograd::Function<Rotate> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& qkv, const at::Tensor& cos,
                            const at::Tensor& sin, int64_t heads, int64_t head_dim) {
    context->save_for_backward({cos, sin});
    context->saved_data["heads"] = heads;
    context->saved_data["head_dim"] = head_dim;
    at::Tensor out = at::empty_like(qkv, at::MemoryFormat::Contiguous);
    turn(qkv.contiguous(), cos, sin, heads, head_dim, false, out);
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor d = grads[0].contiguous();
    at::Tensor out = at::empty_like(d);
    turn(d, saved[0], saved[1], context->saved_data["heads"].toInt(),
         context->saved_data["head_dim"].toInt(), true, out);
    return {out, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

class Swiglu : public torch::autograd::Function<Swiglu> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& given) {
    const at::Tensor both = given.contiguous();
    const On on(both);
    context->save_for_backward({both});
    const int64_t width = both.size(-1) / 2, rows = both.numel() / (2 * width);
    std::vector<int64_t> sizes = both.sizes().vec();
    sizes.back() = width;
    at::Tensor hidden = at::empty(sizes, both.options());
    check(cuda::swiglu(rows, width, 2 * width, bf16(both.narrow(-1, 0, width)),
                       bf16(both.narrow(-1, width, width)), mutable_bf16(hidden), on.stream));
    return hidden;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const at::Tensor both = context->get_saved_variables()[0], d = grads[0].contiguous();
    const On on(both);
    const int64_t width = both.size(-1) / 2, rows = both.numel() / (2 * width);
    at::Tensor d_both = at::empty_like(both);
    const auto halves = [&](const at::Tensor& x) {
      return std::pair{x.narrow(-1, 0, width), x.narrow(-1, width, width)};
    };
    const auto [gate, up] = halves(both);
    const auto [d_gate, d_up] = halves(d_both);
    check(cuda::swiglu_backward(rows, width, 2 * width, bf16(gate), bf16(up), bf16(d),
                                mutable_bf16(d_gate), mutable_bf16(d_up), on.stream));
    return {d_both};
  }
};

}  // namespace

at::Tensor gpu_coupled_weights(std::span<const CoupledLeaves> layers, at::ScalarType compute) {
  std::vector<at::Tensor> leaves;
  for (const CoupledLeaves& layer : layers) {
    leaves.insert(leaves.end(), {layer.latent, layer.g, layer.h});
  }
  return CoupledWeights::apply(at::TensorList(leaves), compute);
}

at::Tensor gpu_coupled_signs(const CoupledLeaves& layer, const at::Tensor& packed) {
  const cuda::CoupledShape shape = shape_of(layer.latent, layer.g);
  const On on(packed);
  const at::Tensor turned = at::empty_like(layer.g, at::TensorOptions().dtype(at::kInt));
  check(cuda::coupled_signs(shape, f32(layer.latent), f32(layer.g), f32(layer.h),
                            static_cast<uint32_t*>(packed.mutable_data_ptr()),
                            turned.mutable_data_ptr<int32_t>(), on.stream));
  return turned.sum();
}

at::Tensor gpu_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  return AddNorm::apply(x, std::optional<at::Tensor>(), weight, epsilon)[0];
}

std::pair<at::Tensor, at::Tensor> gpu_add_norm(const at::Tensor& x, const at::Tensor& delta,
                                               const at::Tensor& weight, double epsilon) {
  const variable_list out = AddNorm::apply(x, std::optional<at::Tensor>(delta), weight, epsilon);
  return {out[0], out[1]};
}

at::Tensor gpu_rotate(const ModelConfig& config, const Rotary& rotary, const at::Tensor& qkv) {
  return Rotate::apply(qkv, rotary.cos, rotary.sin, config.heads + config.kv_heads,
                       config.head_dim);
}

at::Tensor gpu_swiglu(const at::Tensor& both) { return Swiglu::apply(both); }

at::Tensor gpu_block_forward(const ModelConfig& config, const BlockWeights& block,
                             const Rotary& rotary, const at::Tensor& x) {
  const auto weight = [&](Role role) { return block.linear[index_of(role)]; };
  const auto product = [](const at::Tensor& in, const at::Tensor& w) {
    return at::matmul(in, w.t());
  };
  const at::Tensor qkv_weight =
      block.qkv.defined()
          ? block.qkv
          : at::cat({weight(Role::kAttnQ), weight(Role::kAttnK), weight(Role::kAttnV)});
  const at::Tensor gate_up_weight = block.gate_up.defined()
                                        ? block.gate_up
                                        : at::cat({weight(Role::kFfnGate), weight(Role::kFfnUp)});
  const at::Tensor a = gpu_norm(x, block.attn_norm, config.norm_epsilon);
  const at::Tensor qkv = gpu_rotate(config, rotary, product(a, qkv_weight));
  const auto parts = qkv.split_with_sizes({config.d_q(), config.d_kv(), config.d_kv()}, -1);
  const auto heads_of = [&](size_t part, int64_t heads) {
    return parts[part].view({x.size(0), x.size(1), heads, config.head_dim}).transpose(1, 2);
  };
  const at::Tensor attended = at::scaled_dot_product_attention(
      heads_of(0, config.heads), heads_of(1, config.kv_heads), heads_of(2, config.kv_heads), {},
      0.0, /*is_causal=*/true, /*scale=*/{}, /*enable_gqa=*/config.heads != config.kv_heads);
  const at::Tensor rows = attended.transpose(1, 2).reshape({x.size(0), x.size(1), config.d_q()});
  const auto [middle, f] = gpu_add_norm(x, product(rows, weight(Role::kAttnOutput)), block.ffn_norm,
                                        config.norm_epsilon);
  const at::Tensor hidden = gpu_swiglu(product(f, gate_up_weight));
  return middle + product(hidden, weight(Role::kFfnDown));
}

at::Tensor gpu_kl_backward(const at::Tensor& student, const at::Tensor& teacher,
                           const at::Tensor& next, const LossShares& shares,
                           double divergence_weight, double entropy_weight) {
  const On on(student);
  const int64_t rows = student.size(0);
  at::Tensor sums = at::empty({rows, 3}, student.options().dtype(at::kFloat));
  check(
      cuda::kl_backward(rows, student.size(1),
                        {static_cast<float>(shares.reverse), static_cast<float>(shares.temperature),
                         static_cast<float>(divergence_weight), static_cast<float>(entropy_weight)},
                        mutable_bf16(student), bf16(teacher), next.const_data_ptr<int64_t>(),
                        mutable_f32(sums), on.stream));
  return sums;
}

}  // namespace rabit::train
