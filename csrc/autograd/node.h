// The ops users call, with their autograd nodes, one file an op: each runs `<op>_fwd`, saves what `<op>_bwd` needs, and calls
// that in backward with the statistics tensor. They are the C++ twins of the Functions in gradkernels/ops/<op>.py, in the same
// words, and exist because a Python Function costs 10 us a call. Device code is never chosen here: PyTorch's dispatcher does
// that.
//
// Two cases leave the kernels for the differentiable composite in Python: double backward (grad mode on inside backward)
// and forward-mode differentiation.
//
// Here stands what the nodes share: `call` calls an op by its name, `OpNode` keeps what one forward leaves to its backward.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>

#include "../common.h"

namespace gk {

using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// A string as an argument of a template.
template <size_t N>
struct Name {
  char text[N];
  constexpr Name(const char (&characters)[N]) { std::copy_n(characters, N, text); }
};

template <size_t N, typename... Ts>
struct TupleOf : TupleOf<N - 1, Tensor, Ts...> {};
template <typename... Ts>
struct TupleOf<0, Ts...> {
  using type = std::tuple<Ts...>;
};
template <size_t N>
using Tensors = typename TupleOf<N>::type;

template <typename T>
using Declared = std::conditional_t<std::is_same_v<T, Tensor> || std::is_same_v<T, OptionalTensor>, const T&, T>;

// Calls the op of that name, which is looked up once, with the C++ types of its schema.
template <Name NAME, typename Result, typename... Args>
Result call(const Args&... args) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow((std::string("gradkernels::") + NAME.text).c_str(), "")
                             .template typed<Result(Declared<Args>...)>();
  return op.call(args...);
}

inline OptionalTensor optional(Tensor t) { return t.defined() ? OptionalTensor(std::move(t)) : std::nullopt; }

// An output of the forward, whose node is the one that keeps it.
struct Output {
  const Tensor& tensor;
};

inline SavedVariable save(const Output& output) { return SavedVariable(output.tensor, /*is_output=*/true); }
inline SavedVariable save(const Tensor& t) { return SavedVariable(t, /*is_output=*/false); }
inline SavedVariable save(const OptionalTensor& t) { return save(t.value_or(Tensor())); }

// A node that keeps NUM_SAVED tensors and the statistics tensor. What a subclass says is its name and `gradients`.
template <size_t NUM_SAVED>
struct OpNode : Node {
  std::array<SavedVariable, NUM_SAVED> saved;
  OptionalTensor stats;

  // Keeps inputs and intermediate results, in this order from saved[0] on.
  template <typename... Tensors>
  void keep(const Tensors&... tensors) {
    static_assert(sizeof...(Tensors) == NUM_SAVED);
    size_t k = 0;
    ((saved[k++] = save(tensors)), ...);
  }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : saved) variable.reset_data();
  }
  variable_list apply(variable_list&& gradients_of_outputs) override {
    bool any = false;
    for (const Tensor& gradient : gradients_of_outputs) any = any || gradient.defined();
    if (!any) return variable_list(num_outputs());
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list gradients = gradients_of(gradients_of_outputs);
    for (size_t k = 0; k < gradients.size(); ++k) {
      if (!task_should_compute_output(k)) gradients[k].reset();
    }
    return gradients;
  }
  // The gradients of the inputs, in the order of `node_for`; those that nobody wants are dropped.
  virtual variable_list gradients_of(const variable_list& gradients_of_outputs) = 0;

 protected:
  Tensor unpack(size_t k) { return saved[k].unpack(getptr()); }
  OptionalTensor unpack_optional(size_t k) { return optional(unpack(k)); }

  // Which inputs' gradients this pass is to compute.
  template <size_t N>
  OutputMask<N> output_mask() const {
    OutputMask<N> mask;
    for (size_t k = 0; k < N; ++k) mask[k] = task_should_compute_output(k);
    return mask;
  }
};

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

template <typename Body>
auto below_autograd(const Body& body) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return body();
}

// What a backward does: the kernel, below autograd; the differentiable composite in a backward that is itself recorded.
template <typename Composite, typename Kernel>
auto run_backward(const Composite& composite, const Kernel& kernel) {
  return at::GradMode::is_enabled() ? composite() : below_autograd(kernel);
}

template <typename... Tensors>
variable_list as_list(std::tuple<Tensors...>&& gradients) {
  variable_list list;
  list.reserve(sizeof...(Tensors));
  std::apply([&](auto&... each) { (list.push_back(std::move(each)), ...); }, gradients);
  return list;
}

}  // namespace gk
