// One LSTM layer in one direction, padded or packed. The products that know no time (x W_ih^T before the recurrence; dx and the
// gradients of the weights after it) are PyTorch's; the recurrences are in forward.h and backward.h.
#include "checks.h"
#include "steps.h"

#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "../tables.h"

#define GK_SOURCE "lstm/layer.cpp"
#include "../each_isa.h"

#ifdef GK_ISA
namespace gk::GK_ISA {
#include "../vec.h"

#include "gates.h"

#include "forward.h"

#include "backward.h"

template <typename A>
static int64_t panels_size(int64_t K, int64_t columns) {
  return (columns + WIDTH<A> - 1) / WIDTH<A> * panel_size<A>(K);
}
}  // namespace gk::GK_ISA
#else
namespace gk {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Scratch for weights as the loops read them: K rows of `columns`, in whole vectors of any instruction set.
template <typename A>
static Tensor panels(int64_t K, int64_t columns, const Tensor& like) {
  const auto size = GK_CHOOSE((panels_size<A>));
  return at::empty({size(K, columns)}, like.options());
}

// The states after each sequence's last step: the rows that no later step continues.
template <typename A>
static void last_states(const Steps& steps, const Tensor& rows, const Tensor& states) {
  const int64_t columns = rows.size(1);
  int64_t done = 0;
  for (int64_t n = steps.num_steps() - 1; n >= 0 && done < steps.B; --n) {
    const int64_t t = steps.order[n];
    if (steps.size[t] <= done) continue;
    const A* first = rows.const_data_ptr<A>() + steps.offset[t] * columns;
    std::copy(first + done * columns, first + steps.size[t] * columns, states.mutable_data_ptr<A>() + done * columns);
    done = steps.size[t];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_fwd(const Tensor& x, const Tensor& h0_any, const Tensor& c0_any,
                                                                  const Tensor& weight_ih, const Tensor& weight_hh_any,
                                                                  const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                                                                  const OptionalTensor& weight_hr_any,
                                                                  const OptionalTensor& batch_sizes, bool reverse) {
  check_lstm_layer("lstm_layer_fwd", x, h0_any, c0_any, weight_ih, weight_hh_any, bias_ih, bias_hh, weight_hr_any,
                   batch_sizes.has_value());
  const OneThreadInForkedChild guard;
  const int64_t B = h0_any.size(0), P = h0_any.size(1), H = c0_any.size(1);
  const Steps steps(x, batch_sizes, B, reverse);
  const Tensor h0 = upcast(h0_any), c0 = upcast(c0_any), weight_hh = upcast(weight_hh_any), weight_hr = upcast(weight_hr_any);
  const Tensor rows = upcast_rows(x), w = upcast(weight_ih).t();
  Tensor gates = bias_ih ? at::addmm(at::add(upcast(*bias_ih), upcast(*bias_hh)), rows, w) : at::mm(rows, w);
  const Tensor cells = at::empty({steps.num_rows(), H}, gates.options()), y = at::empty({steps.num_rows(), P}, gates.options());
  const Tensor h_n = at::empty({B, P}, gates.options()), c_n = at::empty({B, H}, gates.options());
  AT_DISPATCH_FLOATING_TYPES(gates.scalar_type(), "lstm_layer_fwd", [&] {
    const Tensor packed_hh = panels<scalar_t>(4 * P, H, gates);
    const Tensor packed_hr = weight_hr.defined() ? panels<scalar_t>(H, P, gates) : Tensor();
    const Tensor m = weight_hr.defined() ? at::empty({B, H}, gates.options()) : Tensor();
    const LstmForward<scalar_t> p{steps,
                                  H,
                                  P,
                                  pointer<scalar_t>(weight_hh),
                                  pointer<scalar_t>(weight_hr),
                                  pointer<scalar_t>(h0),
                                  pointer<scalar_t>(c0),
                                  writable<scalar_t>(gates),
                                  writable<scalar_t>(cells),
                                  writable<scalar_t>(y),
                                  writable<scalar_t>(packed_hh),
                                  writable<scalar_t>(packed_hr),
                                  writable<scalar_t>(m)};
    const auto recurrence = GK_CHOOSE((lstm_forward<scalar_t>));
    for_each_thread(num_step_threads(4 * B * H * P, std::min(H, P) / 16),
                    [&](int thread, int threads, Barrier& barrier) { recurrence(p, thread, threads, barrier); });
    last_states<scalar_t>(steps, y, h_n);
    last_states<scalar_t>(steps, cells, c_n);
  });
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = P;
  const auto dtype = x.scalar_type();
  return {y.to(dtype).view(shape), h_n.to(dtype), c_n.to(dtype), gates, cells};
}

// For every row (t, b) row (previous t, b) of `rows`, and row b of `initial` where there is none.
template <typename A>
static Tensor previous_rows(const Steps& steps, const Tensor& rows, const Tensor& initial) {
  const int64_t columns = rows.size(1);
  Tensor result = at::empty(rows.sizes(), rows.options());
  A* target = result.mutable_data_ptr<A>();
  for (int64_t t = 0; t < steps.num_steps(); ++t) {
    const int64_t rows_with_predecessor = steps.rows_with_predecessor(t);
    const A* source = rows.const_data_ptr<A>() + (rows_with_predecessor ? steps.offset[steps.before[t]] * columns : 0);
    target = std::copy(source, source + rows_with_predecessor * columns, target);
    source = initial.const_data_ptr<A>();
    target = std::copy(source + rows_with_predecessor * columns, source + steps.size[t] * columns, target);
  }
  return result;
}

// The norm of what was summed times 2^exponent. What is common is quick: no scale.
static double unscaled_norm(const SquareSum& squares, int64_t exponent) {
  const double norm = squares.norm();
  return exponent ? std::ldexp(norm, static_cast<int>(-exponent)) : norm;
}

// Adds one backward call to `time_stats`.
static void record_steps(const Steps& steps, const std::vector<StepSums>& sums, const std::vector<int64_t>& exponent,
                         int threads, int64_t H, const Tensor& time_stats) {
  const int64_t T = steps.num_steps();
  std::vector<double> rows(T * NUM_TIME_FIELDS);
  for (int64_t n = 0; n < T; ++n) {
    const int64_t t = steps.order[T - 1 - n];
    StepSums total;
    for (int thread = 0; thread < threads; ++thread) {
      const StepSums& part = sums[t * threads + thread];
      total.dh += part.dh;
      total.dc += part.dc;
      total.dh_recurrent += part.dh_recurrent;
      total.forget += part.forget;
      for (int c = 0; c < NUM_COUNTS; ++c) total.counts[c] += part.counts[c];
    }
    double* row = rows.data() + t * NUM_TIME_FIELDS;
    row[0] = unscaled_norm(total.dh, exponent[t]);
    row[1] = unscaled_norm(total.dc, exponent[t]);
    row[2] = unscaled_norm(total.dh_recurrent, n == 0 ? 0 : exponent[steps.order[T - n]]);
    row[GATE_COUNT] = static_cast<double>(steps.size[t] * H);
    for (int c = 0; c < NUM_COUNTS; ++c) row[FIRST_COUNT + c] = total.counts[c];
    row[FORGET_SUM] = total.forget;
  }
  add_steps(rows.data(), T, time_stats);
}

// What the backward recurrence leaves: dG, dh0, dc0, and with a projection the total dh and o tanh(c) of all rows.
struct BackwardResult {
  Tensor dgates, dh0, dc0, dh_total, m;
};

template <typename A>
static BackwardResult backward_through_time(const Steps& steps, const Tensor& dy, const OptionalTensor& dh_n,
                                            const OptionalTensor& dc_n, const Tensor& c0, const Tensor& weight_hh,
                                            const Tensor& weight_hr, const Tensor& gates, const Tensor& cells,
                                            const OptionalTensor& time_stats) {
  const int64_t B = steps.B, H = c0.size(1), P = weight_hh.size(1), rows = steps.num_rows(), stride = 4 * H + PADDING;
  const auto options = c0.options();
  const bool projected = weight_hr.defined();
  const auto state = [&](const OptionalTensor& d, int64_t columns) {
    return d ? upcast(*d).clone() : at::zeros({B, columns}, options);
  };
  const auto scratch = [&](at::IntArrayRef shape) { return projected ? at::empty(shape, options) : Tensor(); };
  const BackwardResult out{at::empty({rows, stride}, options), state(dh_n, P), state(dc_n, H), scratch({rows, P}),
                           scratch({rows, H})};
  const Tensor dgates_scaled = at::empty({2, B, stride}, options), packed_hh = panels<A>(4 * H, P, c0);
  const Tensor packed_hr = projected ? panels<A>(P, H, c0) : Tensor(), dh_scaled = scratch({B, P}), dm = scratch({B, H});
  const int threads = num_step_threads(4 * B * H * P, std::min(H, P) / 16);
  std::vector<A> max_abs(2 * threads), rows_of_threads(time_stats ? threads * 2 * H : 0);
  std::vector<StepSums> sums(time_stats ? steps.num_steps() * threads : 0);
  std::vector<int64_t> exponent(time_stats ? steps.num_steps() : 0);
  const LstmBackward<A> p{steps,
                          H,
                          P,
                          pointer<A>(weight_hh),
                          pointer<A>(weight_hr),
                          pointer<A>(dy),
                          pointer<A>(c0),
                          pointer<A>(gates),
                          pointer<A>(cells),
                          writable<A>(out.dh0),
                          writable<A>(out.dc0),
                          writable<A>(out.dgates),
                          writable<A>(dgates_scaled),
                          writable<A>(out.dh_total),
                          writable<A>(out.m),
                          writable<A>(packed_hh),
                          writable<A>(packed_hr),
                          writable<A>(dh_scaled),
                          writable<A>(dm),
                          max_abs.data(),
                          rows_of_threads.data(),
                          sums.data(),
                          exponent.data()};
  const auto recurrence = GK_CHOOSE((lstm_backward<A>));
  int num_threads = 1;
  for_each_thread(threads, [&](int thread, int all, Barrier& barrier) {
    if (thread == 0) num_threads = all;
    recurrence(p, time_stats.has_value(), thread, all, barrier);
  });
  if (time_stats) record_steps(steps, sums, exponent, num_threads, H, *time_stats);
  return out;
}

Gradients lstm_layer_bwd(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x,
                         const Tensor& h0, const Tensor& c0, const Tensor& weight_ih, const Tensor& weight_hh,
                         const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
                         const OptionalTensor& batch_sizes, const Tensor& y, const Tensor& gates, const Tensor& cells,
                         bool reverse, OutputMask<8> output_mask, const OptionalTensor& stats,
                         const OptionalTensor& time_stats) {
  const auto sizes =
      check_lstm_layer("lstm_layer_bwd", x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes.has_value());
  check_lstm_layer_gradients("lstm_layer_bwd", sizes, dy, dh_n, dc_n, x, y, gates, cells, stats, time_stats);
  const OneThreadInForkedChild guard;
  const Steps steps(x, batch_sizes, h0.size(0), reverse);
  const auto dtype = x.scalar_type();
  const auto& [of_x, of_h0, of_c0, of_weight_ih, of_weight_hh, of_bias_ih, of_bias_hh, of_weight_hr] = output_mask;
  OptionalTensor dx, dh0, dc0, dweight_ih, dweight_hh, dbias, dweight_hr;
  AT_DISPATCH_FLOATING_TYPES(gates.scalar_type(), "lstm_layer_bwd", [&] {
    const Tensor rows_dy = dy ? upcast_rows(*dy) : Tensor();
    const BackwardResult result = backward_through_time<scalar_t>(steps, rows_dy, dh_n, dc_n, upcast(c0), upcast(weight_hh),
                                                                  upcast(weight_hr), gates, cells, time_stats);
    const Tensor dg = result.dgates.narrow(1, 0, gates.size(1));
    dh0 = result.dh0.to(dtype);
    dc0 = result.dc0.to(dtype);
    if (of_x) dx = at::mm(dg, upcast(weight_ih)).to(dtype).view(x.sizes());
    if (of_weight_ih) dweight_ih = at::mm(dg.t(), upcast_rows(x)).to(dtype);
    if (of_weight_hh) dweight_hh = at::mm(dg.t(), previous_rows<scalar_t>(steps, upcast_rows(y), upcast(h0))).to(dtype);
    if (bias_ih && (of_bias_ih || of_bias_hh)) dbias = dg.sum(0).to(dtype);
    if (weight_hr && of_weight_hr) dweight_hr = at::mm(result.dh_total.t(), result.m).to(dtype);
  });
  measure_ports(stats, {dy, dx, dweight_ih, dweight_hh, dbias, dweight_hr});
  const auto [dbias_ih, dbias_hh] = of_both_biases(dbias, of_bias_ih, of_bias_hh);
  return {or_empty(dx, x),         or_empty(dh0, x),      or_empty(dc0, x),      or_empty(dweight_ih, x),
          or_empty(dweight_hh, x), or_empty(dbias_ih, x), or_empty(dbias_hh, x), or_empty(dweight_hr, x)};
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("lstm_layer_fwd", gk::lstm_layer_fwd);
  m.impl("lstm_layer_bwd", gk::lstm_layer_bwd);
}
#endif
