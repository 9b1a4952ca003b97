// csrc/cuda/device.h on a machine without a GPU. Each block is a thread of the operating system and its threads are fibers,
// which change places where a warp or the block meets, in an order that is drawn anew each time. Blocks truly run side by side.
//
// What would be wrong on a device is found out: a result that needs a barrier which is missing (the order is random, and blocks
// dawdle at random before and after they publish, and when they have waited), threads that do not meet at the same point, reads
// out of shared memory that nobody wrote (it starts as NaN), access behind the end of a tensor (a fault), and waiting for
// somebody who never comes.
#pragma once

#include <math.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/lstm_tiling.h"
#include "fibers_on_host.h"

namespace gk::host {

struct GivenUp {};

// A tensor moved to where nothing may be touched behind its end (nor, where AddressSanitizer looks, before its begin), and back
// where it came from. One that is not aligned to 16 bytes stays so.
template <typename A>
class Guarded {
 public:
  Guarded(A* source, int64_t count) : source_(source), bytes_(source ? count * sizeof(A) : 0) {
    if (!source) return;
    const size_t page = sysconf(_SC_PAGESIZE), off = reinterpret_cast<uintptr_t>(source) % 16;
    const size_t pages = (bytes_ + off + page - 1) / page * page;
    size_ = pages + page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + pages, page, PROT_NONE);
    data_ = reinterpret_cast<A*>(base_ + pages - bytes_ - off);
    forbid(base_, pages - bytes_ - off);
    memcpy(const_cast<std::remove_const_t<A>*>(data_), source, bytes_);
  }
  ~Guarded() {
    if (!source_) return;
    if constexpr (!std::is_const_v<A>) memcpy(source_, data_, bytes_);
    allow(base_, size_);
    munmap(base_, size_);
  }
  Guarded(const Guarded&) = delete;
  operator A*() const { return data_; }

 private:
  A *source_, *data_ = nullptr;
  size_t bytes_, size_ = 0;
  char* base_ = nullptr;
};

// What a launch is made of, and what is to go wrong in it on purpose.
struct Launch {
  int blocks = 0;
  size_t shared_bytes = 0;
  unsigned seed = 1;
  double timeout_seconds = 60;
  int silent_block = -1;  // never publishes
  int dawdling = 0;       // one time in so many a block is late to publish, or to go on after it; 0: never
  std::atomic<bool> failed{false};
};

// What is to order nothing, for a test of ThreadSanitizer itself.
enum class Order { NONE, SYNC, PUBLISH, ACQUIRE };
inline Order forgotten = Order::NONE;

enum class State { RUNNING, AT_WARP, AT_BLOCK, DONE };

struct Block;
inline thread_local Block* current = nullptr;

struct Fiber {
  Strand strand;
  State state = State::RUNNING;
  unsigned meetings = 0;              // of its block
  std::vector<const void*> peeked{};  // flags, since it last acquired
};

// What the lanes of a warp lay on the table when they meet.
struct Table {
  uint32_t a[32][4], b[32][2];
  uint64_t value[32];
};

struct Block {
  static constexpr size_t STACK = 256 << 10;
  Launch& launch;
  const std::function<void()>& kernel;
  int index, running = 0;
  std::vector<Fiber> fibers{THREADS};
  std::vector<Table> tables{WARPS};
  std::vector<std::chrono::steady_clock::time_point> waiting_since{THREADS};
  std::unique_ptr<Vector16[]> shared;
  char* stacks;
  Strand scheduler;
  char barrier[2];  // places that order what is before and after the block meets, in turns
  std::mt19937 random;

  Block(Launch& launch, const std::function<void()>& kernel, int index)
      : launch(launch), kernel(kernel), index(index), shared(new Vector16[launch.shared_bytes / sizeof(Vector16) + 1]) {
    random.seed(launch.seed * 7919 + index);
    memset(shared.get(), 0xff, launch.shared_bytes);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, STACK * THREADS, PROT_READ | PROT_WRITE, flags, -1, 0));
  }
  ~Block() { munmap(stacks, STACK * THREADS); }

  // Back to the scheduler, until it is this fiber's turn again.
  void leave(State state) {
    const Untracked untracked;
    Fiber& fiber = fibers[running];
    fiber.state = state;
    const void* place = &barrier[fiber.meetings % 2];
    if (state == State::AT_BLOCK) ordered_before(place);
    fiber.strand.change_to(scheduler);
    if (launch.failed) throw GivenUp{};
    if (state != State::AT_BLOCK) return;
    ++fiber.meetings;
    if (forgotten != Order::SYNC) ordered_after(place);
  }

  static void begin() {
    Block& block = *current;
    Strand& strand = block.fibers[block.running].strand;
    strand.entered();
    try {
      block.kernel();
    } catch (const GivenUp&) {
      block.launch.failed = true;
    }
    {
      const Untracked untracked;
      block.fibers[block.running].state = State::DONE;
    }
    strand.change_to(block.scheduler, true);
  }

  void resume(int thread) {
    running = thread;
    Strand& strand = fibers[thread].strand;
    if (!strand.prepared()) strand.prepare(stacks + STACK * thread, STACK, begin);
    scheduler.change_to(strand);
    if (fibers[thread].state == State::DONE) strand.forget();
  }

  // The state that all fibers of [begin, begin + count) are in, or RUNNING where they differ.
  State common(int begin, int count) const {
    for (int k = 1; k < count; ++k) {
      if (fibers[begin + k].state != fibers[begin].state) return State::RUNNING;
    }
    return fibers[begin].state;
  }

  void run() {
    const Untracked untracked;
    current = this;
    std::vector<int> order(THREADS);
    std::iota(order.begin(), order.end(), 0);
    while (common(0, THREADS) != State::DONE) {
      std::shuffle(order.begin(), order.end(), random);
      bool moved = false;
      for (int thread : order) {
        if (fibers[thread].state != State::RUNNING) continue;
        resume(thread);
        moved = true;
      }
      // A warp that has met goes on, or the whole block. When nobody can go on, threads wait at different points.
      if (common(0, THREADS) == State::AT_BLOCK) {
        for (Fiber& fiber : fibers) fiber.state = State::RUNNING;
        continue;
      }
      for (int warp = 0; warp < WARPS; ++warp) {
        if (common(32 * warp, 32) != State::AT_WARP) continue;
        for (int lane = 0; lane < 32; ++lane) fibers[32 * warp + lane].state = State::RUNNING;
        moved = true;
      }
      if (!moved || launch.failed) {
        launch.failed = true;
        return;
      }
    }
  }

  void dawdle() {
    const Untracked untracked;
    if (launch.dawdling && random() % launch.dawdling == 0) usleep(random() % 400);
  }
};

// Runs `kernel` on `blocks` blocks at once. False where a block gave up waiting, or its threads did not meet.
inline bool run(Launch& launch, const std::function<void()>& kernel) {
  std::vector<std::thread> threads;
  for (int index = 0; index < launch.blocks; ++index) {
    threads.emplace_back([&, index] {
      Block block(launch, kernel, index);
      block.run();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return !launch.failed;
}

// Lays something on the warp's table, and returns the table when all lanes have. Two barriers: the first so that all is there,
// the second, by the caller, so that nobody clears it away too early.
template <typename Lay>
Table& meet(const Lay& lay) {
  const Untracked untracked;
  Block& block = *current;
  Table& table = block.tables[block.running / 32];
  lay(table, block.running % 32);
  block.leave(State::AT_WARP);
  return table;
}

// The value of all lanes, combined by `combine`.
template <typename A, typename Combine>
A all_lanes(A v, Combine combine) {
  const Untracked untracked;
  const Table& table = meet([&](Table& t, int lane) { memcpy(&t.value[lane], &v, sizeof(v)); });
  A result, other;
  memcpy(&result, &table.value[0], sizeof(v));
  for (int lane = 1; lane < 32; ++lane) {
    memcpy(&other, &table.value[lane], sizeof(v));
    result = combine(result, other);
  }
  current->leave(State::AT_WARP);
  return result;
}

// The product from its fragments, element by element as PTX defines them.
template <typename T>
void product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Untracked untracked;
  const Table& table = meet([&](Table& t, int lane) {
    memcpy(t.a[lane], a, sizeof(a));
    t.b[lane][0] = b0;
    t.b[lane][1] = b1;
  });
  const auto element = [](uint32_t pair, int k) { return device::upcast(T{static_cast<uint16_t>(pair >> 16 * (k % 2))}); };
  const int lane = current->running % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float left = element(table.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k);
      c[i] += left * element(table.b[column * 4 + k % 8 / 2][k / 8], k);
    }
  }
  current->leave(State::AT_WARP);
}

}  // namespace gk::host

namespace gk::device {

inline int thread() { return host::current->running; }
inline int block() { return host::current->index; }
inline char* shared() { return reinterpret_cast<char*>(host::current->shared.get()); }
inline void sync() { host::current->leave(host::State::AT_BLOCK); }

inline uint32_t warp_max(uint32_t v) {
  return host::all_lanes(v, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline uint32_t warp_add(uint32_t v) {
  return host::all_lanes(v, [](uint32_t a, uint32_t b) { return a + b; });
}
template <typename A>
A shuffle_xor(A v, int mask) {
  const host::Untracked untracked;
  const host::Table& table = host::meet([&](host::Table& t, int lane) { memcpy(&t.value[lane], &v, sizeof(v)); });
  A result;
  memcpy(&result, &table.value[thread() % 32 ^ mask], sizeof(v));
  host::current->leave(host::State::AT_WARP);
  return result;
}

inline void mma(Bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::product<Bfloat16>(c, a, b0, b1);
}
inline void mma(Half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { host::product<Half>(c, a, b0, b1); }

inline Vector16 load_foreign(const Vector16* p) { return *p; }
inline void publish(uint64_t* flag, uint64_t value) {
  host::current->dawdle();
  if (host::current->index == host::current->launch.silent_block) return;
  if (host::forgotten == host::Order::PUBLISH) {
    __atomic_store_n(flag, value, __ATOMIC_RELAXED);
  } else {
    __atomic_store_n(flag, value, __ATOMIC_RELEASE);
  }
  host::current->dawdle();
}
inline uint64_t peek(const uint64_t* flag) {
  const host::Untracked untracked;
  auto& peeked = host::current->fibers[thread()].peeked;
  if (peeked.empty() || peeked.back() != flag) peeked.push_back(flag);
  return __atomic_load_n(flag, __ATOMIC_RELAXED);
}
// A fence is unknown to ThreadSanitizer: it is told that what this thread has peeked at is acquired.
inline void acquire() {
  const host::Untracked untracked;
  std::atomic_thread_fence(std::memory_order_acquire);
  auto& peeked = host::current->fibers[thread()].peeked;
  for (const void* flag : peeked) {
    if (host::forgotten != host::Order::ACQUIRE) host::ordered_after(flag);
  }
  peeked.clear();
  host::current->dawdle();
}
inline bool timed_out(uint32_t polls) {
  const host::Untracked untracked;
  host::Block& block = *host::current;
  const auto now = std::chrono::steady_clock::now();
  if (polls == 0) block.waiting_since[block.running] = now;
  sched_yield();
  block.leave(host::State::RUNNING);
  return std::chrono::duration<double>(now - block.waiting_since[block.running]).count() > block.launch.timeout_seconds;
}
inline void trap() { throw host::GivenUp{}; }

inline float exponential(float x) { return expf(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float hyperbolic_tangent(float x) { return tanhf(x); }
inline float power_of_two(int exponent) { return ldexpf(1.0f, exponent); }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float upcast(Bfloat16 x) { return float_of(uint32_t{x.bits} << 16); }
inline float upcast(Half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexpf(1024.0f + mantissa, exponent - 25) : ldexpf(static_cast<float>(mantissa), -24));
}
inline void downcast(float x, Bfloat16& y) {
  const uint32_t bits = bits_of(x);
  y.bits = static_cast<uint16_t>(isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void downcast(float x, Half& y) {
  const uint16_t sign = bits_of(x) >> 31 << 15;
  const float magnitude = fabsf(x);
  if (!(magnitude < 65520.0f)) {
    y.bits = sign | (isnan(x) ? 0x7fff : 0x7c00);
    return;
  }
  // Rounded to the spacing of half at this magnitude, ties to even; a carry into the next exponent comes out right by itself.
  const int exponent = magnitude < ldexpf(1, -14) ? -14 : ilogbf(magnitude);
  const int steps = static_cast<int>(nearbyintf(ldexpf(magnitude, 10 - exponent)));
  y.bits = sign | static_cast<uint16_t>(steps + (exponent + 14) * 1024);
}

}  // namespace gk::device
