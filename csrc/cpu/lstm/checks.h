// What lstm_layer and lstm_cell check: see checks.h. batch_sizes are read, and checked, where Steps are made.
#pragma once

#include <c10/util/SmallVector.h>

#include "../checks.h"

namespace gk {

// B sequences, D inputs, H units, P outputs.
struct LstmSizes {
  int64_t B, D, H, P;
};

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape) {
  TORCH_CHECK_VALUE(t.dim() == dim, op, ": ", name, " must have shape ", shape, ", got ", tuple_of(t.sizes()));
}

inline void check_lstm_weights(const char* op, const LstmSizes& sizes, const Tensor& weight_ih, const Tensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, at::ScalarType dtype) {
  const auto [B, D, H, P] = sizes;
  check(op, "weight_ih", weight_ih, {4 * H, D}, dtype);
  check(op, "weight_hh", weight_hh, {4 * H, P}, dtype);
  TORCH_CHECK_VALUE(bias_ih.has_value() == bias_hh.has_value(), op,
                    ": bias_ih and bias_hh must be given together, got one of them");
  check(op, "bias_ih", bias_ih, {4 * H}, dtype);
  check(op, "bias_hh", bias_hh, {4 * H}, dtype);
}

// A tensor that a forward pass has saved in the dtype that is computed in.
inline void check_saved(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype) {
  check(op, name, t, shape, dtype == at::kDouble ? at::kDouble : at::kFloat);
  check_contiguous(op, name, t);
}

inline LstmSizes check_lstm_cell(const char* op, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih,
                                 const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const auto dtype = x.scalar_type();
  check_floating(op, "x", dtype);
  check_dim(op, "x", x, 2, "(B, D)");
  check_dim(op, "h", h, 2, "(B, H)");
  const LstmSizes sizes{x.size(0), x.size(1), h.size(1), h.size(1)};
  check(op, "h", h, {sizes.B, sizes.H}, dtype);
  check(op, "c", c, {sizes.B, sizes.H}, dtype);
  check_lstm_weights(op, sizes, weight_ih, weight_hh, bias_ih, bias_hh, dtype);
  return sizes;
}

// What a cell's backward takes beside the arguments of its forward pass.
inline void check_lstm_cell_gradients(const char* op, const LstmSizes& sizes, const OptionalTensor& dh_next,
                                      const OptionalTensor& dc_next, const Tensor& gates, const OptionalTensor& stats,
                                      at::ScalarType dtype) {
  check(op, "dh_next", dh_next, {sizes.B, sizes.H}, dtype);
  check(op, "dc_next", dc_next, {sizes.B, sizes.H}, dtype);
  check_saved(op, "gates", gates, {sizes.B, 4 * sizes.H}, dtype);
  check_stats(op, stats, 8);
}

inline LstmSizes check_lstm_layer(const char* op, const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih,
                                  const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                                  const OptionalTensor& weight_hr, bool packed) {
  const auto dtype = x.scalar_type();
  check_floating(op, "x", dtype);
  check_dim(op, "x", x, packed ? 2 : 3, packed ? "(rows, D) where batch_sizes are given" : "(T, B, D)");
  check_dim(op, "h0", h0, 2, "(B, P)");
  check_dim(op, "c0", c0, 2, "(B, H)");
  const LstmSizes sizes{packed ? h0.size(0) : x.size(1), x.size(-1), c0.size(1), weight_hr ? h0.size(1) : c0.size(1)};
  check(op, "h0", h0, {sizes.B, sizes.P}, dtype);
  check(op, "c0", c0, {sizes.B, sizes.H}, dtype);
  check_lstm_weights(op, sizes, weight_ih, weight_hh, bias_ih, bias_hh, dtype);
  check(op, "weight_hr", weight_hr, {sizes.P, sizes.H}, dtype);
  return sizes;
}

// What a layer's backward takes beside the arguments of its forward pass.
inline void check_lstm_layer_gradients(const char* op, const LstmSizes& sizes, const OptionalTensor& dy,
                                       const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x, const Tensor& y,
                                       const Tensor& gates, const Tensor& cells, const OptionalTensor& stats,
                                       const OptionalTensor& time_stats) {
  const auto dtype = x.scalar_type();
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  c10::SmallVector<int64_t, 3> of_y(x.sizes().begin(), x.sizes().end());
  of_y.back() = sizes.P;
  check(op, "dy", dy, of_y, dtype);
  check(op, "dh_n", dh_n, {sizes.B, sizes.P}, dtype);
  check(op, "dc_n", dc_n, {sizes.B, sizes.H}, dtype);
  check(op, "y", y, of_y, dtype);
  check_saved(op, "gates", gates, {rows, 4 * sizes.H}, dtype);
  check_saved(op, "cells", cells, {rows, sizes.H}, dtype);
  check_stats(op, stats, 6);
  if (time_stats) check_time_stats(op, *time_stats);
}

}  // namespace gk
