// The autograd node of residual: see node.h.
#include "node.h"

#include <ATen/ops/alias.h>

namespace gk {
namespace {

struct ResidualBackward : OpNode<0> {
  std::string name() const override { return "GradkernelsResidualBackward"; }
  variable_list gradients_of(const variable_list& gradients) override {
    const auto dskip = optional(gradients[0]), dbranch = optional(gradients[1]);
    return {run_backward([&] { return call<"residual_bwd_differentiable", Tensor>(dskip, dbranch, stats); },
                         [&] { return call<"residual_bwd", Tensor>(dskip, dbranch, stats); })};
  }
};

// Both outputs are x. They are marked as views of one node with several outputs, so that writing into either in place,
// which would change the other behind autograd's back, raises the error PyTorch users know from split() and unbind().
Tensors<2> residual_fork(const Tensor& x, const OptionalTensor& stats) {
  const auto node = node_for<ResidualBackward>(x);
  const auto view = [&] {
    Tensor alias = below_autograd([&] { return at::alias(x); });
    return torch::autograd::as_view(x, alias, /*is_bw_differentiable=*/true, /*is_fw_differentiable=*/true, nullptr, nullptr,
                                    torch::autograd::CreationMeta::MULTI_OUTPUT_NODE);
  };
  if (!node || forward_mode(x)) return {at::alias(x), at::alias(x)};
  Tensor skip = view(), branch = view();
  node->stats = stats;
  torch::autograd::set_history(std::vector<Tensor>{skip, branch}, node);
  return {skip, branch};
}

}  // namespace
}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) { m.impl("residual_fork", gk::residual_fork); }
