#include "train/kl_loss.h"

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#ifdef RABIT_CUDA
#include "train/gpu_ops.h"
#endif

namespace rabit::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class ChunkedLoss : public torch::autograd::Function<ChunkedLoss> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& student,
                               const at::Tensor& teacher, const at::Tensor& head,
                               const at::Tensor& next, const LossShares& shares,
                               int64_t chunk_logits, bool backward) {
    const int64_t tokens = student.size(0);
    const int64_t chunk = std::max<int64_t>(1, chunk_logits / head.size(0));
    const double t = shares.temperature, r = shares.reverse, c = shares.cross_entropy;
    const double divergence_weight = (1.0 - c) / static_cast<double>(tokens);
    const at::Tensor known = (next >= 0).to(at::kFloat);  // tokens whose successor is known
    const at::Tensor share = known / known.sum().clamp_min(1.0);
    at::Tensor nll = at::zeros({2}, student.options().dtype(at::kDouble));
    at::Tensor loss = at::zeros({}, student.options().dtype(at::kDouble));
    at::Tensor grad = backward ? at::empty_like(student) : at::Tensor();
    [[maybe_unused]] const double entropy_weight =
        c > 0.0 ? c / std::max(1.0, known.sum().item<double>()) : 0.0;
    for (int64_t begin = 0; begin < tokens; begin += chunk) {
      const int64_t count = std::min(chunk, tokens - begin);
#ifdef RABIT_CUDA
      if (student.is_cuda() && student.scalar_type() == at::kBFloat16) {
        const auto logits_of = [&](const at::Tensor& hidden) {
          return at::matmul(hidden.narrow(0, begin, count), head.t());
        };
        const at::Tensor logits = logits_of(student);
        const at::Tensor sums =
            gpu_kl_backward(logits, logits_of(teacher), next.narrow(0, begin, count), shares,
                            divergence_weight, entropy_weight)
                .to(at::kDouble);
        loss += sums.select(1, 0).sum() * (t * t * divergence_weight);
        nll += (sums.narrow(1, 1, 2) * share.narrow(0, begin, count).unsqueeze(1)).sum(0);
        if (backward) {
          grad.narrow(0, begin, count).copy_(at::matmul(logits, head));
        }
        continue;
      }
#endif
      const auto logits_of = [&](const at::Tensor& hidden) {
        return at::matmul(hidden.narrow(0, begin, count), head.t()).to(at::kFloat);
      };
      const auto log_probabilities = [&](const at::Tensor& logits) {
        return at::log_softmax(t == 1.0 ? logits : logits / t, -1);
      };
      const at::Tensor logits = logits_of(student), logits_t = logits_of(teacher);
      const at::Tensor log_t = log_probabilities(logits_t);
      const at::Tensor log_s = log_probabilities(logits);
      const at::Tensor target = next.narrow(0, begin, count).clamp_min(0).unsqueeze(-1);
      const at::Tensor here = share.narrow(0, begin, count);
      const auto cross_entropy = [&](const at::Tensor& x, const at::Tensor& log_p) {
        const at::Tensor log_one = t == 1.0 ? log_p : at::log_softmax(x, -1);
        return -(log_one.gather(-1, target).squeeze(-1) * here).sum(0, false, at::kDouble);
      };
      nll += at::stack({cross_entropy(logits, log_s), cross_entropy(logits_t, log_t)});
      const at::Tensor p_t = at::exp(log_t), p_s = at::exp(log_s);
      // d KL(p || q) / d logits = (q - p) / T;  d KL(q || p) / d logits = q (log q/p - KL(q || p))
      // / T
      at::Tensor d_logits = (p_s - p_t).mul_((1.0 - r) * t * divergence_weight);
      at::Tensor divergence = (p_t * (log_t - log_s)).sum(-1) * (1.0 - r);
      if (r > 0.0) {
        const at::Tensor ratio = log_s - log_t;
        const at::Tensor reverse = (p_s * ratio).sum(-1, true);
        d_logits.add_(p_s * (ratio - reverse), r * t * divergence_weight);
        divergence = divergence + reverse.squeeze(-1) * r;
      }
      loss += divergence.to(at::kDouble).sum() * (t * t * divergence_weight);
      if (c > 0.0) {
        const at::Tensor weight = (here * c).unsqueeze(-1);
        d_logits.add_(at::softmax(logits, -1) * weight);
        d_logits.scatter_add_(-1, target, -weight);
      }
      if (backward) {
        grad.narrow(0, begin, count).copy_(at::matmul(d_logits.to(head.scalar_type()), head));
      }
    }
    loss += nll[0] * c;
    if (backward) {
      context->save_for_backward({grad});
    }
    context->mark_non_differentiable({nll});
    return {loss.to(at::kFloat), nll};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const at::Tensor grad = context->get_saved_variables()[0];
    return {(grad.to(at::kFloat) * grads[0]).to(grad.scalar_type()),
            at::Tensor(),
            at::Tensor(),
            at::Tensor(),
            at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }
};

}  // namespace

DistillationLoss distillation_loss(const at::Tensor& student, const at::Tensor& teacher,
                                   const at::Tensor& head, const at::Tensor& next,
                                   const LossShares& shares, int64_t chunk_logits) {
  const bool backward = at::GradMode::is_enabled() && student.requires_grad();
  const variable_list out =
      ChunkedLoss::apply(student, teacher, head, next, shares, chunk_logits, backward);
  return {out[0], out[1]};
}

}  // namespace rabit::train
