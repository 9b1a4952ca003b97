// The autograd node of lstm_cell: see node.h.
#include "node.h"

namespace gk {
namespace {

struct LstmCellBackward : OpNode<8> {  // x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, gates
  std::string name() const override { return "GradkernelsLstmCellBackward"; }
  variable_list gradients_of(const variable_list& gradients) override {
    const auto dh_next = optional(gradients[0]), dc_next = optional(gradients[1]);
    const Tensor x = unpack(0), h = unpack(1), c = unpack(2), w_ih = unpack(3), w_hh = unpack(4);
    const auto b_ih = unpack_optional(5), b_hh = unpack_optional(6);
    const auto mask = output_mask<7>();
    return as_list(run_backward(
        [&] {
          return call<"lstm_cell_bwd_differentiable", Tensors<7>>(dh_next, dc_next, x, h, c, w_ih, w_hh, b_ih, b_hh, mask,
                                                                  stats);
        },
        [&] {
          return call<"lstm_cell_bwd", Tensors<7>>(dh_next, dc_next, x, h, c, w_ih, w_hh, b_ih, b_hh, unpack(7), mask, stats);
        }));
  }
};

Tensors<2> lstm_cell(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
                     const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& stats) {
  if (forward_mode(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh)) {
    return call<"lstm_cell_differentiable", Tensors<2>>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  }
  const auto node = node_for<LstmCellBackward>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  const auto [h_next, c_next, gates] =
      below_autograd([&] { return call<"lstm_cell_fwd", Tensors<3>>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh); });
  if (node) {
    torch::autograd::set_history(std::vector<Tensor>{h_next, c_next}, node);
    node->keep(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, gates);
    node->stats = stats;
  }
  return {h_next, c_next};
}

}  // namespace
}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) { m.impl("lstm_cell", gk::lstm_cell); }
