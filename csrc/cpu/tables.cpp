// The tables of statistics on the CPU, which one thread reads, clears or grows while others write them: each op under one lock.
#include "tables.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>

#include "checks.h"

namespace gk {

void add_row(const Tensor& row_any, Tensor& stats, int64_t port) {
  check_row("add_row", stats, port);
  TORCH_CHECK_VALUE(row_any.dim() == 1 && row_any.size(0) == stats.size(2), "add_row: row must have shape (8,), got ",
                    row_any.sizes());
  const Tensor row = row_any.contiguous();
  record(stats, port, *reinterpret_cast<const Slot*>(row.const_data_ptr<double>()));
}

void take_rows(Tensor& stats, Tensor& result) {
  check_stats("take_rows", stats, stats.dim() ? stats.size(0) : 0);
  const int64_t num_rows = stats.size(0), num_slots = stats.size(1);
  check("take_rows", "rows", result, {num_rows, stats.size(2)}, at::kDouble);
  check_contiguous("take_rows", "rows", result);
  const std::lock_guard<std::mutex> lock(tables_mutex);
  auto* rows = reinterpret_cast<Slot*>(result.mutable_data_ptr<double>());
  auto* slots = reinterpret_cast<Slot*>(stats.mutable_data_ptr<double>());
  for (int64_t r = 0; r < num_rows; ++r) {
    rows[r] = Slot();
    for (int64_t c = 0; c < num_slots; ++c) rows[r].merge(slots[r * num_slots + c]);
  }
  std::fill(slots, slots + num_rows * num_slots, Slot());
}

void add_steps(const double* rows, int64_t num_steps, const Tensor& time_stats) {
  const std::lock_guard<std::mutex> lock(tables_mutex);
  const int64_t columns = time_stats.size(1), recorded = std::min(num_steps, time_stats.size(0) - 1);
  double* table = time_stats.mutable_data_ptr<double>();
  table[0] = std::max(table[0], static_cast<double>(num_steps));
  table[1] += 1;
  for (int64_t k = 0; k < recorded * columns; ++k) {
    double& sum = table[columns + k];
    if (k % columns >= NUM_NORMS) {
      sum += rows[k];
    } else {
      sum = sum == 0 ? rows[k] : std::hypot(sum, rows[k]);
    }
  }
}

static void add_steps_op(const Tensor& rows_any, Tensor& time_stats) {
  check_time_stats("add_steps", time_stats);
  TORCH_CHECK_VALUE(rows_any.dim() == 2 && rows_any.size(1) == time_stats.size(1),
                    "add_steps: rows must have as many columns as time_stats, got ", rows_any.sizes());
  const Tensor rows = rows_any.contiguous();
  add_steps(rows.const_data_ptr<double>(), rows.size(0), time_stats);
}

// Memory before size: a reader that does not wait for the lock never sees rows that are not there.
static void grow(const Tensor& time_stats, int64_t num_steps) {
  const int64_t rows = time_stats.size(0), columns = time_stats.size(1);
  if (rows > num_steps) return;
  const int64_t numel = (1 + num_steps) * columns;
  at::native::resize_bytes_cpu(time_stats.storage().unsafeGetStorageImpl(),
                               (time_stats.storage_offset() + numel) * sizeof(double));
  double* table = time_stats.mutable_data_ptr<double>();
  std::fill(table + rows * columns, table + numel, 0.0);
  time_stats.unsafeGetTensorImpl()->set_sizes_contiguous({1 + num_steps, columns});
}

void make_room(Tensor& time_stats, int64_t num_steps) {
  check_time_stats("make_room", time_stats);
  const std::lock_guard<std::mutex> lock(tables_mutex);
  grow(time_stats, num_steps);
}

Tensor take_steps(Tensor& time_stats) {
  check_time_stats("take_steps", time_stats);
  const std::lock_guard<std::mutex> lock(tables_mutex);
  // Its size is known under the lock alone, under which nothing is dispatched.
  const Tensor result = at::detail::empty_cpu(time_stats.sizes(), at::kDouble);
  double* table = time_stats.mutable_data_ptr<double>();
  const auto seen = static_cast<int64_t>(table[0]);
  std::copy(table, table + time_stats.numel(), result.mutable_data_ptr<double>());
  std::fill(table, table + time_stats.numel(), 0.0);
  grow(time_stats, seen);
  return result;
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("add_row", gk::add_row);
  m.impl("take_rows", gk::take_rows);
  m.impl("add_steps", gk::add_steps_op);
  m.impl("make_room", gk::make_room);
  m.impl("take_steps", gk::take_steps);
}
