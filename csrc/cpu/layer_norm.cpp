// LayerNorm over the last `num_dims` dimensions, seen as M rows of N columns. The loops are in norm_rows.h.
#include "norm.h"
#include "norm_checks.h"

#define GK_SOURCE "layer_norm.cpp"
#include "each_isa.h"

#ifdef GK_ISA
namespace gk::GK_ISA {
#include "vec.h"

#include "measure.h"

#include "norm_rows.h"
}  // namespace gk::GK_ISA
#else
namespace gk {

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x_any, const OptionalTensor& weight, const OptionalTensor& bias,
                                                  int64_t num_dims, double eps) {
  check_norm("layer_norm_fwd", "x", x_any, weight, bias, num_dims, x_any.scalar_type());
  const Tensor x = x_any.contiguous();
  const int64_t N = num_columns(x, num_dims), M = N == 0 ? 0 : x.numel() / N;
  const auto options = x.options().dtype(accumulator_dtype(x));
  Tensor y = at::empty(x.sizes(), x.options());
  Tensor mean = at::empty(statistics_shape(x, num_dims), options), rstd = at::empty(mean.sizes(), options);
  GK_DISPATCH(x.scalar_type(), "layer_norm_fwd", [&] {
    using A = Acc<scalar_t>;
    const Columns<A> w(weight, N, 1), b(bias, N, 0);
    for_each_task(num_tasks(M, N), M, [&](int64_t, int64_t begin, int64_t end) {
      const auto loop = GK_CHOOSE((norm_fwd<scalar_t, scalar_t>));
      loop(x.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>(), w.data(), b.data(), eps, N, begin, end, end,
           mean.mutable_data_ptr<A>(), rstd.mutable_data_ptr<A>());
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy_any, const Tensor& x_any, const Tensor& mean,
                                                  const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                                  int64_t num_dims, OutputMask<3> output_mask, const OptionalTensor& stats) {
  check_norm("layer_norm_bwd", "x", x_any, weight, bias, num_dims, x_any.scalar_type());
  check("layer_norm_bwd", "dy", dy_any, x_any.sizes(), x_any.scalar_type());
  check_row_statistic("layer_norm_bwd", "mean", mean, x_any, num_dims);
  check_row_statistic("layer_norm_bwd", "rstd", rstd, x_any, num_dims);
  check_stats("layer_norm_bwd", stats, 4);
  const Tensor dy = dy_any.contiguous(), x = x_any.contiguous();
  const int64_t N = num_columns(x, num_dims), M = N == 0 ? 0 : x.numel() / N, tasks = num_tasks(M, N);
  Tensor dx = at::empty(x.sizes(), x.options()), dweight, dbias;
  std::vector<Slot> slots(3 * tasks);
  GK_DISPATCH(x.scalar_type(), "layer_norm_bwd", [&] {
    using A = Acc<scalar_t>;
    const Columns<A> w(weight, N, 1);
    ColumnSums<scalar_t> sums(weight, bias, M, N, tasks, output_mask[1], output_mask[2]);
    for_each_task(tasks, M, [&](int64_t task, int64_t begin, int64_t end) {
      const NormBackward<scalar_t, scalar_t> p{
          dy.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),    nullptr, w.data(), mean.const_data_ptr<A>(),
          rstd.const_data_ptr<A>(),      dx.mutable_data_ptr<scalar_t>(), nullptr, N};
      const auto loop = GK_CHOOSE((norm_bwd<scalar_t, scalar_t>));
      loop(p, begin, end, sums.of(task, stats ? &slots[3 * task] : nullptr));
    });
    std::tie(dweight, dbias) = sums.finish(stats, 2, x);
  });
  record(stats, 0, slots.data(), 3, tasks, dy.numel());
  record(stats, 1, slots.data() + 2, 3, tasks, dx.numel());
  return {dx, dweight, dbias};
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("layer_norm_fwd", gk::layer_norm_fwd);
  m.impl("layer_norm_bwd", gk::layer_norm_bwd);
}
#endif
