// The fork of a residual connection: backward adds the gradients of the skip and of the branch, dx = dskip + dbranch.
// One program owns a contiguous range of elements, walked in blocks of FOLD.
#define GK_SOURCE "residual.cpp"
#include "each_isa.h"

#ifdef GK_ISA
namespace gk::GK_ISA {
#include "vec.h"

#include "measure.h"

// cells: for dskip, dbranch and dx; null where nothing is measured.
template <typename T>
static void residual_bwd(const T* dskip, const T* dbranch, T* dx, int64_t begin, int64_t end, Cell* cells) {
  const auto cell = [&](int port) { return cells ? cells + port : nullptr; };
  Measure<T> measure_skip(cell(0)), measure_branch(cell(1)), measure_dx(cell(2));
  for (int64_t first = begin; first < end; first += CHUNK) {
    const int64_t last = std::min(end, first + CHUNK);
    for_each_vector<T>(first, last, [&](auto access, int64_t k) __attribute__((always_inline)) {
      access.store(dx + k, access.load(dskip + k) + access.load(dbranch + k));
    });
    measure_skip.add(dskip + first, last - first);
    measure_branch.add(dbranch + first, last - first);
    measure_dx.add(dx + first, last - first);
  }
  measure_skip.finish(dskip + end);
  measure_branch.finish(dbranch + end);
  measure_dx.finish(dx + end);
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
  if (!dbranch_any) return only_one(*dskip_any, 0, stats);
  if (!dskip_any) return only_one(*dbranch_any, 1, stats);
  const Tensor dskip = dense(*dskip_any), dbranch = laid_out_as(dskip, *dbranch_any);
  Tensor dx = at::empty_like(dskip);
  const int64_t num_blocks = (dx.numel() + POINTWISE_BLOCK - 1) / POINTWISE_BLOCK;
  const int64_t programs = num_programs(num_blocks, POINTWISE_BLOCK);
  std::vector<Cell> cells(3 * programs);
  GK_DISPATCH(dx.scalar_type(), "residual_bwd", [&] {
    for_each_program(programs, num_blocks, [&](int64_t program, int64_t begin, int64_t end) {
      const auto loop = GK_CHOOSE((residual_bwd<scalar_t>));
      loop(dskip.const_data_ptr<scalar_t>(), dbranch.const_data_ptr<scalar_t>(), dx.mutable_data_ptr<scalar_t>(),
           begin * POINTWISE_BLOCK, std::min(dx.numel(), end * POINTWISE_BLOCK), stats ? &cells[3 * program] : nullptr);
    });
  });
  for (int64_t port = 0; port < 3; ++port) record(stats, port, cells.data() + port, 3, programs, dx.numel());
  return dx;
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) { m.impl("residual_bwd", gk::residual_bwd); }
#endif
