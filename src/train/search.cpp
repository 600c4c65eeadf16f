// What a run may look for before it starts, by the divergence from the teacher that it measures:
// the exponents of the importances (--alpha-search), and the layers that get more paths
// (--target-bpw).

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/interrupt.h"
#include "train/host_tensor.h"
#include "train/kl_loss.h"
#include "train/layer_fit.h"
#include "train/session.h"

namespace rabit::train {
namespace {

constexpr int64_t kFitTokens = 8192;    // that layers are fitted to in a search
constexpr int64_t kScoreTokens = 1024;  // that the divergence is measured on, others than those

// Windows of the text to fit to and to score on; a text too short for both is used twice.
struct Sample {
  at::Tensor fit, score;  // (count, seq_len) int64 on the device

  explicit Sample(const TrainSession& session) {
    const TextWindows& windows = session.windows;
    const auto count = [&](int64_t tokens) {
      return std::clamp<int64_t>(tokens / session.options.seq_len, 1, windows.distinct());
    };
    fit = windows.distinct_range(0, count(kFitTokens)).to(session.teacher.device);
    const int64_t scored = count(kScoreTokens);
    score = windows.distinct_range(windows.distinct() - scored, scored).to(session.teacher.device);
  }
};

// Teacher and student at the end of their last blocks: the divergence of what they say.
double divergence(const Network& teacher, const at::Tensor& x_student,
                  const at::Tensor& x_teacher) {
  const auto hidden = [&](const at::Tensor& x) {
    return norm(teacher.config, x, teacher.output_norm, teacher.compute).flatten(0, 1);
  };
  const at::Tensor student = hidden(x_student);
  const at::Tensor next =
      at::full({student.size(0)}, -1, at::TensorOptions().dtype(at::kLong).device(teacher.device));
  return distillation_loss(student, hidden(x_teacher), teacher.head, next).loss.item<double>();
}

// The divergence right after phase 1, fitted quickly.
Result<double> start_divergence(TrainSession& session, const Sample& sample) {
  const at::NoGradGuard no_grad;
  const Network& teacher = session.teacher;
  const ModelConfig& config = session.config();
  const Rotary rotary = make_rotary(config, session.options.seq_len, teacher.device);
  at::Tensor fit_student = embed(teacher, sample.fit), fit_teacher = fit_student.clone();
  at::Tensor student = embed(teacher, sample.score), reference = student.clone();
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    RABIT_ASSIGN(BlockOutputs outputs, start_block(session, layer, fit_student, fit_teacher, true));
    const auto block = static_cast<size_t>(layer);
    const BlockWeights weights =
        student_weights(session.student.blocks[block], teacher.blocks[block], teacher.compute);
    const auto forward = [&](const BlockWeights& with, const at::Tensor& x) {
      return block_forward(config, with, rotary, x, teacher.compute);
    };
    const BlockWeights& original = teacher.blocks[block];
    fit_student = outputs.student.defined() ? outputs.student : forward(weights, fit_student);
    fit_teacher = outputs.teacher.defined() ? outputs.teacher : forward(original, fit_teacher);
    student = forward(weights, student);
    reference = forward(original, reference);
    session.student.blocks[block] = {};
  }
  return divergence(teacher, student, reference);
}

// One exponent after the other, each over its grid, from the values given.
Status search_alphas(TrainSession& session) {
  const Sample sample(session);
  const QuantizeOptions given = session.options;
  QuantizeOptions best = given;
  double least = INFINITY;
  nlohmann::json tried = nlohmann::json::array();
  const auto search = [&](double QuantizeOptions::*exponent,
                          std::initializer_list<double> grid) -> Status {
    const QuantizeOptions from = best;
    for (const double value : grid) {
      RABIT_CHECK(check_interrupt());
      QuantizeOptions candidate = from;
      candidate.*exponent = value;
      if (std::isfinite(least) && candidate.alpha_in == best.alpha_in &&
          candidate.alpha_out == best.alpha_out) {
        continue;  // measured already
      }
      session.options = quick_start(candidate);
      const auto found = start_divergence(session, sample);
      session.options = given;
      RABIT_CHECK(found);
      tried.push_back({{"alpha_in", candidate.alpha_in},
                       {"alpha_out", candidate.alpha_out},
                       {"divergence", *found}});
      if (*found < least) {
        least = *found;
        best = candidate;
      }
      if (session.observer.progress) {
        session.observer.progress(
            {"search of the exponents", static_cast<int64_t>(tried.size()), 8, *found, 0.0});
      }
    }
    return {};
  };
  RABIT_CHECK(search(&QuantizeOptions::alpha_in, {0.0, 0.25, 0.5, 0.75, 1.0}));
  RABIT_CHECK(search(&QuantizeOptions::alpha_out, {0.0, 0.25, 0.5, 1.0}));
  session.options.alpha_in = best.alpha_in;
  session.options.alpha_out = best.alpha_out;
  session.log["searched"]["alpha_in"] = best.alpha_in;
  session.log["searched"]["alpha_out"] = best.alpha_out;
  session.log["searched"]["alphas_tried"] = tried;
  session.observer.message(fmt::format("found: --alpha-in {} --alpha-out {} (divergence {:.4f})",
                                       best.alpha_in, best.alpha_out, least));
  return {};
}

// x^T x of what each layer reads in the last pass.
class InputTap : public LinearTap {
 public:
  std::array<at::Tensor, kRoleCount> sums;
  int64_t tokens = 0;
  void see(Role role, const at::Tensor& input, const at::Tensor&) override {
    const at::Tensor x = input.flatten(0, -2).to(at::kFloat);
    at::Tensor& sum = sums[index_of(role)];
    if (role == Role::kAttnK || role == Role::kAttnV || role == Role::kFfnUp) {
      sum = sums[index_of(role == Role::kFfnUp ? Role::kFfnGate : Role::kAttnQ)];
      return;
    }
    sum = at::matmul(x.t(), x);
    tokens = x.size(0);
  }
};

struct Candidate {
  int64_t layer = 0;
  Role role = Role::kAttnQ;
  int64_t paths = 0;                // now
  int64_t first_paths = 0;          // divergences[i] is of first_paths + i paths
  std::vector<double> divergences;  // with only this layer quantized
  quant::Shape shape;

  // What `more` paths lower the divergence by, and the bits they take.
  double gain(int64_t more) const {
    const auto at = static_cast<size_t>(paths - first_paths);
    return divergences[at] - divergences[at + static_cast<size_t>(more)];
  }
  int64_t cost(int64_t more) const {
    return quant::packed_bits({shape.d_out, shape.d_in, paths + more}) -
           quant::packed_bits({shape.d_out, shape.d_in, paths});
  }
  int64_t most_more() const {
    return first_paths + static_cast<int64_t>(divergences.size()) - 1 - paths;
  }
};

// The divergence that each layer causes alone, by its number of paths.
Result<std::vector<Candidate>> measure_sensitivity(TrainSession& session) {
  const at::NoGradGuard no_grad;
  const Network& teacher = session.teacher;
  const ModelConfig& config = session.config();
  const Sample sample(session);
  const Rotary rotary = make_rotary(config, session.options.seq_len, teacher.device);
  const QuantizeOptions options = quick_start(session.options);
  std::vector<at::Tensor> streams = {embed(teacher, sample.score)};
  for (const BlockWeights& block : teacher.blocks) {
    streams.push_back(block_forward(config, block, rotary, streams.back(), teacher.compute));
  }
  at::Tensor x_fit = embed(teacher, sample.fit);
  std::vector<Candidate> candidates;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const auto block = static_cast<size_t>(layer);
    InputTap tap;
    x_fit = block_forward(config, teacher.blocks[block], rotary, x_fit, teacher.compute, &tap);
    for (const Role role : kRoles) {
      const LinearShape sizes = linear_shape(config, role);
      const int64_t first = session.bits.paths(layer, role);
      Candidate candidate{layer, role, first, first, {}, {sizes.d_out, sizes.d_in, first}};
      const std::string name = linear_name(layer, role);
      RABIT_ASSIGN(const at::Tensor weight,
                   read_tensor(session.model, name + ".weight", {sizes.d_out, sizes.d_in}));
      const LayerProblem problem{name,
                                 weight.to(teacher.device),
                                 tap.sums[index_of(role)] / static_cast<double>(tap.tokens),
                                 {}};
      for (int64_t paths = first; paths <= std::min(quant::kMaxPaths, first + kMostExtraPaths);
           ++paths) {
        RABIT_CHECK(check_interrupt());
        RABIT_ASSIGN(const LayerFit fit, fit_layer(problem, paths, options, session.pool));
        const StudentLinear linear = restore_student_linear(
            Method::kRabit, fit.latent, to_tensor(fit.scales.g, {paths, sizes.d_out}),
            to_tensor(fit.scales.h, {paths, sizes.d_in}), {}, teacher.device);
        BlockWeights weights = teacher.blocks[block];
        weights.replace(role, fake_quant_weight(linear, teacher.compute));
        at::Tensor x = block_forward(config, weights, rotary, streams[block], teacher.compute);
        for (size_t next = block + 1; next < teacher.blocks.size(); ++next) {
          x = block_forward(config, teacher.blocks[next], rotary, x, teacher.compute);
        }
        candidate.divergences.push_back(divergence(teacher, x, streams.back()));
      }
      candidates.push_back(std::move(candidate));
    }
    if (session.observer.progress) {
      session.observer.progress({"sensitivity", layer + 1, config.layers, NAN, 0.0});
    }
  }
  return candidates;
}

// Path after path to the layer where it lowers the divergence most for its bits, while they last.
Status spend_bits(TrainSession& session) {
  const double target = session.options.target_bpw;
  RABIT_ASSIGN(std::vector<Candidate> candidates, measure_sensitivity(session));
  PlanSize size = plan_size(session.config(), session.bits);
  nlohmann::json measured = nlohmann::json::array();
  for (const Candidate& candidate : candidates) {
    measured.push_back({{"layer", linear_name(candidate.layer, candidate.role)},
                        {"paths", candidate.first_paths},
                        {"divergences", candidate.divergences}});
  }
  const double budget = target * static_cast<double>(size.weights);
  while (true) {
    Candidate* best = nullptr;
    int64_t best_more = 0;
    double best_worth = 0.0;
    for (Candidate& candidate : candidates) {
      // One path more may gain nothing and two a lot.
      for (int64_t more = 1; more <= candidate.most_more(); ++more) {
        const double worth = candidate.gain(more) / static_cast<double>(candidate.cost(more));
        if (worth > best_worth && static_cast<double>(size.bits + candidate.cost(more)) <= budget) {
          best = &candidate;
          best_more = more;
          best_worth = worth;
        }
      }
    }
    if (best == nullptr) {
      break;
    }
    size.bits += best->cost(best_more);
    best->paths += best_more;
  }
  for (const Candidate& candidate : candidates) {
    if (candidate.paths != candidate.first_paths) {
      session.bits.set(candidate.layer, candidate.role, candidate.paths);
    }
  }
  session.log["searched"]["bits"] = session.bits.text();
  session.log["searched"]["sensitivity"] = measured;
  session.observer.message(fmt::format("found: --bits {} ({:.4f} bits a weight of {} asked for)",
                                       session.bits.text(), size.bits_per_weight(), target));
  return {};
}

}  // namespace

PlanSize plan_size(const ModelConfig& config, const PathPlan& plan) {
  PlanSize size;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    for (const Role role : kRoles) {
      const LinearShape shape = linear_shape(config, role);
      size.weights += shape.d_out * shape.d_in;
      size.bits += quant::packed_bits({shape.d_out, shape.d_in, plan.paths(layer, role)});
    }
  }
  return size;
}

Status search_settings(TrainSession& session) {
  if (session.options.alpha_search) {
    RABIT_CHECK(search_alphas(session));
  }
  if (session.options.target_bpw > 0.0) {
    RABIT_CHECK(spend_bits(session));
  }
  return {};
}

}  // namespace rabit::train
