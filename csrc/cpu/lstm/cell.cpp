// One step of an LSTM. Its products are PyTorch's, for weights packed for one step alone would cost what they save; the loops
// here turn the products into gates and states, and back.
#include "checks.h"
#include "steps.h"

#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#ifndef GK_ISA
namespace gk {

template <typename A>
struct CellForward {
  const A *c, *bias_ih, *bias_hh;  // biases: null where there are none
  A *gates, *h_next, *c_next;      // gates: x W_ih^T + h W_hh^T on entry, activated on return
  int64_t H;
};

template <typename A>
struct CellBackward {
  const A *dh_next, *dc_next, *c, *gates;  // either gradient: null where none came
  A *dgates, *dc;
  int64_t H;
};

}  // namespace gk
#endif

#define GK_SOURCE "lstm/cell.cpp"
#include "../each_isa.h"

#ifdef GK_ISA
namespace gk::GK_ISA {
#include "../vec.h"

#include "gates.h"

template <typename A>
static void cell_forward(const CellForward<A>& p, int64_t begin, int64_t end) {
  const int64_t H = p.H;
  for (int64_t b = begin; b < end; ++b) {
    A* gates = p.gates + b * 4 * H;
    for (int64_t j = 0; j < H; j += WIDTH<A>) {
      const int64_t count = H - j;
      Vec<A> v[4];
      for (int gate = 0; gate < 4; ++gate) {
        v[gate] = load_first(gates + gate * H + j, count);
        if (p.bias_ih) v[gate] += load_first(p.bias_ih + gate * H + j, count) + load_first(p.bias_hh + gate * H + j, count);
      }
      const Gates<A> active = activate<A>(v);
      store_gates(gates + j, active, H, count);
      const Vec<A> c = active.f * load_first(p.c + b * H + j, count) + active.i * active.g;
      store_first(p.c_next + b * H + j, c, count);
      store_first(p.h_next + b * H + j, active.o * hyperbolic_tangent<A>(c), count);
    }
  }
}

template <typename A>
static void cell_backward(const CellBackward<A>& p, int64_t begin, int64_t end) {
  const int64_t H = p.H;
  for (int64_t b = begin; b < end; ++b) {
    const A* gates = p.gates + b * 4 * H;
    A* dgates = p.dgates + b * 4 * H;
    for (int64_t j = 0; j < H; j += WIDTH<A>) {
      const int64_t count = H - j, at = b * H + j;
      const Gates<A> active = load_gates(gates + j, H, count);
      const Vec<A> c = load_first(p.c + at, count), m = hyperbolic_tangent<A>(active.f * c + active.i * active.g);
      const Vec<A> dh = p.dh_next ? load_first(p.dh_next + at, count) : Vec<A>{};
      const Vec<A> dc_after = p.dc_next ? load_first(p.dc_next + at, count) : Vec<A>{};
      const StepGradients<A> d = step_backward(dh, dc_after, active, m, c);
      store_gates(dgates + j, d.dgates, H, count);
      store_first(p.dc + at, d.dc, count);
    }
  }
}
}  // namespace gk::GK_ISA
#else
namespace gk {

std::tuple<Tensor, Tensor, Tensor> lstm_cell_fwd(const Tensor& x, const Tensor& h, const Tensor& c_any, const Tensor& weight_ih,
                                                 const Tensor& weight_hh, const OptionalTensor& bias_ih_any,
                                                 const OptionalTensor& bias_hh_any) {
  check_lstm_cell("lstm_cell_fwd", x, h, c_any, weight_ih, weight_hh, bias_ih_any, bias_hh_any);
  const OneThreadInForkedChild guard;
  const int64_t B = h.size(0), H = h.size(1);
  const Tensor c = upcast(c_any), bias_ih = upcast(bias_ih_any), bias_hh = upcast(bias_hh_any);
  Tensor gates = at::mm(upcast(x), upcast(weight_ih).t());
  gates.addmm_(upcast(h), upcast(weight_hh).t());
  const Tensor h_next = at::empty(c.sizes(), c.options()), c_next = at::empty(c.sizes(), c.options());
  AT_DISPATCH_FLOATING_TYPES(c.scalar_type(), "lstm_cell_fwd", [&] {
    const CellForward<scalar_t> p{pointer<scalar_t>(c),
                                  pointer<scalar_t>(bias_ih),
                                  pointer<scalar_t>(bias_hh),
                                  writable<scalar_t>(gates),
                                  writable<scalar_t>(h_next),
                                  writable<scalar_t>(c_next),
                                  H};
    const auto loop = GK_CHOOSE((cell_forward<scalar_t>));
    for_each_task(num_tasks(B, 4 * H), B, [&](int64_t, int64_t begin, int64_t end) { loop(p, begin, end); });
  });
  return {h_next.to(x.scalar_type()), c_next.to(x.scalar_type()), gates};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients lstm_cell_bwd(const OptionalTensor& dh_next, const OptionalTensor& dc_next, const Tensor& x, const Tensor& h,
                        const Tensor& c_any, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                        const OptionalTensor& bias_hh, const Tensor& gates, OutputMask<7> output_mask,
                        const OptionalTensor& stats) {
  const auto sizes = check_lstm_cell("lstm_cell_bwd", x, h, c_any, weight_ih, weight_hh, bias_ih, bias_hh);
  check_lstm_cell_gradients("lstm_cell_bwd", sizes, dh_next, dc_next, gates, stats, x.scalar_type());
  const OneThreadInForkedChild guard;
  const int64_t B = h.size(0), H = h.size(1);
  const auto dtype = x.scalar_type();
  const Tensor c = upcast(c_any), dh_upcast = upcast(dh_next), dc_upcast = upcast(dc_next);
  const Tensor dg = at::empty(gates.sizes(), gates.options()), dc_float32 = at::empty(c.sizes(), c.options());
  AT_DISPATCH_FLOATING_TYPES(c.scalar_type(), "lstm_cell_bwd", [&] {
    const CellBackward<scalar_t> p{pointer<scalar_t>(dh_upcast),
                                   pointer<scalar_t>(dc_upcast),
                                   pointer<scalar_t>(c),
                                   pointer<scalar_t>(gates),
                                   writable<scalar_t>(dg),
                                   writable<scalar_t>(dc_float32),
                                   H};
    const auto loop = GK_CHOOSE((cell_backward<scalar_t>));
    for_each_task(num_tasks(B, 4 * H), B, [&](int64_t, int64_t begin, int64_t end) { loop(p, begin, end); });
  });
  const auto& [of_x, of_h, of_c, of_weight_ih, of_weight_hh, of_bias_ih, of_bias_hh] = output_mask;
  const auto product = [&](bool wanted, const Tensor& a, const Tensor& b) {
    return wanted ? OptionalTensor(at::mm(a, upcast(b)).to(dtype)) : std::nullopt;
  };
  const OptionalTensor dx = product(of_x, dg, weight_ih), dh = product(true, dg, weight_hh), dc = dc_float32.to(dtype);
  const OptionalTensor dweight_ih = product(of_weight_ih, dg.t(), x), dweight_hh = product(of_weight_hh, dg.t(), h);
  const bool of_bias = bias_ih && (of_bias_ih || of_bias_hh);
  const OptionalTensor dbias = of_bias ? OptionalTensor(dg.sum(0).to(dtype)) : std::nullopt;
  measure_ports(stats, {dh_next, dc_next, dx, dh, dc, dweight_ih, dweight_hh, dbias});
  const auto [dbias_ih, dbias_hh] = of_both_biases(dbias, of_bias_ih, of_bias_hh);
  return {or_empty(dx, x),         or_empty(dh, x),       or_empty(dc, x),      or_empty(dweight_ih, x),
          or_empty(dweight_hh, x), or_empty(dbias_ih, x), or_empty(dbias_hh, x)};
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("lstm_cell_fwd", gk::lstm_cell_fwd);
  m.impl("lstm_cell_bwd", gk::lstm_cell_bwd);
}
#endif
