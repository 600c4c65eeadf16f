#include "train/recompute.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

namespace rabit::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Body = std::function<at::Tensor(const at::Tensor&)>;

struct KeptBody : torch::CustomClassHolder {
  explicit KeptBody(Body kept) : body(std::move(kept)) {}
  Body body;
};

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor&,
                            const Body& body) {
    context->save_for_backward({x});
    context->saved_data["body"] = c10::IValue::make_capsule(c10::make_intrusive<KeptBody>(body));
    return body(x);  // without a graph here
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto kept = context->saved_data["body"].toCapsule();
    const at::Tensor x = context->get_saved_variables()[0].detach().set_requires_grad(true);
    at::Tensor y;
    {
      const at::AutoGradMode with_graph(true);
      y = static_cast<const KeptBody&>(*kept).body(x);
    }
    y.backward(grads[0]);
    return {x.grad(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor recomputed(Body body, const at::Tensor& x, const at::Tensor& leaf) {
  return Recompute::apply(x, leaf, body);
}

}  // namespace rabit::train
