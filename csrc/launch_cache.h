// The launch cache: an op whose kernels are launched from Python costs tens of microseconds of host time a call, and the GIL.
// What such a call does, though, follows from its arguments' shapes alone: some allocations, some launches, some outputs. So
// the second call of a signature is captured, and from the third on C++ does the same without Python.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <atomic>
#include <shared_mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "common.h"

namespace gk {

// cuLaunchKernel, or hipModuleLaunchKernel, which takes the same.
using LaunchFunction = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                               void** extra);

// A kernel's parameter: `value` bytes beyond the start of a tensor, or `value` itself, whose low bytes the kernel reads.
struct Parameter {
  static constexpr int64_t LITERAL = -1;
  int64_t tensor;  // an argument by its position, then the allocations; or LITERAL
  uint64_t value;
};

struct Launch {
  std::string kernel;
  void* function;
  std::array<unsigned, 3> grid;
  unsigned threads, shared_bytes;
  std::vector<Parameter> parameters;
};

struct Allocation {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
};

// What one call signature does, in this order. `kernels` keeps the code that `launches` point to.
struct CapturedLaunches {
  std::vector<Allocation> allocations;
  std::vector<Launch> launches;
  std::vector<size_t> outputs;  // allocations
  std::shared_ptr<PyObject> kernels;
};

// The signature of a call, in words. No two signatures have the same: see Call in launch_cache.cpp.
using Key = std::span<const uint64_t>;
struct HashKey {
  using is_transparent = void;
  size_t operator()(Key key) const;
};
struct EqualKey {
  using is_transparent = void;
  bool operator()(Key a, Key b) const { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }
};

// The captured launches of one op. Bounded: where shapes never repeat, the table starts again once it is full of kinds or of
// launches (a time loop has as many as steps, of some 500 bytes each).
class LaunchCache {
 public:
  static constexpr size_t MAX_KINDS = 1024, MAX_LAUNCHES = 1 << 16;
  std::shared_ptr<const CapturedLaunches> find(Key key) const;
  // Counts a call that has no captured launches; true if it should be captured.
  bool should_capture(Key key);
  // Keeps what was seen; none says that this signature never has any.
  void keep(Key key, std::shared_ptr<const CapturedLaunches> capture);
  std::pair<size_t, size_t> size() const;  // kinds seen, and how many of them have captured launches
  std::atomic<uint64_t> replays = 0;

 private:
  struct Entry {
    int calls = 0;
    bool captured = false;
    std::shared_ptr<const CapturedLaunches> capture;
  };
  using Table = std::unordered_map<std::vector<uint64_t>, Entry, HashKey, EqualKey>;
  Entry& entry(Key key, Table& full);
  mutable std::shared_mutex mutex_;
  Table table_;
  size_t launches_ = 0;
};

void bind_launch_cache(pybind11::module_& m);

}  // namespace gk
