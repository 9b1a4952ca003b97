// The hook of a probe on a tensor's gradient, where Python has nothing to do with it: gradkernels/ops/probe.py, GradientHook,
// which does the same and serves the tensors that are refused here. A hook written in Python costs a small net ten times as
// much.
#include "probe.h"

#include <ATen/TensorSubclassLikeUtils.h>

#include "node.h"

namespace gk {

namespace {

// Where a probe measures, as that is when the gradient comes; nothing measures nothing.
struct ProbeHook {
  OptionalTensor stats;
};

// What autograd calls with the gradient of a tensor.
struct Measure {
  std::shared_ptr<const ProbeHook> hook;

  at::TensorBase operator()(const at::TensorBase& gradient) const {
    const OptionalTensor stats = hook->stats;
    if (stats && gradient.defined()) {
      static const auto op = find<void(const Tensor&, Tensor&, int64_t)>("gradkernels::probe_bwd");
      const at::AutoDispatchBelowAutograd guard;  // the gradient is a number
      Tensor table = *stats;
      op.call(Tensor(gradient), table, 0);
    }
    return {};
  }
};

// Has the gradient of x measured, once by each table; whether that was done. It is not for leaves, whose gradients have hooks
// of one language alone, and not for tensors that are not one plain block of real numbers.
bool attach(const std::shared_ptr<ProbeHook>& hook, const Tensor& x) {
  if (!x.requires_grad() || !x.grad_fn() || x.is_complex() || x.layout() != at::kStrided || x.is_nested() ||
      at::isTensorSubclassLike(x))
    return false;
  auto& hooks = torch::autograd::impl::get_autograd_meta(x)->cpp_hooks_list_;
  if (!hooks) torch::autograd::impl::create_cpp_hook(x);
  for (const auto& other : *hooks) {
    const auto* own = other.target<Measure>();
    if (own && (own->hook == hook || (hook->stats && own->hook->stats && own->hook->stats->is_same(*hook->stats)))) return true;
  }
  hooks->emplace_back(Measure{hook});
  return true;
}

}  // namespace

void bind_probe_hook(pybind11::module_& m) {
  pybind11::class_<ProbeHook, std::shared_ptr<ProbeHook>>(m, "ProbeHook")
      .def(pybind11::init<>())
      .def_readwrite("stats", &ProbeHook::stats)
      .def("attach", &attach);
}

}  // namespace gk
