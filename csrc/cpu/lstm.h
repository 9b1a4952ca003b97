// What the LSTM kernels share outside their loops: the steps of a sequence, the arguments of the loops through time, and the
// threads that walk it together.
#pragma once

#include <omp.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>

#include "../common.h"

namespace gk {

constexpr int64_t WORK_PER_THREAD = 1 << 18;  // multiply-adds a step, about 7 us: below it waiting costs more than is saved
constexpr int64_t PADDING = 16;               // columns between rows of dG: powers of two apart they would share cache sets

// The rows of each time step. `order` lists the steps as the forward pass takes them; before[t] is the step it took before t.
struct Steps {
  Steps(const Tensor& x, const OptionalTensor& batch_sizes, int64_t B, bool reverse) : B(B) {
    const int64_t T = batch_sizes ? batch_sizes->numel() : x.size(0);
    offset.push_back(0);
    for (int64_t t = 0; t < T; ++t) {
      size.push_back(batch_sizes ? batch_sizes->const_data_ptr<int64_t>()[t] : B);
      offset.push_back(offset[t] + size[t]);
      order.push_back(reverse ? T - 1 - t : t);
      before.push_back(reverse ? (t + 1 < T ? t + 1 : -1) : t - 1);
      TORCH_CHECK_VALUE(!batch_sizes || (t == 0 ? size[0] == B : 0 < size[t] && size[t] <= size[t - 1]),
                        "lstm_layer: batch_sizes must start with ", B, " and not increase, got ", size[t], " at step ", t);
    }
    TORCH_CHECK_VALUE(!batch_sizes || offset[T] == x.size(0), "lstm_layer: batch_sizes must add up to ", x.size(0), ", got ",
                      offset[T]);
  }
  int64_t num_steps() const { return static_cast<int64_t>(size.size()); }
  int64_t num_rows() const { return offset.back(); }
  // How many rows of step t have a row in the step before; the others start from the initial state.
  int64_t continued(int64_t t) const { return before[t] < 0 ? 0 : std::min(size[t], size[before[t]]); }

  int64_t B;
  std::vector<int64_t> size, offset, order, before;
};

template <typename A>
struct LstmForward {
  const Steps& steps;
  int64_t H, P;
  const A *weight_hh, *weight_hr, *h0, *c0;  // weight_hr: null without projection
  A *gates, *cells, *y;                      // gates: x W_ih^T + biases on entry, activated on return
  A *packed_hh, *packed_hr, *m;              // scratch: the weights as the loops read them; o tanh(c) of one step
};

// The sums of one time step of one thread, over its units.
struct StepSums {
  double dh = 0, dc = 0, dh_recurrent = 0, counts[7] = {}, forget = 0;
};

template <typename A>
struct LstmBackward {
  const Steps& steps;
  int64_t H, P;
  const A *weight_hh, *weight_hr, *dy, *c0, *gates, *cells;  // dy: null where none came
  A *dh, *dc;                                                // (B, P) and (B, H): dh_n and dc_n on entry, dh0 and dc0 on return
  A *dgates, *dgates_scaled, *dh_total, *m;  // dgates_scaled: two steps' worth; dh_total, m: all rows, with a projection alone
  A *packed_hh, *packed_hr, *dh_scaled, *dm;
  A* largest;         // two steps' worth of one number a thread
  A* rows;            // with telemetry, two rows of H units a thread
  StepSums* sums;     // (steps, threads); null without telemetry
  int64_t* exponent;  // of the scale that each step was walked in
};

// Meets `threads` threads. They spin for a while and then yield, in case there are fewer cores than threads.
class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins > 4000) sched_yield();
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> turn_{0};
};

// How many threads walk a sequence: one where a step is small, where another parallel region is around, and in a child of
// fork(), whose threads are gone while the OpenMP runtime believes them there.
inline int num_step_threads(int64_t work, int64_t num_blocks) {
  const int64_t wanted = std::min<int64_t>({work / WORK_PER_THREAD, num_blocks, at::get_num_threads()});
  if (wanted < 2 || at::in_parallel_region()) return 1;
  static const pid_t first = getpid();
  return getpid() == first ? static_cast<int>(wanted) : 1;
}

// Calls body(thread, threads, barrier) on each of `threads` threads at once.
template <typename Body>
void for_each_thread(int threads, const Body& body) {
  Barrier barrier;
  if (threads == 1) return body(0, 1, barrier);
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads(), barrier);
}

// `t` as the loops read it: without gaps, in float32 or float64.
inline Tensor widened(const Tensor& t) { return t.to(t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous(); }
inline Tensor widened(const OptionalTensor& t) { return t ? widened(*t) : Tensor(); }
inline Tensor widened_rows(const Tensor& t) {
  return widened(t).view({t.numel() / std::max<int64_t>(1, t.size(-1)), t.size(-1)});
}

// Null where the tensor is undefined: what is not there.
template <typename A>
const A* pointer(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<A>() : nullptr;
}
template <typename A>
A* writable(const Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<A>() : nullptr;
}

}  // namespace gk
