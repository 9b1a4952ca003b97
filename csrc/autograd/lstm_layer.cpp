// The autograd node of lstm_layer: see node.h.
#include "node.h"

namespace gk {
namespace {

// x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, y, gates, cells
struct LstmLayerBackward : OpNode<12> {
  OptionalTensor time_stats;
  bool reverse = false;

  std::string name() const override { return "GradkernelsLstmLayerBackward"; }
  variable_list gradients_of(const variable_list& gradients) override {
    const auto dy = optional(gradients[0]), dh_n = optional(gradients[1]), dc_n = optional(gradients[2]);
    const Tensor x = unpack(0), h0 = unpack(1), c0 = unpack(2), w_ih = unpack(3), w_hh = unpack(4);
    const auto b_ih = unpack_optional(5), b_hh = unpack_optional(6), w_hr = unpack_optional(7), sizes = unpack_optional(8);
    const auto mask = output_mask<8>();
    return as_list(run_backward(
        [&] {
          return call<"lstm_layer_bwd_differentiable", Tensors<8>>(dy, dh_n, dc_n, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr,
                                                                   sizes, reverse, mask, stats, time_stats);
        },
        [&] {
          return call<"lstm_layer_bwd", Tensors<8>>(dy, dh_n, dc_n, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, sizes, unpack(9),
                                                    unpack(10), unpack(11), reverse, mask, stats, time_stats);
        }));
  }
};

Tensors<3> lstm_layer(const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih, const Tensor& weight_hh,
                      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
                      const OptionalTensor& batch_sizes, bool reverse, const OptionalTensor& stats,
                      const OptionalTensor& time_stats) {
  if (forward_mode(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)) {
    return call<"lstm_layer_differentiable", Tensors<3>>(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
                                                         batch_sizes, reverse);
  }
  const auto node = node_for<LstmLayerBackward>(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr);
  const auto [y, h_n, c_n, gates, cells] = below_autograd([&] {
    return call<"lstm_layer_fwd", Tensors<5>>(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes,
                                              reverse);
  });
  if (node) {
    torch::autograd::set_history(std::vector<Tensor>{y, h_n, c_n}, node);
    node->keep(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, Output{y}, gates, cells);
    node->reverse = reverse;
    node->stats = stats;
    node->time_stats = time_stats;
  }
  return {y, h_n, c_n};
}

}  // namespace
}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) { m.impl("lstm_layer", gk::lstm_layer); }
