// The statistics of one gradient that no fused backward holds in registers: one read, nothing written.
// One task owns a contiguous range of elements, read in blocks of POINTWISE_BLOCK.
#include "checks.h"

#define GK_SOURCE "probe.cpp"
#include "each_isa.h"

#ifdef GK_ISA
namespace gk::GK_ISA {
#include "vec.h"

#include "measure.h"
}  // namespace gk::GK_ISA
#else

namespace gk {

void measure(const Tensor& gradient_any, const Tensor& stats, int64_t port) {
  const Tensor gradient = dense(gradient_any);
  const int64_t num_blocks = (gradient.numel() + POINTWISE_BLOCK - 1) / POINTWISE_BLOCK;
  const int64_t tasks = num_tasks(num_blocks, POINTWISE_BLOCK);
  std::vector<Slot> slots(tasks);
  GK_DISPATCH(gradient.scalar_type(), "probe_bwd", [&] {
    const auto* p = gradient.const_data_ptr<scalar_t>();
    for_each_task(tasks, num_blocks, [&](int64_t task, int64_t begin, int64_t end) {
      const int64_t first = begin * POINTWISE_BLOCK, last = std::min(gradient.numel(), end * POINTWISE_BLOCK);
      const auto loop = GK_CHOOSE((measure_array<scalar_t>));
      loop(p + first, last - first, slots[task]);
    });
  });
  record(stats, port, slots.data(), 1, tasks, gradient.numel());
}

void probe_bwd(const Tensor& dy, Tensor& stats, int64_t port) {
  check_floating("probe_bwd", "dy", dy.scalar_type());
  check_row("probe_bwd", stats, port);
  measure(dy, stats, port);
}

}  // namespace gk

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) { m.impl("probe_bwd", gk::probe_bwd); }
#endif
