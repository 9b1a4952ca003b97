// The autograd node of add_layer_norm: see node.h.
#include "node.h"

namespace gk {
namespace {

struct AddLayerNormBackward : OpNode<5> {  // new_residual, weight, bias, mean, rstd
  int64_t num_dims = 0;
  double eps = 0;
  at::ScalarType x_dtype = at::kFloat;

  std::string name() const override { return "GradkernelsAddLayerNormBackward"; }
  variable_list gradients_of(const variable_list& gradients) override {
    const auto dy = optional(gradients[0]), dnew_residual = optional(gradients[1]);
    const Tensor h = unpack(0);
    const auto weight = unpack_optional(1), bias = unpack_optional(2);
    const auto mask = output_mask<4>();
    return as_list(run_backward(
        [&] {
          return call<"add_layer_norm_bwd_differentiable", Tensors<4>>(dy, dnew_residual, h, weight, bias, num_dims, eps,
                                                                       x_dtype, mask, stats);
        },
        [&] {
          return call<"add_layer_norm_bwd", Tensors<4>>(dy, dnew_residual, h, unpack(3), unpack(4), weight, bias, num_dims,
                                                        x_dtype, mask, stats);
        }));
  }
};

Tensors<2> add_layer_norm(const Tensor& x, const Tensor& residual, int64_t num_dims, const OptionalTensor& weight,
                          const OptionalTensor& bias, double eps, const OptionalTensor& stats) {
  if (forward_mode(x, residual, weight, bias))
    return call<"add_layer_norm_differentiable", Tensors<2>>(x, residual, weight, bias, num_dims, eps);
  const auto node = node_for<AddLayerNormBackward>(x, residual, weight, bias);
  const auto [y, new_residual, mean, rstd] =
      below_autograd([&] { return call<"add_layer_norm_fwd", Tensors<4>>(x, residual, weight, bias, num_dims, eps); });
  if (node) {
    torch::autograd::set_history(std::vector<Tensor>{y, new_residual}, node);
    node->keep(Output{new_residual}, weight, bias, mean, rstd);
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
