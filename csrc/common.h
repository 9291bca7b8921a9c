// Shared by the host code of all kernels: element types, tensors and named checks.
// Nothing here may pull in a std:: template: the CPU kernels include it and are compiled once an instruction set.
#pragma once

#include <stdint.h>

namespace napo {

enum class DType : int { f32, bf16, f16 };

inline const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "float32" : dtype == DType::bf16 ? "bfloat16" : "float16";
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A tensor of n dimensions whose last has stride 1; strides in elements. Null where Python passes None.
template <int n>
struct Tensor {
  DType dtype;
  void* data;
  int64_t size[n], stride[n];
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
  fail("dtype: expected float32, bfloat16 or float16, got code %d", static_cast<int>(dtype));
}

}  // namespace napo
