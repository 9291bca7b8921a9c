// Scratch memory of a kernel, at lines of the cache. Where there is none, Python gets a MemoryError.
//
//   Array<float> panels(count);                     freed at the end of its scope
//   parallel_for_with(..., room<float>(n) + room<uint8_t>(m), [&](int64_t begin, int64_t end, Scratch memory) {
//     float* sums = memory.take<float>(n);          a piece of the thread's own memory (parallel.h)
//     uint8_t* keep = memory.take<uint8_t>(m);
//   });
//
// Everything is inlined: a function that was compiled for a large instruction set must not serve a small one.
#pragma once

#include <stdint.h>

namespace napo {

// Null for no bytes, and where there is no memory.
void* allocate(int64_t bytes);
void release(void* memory);
[[noreturn]] void fail_memory(int64_t bytes);

#define NAPO_ALWAYS_INLINE inline __attribute__((always_inline))

// Bytes that `count` elements take of a Scratch.
template <class T>
constexpr NAPO_ALWAYS_INLINE int64_t room(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
}

template <class T>
class Array {
 public:
  NAPO_ALWAYS_INLINE explicit Array(int64_t count) : data_(static_cast<T*>(allocate(room<T>(count)))) {
    if (data_ == nullptr && count != 0) fail_memory(room<T>(count));
  }
  NAPO_ALWAYS_INLINE ~Array() { release(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  NAPO_ALWAYS_INLINE T* get() const { return data_; }

 private:
  T* data_;
};

// Hands memory out piece by piece.
class Scratch {
 public:
  NAPO_ALWAYS_INLINE explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  NAPO_ALWAYS_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += room<T>(count);
    return piece;
  }

 private:
  char* next_;
};

}  // namespace napo
