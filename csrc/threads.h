// What the threads of a process share: the lock of the tables they write, and how many of them there may be.
#pragma once

#include <ATen/Parallel.h>

#include <mutex>

namespace gk {

// Guards every table of statistics on the CPU: its numbers, and of a table of time steps its size and memory, which grow.
// It is held for loads and stores alone, never while an op of PyTorch's or Python runs, so that whoever holds the GIL may
// wait for it. fork() waits for it too.
extern std::mutex tables_mutex;

// Whether this process is a child of fork(): the threads of its parent are gone, while the OpenMP runtime believes them
// there and would wait for them.
bool in_forked_child();

// How many threads may share work: one inside another parallel region, and one in a child of fork().
inline int64_t usable_threads() { return in_forked_child() || at::in_parallel_region() ? 1 : at::get_num_threads(); }

// PyTorch's own ops wait for the parent's threads as well. While one of these lives, those that our ops call do not.
class OneThreadInForkedChild {
 public:
  OneThreadInForkedChild() : before_(in_forked_child() ? at::get_num_threads() : 1) {
    if (before_ > 1) at::set_num_threads(1);
  }
  ~OneThreadInForkedChild() {
    if (before_ > 1) at::set_num_threads(before_);
  }
  OneThreadInForkedChild(const OneThreadInForkedChild&) = delete;
  OneThreadInForkedChild& operator=(const OneThreadInForkedChild&) = delete;

 private:
  const int before_;
};

}  // namespace gk
