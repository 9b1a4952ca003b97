// The ops users call, with their autograd nodes: each runs `<op>_fwd`, saves what `<op>_bwd` needs, and calls that in
// backward with the statistics tensor. The C++ twins of the Functions in gradkernels/ops/<op>.py, in the same words; they
// exist because a Python Function costs 10 us a call. Device code is never chosen here: PyTorch's dispatcher does that.
//
// Two cases leave the kernels for the differentiable composite in Python: double backward (grad mode on inside backward)
// and forward-mode differentiation.
#include "autograd.h"

#include <ATen/ops/alias.h>

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

struct ResidualBackward : Node {
  OptionalTensor stats;

  std::string name() const override { return "GradkernelsResidualBackward"; }
  variable_list apply(variable_list&& gradients) override {
    using Signature = Tensor(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&);
    static const auto kernel = find<Signature>("gradkernels::residual_bwd");
    static const auto differentiable = find<Signature>("gradkernels::residual_bwd_differentiable");
    if (!gradients[0].defined() && !gradients[1].defined()) return {Tensor()};
    const auto dskip = optional(gradients[0]), dbranch = optional(gradients[1]);
    return {run_backward([&] { return differentiable.call(dskip, dbranch, stats); },
                         [&] { return kernel.call(dskip, dbranch, stats); })};
  }
};

// Both outputs are x. They are marked as views of one node with several outputs, so that writing into either in place,
// which would change the other behind autograd's back, raises the error PyTorch users know from split() and unbind().
std::tuple<Tensor, Tensor> residual_fork(const Tensor& x, const OptionalTensor& stats) {
  const auto node = node_for<ResidualBackward>(x);
  const auto view = [&] {
    Tensor alias = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return at::alias(x);
    }();
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

TORCH_LIBRARY_IMPL(gradkernels, CompositeImplicitAutograd, m) {
  m.impl("gelu", gk::gelu);
  m.impl("layer_norm", gk::layer_norm);
  m.impl("add_layer_norm", gk::add_layer_norm);
  m.impl("residual_fork", gk::residual_fork);
}
