#include "train/kl_loss.h"

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace rabit::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Logits kept at once: 2 models x 2^26 floats.
constexpr int64_t kChunkLogits = int64_t{1} << 26;

class ChunkedKl : public torch::autograd::Function<ChunkedKl> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& student,
                            const at::Tensor& teacher, const at::Tensor& head) {
    const int64_t tokens = student.size(0);
    const int64_t chunk = std::max<int64_t>(1, kChunkLogits / head.size(0));
    at::Tensor loss = at::zeros({}, student.options().dtype(at::kDouble));
    at::Tensor grad = at::empty_like(student);
    for (int64_t begin = 0; begin < tokens; begin += chunk) {
      const int64_t count = std::min(chunk, tokens - begin);
      const auto log_probabilities = [&](const at::Tensor& hidden) {
        return at::log_softmax(at::matmul(hidden.narrow(0, begin, count), head.t()).to(at::kFloat),
                               -1);
      };
      const at::Tensor log_t = log_probabilities(teacher);
      const at::Tensor log_s = log_probabilities(student);
      const at::Tensor p_t = at::exp(log_t);
      loss += (p_t * (log_t - log_s)).sum(-1).to(at::kDouble).sum();
      // d mean KL / d student logits = (softmax(student) - softmax(teacher)) / tokens
      const at::Tensor d_logits = (at::exp(log_s) - p_t).div_(static_cast<double>(tokens));
      grad.narrow(0, begin, count).copy_(at::matmul(d_logits.to(head.scalar_type()), head));
    }
    context->save_for_backward({grad});
    return (loss / static_cast<double>(tokens)).to(at::kFloat);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const at::Tensor grad = context->get_saved_variables()[0];
    return {grad * grads[0].to(grad.scalar_type()), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor kl_divergence(const at::Tensor& student, const at::Tensor& teacher,
                         const at::Tensor& head) {
  return ChunkedKl::apply(student, teacher, head);
}

}  // namespace rabit::train
