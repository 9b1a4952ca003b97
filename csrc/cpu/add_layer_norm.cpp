// new_residual = residual + x and y = LayerNorm(new_residual) in one pass, seen as M rows of N columns; its backward adds
// the gradient of new_residual to LayerNorm's in the loop that computes it. The loops are in norm_rows.h.
// residual and new_residual share a dtype TX, x and y a dtype TY.
#include "norm.h"
#include "norm_checks.h"

#define GK_SOURCE "add_layer_norm.cpp"
#include "each_isa.h"

#ifdef GK_ISA
namespace gk::GK_ISA {
#include "vec.h"

#include "measure.h"

#include "norm_rows.h"

// A chunk of rows is added and normalised before the next one, while it is in the first-level cache.
template <typename TX, typename TY>
static void add_norm_fwd(const TY* x, const TX* residual, TX* new_residual, TY* y, const Acc<TX>* weight, const Acc<TX>* bias,
                         double eps, int64_t N, int64_t begin, int64_t end, Acc<TX>* mean, Acc<TX>* rstd) {
  const int64_t rows = std::max(ROWS, 1024 / std::max<int64_t>(1, N) / ROWS * ROWS);
  for (int64_t first = begin; first < end; first += rows) {
    const int64_t last = std::min(first + rows, end);
    for_each_vector<TX>(first * N, last * N, [&](auto access, int64_t k) __attribute__((always_inline)) {
      access.store(new_residual + k, access.load(x + k) + access.load(residual + k));
    });
    norm_fwd<TX, TY>(new_residual, y, weight, bias, eps, N, first, last, end, mean, rstd);
  }
}
}  // namespace gk::GK_ISA
#else
namespace gk {

// Calls body<TX, TY>() for the dtypes of residual and x: equal, or a float32 residual beside a 16-bit x.
template <typename Body>
static void dispatch_pair(const Tensor& residual, const Tensor& x, const Body& body) {
  if (residual.scalar_type() == x.scalar_type()) {
    GK_DISPATCH(x.scalar_type(), "add_layer_norm", [&] { body.template operator()<scalar_t, scalar_t>(); });
  } else if (x.scalar_type() == at::kBFloat16) {
    body.template operator()<float, c10::BFloat16>();
  } else {
    body.template operator()<float, c10::Half>();
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x_any, const Tensor& residual_any,
                                                              const OptionalTensor& weight, const OptionalTensor& bias,
                                                              int64_t num_dims, double eps) {
  check_norm("add_layer_norm_fwd", "x", x_any, weight, bias, num_dims, x_any.scalar_type());
  check_shape("add_layer_norm_fwd", "residual", residual_any, x_any.sizes());
  check_dtype_or_float("add_layer_norm_fwd", "residual", residual_any.scalar_type(), x_any.scalar_type());
  const Tensor x = x_any.contiguous(), residual = residual_any.contiguous();
  const int64_t N = num_columns(x, num_dims), M = N == 0 ? 0 : x.numel() / N;
  const auto options = x.options().dtype(accumulator_dtype(x));
  Tensor y = at::empty(x.sizes(), x.options()), new_residual = at::empty(x.sizes(), residual.options());
  Tensor mean = at::empty(statistics_shape(x, num_dims), options), rstd = at::empty(mean.sizes(), options);
  dispatch_pair(residual, x, [&]<typename TX, typename TY>() {
    using A = Acc<TX>;
    const Columns<A> w(weight, N, 1), b(bias, N, 0);
    for_each_task(num_tasks(M, N), M, [&](int64_t, int64_t begin, int64_t end) {
      const auto loop = GK_CHOOSE((add_norm_fwd<TX, TY>));
      loop(x.const_data_ptr<TY>(), residual.const_data_ptr<TX>(), new_residual.mutable_data_ptr<TX>(), y.mutable_data_ptr<TY>(),
           w.data(), b.data(), eps, N, begin, end, mean.mutable_data_ptr<A>(), rstd.mutable_data_ptr<A>());
    });
  });
  return {y, new_residual, mean, rstd};
}

// dy or dnew_residual may be absent, not both. dx and dresidual, the gradients of new_residual's two terms, are equal but for
// their dtypes. One in residual's comes in any case, for it is measured; it is dx where dx alone is wanted and has that dtype.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const OptionalTensor& dy_any, const OptionalTensor& dnew_residual_any, const Tensor& new_residual_any, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_dims, at::ScalarType x_dtype,
    OutputMask<4> output_mask, const OptionalTensor& stats) {
  const char* op = "add_layer_norm_bwd";
  check_floating(op, "x_dtype", x_dtype);
  check_norm(op, "new_residual", new_residual_any, weight, bias, num_dims, x_dtype);
  check_dtype_or_float(op, "new_residual", new_residual_any.scalar_type(), x_dtype);
  check(op, "dy", dy_any, new_residual_any.sizes(), x_dtype);
  check(op, "dnew_residual", dnew_residual_any, new_residual_any.sizes(), new_residual_any.scalar_type());
  check_row_statistic(op, "mean", mean, new_residual_any, num_dims);
  check_row_statistic(op, "rstd", rstd, new_residual_any, num_dims);
  check_stats(op, stats, 5);
  const Tensor h = new_residual_any.contiguous();
  const Tensor dy = dy_any ? dy_any->contiguous() : at::zeros(h.sizes(), h.options().dtype(x_dtype));
  const Tensor dnew_residual = dnew_residual_any ? dnew_residual_any->contiguous() : Tensor();
  const int64_t N = num_columns(h, num_dims), M = N == 0 ? 0 : h.numel() / N, tasks = num_tasks(M, N);
  const bool separate = output_mask[0] && (output_mask[1] || x_dtype != h.scalar_type());
  Tensor dh = at::empty(h.sizes(), h.options()), dweight, dbias;
  const Tensor dx = separate ? at::empty(h.sizes(), dy.options()) : no_gradient(h);
  std::vector<Slot> slots(3 * tasks);
  dispatch_pair(h, dy, [&]<typename TX, typename TY>() {
    using A = Acc<TX>;
    const Columns<A> w(weight, N, 1);
    ColumnSums<TX> sums(weight, bias, M, N, tasks, output_mask[2], output_mask[3]);
    for_each_task(tasks, M, [&](int64_t task, int64_t begin, int64_t end) {
      const NormBackward<TX, TY> p{dy.const_data_ptr<TY>(),
                                   h.const_data_ptr<TX>(),
                                   dnew_residual.defined() ? dnew_residual.const_data_ptr<TX>() : nullptr,
                                   w.data(),
                                   mean.const_data_ptr<A>(),
                                   rstd.const_data_ptr<A>(),
                                   dh.mutable_data_ptr<TX>(),
                                   separate ? dx.mutable_data_ptr<TY>() : nullptr,
                                   N};
      const auto loop = GK_CHOOSE((norm_bwd<TX, TY>));
      loop(p, begin, end, sums.of(task, stats ? &slots[3 * task] : nullptr));
    });
    std::tie(dweight, dbias) = sums.finish(stats, 3, h);
  });
  if (dy_any) record(stats, 0, slots.data(), 3, tasks, dy.numel());
  if (dnew_residual_any) record(stats, 1, slots.data() + 1, 3, tasks, h.numel());
  record(stats, 2, slots.data() + 2, 3, tasks, h.numel());
  if (output_mask[0] && !separate) return {dh, no_gradient(h), dweight, dbias};
  return {dx, dh, dweight, dbias};
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("add_layer_norm_fwd", gk::add_layer_norm_fwd);
  m.impl("add_layer_norm_bwd", gk::add_layer_norm_bwd);
}
#endif
