// What the host code of every kernel shares: element types, named checks, addresses that come from Python.
// Nothing here may pull in a std:: template: the CPU kernels include it and are compiled once an instruction set.
#pragma once

#include <stdint.h>

namespace napo {

// Element types, in the order of napo_kernels.native.calls.DTYPE_CODES.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Raises ValueError in Python. The message names the argument, what was expected and what came (printf style).
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

#define NAPO_CHECK(condition, ...)               \
  do {                                           \
    if (!(condition)) ::napo::fail(__VA_ARGS__); \
  } while (0)

template <class P>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};

// Calls f with a null pointer of the element type, so that f can name it:
// with_dtype(d, [&](auto* tag) { using T = typename Pointee<decltype(tag)>::type; ... });
template <class F>
inline __attribute__((always_inline)) void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::bf16: return f(static_cast<BFloat16*>(nullptr));
    case DType::f16: return f(static_cast<Float16*>(nullptr));
  }
  fail("dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got %d", static_cast<int>(dtype));
}

// Tensors come from Python as addresses (Tensor.data_ptr()); 0 stands for "not given".
template <class T>
inline __attribute__((always_inline)) T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace napo
