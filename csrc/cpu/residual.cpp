// The fork of a residual connection: backward adds the gradients of the skip and of the branch, dx = dskip + dbranch.
// One program owns a contiguous range of elements, walked in blocks of FOLD.
#include "checks.h"

#define GK_SOURCE "residual.cpp"
#include "each_isa.h"

#ifdef GK_ISA
namespace gk::GK_ISA {
#include "vec.h"

#include "measure.h"

template <typename T, bool TELEMETRY>
static void fork_range(const T* dskip_ptr, const T* dbranch_ptr, T* dx_ptr, int64_t begin, int64_t end, Cell* cells) {
  Measure<T> measure_skip, measure_branch, measure_dx;
  for (int64_t first = begin; first < end; first += FOLD) {
    const int64_t last = std::min(end, first + FOLD);
    int64_t k = first;
    for (; k + STEP<T> <= last; k += STEP<T>) {
      store_pair(dx_ptr + k, load_pair(dskip_ptr + k) + load_pair(dbranch_ptr + k));
      if (TELEMETRY) {
        add(measure_skip, dskip_ptr + k);
        add(measure_branch, dbranch_ptr + k);
        add(measure_dx, dx_ptr + k);
      }
    }
    if (k < last) {
      store_tail(dx_ptr + k, load_tail(dskip_ptr + k, last - k) + load_tail(dbranch_ptr + k, last - k), last - k);
      if (TELEMETRY) {
        add_tail(measure_skip, dskip_ptr + k, last - k);
        add_tail(measure_branch, dbranch_ptr + k, last - k);
        add_tail(measure_dx, dx_ptr + k, last - k);
      }
    }
    if (TELEMETRY) {
      fold(measure_skip, dskip_ptr + first, last - first, cells[0]);
      fold(measure_branch, dbranch_ptr + first, last - first, cells[1]);
      fold(measure_dx, dx_ptr + first, last - first, cells[2]);
    }
  }
}

template <typename T>
static void residual_bwd(const T* dskip, const T* dbranch, T* dx, bool telemetry, int64_t begin, int64_t end, Cell* cells) {
  (telemetry ? fork_range<T, true> : fork_range<T, false>)(dskip, dbranch, dx, begin, end, cells);
}
}  // namespace gk::GK_ISA
#else

namespace gk {

// Where only one gradient arrives, it is dx, measured and copied: an op's output never shares its input's memory.
static Tensor only_one(const Tensor& gradient, int64_t port, const OptionalTensor& stats) {
  if (stats) {
    measure(gradient, *stats, port);
    measure(gradient, *stats, 2);
  }
  return gradient.clone();
}

Tensor residual_bwd(const OptionalTensor& dskip_any, const OptionalTensor& dbranch_any, const OptionalTensor& stats) {
  TORCH_CHECK_VALUE(dskip_any || dbranch_any, "residual_bwd: dskip or dbranch must be given, got neither");
  check_floating("residual_bwd", dskip_any ? "dskip" : "dbranch", (dskip_any ? dskip_any : dbranch_any)->scalar_type());
  check_stats("residual_bwd", stats, 3);
  if (!dbranch_any) return only_one(*dskip_any, 0, stats);
  if (!dskip_any) return only_one(*dbranch_any, 1, stats);
  check("residual_bwd", "dbranch", *dbranch_any, dskip_any->sizes(), dskip_any->scalar_type());
  const Tensor dskip = dense(*dskip_any), dbranch = laid_out_as(dskip, *dbranch_any);
  Tensor dx = at::empty_like(dskip);
  const int64_t num_blocks = (dx.numel() + POINTWISE_BLOCK - 1) / POINTWISE_BLOCK;
  const int64_t programs = num_programs(num_blocks, POINTWISE_BLOCK);
  std::vector<Cell> cells(3 * programs);
  GK_DISPATCH(dx.scalar_type(), "residual_bwd", [&] {
    for_each_program(programs, num_blocks, [&](int64_t program, int64_t begin, int64_t end) {
      const auto loop = GK_CHOOSE((residual_bwd<scalar_t>));
      loop(dskip.const_data_ptr<scalar_t>(), dbranch.const_data_ptr<scalar_t>(), dx.mutable_data_ptr<scalar_t>(),
           stats.has_value(), begin * POINTWISE_BLOCK, std::min(dx.numel(), end * POINTWISE_BLOCK), &cells[3 * program]);
    });
  });
  for (int64_t port = 0; port < 3; ++port) record(stats, port, cells.data() + port, 3, programs, dx.numel());
  return dx;
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) { m.impl("residual_bwd", gk::residual_bwd); }
#endif
