// The autograd node of lstm_layer: see node.h.
#include "node.h"

namespace gk {
namespace {

using Layer = std::tuple<Tensor, Tensor, Tensor>;
using LayerFwd = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                                    const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                                    const OptionalTensor&, const OptionalTensor&, bool);
using LayerDifferentiable = Layer(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                  const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                  bool);
using LayerGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using LayerBwd = LayerGradients(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                const Tensor&, const Tensor&, bool, bool, bool, const OptionalTensor&, const OptionalTensor&);
using LayerBwdDifferentiable = LayerGradients(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                              const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                              const OptionalTensor&, bool, bool, bool, const OptionalTensor&,
                                              const OptionalTensor&);

struct LstmLayerBackward : Node {
  SavedVariable x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, y, gates, cells;
  OptionalTensor stats, time_stats;
  bool reverse = false;

  std::string name() const override { return "GradkernelsLstmLayerBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved :
         {&x, &h0, &c0, &weight_ih, &weight_hh, &bias_ih, &bias_hh, &weight_hr, &batch_sizes, &y, &gates, &cells}) {
      saved->reset_data();
    }
  }
  variable_list apply(variable_list&& gradients) override {
    static const auto kernel = find<LayerBwd>("gradkernels::lstm_layer_bwd");
    static const auto differentiable = find<LayerBwdDifferentiable>("gradkernels::lstm_layer_bwd_differentiable");
    if (!gradients[0].defined() && !gradients[1].defined() && !gradients[2].defined()) return variable_list(8);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto dy = optional(gradients[0]), dh_n = optional(gradients[1]), dc_n = optional(gradients[2]);
    const Tensor in = x.unpack(), h = h0.unpack(), c = c0.unpack(), w_ih = weight_ih.unpack(), w_hh = weight_hh.unpack();
    const auto b_ih = optional(bias_ih.unpack()), b_hh = optional(bias_hh.unpack()), w_hr = optional(weight_hr.unpack());
    const auto sizes = optional(batch_sizes.unpack());
    const bool inputs = task_should_compute_output(0);
    bool weights = false;
    for (size_t k = 3; k < 8; ++k) weights = weights || task_should_compute_output(k);
    const auto [dx, dh0, dc0, dweight_ih, dweight_hh, dbias, dweight_hr] = run_backward(
        [&] {
          return differentiable.call(dy, dh_n, dc_n, in, h, c, w_ih, w_hh, b_ih, b_hh, w_hr, sizes, reverse, inputs, weights,
                                     stats, time_stats);
        },
        [&] {
          return kernel.call(dy, dh_n, dc_n, in, h, c, w_ih, w_hh, b_ih, b_hh, w_hr, sizes, y.unpack(getptr()), gates.unpack(),
                             cells.unpack(), reverse, inputs, weights, stats, time_stats);
        });
    const auto wanted = [&](size_t k, const Tensor& d) { return task_should_compute_output(k) ? d : Tensor(); };
    const auto [dbias_ih, dbias_hh] = of_both_biases(wanted(5, dbias), wanted(6, dbias));
    return {wanted(0, dx),         wanted(1, dh0), wanted(2, dc0), wanted(3, dweight_ih),
            wanted(4, dweight_hh), dbias_ih,       dbias_hh,       wanted(7, dweight_hr)};
  }
};

Layer lstm_layer(const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih, const Tensor& weight_hh,
                 const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
                 const OptionalTensor& batch_sizes, bool reverse, const OptionalTensor& stats,
                 const OptionalTensor& time_stats) {
  static const auto fwd = find<LayerFwd>("gradkernels::lstm_layer_fwd");
  static const auto differentiable = find<LayerDifferentiable>("gradkernels::lstm_layer_differentiable");
  if (forward_mode(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)) {
    return differentiable.call(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse);
  }
  const auto node = node_for<LstmLayerBackward>(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr);
  const auto [y, h_n, c_n, gates, cells] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return fwd.call(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse);
  }();
  if (node) {
    torch::autograd::set_history(std::vector<Tensor>{y, h_n, c_n}, node);
    node->x = save(x);
    node->h0 = save(h0);
    node->c0 = save(c0);
    node->weight_ih = save(weight_ih);
    node->weight_hh = save(weight_hh);
    node->bias_ih = save(bias_ih);
    node->bias_hh = save(bias_hh);
    node->weight_hr = save(weight_hr);
    node->batch_sizes = save(batch_sizes);
    node->y = SavedVariable(y, /*is_output=*/true);
    node->gates = save(gates);
    node->cells = save(cells);
    node->reverse = reverse;
    node->stats = stats;
    node->time_stats = time_stats;
  }
  return {y, h_n, c_n};
}

}  // namespace
}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) { m.impl("lstm_layer", gk::lstm_layer); }
