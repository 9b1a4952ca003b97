// The autograd node of gelu: see node.h.
#include "node.h"

namespace gk {
namespace {

struct GeluBackward : Node {
  SavedVariable x;
  bool tanh = false;
  OptionalTensor stats;

  std::string name() const override { return "GradkernelsGeluBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
  }
  variable_list apply(variable_list&& dy) override {
    using Signature = Tensor(const Tensor&, const Tensor&, bool, const OptionalTensor&);
    static const auto kernel = find<Signature>("gradkernels::gelu_bwd");
    static const auto differentiable = find<Signature>("gradkernels::gelu_bwd_differentiable");
    if (!dy[0].defined()) return {Tensor()};
    std::lock_guard<std::mutex> lock(mutex_);
    const Tensor x_saved = x.unpack();
    return {run_backward([&] { return differentiable.call(dy[0], x_saved, tanh, stats); },
                         [&] { return kernel.call(dy[0], x_saved, tanh, stats); })};
  }
};

Tensor gelu(const Tensor& x, bool tanh, const OptionalTensor& stats) {
  static const auto fwd = find<Tensor(const Tensor&, bool)>("gradkernels::gelu_fwd");
  static const auto differentiable = find<Tensor(const Tensor&, bool)>("gradkernels::gelu_differentiable");
  if (forward_mode(x)) return differentiable.call(x, tanh);
  const auto node = node_for<GeluBackward>(x);
  Tensor y = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return fwd.call(x, tanh);
  }();
  if (node) {
    node->x = save(x);
    node->tanh = tanh;
    node->stats = stats;
    torch::autograd::set_history(y, node);
  }
  return y;
}

}  // namespace
}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) { m.impl("gelu", gk::gelu); }
