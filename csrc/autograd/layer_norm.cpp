// The autograd node of layer_norm: see node.h.
#include "node.h"

namespace gk {
namespace {

struct LayerNormBackward : Node {
  SavedVariable x, mean, rstd, weight, bias;
  int64_t num_dims = 0;
  double eps = 0;
  OptionalTensor stats;

  std::string name() const override { return "GradkernelsLayerNormBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&x, &mean, &rstd, &weight, &bias}) saved->reset_data();
  }
  variable_list apply(variable_list&& dy) override {
    using Gradients = std::tuple<Tensor, Tensor, Tensor>;
    static const auto kernel =
        find<Gradients(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                       int64_t, bool, const OptionalTensor&)>("gradkernels::layer_norm_bwd");
    static const auto differentiable =
        find<Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double, bool,
                       const OptionalTensor&)>("gradkernels::layer_norm_bwd_differentiable");
    if (!dy[0].defined()) return variable_list(3);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto w = optional(weight.unpack()), b = optional(bias.unpack());
    const bool columns = task_should_compute_output(1) || task_should_compute_output(2);
    const Tensor x_saved = x.unpack();
    const auto [dx, dweight, dbias] =
        run_backward([&] { return differentiable.call(dy[0], x_saved, w, b, num_dims, eps, columns, stats); },
                     [&] { return kernel.call(dy[0], x_saved, mean.unpack(), rstd.unpack(), w, b, num_dims, columns, stats); });
    return {dx, w && columns ? dweight : Tensor(), b && columns ? dbias : Tensor()};
  }
};

Tensor layer_norm(const Tensor& x, int64_t num_dims, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                  const OptionalTensor& stats) {
  static const auto fwd =
      find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double)>(
          "gradkernels::layer_norm_fwd");
  static const auto differentiable = find<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double)>(
      "gradkernels::layer_norm_differentiable");
  if (forward_mode(x, weight, bias)) return differentiable.call(x, weight, bias, num_dims, eps);
  const auto node = node_for<LayerNormBackward>(x, weight, bias);
  const auto [y, mean, rstd] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return fwd.call(x, weight, bias, num_dims, eps);
  }();
  if (node) {
    node->x = save(x);
    node->mean = save(mean);
    node->rstd = save(rstd);
    node->weight = save(weight);
    node->bias = save(bias);
    node->num_dims = num_dims;
    node->eps = eps;
    node->stats = stats;
    torch::autograd::set_history(y, node);
  }
  return y;
}

}  // namespace
}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) { m.impl("layer_norm", gk::layer_norm); }
