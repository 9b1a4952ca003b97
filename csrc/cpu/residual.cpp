// The fork of a residual connection: backward adds the gradients of the skip and of the branch, dx = dskip + dbranch.
// One task owns a contiguous range of elements, read in blocks of POINTWISE_BLOCK.
#include "checks.h"

#define GK_SOURCE "residual.cpp"
#include "each_isa.h"

#ifdef GK_ISA
namespace gk::GK_ISA {
#include "vec.h"

#include "measure.h"

template <typename T, Mode MODE>
static void fork_block(const T* dskip, const T* dbranch, T* dx, int64_t count, Measure<T>* measures) {
  Sums<T> sums_skip, sums_branch, sums_dx;
  const auto scale_skip = measures[0].scale(), scale_branch = measures[1].scale(), scale_dx = measures[2].scale();
  for_each_vector<T>(0, count, [&](auto access, int64_t k) __attribute__((always_inline)) {
    access.store(dx + k, access.load(dskip + k) + access.load(dbranch + k));
    if (MODE == OFF) return;
    sums_skip.template add<MODE>(access, dskip + k, scale_skip);
    sums_branch.template add<MODE>(access, dbranch + k, scale_branch);
    sums_dx.template add<MODE>(access, dx + k, scale_dx);
  });
  if (MODE == OFF) return;
  measures[0].merge_partials(MODE, sums_skip, dskip, count);
  measures[1].merge_partials(MODE, sums_branch, dbranch, count);
  measures[2].merge_partials(MODE, sums_dx, dx, count);
}

// slots: for dskip, dbranch and dx; null where nothing is measured.
template <typename T>
static void residual_bwd(const T* dskip, const T* dbranch, T* dx, int64_t begin, int64_t end, Slot* slots) {
  static constexpr decltype(&fork_block<T, OFF>) blocks[] = {fork_block<T, OFF>, fork_block<T, FAST>, fork_block<T, FINITE>,
                                                             fork_block<T, SCALED>};
  const auto slot = [&](int port) { return slots ? slots + port : nullptr; };
  Measure<T> measures[] = {Measure<T>(slot(0)), Measure<T>(slot(1)), Measure<T>(slot(2))};
  for_each_block(begin, end, [&](int64_t first, int64_t last) {
    const Mode mode = std::max({measures[0].mode(), measures[1].mode(), measures[2].mode()});
    blocks[mode](dskip + first, dbranch + first, dx + first, last - first, measures);
  });
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
  const Tensor dskip = dense(*dskip_any), dbranch = with_strides_of(dskip, *dbranch_any);
  Tensor dx = at::empty_like(dskip);
  const int64_t num_blocks = (dx.numel() + POINTWISE_BLOCK - 1) / POINTWISE_BLOCK;
  const int64_t tasks = num_tasks(num_blocks, POINTWISE_BLOCK);
  std::vector<Slot> slots(3 * tasks);
  GK_DISPATCH(dx.scalar_type(), "residual_bwd", [&] {
    for_each_task(tasks, num_blocks, [&](int64_t task, int64_t begin, int64_t end) {
      const auto loop = GK_CHOOSE((residual_bwd<scalar_t>));
      loop(dskip.const_data_ptr<scalar_t>(), dbranch.const_data_ptr<scalar_t>(), dx.mutable_data_ptr<scalar_t>(),
           begin * POINTWISE_BLOCK, std::min(dx.numel(), end * POINTWISE_BLOCK), stats ? &slots[3 * task] : nullptr);
    });
  });
  for (int64_t port = 0; port < 3; ++port) record(stats, port, slots.data() + port, 3, tasks, dx.numel());
  return dx;
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("residual_bwd", gk::residual_bwd);
  m.impl("residual_bwd_unmeasured", [](const gk::OptionalTensor& dskip, const gk::OptionalTensor& dbranch) {
    return gk::residual_bwd(dskip, dbranch, {});
  });
}
#endif
