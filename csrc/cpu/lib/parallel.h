// Loops over independent items, shared among threads.
//
// The threads are those of torch where it uses OpenMP: after a matmul they spin for a while, so a second pool would
// have to fight them for the cores. The library that torch has loaded is found at run time; the module links none.
#pragma once

#include "cpu/lib/scratch.h"

namespace napo {

// Runs body(context) on `threads` threads at once, the calling one included, and waits for them all.
void run_on_threads(int threads, void (*body)(void*), void* context);
// "openmp" (torch's) or "threads" (our own pool), for build_config() and tests.
const char* thread_pool_name();

// Calls f(begin, end, memory) for pieces of at most `grain` items that cover [0, n); every thread has `bytes` of
// scratch memory, which each piece takes anew. Threads take the next piece as they become free, so f's result must not
// depend on who computes a piece: then it is the same from run to run.
template <class F>
inline void parallel_for_with(int64_t n, int64_t grain, int threads, int64_t bytes, const F& f) {
  if (n <= 0) return;
  if (grain < 1) grain = 1;
  const int64_t pieces = (n + grain - 1) / grain;
  if (threads > pieces) threads = static_cast<int>(pieces);
  struct Shared {
    const F& f;
    int64_t n, grain, bytes, next;
    bool failed;
  } shared{f, n, grain, bytes, 0, false};
  run_on_threads(
      threads,
      [](void* context) {
        Shared& s = *static_cast<Shared*>(context);
        void* memory = allocate(s.bytes);
        if (memory == nullptr && s.bytes != 0) {  // no exception may leave a thread
          __atomic_store_n(&s.failed, true, __ATOMIC_RELAXED);
          return;
        }
        for (;;) {
          const int64_t begin = __atomic_fetch_add(&s.next, s.grain, __ATOMIC_RELAXED);
          if (begin >= s.n) break;
          s.f(begin, begin + s.grain < s.n ? begin + s.grain : s.n, Scratch(memory));
        }
        release(memory);
      },
      &shared);
  if (shared.failed) fail_memory(bytes);
}

// The same without memory: f(begin, end).
template <class F>
inline void parallel_for(int64_t n, int64_t grain, int threads, const F& f) {
  parallel_for_with(n, grain, threads, 0, [&](int64_t begin, int64_t end, Scratch) { f(begin, end); });
}

}  // namespace napo
