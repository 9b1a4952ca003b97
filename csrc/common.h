// What two or more ops share: the statistics slot, the choice of instruction set, and the split of work over threads.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "fields.h"
#include "threads.h"

namespace gk {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Which gradients of N inputs a backward is asked for. What is not wanted, or not there, comes back without elements: the
// outputs of an op are tensors.
template <size_t N>
using OutputMask = std::array<bool, N>;
inline Tensor no_gradient(const Tensor& like) { return at::empty({0}, like.options()); }
inline Tensor or_empty(const OptionalTensor& gradient, const Tensor& like) { return gradient ? *gradient : no_gradient(like); }

// What a tensor of T is computed and summed in: float, and double for double.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The instruction set torch itself uses on this CPU (ATEN_CPU_CAPABILITY overrides torch's choice, and so ours).
Isa cpu_isa();

// One slot of a statistics table: the columns of gradkernels/telemetry/fields.py, FIELDS, in that order. The square sum is
// kept in three parts so that it neither underflows nor overflows for float64 (Blue 1978): the tiny part is of
// elements below 2^-480, times 2^537 before they are squared; the huge part of elements above 2^480 and of those in the same
// block, times 2^-537. Other dtypes use the middle alone.
struct Slot {
  double numel = 0, observation_count = 0, square_sum = 0, square_sum_tiny = 0, square_sum_huge = 0, abs_max = 0,
         nonfinite_count = 0, zero_count = 0;

  void merge(const Slot& other) {
    numel += other.numel;
    observation_count += other.observation_count;
    square_sum += other.square_sum;
    square_sum_tiny += other.square_sum_tiny;
    square_sum_huge += other.square_sum_huge;
    abs_max = std::max(abs_max, other.abs_max);
    nonfinite_count += other.nonfinite_count;
    zero_count += other.zero_count;
  }
};
static_assert(sizeof(Slot) == NUM_FIELDS * sizeof(double), "a slot is one row of a float64 table");

// Adds `slot` to slot 0 of row `port` of `stats` (ports, slots, NUM_FIELDS). Threads that share a table add to it in turn.
inline void record(const Tensor& stats, int64_t port, const Slot& slot) {
  const std::lock_guard<std::mutex> lock(tables_mutex);
  reinterpret_cast<Slot*>(stats.data_ptr<double>() + port * stats.stride(0))->merge(slot);
}

// Adds the sums of one backward call, `tasks` slots `stride` apart. The tasks are added in their order, so equal work
// on equal threads gives equal bits.
inline void record(const OptionalTensor& stats, int64_t port, const Slot* slots, int64_t stride, int64_t tasks, int64_t numel) {
  if (!stats) return;
  Slot total;
  for (int64_t p = 0; p < tasks; ++p) total.merge(slots[p * stride]);
  total.numel = static_cast<double>(numel);
  total.observation_count = 1;
  record(*stats, port, total);
}

// `t` in memory without gaps or overlaps, in its own order of dimensions: itself where it already is.
inline Tensor dense(const Tensor& t) {
  if (t.is_non_overlapping_and_dense()) return t;
  const OneThreadInForkedChild guard;
  return at::empty_like(t).copy_(t);
}

// `t` with the strides of the dense tensor `model`, so that both can be read as flat arrays.
inline Tensor with_strides_of(const Tensor& model, const Tensor& t) {
  if (t.strides() == model.strides()) return t;
  const OneThreadInForkedChild guard;
  return at::empty_like(model).copy_(t);
}

constexpr int64_t POINTWISE_BLOCK = 8192;  // elements that are not split over threads
// Adds the statistics of a whole tensor to row `port` of `stats` (cpu/probe.cpp).
void measure(const Tensor& gradient, const Tensor& stats, int64_t port);

constexpr int64_t ELEMENTS_PER_THREAD = 16384;  // below this a second thread costs more than it saves

// How many tasks share `num_items` items of `item_size` elements: the same for the same work and thread count.
inline int64_t num_tasks(int64_t num_items, int64_t item_size) {
  const int64_t wanted = num_items * item_size / ELEMENTS_PER_THREAD;
  return std::max<int64_t>(1, std::min({wanted, num_items, usable_threads()}));
}

// Calls body(task, begin, end) for contiguous ranges of [0, num_items), on torch's own thread pool.
template <typename Body>
void for_each_task(int64_t tasks, int64_t num_items, const Body& body) {
  if (tasks == 1) return body(int64_t{0}, int64_t{0}, num_items);
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) body(p, num_items * p / tasks, num_items * (p + 1) / tasks);
  });
}

}  // namespace gk

// A step of a hot loop: left to itself the compiler calls it, and every vector then goes through memory.
#define GK_INLINE inline __attribute__((always_inline))

#define GK_DISPATCH(dtype, name, ...) AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, name, __VA_ARGS__)
