// What the LSTM kernels share outside their loops: the steps of a sequence, the arguments of the loops through time, and the
// threads that work on it together.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>

#include "../../common.h"

namespace gk {

constexpr int64_t WORK_PER_THREAD = 1 << 18;  // multiply-adds a step, about 7 us: below it waiting costs more than is saved
constexpr int64_t PADDING = 16;               // columns between rows of dG: powers of two apart they would share cache sets

// The numbers of rows of all time steps, or an error where batch_sizes are not those of x and B.
inline std::vector<int64_t> rows_per_step(const Tensor& x, const OptionalTensor& batch_sizes, int64_t B) {
  const int64_t T = batch_sizes ? batch_sizes->numel() : x.size(0);
  TORCH_CHECK_VALUE(T > 0, "lstm_layer: Expected sequence length to be larger than 0 in RNN");
  if (!batch_sizes) return std::vector<int64_t>(T, B);
  TORCH_CHECK_VALUE(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == at::kLong && batch_sizes->is_cpu(),
                    "lstm_layer: batch_sizes must be int64 of shape (T,) on the CPU, got ", batch_sizes->scalar_type(),
                    " of shape ", batch_sizes->sizes(), " on ", batch_sizes->device());
  const Tensor given = batch_sizes->contiguous();
  const int64_t* first = given.const_data_ptr<int64_t>();
  const std::vector<int64_t> sizes(first, first + T);
  int64_t rows = 0;
  for (int64_t t = 0; t < T; ++t) {
    rows += sizes[t];
    TORCH_CHECK_VALUE(t == 0 ? sizes[0] == B : 0 <= sizes[t] && sizes[t] <= sizes[t - 1],
                      "lstm_layer: batch_sizes must start with ", B, " and not increase, got ", sizes[t], " at step ", t);
  }
  TORCH_CHECK_VALUE(rows == x.size(0), "lstm_layer: batch_sizes must add up to ", x.size(0), ", got ", rows);
  return sizes;
}

// The rows of each time step. `order` lists the steps as the forward pass takes them; before[t] is the step it took before t.
struct Steps {
  Steps(const Tensor& x, const OptionalTensor& batch_sizes, int64_t B, bool reverse)
      : B(B), size(rows_per_step(x, batch_sizes, B)) {
    const int64_t T = num_steps();
    offset.push_back(0);
    for (int64_t t = 0; t < T; ++t) {
      offset.push_back(offset[t] + size[t]);
      order.push_back(reverse ? T - 1 - t : t);
      before.push_back(reverse ? (t + 1 < T ? t + 1 : -1) : t - 1);
    }
  }
  int64_t num_steps() const { return static_cast<int64_t>(size.size()); }
  int64_t num_rows() const { return offset.back(); }
  // How many rows of step t have a row in the step before; the others start from the initial state.
  int64_t rows_with_predecessor(int64_t t) const { return before[t] < 0 ? 0 : std::min(size[t], size[before[t]]); }

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

// A sum of squares: of tiny elements times 2^537, of huge ones times 2^-537, and of the others: no square leaves float64.
struct SquareSum {
  double ordinary = 0, tiny = 0, huge = 0;

  void operator+=(const SquareSum& other) {
    ordinary += other.ordinary;
    tiny += other.tiny;
    huge += other.huge;
  }
  double norm() const { return std::hypot(std::sqrt(ordinary), std::sqrt(tiny) / SCALE, std::sqrt(huge) * SCALE); }
};

// The sums of one time step of one thread, over its units.
struct StepSums {
  SquareSum dh, dc, dh_recurrent;
  double counts[NUM_COUNTS] = {}, forget = 0;
};

template <typename A>
struct LstmBackward {
  const Steps& steps;
  int64_t H, P;
  const A *weight_hh, *weight_hr, *dy, *c0, *gates, *cells;  // dy: null where none came
  A *dh, *dc;                                                // (B, P) and (B, H): dh_n and dc_n on entry, dh0 and dc0 on return
  A *dgates, *dgates_scaled, *dh_total, *m;  // dgates_scaled: two steps' worth; dh_total, m: all rows, with a projection alone
  A *packed_hh, *packed_hr, *dh_scaled, *dm;
  A* max_abs;         // two steps' worth of one number a thread
  A* rows;            // with telemetry, two rows of H units a thread
  StepSums* sums;     // (steps, threads); null without telemetry
  int64_t* exponent;  // of the scale that each step was computed in
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

// How many threads work on a sequence: one where a step is small.
inline int num_step_threads(int64_t work, int64_t num_blocks) {
  return static_cast<int>(std::max<int64_t>(1, std::min({work / WORK_PER_THREAD, num_blocks, usable_threads()})));
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
inline Tensor upcast(const Tensor& t) { return t.to(t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous(); }
inline Tensor upcast(const OptionalTensor& t) { return t ? upcast(*t) : Tensor(); }
inline Tensor upcast_rows(const Tensor& t) {
  return upcast(t).view({c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)), t.size(-1)});
}

// The gradients of bias_ih and bias_hh where they are wanted: equal numbers, a tensor each, as of any two inputs.
inline std::pair<OptionalTensor, OptionalTensor> of_both_biases(const OptionalTensor& dbias, bool of_bias_ih, bool of_bias_hh) {
  const bool both = dbias && of_bias_ih && of_bias_hh;
  return {of_bias_ih ? dbias : std::nullopt, both ? dbias->clone() : of_bias_hh ? dbias : std::nullopt};
}

// Adds the statistics of those gradients that are there, in the order of the op's ports.
inline void measure_ports(const OptionalTensor& stats, std::initializer_list<OptionalTensor> gradients) {
  if (!stats) return;
  int64_t port = 0;
  for (const OptionalTensor& gradient : gradients) {
    if (gradient) measure(*gradient, *stats, port);
    ++port;
  }
}

// Null where the tensor is undefined: what is not there. One without elements is there, and has an address nobody reads.
template <typename A>
A* writable(const Tensor& t) {
  static A nowhere;
  if (!t.defined()) return nullptr;
  return t.numel() == 0 ? &nowhere : t.mutable_data_ptr<A>();
}
template <typename A>
const A* pointer(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.const_data_ptr<A>() : writable<A>(t);
}

}  // namespace gk
