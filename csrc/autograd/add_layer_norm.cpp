// The autograd node of add_layer_norm: see node.h.
#include "node.h"

namespace gk {
namespace {

struct AddLayerNormBackward : Node {
  SavedVariable new_residual, mean, rstd, weight, bias;
  int64_t num_dims = 0;
  double eps = 0;
  at::ScalarType x_dtype = at::kFloat;
  OptionalTensor stats;

  std::string name() const override { return "GradkernelsAddLayerNormBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&new_residual, &mean, &rstd, &weight, &bias}) saved->reset_data();
  }
  variable_list apply(variable_list&& gradients) override {
    using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
    static const auto kernel = find<Gradients(
        const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
        const OptionalTensor&, int64_t, at::ScalarType, bool, bool, const OptionalTensor&)>("gradkernels::add_layer_norm_bwd");
    static const auto differentiable =
        find<Gradients(const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                       const OptionalTensor&, int64_t, double, at::ScalarType, bool, bool, const OptionalTensor&)>(
            "gradkernels::add_layer_norm_bwd_differentiable");
    if (!gradients[0].defined() && !gradients[1].defined()) return variable_list(4);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto dy = optional(gradients[0]), dnew_residual = optional(gradients[1]);
    const auto w = optional(weight.unpack()), b = optional(bias.unpack());
    const Tensor h = new_residual.unpack(getptr());
    const bool of_x = task_should_compute_output(0), of_residual = task_should_compute_output(1);
    const bool separate_dx = of_x && (of_residual || x_dtype != h.scalar_type());
    const bool columns = task_should_compute_output(2) || task_should_compute_output(3);
    const auto [dresidual, dx, dweight, dbias] = run_backward(
        [&] { return differentiable.call(dy, dnew_residual, h, w, b, num_dims, eps, x_dtype, separate_dx, columns, stats); },
        [&] {
          return kernel.call(dy, dnew_residual, h, mean.unpack(), rstd.unpack(), w, b, num_dims, x_dtype, separate_dx, columns,
                             stats);
        });
    return {of_x ? (separate_dx ? dx : dresidual) : Tensor(), of_residual ? dresidual : Tensor(),
            w && columns ? dweight : Tensor(), b && columns ? dbias : Tensor()};
  }
};

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, int64_t num_dims,
                                          const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                          const OptionalTensor& stats) {
  static const auto fwd = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                                          const OptionalTensor&, int64_t, double)>(
      "gradkernels::add_layer_norm_fwd");
  static const auto differentiable =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
                                      double)>("gradkernels::add_layer_norm_differentiable");
  if (forward_mode(x, residual, weight, bias)) return differentiable.call(x, residual, weight, bias, num_dims, eps);
  const auto node = node_for<AddLayerNormBackward>(x, residual, weight, bias);
  const auto [y, new_residual, mean, rstd] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return fwd.call(x, residual, weight, bias, num_dims, eps);
  }();
  if (node) {
    torch::autograd::set_history(std::vector<Tensor>{y, new_residual}, node);
    node->new_residual = SavedVariable(new_residual, /*is_output=*/true);
    node->mean = save(mean);
    node->rstd = save(rstd);
    node->weight = save(weight);
    node->bias = save(bias);
    node->num_dims = num_dims;
    node->eps = eps;
    node->x_dtype = x.scalar_type();
    node->stats = stats;
  }
  return {y, new_residual};
}

}  // namespace
}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) { m.impl("add_layer_norm", gk::add_layer_norm); }
