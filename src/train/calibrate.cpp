// The start of one block's student: second moments of its inputs, scales, error feedback.
// Layers go in the order in which they are computed; each sees inputs that the already quantized
// layers before it produce, within the block too. q, k, v share one input, gate and up another.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>

#include "base/interrupt.h"
#include "io/dequant.h"
#include "train/session.h"

namespace rabit::train {
namespace {

constexpr int64_t kChunk = 8;  // windows computed at once

// Sum of x xT over rows of x (tokens, d), in float32 on the device of x.
class SecondMoment {
 public:
  void add(const at::Tensor& x) {
    const at::Tensor flat = x.reshape({-1, x.size(-1)}).to(at::kFloat);
    if (!sum_.defined()) {
      sum_ = at::zeros({flat.size(1), flat.size(1)}, flat.options());
    }
    sum_.addmm_(flat.t(), flat);
    tokens_ += flat.size(0);
  }
  at::Tensor mean() const { return sum_ / static_cast<double>(tokens_); }

 private:
  at::Tensor sum_;
  int64_t tokens_ = 0;
};

std::vector<float> to_vector(const at::Tensor& tensor) {
  const at::Tensor host = tensor.to(at::kCPU, at::kFloat).contiguous();
  const float* data = host.const_data_ptr<float>();
  return {data, data + host.numel()};
}

// value^exponent, floored at a thousandth of the mean (a dead column must not get a zero weight),
// with mean 1.
std::vector<float> importance_from(at::Tensor values, double exponent) {
  values = values.to(at::kDouble);
  values = at::clamp_min(values, std::max(values.mean().item<double>() * 1e-3, 1e-30));
  values = at::pow(values / values.mean(), exponent);
  return to_vector(values / values.mean());
}

StudentLinear make_linear(const TrainSession& session, const quant::Shape& shape, at::Tensor latent,
                          const quant::Scales& scales) {
  const at::Device device = session.teacher.device;
  const auto leaf = [&](const at::Tensor& tensor) {
    return tensor.to(device).clone().set_requires_grad(true);
  };
  const auto host = [](const std::vector<float>& values, int64_t rows, int64_t columns) {
    at::Tensor tensor = at::empty({rows, columns}, at::kFloat);
    std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<float>());
    return tensor;
  };
  return {shape, leaf(latent), leaf(host(scales.g, shape.paths, shape.d_out)),
          leaf(host(scales.h, shape.paths, shape.d_in))};
}

// The original weight (d_out, d_in) in float32 from the file: the teacher may hold it in bf16.
Result<at::Tensor> original_weight(const TrainSession& session, int64_t layer, Role role) {
  const LinearShape shape = linear_shape(session.config(), role);
  RABIT_ASSIGN(const TensorInfo* info,
               session.model.get_tensor(linear_name(layer, role) + ".weight",
                                        std::array{shape.d_in, shape.d_out}));
  at::Tensor weight = at::empty({shape.d_out, shape.d_in}, at::kFloat);
  RABIT_CHECK(dequantize(
      *info, 0, std::span(weight.mutable_data_ptr<float>(), static_cast<size_t>(weight.numel()))));
  return weight;
}

quant::Shape shape_of(const TrainSession& session, Role role) {
  const LinearShape shape = linear_shape(session.config(), role);
  return {shape.d_out, shape.d_in, session.options.paths};
}

// Upper Cholesky factor of the inverse of the damped H, (d, d) float32 on the host.
Result<at::Tensor> inverse_factor(const at::Tensor& h, double damp, const std::string& name) {
  at::Tensor damped = h.to(at::kDouble);
  const double mean = damped.diagonal().mean().item<double>();
  if (!std::isfinite(mean) || mean <= 0.0) {
    return Error{name +
                 ": the calibration inputs of this layer are all zero or not finite; give "
                 "other text"};
  }
  damped.diagonal().add_(damp * mean);
  const auto [factor, info] = at::linalg_cholesky_ex(damped);
  if (info.item<int64_t>() != 0) {
    return Error{name +
                 ": the second moment of the inputs is not positive definite; raise "
                 "--ef-damp or --calib-tokens"};
  }
  const at::Tensor inverse = at::cholesky_inverse(factor);
  const auto [upper, info2] = at::linalg_cholesky_ex(inverse, /*upper=*/true);
  if (info2.item<int64_t>() != 0) {
    return Error{name +
                 ": the inverse second moment is not positive definite; raise --ef-damp or "
                 "--calib-tokens"};
  }
  return upper.to(at::kCPU, at::kFloat).contiguous();
}

// Adds the time until it goes to the session's count.
struct FitTimer {
  TrainSession& session;
  Clock clock{};
  ~FitTimer() { session.fit_seconds += clock.elapsed(); }
};

Status quantize_roles(TrainSession& session, int64_t layer, std::initializer_list<Role> roles,
                      const at::Tensor& h, StudentBlock& block) {
  const FitTimer timer{session};
  const QuantizeOptions& options = session.options;
  const std::vector<float> s_in = importance_from(h.diagonal().sqrt(), options.alpha_in);
  RABIT_ASSIGN(const at::Tensor u,
               inverse_factor(h, options.ef_damp, linear_name(layer, *roles.begin())));
  for (const Role role : roles) {
    RABIT_CHECK(check_interrupt());
    const quant::Shape shape = shape_of(session, role);
    RABIT_ASSIGN(at::Tensor w, original_weight(session, layer, role));
    const quant::Scales scales =
        quant::fit_scales(shape, w.const_data_ptr<float>(), {}, s_in,
                          {options.init_sweeps, options.als_steps}, session.pool);
    quant::error_feedback(shape, w.mutable_data_ptr<float>(), scales, u.const_data_ptr<float>(),
                          session.pool);
    block[index_of(role)] = make_linear(session, shape, w, scales);
  }
  return {};
}

}  // namespace

Status initialise_block(TrainSession& session, int64_t layer, const at::Tensor& x) {
  const at::NoGradGuard no_grad;
  const ModelConfig& config = session.config();
  const Network& teacher = session.teacher;
  const BlockWeights& weights = teacher.blocks[static_cast<size_t>(layer)];
  const Rotary rotary = make_rotary(config, x.size(1), teacher.device);
  StudentBlock block;
  const int64_t windows = x.size(0);
  const auto each_chunk = [&](const auto& body) -> Status {
    for (int64_t begin = 0; begin < windows; begin += kChunk) {
      RABIT_CHECK(check_interrupt());
      body(begin, std::min(kChunk, windows - begin));
    }
    return {};
  };
  const auto chunk_of = [&](const at::Tensor& stream, int64_t begin, int64_t count) {
    return stream.narrow(0, begin, count).to(teacher.device);
  };

  SecondMoment attn_in;
  RABIT_CHECK(each_chunk([&](int64_t begin, int64_t count) {
    attn_in.add(norm(config, chunk_of(x, begin, count), weights.attn_norm, teacher.compute));
  }));
  RABIT_CHECK(quantize_roles(session, layer, {Role::kAttnQ, Role::kAttnK, Role::kAttnV},
                             attn_in.mean(), block));
  BlockWeights student = student_weights(block, weights, teacher.compute);
  const auto product = [&](Role role, const at::Tensor& input) {
    return at::matmul(input, student.linear[index_of(role)].t());
  };

  SecondMoment attended;
  at::Tensor attention =
      at::empty({windows, x.size(1), config.d_q()}, x.options().dtype(teacher.compute));
  RABIT_CHECK(each_chunk([&](int64_t begin, int64_t count) {
    const at::Tensor a =
        norm(config, chunk_of(x, begin, count), weights.attn_norm, teacher.compute);
    const at::Tensor out = attend(config, rotary, product(Role::kAttnQ, a),
                                  product(Role::kAttnK, a), product(Role::kAttnV, a));
    attended.add(out);
    attention.narrow(0, begin, count).copy_(out);
  }));
  RABIT_CHECK(quantize_roles(session, layer, {Role::kAttnOutput}, attended.mean(), block));
  student = student_weights(block, weights, teacher.compute);

  const auto ffn_input = [&](int64_t begin, int64_t count) {
    const at::Tensor middle =
        chunk_of(x, begin, count) + product(Role::kAttnOutput, chunk_of(attention, begin, count));
    return norm(config, middle, weights.ffn_norm, teacher.compute);
  };
  SecondMoment ffn_in;
  RABIT_CHECK(
      each_chunk([&](int64_t begin, int64_t count) { ffn_in.add(ffn_input(begin, count)); }));
  RABIT_CHECK(quantize_roles(session, layer, {Role::kFfnGate, Role::kFfnUp}, ffn_in.mean(), block));
  student = student_weights(block, weights, teacher.compute);

  SecondMoment hidden;
  RABIT_CHECK(each_chunk([&](int64_t begin, int64_t count) {
    const at::Tensor f = ffn_input(begin, count);
    hidden.add(swiglu(product(Role::kFfnGate, f), product(Role::kFfnUp, f)));
  }));
  RABIT_CHECK(quantize_roles(session, layer, {Role::kFfnDown}, hidden.mean(), block));
  session.student.blocks[static_cast<size_t>(layer)] = std::move(block);
  return {};
}

namespace {

// Sums |input| per column as the forward pass goes, and squares of output gradients per row as the
// backward pass does.
class ImportanceTap : public LinearTap {
 public:
  struct Sums {
    at::Tensor in, out;
    int64_t tokens = 0;
  };
  std::array<Sums, kRoleCount> sums;

  void see(Role role, const at::Tensor& input, const at::Tensor& output) override {
    Sums& sum = sums[index_of(role)];
    const auto add = [](at::Tensor& total, const at::Tensor& value) {
      total = total.defined() ? total + value : value;
    };
    add(sum.in, input.detach().reshape({-1, input.size(-1)}).abs().sum(0, false, at::kDouble));
    sum.tokens += input.numel() / input.size(-1);
    if (output.requires_grad()) {
      output.register_hook([&sum, add](const at::Tensor& grad) {
        add(sum.out, grad.detach().reshape({-1, grad.size(-1)}).to(at::kDouble).square().sum(0));
      });
    }
  }
};

constexpr int64_t kImportanceWindows = 32;

}  // namespace

Result<std::vector<std::array<Importance, kRoleCount>>> measure_importance(TrainSession& session) {
  const Network& teacher = session.teacher;
  const ModelConfig& config = session.config();
  const Rotary rotary = make_rotary(config, session.options.seq_len, teacher.device);
  std::vector<ImportanceTap> taps(teacher.blocks.size());
  const int64_t windows = std::min(kImportanceWindows, session.windows.size(0));
  for (int64_t i = 0; i < windows; ++i) {
    RABIT_CHECK(check_interrupt());
    const at::Tensor ids = session.windows.narrow(0, i, 1).to(teacher.device);
    at::Tensor x = embed(teacher, ids).set_requires_grad(true);
    for (size_t layer = 0; layer < teacher.blocks.size(); ++layer) {
      x = block_forward(config, teacher.blocks[layer], rotary, x, teacher.compute, &taps[layer]);
    }
    // The language loss of the teacher: its gradient says how much each output row matters.
    const at::Tensor hidden = norm(config, x, teacher.output_norm, teacher.compute);
    const at::Tensor logits = at::matmul(hidden[0].narrow(0, 0, ids.size(1) - 1), teacher.head.t());
    at::cross_entropy_loss(logits.to(at::kFloat), ids[0].narrow(0, 1, ids.size(1) - 1)).backward();
    if (session.observer.progress) {
      session.observer.progress({"importance", i + 1, windows, NAN, 0.0});
    }
  }
  std::vector<std::array<Importance, kRoleCount>> importance(taps.size());
  for (size_t layer = 0; layer < taps.size(); ++layer) {
    for (size_t role = 0; role < kRoleCount; ++role) {
      const auto& sum = taps[layer].sums[role];
      importance[layer][role] = {importance_from(sum.in, session.options.alpha_in),
                                 importance_from(sum.out.sqrt(), session.options.alpha_out)};
    }
  }
  return importance;
}

Status initialise_block(TrainSession& session, int64_t layer,
                        const std::array<Importance, kRoleCount>& importance) {
  const FitTimer timer{session};
  for (const Role role : kRoles) {
    RABIT_CHECK(check_interrupt());
    const quant::Shape shape = shape_of(session, role);
    RABIT_ASSIGN(const at::Tensor w, original_weight(session, layer, role));
    const Importance& weight = importance[index_of(role)];
    const quant::Scales scales =
        quant::fit_scales(shape, w.const_data_ptr<float>(), weight.out, weight.in,
                          {session.options.init_sweeps, session.options.als_steps}, session.pool);
    session.student.blocks[static_cast<size_t>(layer)][index_of(role)] =
        make_linear(session, shape, w, scales);
  }
  return {};
}

}  // namespace rabit::train
