// The autograd node of gelu: see node.h.
#include "node.h"

namespace gk {
namespace {

struct GeluBackward : OpNode<1> {  // x
  bool tanh = false;

  std::string name() const override { return "GradkernelsGeluBackward"; }
  variable_list gradients_of(const variable_list& dy) override {
    static const Op<Tensor> kernel("gelu_bwd"), differentiable("gelu_bwd_differentiable");
    const Tensor x = unpack(0);
    return {run_backward([&] { return differentiable(dy[0], x, tanh, stats); }, [&] { return kernel(dy[0], x, tanh, stats); })};
  }
};

Tensor gelu(const Tensor& x, bool tanh, const OptionalTensor& stats) {
  static const Op<Tensor> forward("gelu_fwd"), differentiable("gelu_differentiable");
  if (forward_mode(x)) return differentiable(x, tanh);
  const auto node = node_for<GeluBackward>(x);
  Tensor y = below_autograd([&] { return forward(x, tanh); });
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
