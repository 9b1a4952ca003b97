// The ops users call, with their autograd nodes, one file an op: each runs `<op>_fwd`, saves what `<op>_bwd` needs, and calls
// that in backward with the statistics tensor. They are the C++ twins of the Functions in gradkernels/ops/<op>.py, in the same
// words, and exist because a Python Function costs 10 us a call. Device code is never chosen here: PyTorch's dispatcher does
// that.
//
// Two cases leave the kernels for the differentiable composite in Python: double backward (grad mode on inside backward)
// and forward-mode differentiation.
//
// Here stands what the nodes share.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "../common.h"

namespace gk {

using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Nodes are held by std::shared_ptr up to torch 2.12 and by c10::intrusive_ptr from 2.13 on.
template <typename N>
auto make_node() {
  if constexpr (std::is_constructible_v<decltype(Edge::function), std::shared_ptr<N>>) {
    return std::shared_ptr<N>(new N(), [](Node* node) { delete static_cast<N*>(node); });
  } else {
    return c10::make_intrusive<N>();
  }
}
template <typename N>
using NodePointer = decltype(make_node<N>());

template <typename N, typename... Inputs>
NodePointer<N> node_for(const Inputs&... inputs) {
  if (!torch::autograd::compute_requires_grad(inputs...)) return nullptr;
  auto node = make_node<N>();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

template <typename... Inputs>
bool forward_mode(const Inputs&... inputs) {
  return (torch::autograd::isFwGradDefined(inputs) || ...);
}

// What a backward does: the kernel, below autograd; the differentiable composite in a backward that is itself recorded.
template <typename Composite, typename Kernel>
auto run_backward(const Composite& composite, const Kernel& kernel) {
  if (at::GradMode::is_enabled()) return composite();
  at::AutoDispatchBelowADInplaceOrView guard;
  return kernel();
}

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline OptionalTensor optional(Tensor t) { return t.defined() ? OptionalTensor(std::move(t)) : std::nullopt; }

inline SavedVariable save(const Tensor& t) { return SavedVariable(t, /*is_output=*/false); }
inline SavedVariable save(const OptionalTensor& t) { return save(t.value_or(Tensor())); }

// The gradient of either bias, undefined where not wanted: equal numbers, but a tensor each, as any two gradients.
inline std::tuple<Tensor, Tensor> of_both_biases(const Tensor& dbias_ih, const Tensor& dbias_hh) {
  return {dbias_ih, dbias_ih.defined() && dbias_hh.defined() ? dbias_hh.clone() : dbias_hh};
}

}  // namespace gk
