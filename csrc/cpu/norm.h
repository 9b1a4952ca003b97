// What layer_norm and add_layer_norm share outside their loops: arguments, shapes, and dweight and dbias as one pair of
// accumulators a task, summed in the tasks' order.
#pragma once

#include <ATen/ops/zeros.h>

#include <utility>

#include "../common.h"

namespace gk {

template <typename TX, typename TY>
struct NormBackward {
  const TY* dy;
  const TX *x, *dresidual;  // dresidual: null where no gradient arrives beside dy
  const Acc<TX>*weight, *mean, *rstd;
  TX* dx;
  TY* dx_again;  // dx in memory of its own and in dy's dtype; null where one is enough
  int64_t N;
};

template <typename TX>
struct NormGradients {
  // This task's column sums of its last rows, in columns that go on up to a multiple of COLUMN_PADDING; both or neither.
  Acc<TX>*dweight, *dbias;
  double *dweight_total, *dbias_total;  // of the rows before, N each; null where the task has few rows
  Slot* slots;                          // this task's statistics: dy, dresidual, dx; null where nothing is measured

  void merge_columns(int64_t N) const {
    for (int64_t k = 0; k < N; ++k) {
      dweight_total[k] += std::exchange(dweight[k], Acc<TX>(0));
      dbias_total[k] += std::exchange(dbias[k], Acc<TX>(0));
    }
  }
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

constexpr int64_t COLUMN_PADDING = 32;   // columns: a multiple of what a loop takes at a time, on any instruction set
constexpr int64_t ROWS_OF_A_SUM = 1024;  // rows whose column sums are added up in the accumulator's dtype
inline int64_t padded_columns(int64_t N) { return (N + COLUMN_PADDING - 1) / COLUMN_PADDING * COLUMN_PADDING; }

// A weight or bias as the loops read it: in the accumulator's dtype, and behind its N numbers zeros up to padded_columns(N).
// Where there is none, `otherwise` in every column.
template <typename A>
class Columns {
 public:
  Columns(const OptionalTensor& given, int64_t N, A otherwise) {
    if (given) given_ = given->contiguous();
    if (given && given_.scalar_type() == c10::CppTypeToScalarType<A>::value && N == padded_columns(N)) {
      data_ = given_.template const_data_ptr<A>();
      return;
    }
    copy_.resize(padded_columns(N));
    data_ = copy_.data();
    if (!given) {
      std::fill_n(copy_.begin(), N, otherwise);
      return;
    }
    GK_DISPATCH(given_.scalar_type(), "norm", [&] {
      const auto* from = given_.template const_data_ptr<scalar_t>();
      for (int64_t k = 0; k < N; ++k) copy_[k] = static_cast<A>(from[k]);
    });
  }
  const A* data() const { return data_; }

 private:
  Tensor given_;
  std::vector<A> copy_;
  const A* data_;
};

// dweight and dbias: one pair of accumulators a task, added up in the tasks' order.
template <typename TX>
class ColumnSums {
 public:
  ColumnSums(const OptionalTensor& weight, const OptionalTensor& bias, int64_t M, int64_t N, int64_t tasks, bool of_weight,
             bool of_bias)
      : weight_(of_weight ? weight : std::nullopt),
        bias_(of_bias ? bias : std::nullopt),
        N_(N),
        padded_(padded_columns(N)),
        tasks_(tasks) {
    if (!weight_ && !bias_) return;
    recent_.resize(2 * tasks * padded_);
    if (M > ROWS_OF_A_SUM) total_.resize(2 * tasks * N);
  }

  NormGradients<TX> of(int64_t task, Slot* slots) {
    if (recent_.empty()) return {nullptr, nullptr, nullptr, nullptr, slots};
    A* recent = recent_.data() + 2 * task * padded_;
    double* total = total_.empty() ? nullptr : total_.data() + 2 * task * N_;
    return {recent, recent + padded_, total, total ? total + N_ : nullptr, slots};
  }

  // (dweight, dbias) in the dtype of weight and bias, measured as stored; a tensor of no elements where not wanted.
  std::tuple<Tensor, Tensor> finish(const OptionalTensor& stats, int64_t dweight_port, const Tensor& x) {
    return {finish_one(weight_, 0, stats, dweight_port, x), finish_one(bias_, 1, stats, dweight_port + 1, x)};
  }

 private:
  using A = Acc<TX>;

  Tensor finish_one(const OptionalTensor& parameter, int64_t which, const OptionalTensor& stats, int64_t port,
                    const Tensor& x) {
    if (!parameter) return no_gradient(x);
    Tensor gradient = at::empty(parameter->sizes(), parameter->options());
    GK_DISPATCH(gradient.scalar_type(), "norm", [&] {
      auto* to = gradient.template mutable_data_ptr<scalar_t>();
      for (int64_t k = 0; k < N_; ++k) {
        double sum = 0;
        for (int64_t p = 0; p < tasks_; ++p) {
          sum += static_cast<double>(recent_[(2 * p + which) * padded_ + k]);
          if (!total_.empty()) sum += total_[(2 * p + which) * N_ + k];
        }
        to[k] = static_cast<scalar_t>(sum);
      }
    });
    if (stats) measure(gradient, *stats, port);
    return gradient;
  }

  const OptionalTensor weight_, bias_;  // those that want a gradient
  int64_t N_, padded_, tasks_;
  std::vector<A> recent_;  // of each task: dweight, dbias
  std::vector<double> total_;
};

}  // namespace gk
