#include "cpu/lib/parallel.h"

#include <dlfcn.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace napo {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// GOMP_parallel of the OpenMP library that torch is linked with, null where torch is absent or built without OpenMP.
[[maybe_unused]] GompParallel find_openmp() {
  for (const char* name : {"libtorch_cpu.so", "libtorch_cpu.dylib"}) {
    if (void* torch = dlopen(name, RTLD_NOLOAD | RTLD_LAZY)) {
      // dlsym on the handle searches torch's own dependencies, hence the very library that torch calls.
      void* symbol = dlsym(torch, "GOMP_parallel");
      dlclose(torch);
      if (symbol != nullptr) return reinterpret_cast<GompParallel>(symbol);
    }
  }
  return nullptr;
}

GompParallel openmp() {
#ifdef NAPO_OWN_THREADS
  return nullptr;
#else
  static const GompParallel parallel = find_openmp();
  return parallel;
#endif
}

// The fallback: sleeping workers that grow in number as asked for and live until the process ends.
class Pool {
 public:
  void run(int threads, void (*body)(void*), void* context) {
    std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        workers_.emplace_back(&Pool::work, this, static_cast<int>(workers_.size()), round_);
      }
      body_ = body;
      context_ = context;
      active_ = pending_ = threads - 1;
      ++round_;
    }
    wake_.notify_all();
    body(context);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void work(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (index >= active_) continue;
      auto* body = body_;
      void* context = context_;
      lock.unlock();
      body(context);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  int active_ = 0, pending_ = 0;
  uint64_t round_ = 0;
};

}  // namespace

void run_on_threads(int threads, void (*body)(void*), void* context) {
  if (threads <= 1) return body(context);
  if (GompParallel parallel = openmp()) return parallel(body, context, static_cast<unsigned>(threads), 0);
  static Pool* pool = new Pool;  // never destroyed: its threads may outlive static destructors
  pool->run(threads, body, context);
}

const char* thread_pool_name() { return openmp() != nullptr ? "openmp" : "threads"; }

}  // namespace napo
