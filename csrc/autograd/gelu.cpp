// The autograd node of gelu: see node.h.
#include "node.h"

namespace gk {
namespace {

struct GeluBackward : OpNode<1> {  // x
  bool tanh = false;

  std::string name() const override { return "GradkernelsGeluBackward"; }
  variable_list gradients_of(const variable_list& dy) override {
    const Tensor x = unpack(0);
    return {run_backward([&] { return call<"gelu_bwd_differentiable", Tensor>(dy[0], x, tanh, stats); },
                         [&] { return call<"gelu_bwd", Tensor>(dy[0], x, tanh, stats); })};
  }
};

Tensor gelu(const Tensor& x, bool tanh, const OptionalTensor& stats) {
  if (forward_mode(x)) return call<"gelu_differentiable", Tensor>(x, tanh);
  const auto node = node_for<GeluBackward>(x);
  Tensor y = below_autograd([&] { return call<"gelu_fwd", Tensor>(x, tanh); });
  if (node) {
    torch::autograd::set_history(y, node);
    node->keep(x);
    node->tanh = tanh;
    node->stats = stats;
  }
  return y;
}

}  // namespace
}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) { m.impl("gelu", gk::gelu); }
