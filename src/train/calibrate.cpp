// The start of one block's student. Its linear layers go in the order in which they are computed,
// in four stages that share an input: q, k, v; output; gate, up; down. Each stage sees inputs that
// the already quantized layers before it produce, within the block too.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <optional>

#include "base/interrupt.h"
#include "train/host_tensor.h"
#include "train/layer_fit.h"
#include "train/recompute.h"
#include "train/session.h"
#include "train/shards.h"

namespace rabit::train {
namespace {

// Between a latent and the next value with another sign, in units of its last path's magnitude.
constexpr float kMargin = 0.1F;

// Lets float32 products be formed in the units for bf16 (TF32 on a GPU), as long as it lives.
class ReducedPrecision {
 public:
  ReducedPrecision() { at::globalContext().setFloat32MatmulPrecision("medium"); }
  ~ReducedPrecision() {
    constexpr std::array kNames = {"highest", "high", "medium"};
    at::globalContext().setFloat32MatmulPrecision(kNames[static_cast<size_t>(before_)]);
  }
  ReducedPrecision(const ReducedPrecision&) = delete;
  ReducedPrecision& operator=(const ReducedPrecision&) = delete;

 private:
  const at::Float32MatmulPrecision before_ = at::globalContext().float32MatmulPrecision();
};

// Mean of y x^T over the tokens of all processes, summed in float32 on the device of x.
class Moment {
 public:
  // y (tokens, m), x (tokens, d); of all processes equally many.
  void add(const at::Tensor& y, const at::Tensor& x) {
    const at::Tensor left = y.reshape({-1, y.size(-1)}).to(at::kFloat);
    const at::Tensor right = x.reshape({-1, x.size(-1)}).to(at::kFloat);
    if (!sum_.defined()) {
      sum_ = at::zeros({left.size(1), right.size(1)}, right.options());
    }
    // What is bf16 already loses nothing.
    std::optional<ReducedPrecision> reduced;
    if (x.scalar_type() == at::kBFloat16 && y.scalar_type() == at::kBFloat16) {
      reduced.emplace();
    }
    sum_.addmm_(left.t(), right);
    tokens_ += right.size(0);
  }
  at::Tensor mean(const TrainSession& session) const {
    session.sum(sum_);
    return sum_ / static_cast<double>(tokens_ * session.processes());
  }

 private:
  at::Tensor sum_;
  int64_t tokens_ = 0;
};

StudentLinear make_linear(const TrainSession& session, const quant::Shape& shape,
                          const at::Tensor& latent, const quant::Scales& scales) {
  return make_student_linear(
      session.options.method, latent, to_tensor(scales.g, {shape.paths, shape.d_out}),
      to_tensor(scales.h, {shape.paths, shape.d_in}), session.teacher.device);
}

// The original weight (d_out, d_in) in float32 from the file: the teacher may hold it in bf16.
Result<at::Tensor> original_weight(const TrainSession& session, int64_t layer, Role role) {
  const LinearShape shape = linear_shape(session.config(), role);
  return read_tensor(session.model, linear_name(layer, role) + ".weight",
                     {shape.d_out, shape.d_in});
}

quant::Shape shape_of(const TrainSession& session, int64_t layer, Role role) {
  const LinearShape shape = linear_shape(session.config(), role);
  return {shape.d_out, shape.d_in, session.bits.paths(layer, role)};
}

// Adds the time until it goes to the session's count.
struct FitTimer {
  TrainSession& session;
  Clock clock{};
  ~FitTimer() { session.fit_seconds += clock.elapsed(); }
};

struct Stage {
  std::vector<Role> roles;
  bool adds_to_stream;  // its output goes onto the residual stream
};
const std::array<Stage, 4> kStages = {{{{Role::kAttnQ, Role::kAttnK, Role::kAttnV}, false},
                                       {{Role::kAttnOutput}, true},
                                       {{Role::kFfnGate, Role::kFfnUp}, false},
                                       {{Role::kFfnDown}, true}}};

// One side, teacher or student, on the way through the block: what each stage reads and the stream
// that it adds to, a few windows at a time. The stages go in order, each over all windows.
class Side {
 public:
  Side(const TrainSession& session, const Rotary& rotary, const at::Tensor& x)
      : session_(session), rotary_(rotary), x_(x) {}

  void set_weights(BlockWeights weights) { weights_ = std::move(weights); }

  at::Tensor input(size_t stage, int64_t begin, int64_t count) {
    const ModelConfig& config = session_.config();
    const at::ScalarType compute = session_.teacher.compute;
    switch (stage) {
      case 0:
        return norm(config, stream(stage, begin, count), weights_.attn_norm, compute);
      case 1: {
        const at::Tensor a = input(0, begin, count);
        const at::Tensor out = attend(config, rotary_, product(Role::kAttnQ, a),
                                      product(Role::kAttnK, a), product(Role::kAttnV, a));
        if (!attention_.defined()) {
          attention_ =
              at::empty({x_.size(0), x_.size(1), config.d_q()}, x_.options().dtype(compute));
        }
        attention_.narrow(0, begin, count).copy_(out);
        return out;
      }
      case 2: {
        if (!middle_.defined()) {
          middle_ = at::empty_like(x_);
        }
        middle_.narrow(0, begin, count)
            .copy_(stream(0, begin, count) +
                   product(Role::kAttnOutput, attention_.narrow(0, begin, count)));
        if (begin + count == x_.size(0)) {
          attention_ = at::Tensor();
        }
        return norm(config, stream(stage, begin, count), weights_.ffn_norm, compute);
      }
      default: {
        const at::Tensor f = norm(config, stream(stage, begin, count), weights_.ffn_norm, compute);
        return swiglu(product(Role::kFfnGate, f), product(Role::kFfnUp, f));
      }
    }
  }

  // Before the stage adds to it.
  at::Tensor stream(size_t stage, int64_t begin, int64_t count) const {
    return (stage < 2 ? x_ : middle_).narrow(0, begin, count);
  }

  // The last stage's output onto the stream, from its input; nothing may be asked of these windows
  // after it.
  void finish(int64_t begin, int64_t count, const at::Tensor& hidden) {
    middle_.narrow(0, begin, count).add_(product(Role::kFfnDown, hidden));
  }

  // After the block, once all windows are finished (S, T, d_model).
  const at::Tensor& output() const { return middle_; }

 private:
  at::Tensor product(Role role, const at::Tensor& in) const {
    return at::matmul(in, weights_.linear[index_of(role)].t());
  }

  const TrainSession& session_;
  const Rotary& rotary_;
  const at::Tensor x_;  // (S, T, d_model)
  BlockWeights weights_;
  at::Tensor attention_;  // (S, T, d_q), from stage 1 to stage 2
  at::Tensor middle_;     // (S, T, d_model), the stream between attention and feed-forward
};

// What the layers of a stage are fitted to.
struct StageMoments {
  at::Tensor inputs;  // mean x x^T
  at::Tensor cross;   // mean t x^T, t the teacher's input; undefined: not asked for
  at::Tensor stream;  // mean (teacher's stream - student's stream) x^T; undefined: not asked for
};

Result<StageMoments> measure_stage(const TrainSession& session, size_t stage, int64_t windows,
                                   Side& student, Side& teacher) {
  const QuantizeOptions& options = session.options;
  const bool by_teacher = options.ef_inputs == EfInputs::kTeacher;
  const bool to_output = options.ef_target != EfTarget::kWeight;
  const bool to_stream = options.ef_target == EfTarget::kStream && kStages[stage].adds_to_stream;
  Moment inputs, cross, lacking;
  for (int64_t begin = 0; begin < windows; begin += kForwardWindows) {
    RABIT_CHECK(check_interrupt());
    const int64_t count = std::min(kForwardWindows, windows - begin);
    // Both sides go through every stage, for what a stage leaves the next may need.
    const at::Tensor x = student.input(stage, begin, count);
    const at::Tensor t = needs_teacher_stream(options) ? teacher.input(stage, begin, count) : x;
    inputs.add(by_teacher ? t : x, by_teacher ? t : x);
    if (to_output) {
      cross.add(t, x);
    }
    if (to_stream) {
      lacking.add(teacher.stream(stage, begin, count) - student.stream(stage, begin, count), x);
    }
    if (stage + 1 == kStages.size() && needs_teacher_stream(options)) {
      teacher.finish(begin, count, t);
    }
  }
  return StageMoments{inputs.mean(session), to_output ? cross.mean(session) : at::Tensor(),
                      to_stream ? lacking.mean(session) : at::Tensor()};
}

Result<LayerFit> fit_role(TrainSession& session, int64_t layer, Role role,
                          const StageMoments& moments) {
  const std::string name = linear_name(layer, role);
  RABIT_ASSIGN(const at::Tensor weight, original_weight(session, layer, role));
  LayerProblem problem{name, weight.to(moments.inputs.device()), moments.inputs, {}};
  Importance importance;
  if (session.options.alpha_out > 0.0 && !session.sums.empty()) {
    importance = importance_of(session.sums[static_cast<size_t>(layer)], role, session.options);
    problem.out = importance.out;
  }
  if (moments.cross.defined()) {
    at::Tensor cross = at::matmul(problem.target, moments.cross);
    if (moments.stream.defined()) {
      cross += moments.stream;
    }
    RABIT_ASSIGN(problem.target,
                 best_target(problem.target, cross, moments.inputs, session.options.ef_damp, name));
  }
  const quant::Shape shape = shape_of(session, layer, role);
  RABIT_ASSIGN(LayerFit fit, fit_layer(problem, shape.paths, session.options, session.pool));
  quant::draw_towards(shape, weight.const_data_ptr<float>(), fit.scales, kMargin,
                      fit.latent.mutable_data_ptr<float>());
  return fit;
}

// What process `owner` has fitted, on all of them.
LayerFit fit_of(const TrainSession& session, const quant::Shape& shape, const LayerFit& own,
                int64_t owner) {
  if (!session.ranks) {
    return own;
  }
  const int64_t rows = shape.paths * shape.d_out, columns = shape.paths * shape.d_in;
  const std::vector<int64_t> sizes = {shape.d_out * shape.d_in, rows, columns, 1};
  at::Tensor all = at::empty({sizes[0] + rows + columns + 1}, at::kFloat);
  if (session.rank() == owner) {
    all = at::cat({own.latent.flatten(), to_tensor(own.scales.g, {rows}),
                   to_tensor(own.scales.h, {columns}), at::full({1}, own.error, at::kFloat)});
  }
  all = all.to(session.teacher.device);
  session.ranks->broadcast(all, static_cast<int>(owner));
  const std::vector<at::Tensor> parts = all.to(at::kCPU).split_with_sizes(sizes);
  return {parts[0].view({shape.d_out, shape.d_in}).clone(),
          {to_vector(parts[1]), to_vector(parts[2])},
          parts[3].item<double>()};
}

Status fit_stage(TrainSession& session, int64_t layer, const Stage& stage,
                 const StageMoments& moments, StudentBlock& block) {
  wait_for(moments.inputs);
  const FitTimer timer{session};
  std::vector<LayerFit> fits(stage.roles.size());
  const auto owner = [&](size_t i) { return static_cast<int64_t>(i) % session.processes(); };
  for (size_t i = 0; i < fits.size(); ++i) {
    RABIT_CHECK(check_interrupt());
    if (owner(i) == session.rank()) {
      RABIT_ASSIGN(fits[i], fit_role(session, layer, stage.roles[i], moments));
    }
  }
  for (size_t i = 0; i < fits.size(); ++i) {
    const quant::Shape shape = shape_of(session, layer, stage.roles[i]);
    const LayerFit fit = fit_of(session, shape, fits[i], owner(i));
    block[stage.roles[i]] = make_linear(session, shape, fit.latent, fit.scales);
    session.fit_errors.push_back(fit.error);
  }
  return {};
}

Status start_by_error_feedback(TrainSession& session, int64_t layer, const at::Tensor& x,
                               const at::Tensor& teacher_x, bool final, StudentBlock& block,
                               BlockOutputs& outputs) {
  const at::NoGradGuard no_grad;
  const BlockWeights weights = whole_weights(session.teacher, layer);
  const Rotary rotary = make_rotary(session.config(), x.size(1), session.teacher.device);
  Side student(session, rotary, x), teacher(session, rotary, teacher_x);
  teacher.set_weights(weights);
  for (size_t stage = 0; stage < kStages.size(); ++stage) {
    student.set_weights(student_weights(block, weights, session.teacher.compute));
    RABIT_ASSIGN(const StageMoments moments,
                 measure_stage(session, stage, x.size(0), student, teacher));
    RABIT_CHECK(fit_stage(session, layer, kStages[stage], moments, block));
  }
  if (needs_teacher_stream(session.options)) {
    outputs.teacher = teacher.output();
  }
  if (final) {
    constexpr size_t kLast = kStages.size() - 1;
    student.set_weights(student_weights(block, weights, session.teacher.compute));
    for (int64_t begin = 0; begin < x.size(0); begin += kForwardWindows) {
      RABIT_CHECK(check_interrupt());
      const int64_t count = std::min(kForwardWindows, x.size(0) - begin);
      student.finish(begin, count, student.input(kLast, begin, count));
    }
    outputs.student = student.output();
  }
  return {};
}

Status start_by_importance(TrainSession& session, int64_t layer, StudentBlock& block) {
  const FitTimer timer{session};
  for (const Role role : kRoles) {
    RABIT_CHECK(check_interrupt());
    const quant::Shape shape = shape_of(session, layer, role);
    RABIT_ASSIGN(const at::Tensor w, original_weight(session, layer, role));
    Importance importance;
    if (!session.sums.empty()) {
      importance = importance_of(session.sums[static_cast<size_t>(layer)], role, session.options);
    }
    const bool dual = session.options.method == Method::kDbllm;
    const quant::Scales scales =
        dual ? quant::two_bit_scales(shape.d_out, shape.d_in, w.const_data_ptr<float>())
             : quant::fit_scales(shape, w.const_data_ptr<float>(), importance.out, importance.in,
                                 {session.options.init_sweeps, session.options.als_steps},
                                 session.pool);
    block[role] = make_linear(session, shape, w, scales);
  }
  return {};
}

}  // namespace

QuantizeOptions quick_start(QuantizeOptions options) {
  options.init_sweeps = std::min<int64_t>(options.init_sweeps, 2);
  options.als_steps = std::min<int64_t>(options.als_steps, 4);
  options.ef_rounds = 0;
  options.ef_sweeps = 0;
  return options;
}

Result<BlockOutputs> start_block(TrainSession& session, int64_t layer, const at::Tensor& x,
                                 const at::Tensor& teacher_x, bool final) {
  StudentBlock block;
  BlockOutputs outputs;
  session.fit_errors.clear();
  RABIT_CHECK(session.options.error_feedback
                  ? start_by_error_feedback(session, layer, x, teacher_x, final, block, outputs)
                  : start_by_importance(session, layer, block));
  if (session.options.train_norms) {
    add_norms(session.teacher, layer, block);
  }
  session.student.blocks[static_cast<size_t>(layer)] = std::move(block);
  return outputs;
}

Importance importance_of(const BlockSums& sums, Role role, const QuantizeOptions& options) {
  return {importance_from(sums.in[index_of(role)], options.alpha_in),
          importance_from(sums.out[index_of(role)], options.alpha_out)};
}

void add_norms(const Network& teacher, int64_t layer, StudentBlock& block) {
  const BlockWeights& weights = teacher.blocks[static_cast<size_t>(layer)];
  block.attn_norm = weights.attn_norm.clone().set_requires_grad(true);
  block.ffn_norm = weights.ffn_norm.clone().set_requires_grad(true);
}

void add_output_norm(const Network& teacher, Student& student) {
  student.output_norm = teacher.output_norm.clone().set_requires_grad(true);
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
    if (!c10::GradMode::is_enabled()) {
      return;  // the block will be computed again
    }
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

Status measure_importance(TrainSession& session) {
  const Network& teacher = session.teacher;
  const ModelConfig& config = session.config();
  const Rotary rotary = make_rotary(config, session.options.seq_len, teacher.device);
  std::vector<ImportanceTap> taps(teacher.blocks.size());
  const int64_t windows = std::min(kImportanceWindows, session.windows.distinct());
  for (int64_t i = 0; i < windows; ++i) {
    RABIT_CHECK(check_interrupt());
    const at::Tensor ids = session.windows.distinct_range(i, 1).to(teacher.device);
    at::Tensor x = embed(teacher, ids).set_requires_grad(true);
    for (size_t layer = 0; layer < taps.size(); ++layer) {
      const auto block = [&, layer](const at::Tensor& in) {
        return block_forward(config, whole_weights(teacher, static_cast<int64_t>(layer)), rotary,
                             in, teacher.compute, &taps[layer]);
      };
      // Of blocks that are shared out no more than one is to be here at a time.
      x = teacher.ranks ? recomputed(block, x, x) : block(x);
    }
    // The language loss of the teacher: its gradient says how much each output row matters.
    const at::Tensor hidden = norm(config, x, teacher.output_norm, teacher.compute);
    const at::Tensor logits = at::matmul(hidden[0].narrow(0, 0, ids.size(1) - 1), teacher.head.t());
    at::cross_entropy_loss(logits.to(at::kFloat), ids[0].narrow(0, 1, ids.size(1) - 1)).backward();
    if (session.observer.progress) {
      session.observer.progress({"importance", i + 1, windows, NAN, 0.0});
    }
  }
  session.sums.clear();
  for (const ImportanceTap& tap : taps) {
    BlockSums& sums = session.sums.emplace_back();
    for (size_t role = 0; role < kRoleCount; ++role) {
      sums.in[role] = tap.sums[role].in;
      sums.out[role] = tap.sums[role].out.sqrt();
    }
  }
  return {};
}

}  // namespace rabit::train
