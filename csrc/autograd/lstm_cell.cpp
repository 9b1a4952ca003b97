// The autograd node of lstm_cell: see node.h.
#include "node.h"

namespace gk {
namespace {

using Cell = std::tuple<Tensor, Tensor>;
using CellFwd = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                   const OptionalTensor&, const OptionalTensor&);
using CellDifferentiable = Cell(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const OptionalTensor&, const OptionalTensor&);
using CellGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using CellBwd = CellGradients(const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, bool,
                              bool, const OptionalTensor&);
using CellBwdDifferentiable = CellGradients(const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                            const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                            const OptionalTensor&, bool, bool, const OptionalTensor&);

struct LstmCellBackward : Node {
  SavedVariable x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, gates;
  OptionalTensor stats;

  std::string name() const override { return "GradkernelsLstmCellBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&x, &h, &c, &weight_ih, &weight_hh, &bias_ih, &bias_hh, &gates}) saved->reset_data();
  }
  variable_list apply(variable_list&& gradients) override {
    static const auto kernel = find<CellBwd>("gradkernels::lstm_cell_bwd");
    static const auto differentiable = find<CellBwdDifferentiable>("gradkernels::lstm_cell_bwd_differentiable");
    if (!gradients[0].defined() && !gradients[1].defined()) return variable_list(7);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto dh_next = optional(gradients[0]), dc_next = optional(gradients[1]);
    const Tensor in = x.unpack(), h_in = h.unpack(), c_in = c.unpack(), w_ih = weight_ih.unpack(), w_hh = weight_hh.unpack();
    const auto b_ih = optional(bias_ih.unpack()), b_hh = optional(bias_hh.unpack());
    const bool inputs = task_should_compute_output(0);
    bool weights = false;
    for (size_t k = 3; k < 7; ++k) weights = weights || task_should_compute_output(k);
    const auto [dx, dh, dc, dweight_ih, dweight_hh, dbias] = run_backward(
        [&] { return differentiable.call(dh_next, dc_next, in, h_in, c_in, w_ih, w_hh, b_ih, b_hh, inputs, weights, stats); },
        [&] {
          return kernel.call(dh_next, dc_next, in, h_in, c_in, w_ih, w_hh, b_ih, b_hh, gates.unpack(), inputs, weights, stats);
        });
    const auto wanted = [&](size_t k, const Tensor& d) { return task_should_compute_output(k) ? d : Tensor(); };
    const auto [dbias_ih, dbias_hh] = of_both_biases(wanted(5, dbias), wanted(6, dbias));
    return {wanted(0, dx), wanted(1, dh), wanted(2, dc), wanted(3, dweight_ih), wanted(4, dweight_hh), dbias_ih, dbias_hh};
  }
};

Cell lstm_cell(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& stats) {
  static const auto fwd = find<CellFwd>("gradkernels::lstm_cell_fwd");
  static const auto differentiable = find<CellDifferentiable>("gradkernels::lstm_cell_differentiable");
  if (forward_mode(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh)) {
    return differentiable.call(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  }
  const auto node = node_for<LstmCellBackward>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  const auto [h_next, c_next, gates] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return fwd.call(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  }();
  if (node) {
    torch::autograd::set_history(std::vector<Tensor>{h_next, c_next}, node);
    node->x = save(x);
    node->h = save(h);
    node->c = save(c);
    node->weight_ih = save(weight_ih);
    node->weight_hh = save(weight_hh);
    node->bias_ih = save(bias_ih);
    node->bias_hh = save(bias_hh);
    node->gates = save(gates);
    node->stats = stats;
  }
  return {h_next, c_next};
}

}  // namespace
}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) { m.impl("lstm_cell", gk::lstm_cell); }
