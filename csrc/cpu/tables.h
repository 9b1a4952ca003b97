// What the kernels of a sequence add to a table of time steps (tables.cpp).
#pragma once

#include <ATen/core/Tensor.h>

namespace gk {

// Adds one backward call to `time_stats`, the columns of gradkernels/telemetry/fields.py, TIME_FIELDS: `rows` holds those of its
// steps. Steps beyond the table are not recorded, which row 0 shows.
void add_steps(const double* rows, int64_t num_steps, const at::Tensor& time_stats);

}  // namespace gk
