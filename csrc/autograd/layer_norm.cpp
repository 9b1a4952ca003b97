// The autograd node of layer_norm: see node.h.
#include "node.h"

namespace gk {
namespace {

struct LayerNormBackward : OpNode<5> {  // x, weight, bias, mean, rstd
  int64_t num_dims = 0;
  double eps = 0;

  std::string name() const override { return "GradkernelsLayerNormBackward"; }
  variable_list gradients_of(const variable_list& dy) override {
    const Tensor x = unpack(0);
    const auto weight = unpack_optional(1), bias = unpack_optional(2);
    const auto mask = output_mask<3>();
    return as_list(run_backward(
        [&] { return call<"layer_norm_bwd_differentiable", Tensors<3>>(dy[0], x, weight, bias, num_dims, eps, mask, stats); },
        [&] {
          return call<"layer_norm_bwd", Tensors<3>>(dy[0], x, unpack(3), unpack(4), weight, bias, num_dims, mask, stats);
        }));
  }
};

Tensor layer_norm(const Tensor& x, int64_t num_dims, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                  const OptionalTensor& stats) {
  if (forward_mode(x, weight, bias)) return call<"layer_norm_differentiable", Tensor>(x, weight, bias, num_dims, eps);
  const auto node = node_for<LayerNormBackward>(x, weight, bias);
  const auto [y, mean, rstd] =
      below_autograd([&] { return call<"layer_norm_fwd", Tensors<3>>(x, weight, bias, num_dims, eps); });
  if (node) {
    torch::autograd::set_history(y, node);
    node->keep(x, weight, bias, mean, rstd);
    node->num_dims = num_dims;
    node->eps = eps;
    node->stats = stats;
  }
  return y;
}

}  // namespace
}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) { m.impl("layer_norm", gk::layer_norm); }
