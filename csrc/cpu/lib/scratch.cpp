#include "cpu/lib/scratch.h"

#include <cstdio>
#include <cstdlib>
#include <new>

namespace napo {
namespace {

class NoScratch : public std::bad_alloc {  // pybind11 turns it into MemoryError
 public:
  explicit NoScratch(int64_t bytes) {
    std::snprintf(message_, sizeof message_, "no memory for %lld bytes of scratch; make the batch smaller",
                  static_cast<long long>(bytes));
  }
  const char* what() const noexcept override { return message_; }

 private:
  char message_[128];
};

}  // namespace

void* allocate(int64_t bytes) {
  if (bytes <= 0) return nullptr;
  return std::aligned_alloc(64, (static_cast<size_t>(bytes) + 63) / 64 * 64);
}

void release(void* memory) { std::free(memory); }

void fail_memory(int64_t bytes) { throw NoScratch(bytes); }

}  // namespace napo
