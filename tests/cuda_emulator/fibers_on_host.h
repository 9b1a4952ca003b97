// Fibers: stacks between which one thread of the operating system changes, and what sanitizers are told of them.
//
// ThreadSanitizer takes each fiber for a thread of its own, ordered with others by nothing but what the emulated device orders
// (`ordered_before`, `ordered_after`, and atomic operations on flags): it sees a race where a barrier or a flag is missing, in
// whatever order the fibers happened to run. What the emulation itself does in between is Untracked.
#pragma once

#include <setjmp.h>
#include <stddef.h>
#include <ucontext.h>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gk::host {

// A stack and where it was left; one that is not prepared is the thread's own.
class Strand {
 public:
  bool prepared() const { return prepared_; }

  void prepare(char* stack, size_t size, void (*begin)()) {
    prepared_ = true;
    getcontext(&context_);
    stack_ = context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size_ = size;
    context_.uc_link = nullptr;
    makecontext(&context_, begin, 0);
#ifdef __SANITIZE_THREAD__
    fiber_ = __tsan_create_fiber(0);
#endif
  }

  // From this strand, which runs, to `other`; returns when somebody changes to this one. `last`: nobody ever will.
  void change_to(Strand& other, [[maybe_unused]] bool last = false) {
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(other.fiber_, last ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
    other.left_ = this;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_, other.stack_, other.size_);
#endif
    change(other);
    entered();
  }

  // The first thing that a new strand does.
  void entered() {
#ifdef __SANITIZE_ADDRESS__
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_, &stack, &size);
    if (left_ && !left_->prepared_) {
      left_->stack_ = stack;
      left_->size_ = size;
    }
#endif
  }

  // Of a prepared strand that has ended.
  void forget() {
#ifdef __SANITIZE_THREAD__
    __tsan_destroy_fiber(fiber_);
#endif
  }

 private:
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  // The sanitizers have a longjmp of their own, which takes a jump to another stack for an error.
  void change(Strand& other) { swapcontext(&context_, &other.context_); }
#else
  void change(Strand& other) {
    if (_setjmp(where_) != 0) return;
    if (!other.prepared_ || other.begun_) _longjmp(other.where_, 1);
    other.begun_ = true;
    setcontext(&other.context_);
  }
#endif

  ucontext_t context_{};
  bool prepared_ = false;
  const void* stack_ = nullptr;
  size_t size_ = 0;
#ifdef __SANITIZE_THREAD__
  void* fiber_ = __tsan_get_current_fiber();
#elif defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  Strand* left_ = nullptr;
#else
  jmp_buf where_{};
  bool begun_ = false;
#endif
};

// What happens during its life is not looked at for races: it is the emulation's own.
struct Untracked {
#ifdef __SANITIZE_THREAD__
  Untracked() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Untracked() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Untracked() {}
#endif
  Untracked(const Untracked&) = delete;
};

// For AddressSanitizer: memory that nobody may touch.
inline void forbid([[maybe_unused]] const char* begin, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(begin, size);
#endif
}
inline void allow([[maybe_unused]] const char* begin, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(begin, size);
#endif
}

// All that this fiber has done is before what another does after `ordered_after` of the same place.
inline void ordered_before([[maybe_unused]] const void* place) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(const_cast<void*>(place));
#endif
}
inline void ordered_after([[maybe_unused]] const void* place) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(const_cast<void*>(place));
#endif
}

}  // namespace gk::host
