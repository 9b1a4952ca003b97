// The hook of a probe on a tensor's gradient, where Python has nothing to do with it: gradkernels/ops/probe.py, GradientHook,
// which does the same and serves the tensors that are refused here.
#include "probe.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "node.h"

namespace gk {

namespace {

// Where a probe measures, as that is when the gradient comes; nothing measures nothing.
struct ProbeHook {
  OptionalTensor stats;
};

// What autograd calls with the gradient of output `index` of a node.
struct Measure : torch::autograd::FunctionPreHook {
  std::shared_ptr<const ProbeHook> hook;
  size_t index;

  Measure(std::shared_ptr<const ProbeHook> hook, size_t index) : hook(std::move(hook)), index(index) {}

  static void measure(const ProbeHook& hook, const Tensor& gradient) {
    const OptionalTensor stats = hook.stats;
    if (!stats || !gradient.defined()) return;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("gradkernels::probe_bwd", "")
                               .typed<void(const Tensor&, Tensor&, int64_t)>();
    const at::AutoDispatchBelowAutograd guard;  // the gradient is a number
    Tensor table = *stats;
    op.call(gradient, table, 0);
  }
  variable_list operator()(const variable_list& gradients) override {
    measure(*hook, gradients[index]);
    return gradients;
  }
  // Compiled autograd calls a function in the place of the hook.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const auto function = [hook = hook](const at::TensorBase& gradient) {
      measure(*hook, Tensor(gradient));
      return gradient;
    };
    args.add_cpp_single_tensor_pre_hook(function, index);
  }
};

// Has the gradient of x measured, once by each table; whether that was done. It is not for leaves, whose gradients have hooks
// of one language alone, and not for tensors that are not one plain block of real numbers.
bool attach(const std::shared_ptr<ProbeHook>& hook, const Tensor& x) {
  if (!x.requires_grad() || !x.grad_fn() || x.is_complex() || x.layout() != at::kStrided || x.is_nested() ||
      at::isTensorSubclassLike(x))
    return false;
  const auto node = x.grad_fn();
  for (const auto& other : node->tensor_pre_hooks()) {
    const auto* own = dynamic_cast<const Measure*>(other.get());
    if (!own || own->index != x.output_nr()) continue;
    if (own->hook == hook || (hook->stats && own->hook->stats && own->hook->stats->is_same(*hook->stats))) return true;
  }
  node->add_tensor_pre_hook(std::make_unique<Measure>(hook, x.output_nr()));
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
