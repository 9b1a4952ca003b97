// What layer_norm and add_layer_norm share outside their loops: arguments, shapes, and dweight and dbias as one pair of
// accumulators a program, summed in the programs' order.
#pragma once

#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "../common.h"

namespace gk {

template <typename TX, typename TY>
struct NormBackward {
  const TY* dy;
  const TX *x, *dresidual;  // dresidual: null where no gradient arrives beside dy
  const Acc<TX>*weight, *mean, *rstd;
  TX* dx;
  TY* dx_narrow;  // dx again, in dy's dtype; null where one is enough
  int64_t N;
};

template <typename TX>
struct NormGradients {
  Acc<TX>*dweight, *dbias;  // this program's column sums, N each; both or neither
  Cell* cells;              // this program's statistics: dy, dresidual, dx
};

// mean and rstd have x's leading dimensions followed by num_dims ones.
inline std::vector<int64_t> statistics_shape(const Tensor& x, int64_t num_dims) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  std::fill(shape.end() - num_dims, shape.end(), 1);
  return shape;
}

inline int64_t num_columns(const Tensor& x, int64_t num_dims) {
  return c10::multiply_integers(x.sizes().slice(x.dim() - num_dims));
}

// dweight and dbias accumulate in float32, in float64 for float64 tensors.
inline at::ScalarType accumulator_dtype(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// A contiguous row of N numbers in another dtype. A loop: at small sizes a call of Tensor::to would cost more than the norm.
inline Tensor converted(const Tensor& any, at::ScalarType dtype) {
  const Tensor source = any.contiguous();
  if (source.scalar_type() == dtype) return source;
  Tensor result = at::empty(source.sizes(), source.options().dtype(dtype));
  GK_DISPATCH(source.scalar_type(), "norm", [&] {
    const auto* from = source.const_data_ptr<scalar_t>();
    GK_DISPATCH(dtype, "norm", [&] {
      auto* to = result.mutable_data_ptr<scalar_t>();
      for (int64_t k = 0; k < source.numel(); ++k) to[k] = static_cast<scalar_t>(from[k]);
    });
  });
  return result;
}

// A contiguous weight or bias in the accumulator's dtype; `otherwise` in every column where there is none.
inline Tensor column_factor(const OptionalTensor& values, int64_t N, const Tensor& x, double otherwise) {
  const auto dtype = accumulator_dtype(x);
  if (values) return converted(*values, dtype);
  return otherwise == 0 ? at::zeros({N}, x.options().dtype(dtype)) : at::ones({N}, x.options().dtype(dtype));
}

template <typename A>
class ColumnSums {
 public:
  ColumnSums(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x, int64_t N, int64_t programs,
             bool wanted)
      : weight_(weight), bias_(bias), N_(N), programs_(programs), wanted_(wanted && (weight || bias)) {
    if (!wanted_) return;
    const auto& shaped = weight ? *weight : *bias;
    dweight_ = at::zeros(shaped.sizes(), x.options().dtype(accumulator_dtype(x)));
    dbias_ = at::zeros(shaped.sizes(), x.options().dtype(accumulator_dtype(x)));
    further_.resize(2 * N * (programs - 1));
  }

  A* dweight(int64_t program) { return accumulator(dweight_, program, 0); }
  A* dbias(int64_t program) { return accumulator(dbias_, program, N_); }

  // (dweight, dbias) in the dtype of weight and bias, measured as stored; a tensor of no elements where not wanted.
  std::tuple<Tensor, Tensor> finish(const OptionalTensor& stats, int64_t dweight_port, const Tensor& x) {
    for (int64_t p = 1; wanted_ && p < programs_; ++p) {
      add(dweight(0), dweight(p));
      add(dbias(0), dbias(p));
    }
    return {finish_one(dweight_, weight_, stats, dweight_port, x), finish_one(dbias_, bias_, stats, dweight_port + 1, x)};
  }

 private:
  A* accumulator(Tensor& first, int64_t program, int64_t offset) {
    if (!wanted_) return nullptr;
    return program == 0 ? first.mutable_data_ptr<A>() : further_.data() + 2 * N_ * (program - 1) + offset;
  }
  void add(A* total, const A* part) {
    for (int64_t k = 0; k < N_; ++k) total[k] += part[k];
  }
  Tensor finish_one(const Tensor& total, const OptionalTensor& parameter, const OptionalTensor& stats, int64_t port,
                    const Tensor& x) {
    if (!wanted_ || !parameter) return at::empty({0}, x.options());
    Tensor gradient = converted(total, parameter->scalar_type());
    if (stats) measure(gradient, *stats, port);
    return gradient;
  }

  const OptionalTensor &weight_, &bias_;
  int64_t N_, programs_;
  bool wanted_;
  Tensor dweight_, dbias_;
  std::vector<A> further_;  // programs 1, 2, ...: dweight then dbias of each
};

}  // namespace gk
