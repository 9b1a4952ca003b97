// What happens around fork(); see threads.h.
#include "threads.h"

#include <pthread.h>

namespace gk {

std::mutex tables_mutex;

namespace {

bool forked = false;

// The child has a copy of the lock, and not the thread that may hold it: nobody does while the process forks.
void before_fork() { tables_mutex.lock(); }
void after_fork_in_parent() { tables_mutex.unlock(); }
void after_fork_in_child() {
  tables_mutex.unlock();
  forked = true;
}

// When the library is loaded, for a parent may have started threads that are none of ours, and none of its calls be ours.
[[maybe_unused]] const int registered = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);

}  // namespace

bool in_forked_child() { return forked; }

}  // namespace gk
