// What layer_norm and add_layer_norm check: see checks.h.
#pragma once

#include "checks.h"
#include "norm.h"

namespace gk {

// x, whose last num_dims dimensions are normalized, and weight and bias, which have their shape; the dtype is theirs or
// float32.
inline void check_norm(const char* op, const char* name, const Tensor& x, const OptionalTensor& weight,
                       const OptionalTensor& bias, int64_t num_dims, at::ScalarType dtype) {
  check_floating(op, name, x.scalar_type());
  TORCH_CHECK_VALUE(0 < num_dims && num_dims <= x.dim(), op, ": num_dims must be 1 to the number of dimensions of ", name, ", ",
                    x.dim(), ", got ", num_dims);
  const auto shape = x.sizes().slice(x.dim() - num_dims);
  const auto check_parameter = [&](const char* parameter, const OptionalTensor& t) {
    if (!t) return;
    check_shape(op, parameter, *t, shape);
    check_dtype_or_float(op, parameter, t->scalar_type(), dtype);
  };
  check_parameter("weight", weight);
  check_parameter("bias", bias);
}

// mean or rstd: one number a row of x, as the forward pass leaves them.
inline void check_row_statistic(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t num_dims) {
  bool fits = t.dim() == x.dim();
  for (int64_t k = 0; fits && k < x.dim(); ++k) fits = t.size(k) == (k < x.dim() - num_dims ? x.size(k) : 1);
  if (!fits) [[unlikely]]
    wrong_shape(op, name, statistics_shape(x, num_dims), t);
  check_dtype(op, name, t, accumulator_dtype(x));
  check_contiguous(op, name, t);
}

}  // namespace gk
