// What an op checks of its arguments before a loop gets pointers to them, so that no call, not one of torch.ops.gradkernels.*
// itself, reads or writes beyond a tensor. The public functions in gradkernels/ops/ have said earlier, on every device, what
// a user can get wrong. What they do not see is found here alone: gradients, what was saved, and tables that are no longer
// what they were in the forward pass.
//
// A check that holds is a comparison or two. Messages are made by functions that are called when one fails.
#pragma once

#include <sstream>

#include "../common.h"

namespace gk {

#define GK_SELDOM [[gnu::cold]] [[gnu::noinline]] inline

// A shape as Python writes it.
GK_SELDOM std::string tuple_of(at::IntArrayRef sizes) {
  std::ostringstream text;
  for (size_t k = 0; k < sizes.size(); ++k) text << (k ? ", " : "(") << sizes[k];
  text << (sizes.empty() ? "()" : sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

GK_SELDOM void wrong_shape(const char* op, const char* name, at::IntArrayRef expected, const Tensor& got) {
  TORCH_CHECK_VALUE(false, op, ": ", name, " must have shape ", tuple_of(expected), ", got ", tuple_of(got.sizes()));
}
GK_SELDOM void wrong_dtype(const char* op, const char* name, const char* expected, at::ScalarType got) {
  TORCH_CHECK_TYPE(false, op, ": ", name, " must be ", expected, ", got ", got);
}
GK_SELDOM void not_contiguous(const char* op, const char* name, const Tensor& got) {
  TORCH_CHECK_VALUE(false, op, ": ", name, " must be contiguous, got strides ", tuple_of(got.strides()));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, at::IntArrayRef expected) {
  if (t.sizes() != expected) [[unlikely]]
    wrong_shape(op, name, expected, t);
}
inline void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType expected) {
  if (t.scalar_type() != expected) [[unlikely]]
    wrong_dtype(op, name, at::toString(expected), t.scalar_type());
}
inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  if (!t.is_contiguous()) [[unlikely]]
    not_contiguous(op, name, t);
}

inline bool is_16_bit(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

inline void check_floating(const char* op, const char* name, at::ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kDouble && !is_16_bit(dtype)) [[unlikely]]
    wrong_dtype(op, name, "Float, Double, BFloat16 or Half", dtype);
}

// dtype, or float32 beside a 16-bit one.
inline void check_dtype_or_float(const char* op, const char* name, at::ScalarType got, at::ScalarType dtype) {
  if (got == dtype || (got == at::kFloat && is_16_bit(dtype))) [[likely]]
    return;
  wrong_dtype(op, name, is_16_bit(dtype) ? (dtype == at::kHalf ? "Half or Float" : "BFloat16 or Float") : at::toString(dtype),
              got);
}

// What is there has this shape and dtype.
inline void check(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype) {
  check_shape(op, name, t, shape);
  check_dtype(op, name, t, dtype);
}
inline void check(const char* op, const char* name, const OptionalTensor& t, at::IntArrayRef shape, at::ScalarType dtype) {
  if (t) check(op, name, *t, shape, dtype);
}

// A table of statistics with a row for each of `ports` gradients, and a slot of each to add to.
inline void check_stats(const char* op, const Tensor& stats, int64_t ports) {
  check_dtype(op, "stats", stats, at::kDouble);
  TORCH_CHECK_VALUE(stats.dim() == 3 && stats.size(0) == ports && stats.size(2) == NUM_FIELDS, op,
                    ": stats must have shape (ports, slots, fields) = (", ports, ", slots, ", NUM_FIELDS, "), got ",
                    tuple_of(stats.sizes()));
  TORCH_CHECK_VALUE(stats.size(1) > 0, op, ": stats must have a slot or more, got shape ", tuple_of(stats.sizes()));
  check_contiguous(op, "stats", stats);
}
inline void check_stats(const char* op, const OptionalTensor& stats, int64_t ports) {
  if (stats) check_stats(op, *stats, ports);
}

// A table of any number of rows, and one of them.
inline void check_row(const char* op, const Tensor& stats, int64_t port) {
  check_stats(op, stats, stats.dim() ? stats.size(0) : 0);
  TORCH_CHECK_VALUE(0 <= port && port < stats.size(0), op, ": port must be a row of stats, 0 to ", stats.size(0) - 1, ", got ",
                    port);
}

// A table of time steps: the first row is about all of them.
inline void check_time_stats(const char* op, const Tensor& time_stats) {
  check_dtype(op, "time_stats", time_stats, at::kDouble);
  TORCH_CHECK_VALUE(time_stats.dim() == 2 && time_stats.size(0) > 0 && time_stats.size(1) == NUM_TIME_FIELDS, op,
                    ": time_stats must have shape (1 + steps, fields) = (1 + steps, ", NUM_TIME_FIELDS, "), got ",
                    tuple_of(time_stats.sizes()));
  check_contiguous(op, "time_stats", time_stats);
}

}  // namespace gk
