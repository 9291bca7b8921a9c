#include "body.h"

#include "cpu/lib/parallel.h"
#include "cpu/lib/simd.h"

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of a piece of work

NAPO_INLINE int lanes_left(int64_t n) { return n < Vec::lanes ? static_cast<int>(n) : Vec::lanes; }

template <class T>
NAPO_INLINE Vec some(const T* p, int n) {
  return n == Vec::lanes ? load(p) : load(p, n, 0.0f);
}

template <class T>
NAPO_INLINE void put(T* p, Vec v, int n) {
  if (n == Vec::lanes) {
    store(p, v);
  } else {
    store(p, v, n);
  }
}

// To T and back: where transformers stores an intermediate result.
template <class T>
NAPO_INLINE Vec rounded(Vec v, const T*) {
  T narrow[Vec::lanes];
  store(narrow, v);
  return load(narrow);
}
NAPO_INLINE Vec rounded(Vec v, const float*) { return v; }
#if defined(__AVX512F__)
NAPO_INLINE Vec rounded(Vec v, const BFloat16* tag) { return widen(narrow(v, tag), tag); }
NAPO_INLINE Vec rounded(Vec v, const Float16* tag) { return widen(narrow(v, tag), tag); }
#endif

template <class T>
void norm_forward(const RmsNormForwardArgs& args, int threads) {
  const T* weight = static_cast<const T*>(args.norm.weight);
  T* out = static_cast<T*>(args.out);
  parallel_for(args.norm.rows, kGrain / args.norm.width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(args.norm.x) + row * args.norm.width;
      Vec squares = splat(0.0f);
      for (int64_t j = 0; j < args.norm.width; j += Vec::lanes) {
        const Vec v = some(x + j, lanes_left(args.norm.width - j));
        squares = fma(v, v, squares);
      }
      args.r[row] = 1.0f / sqrtf(sum(squares) / static_cast<float>(args.norm.width) + args.eps);
      const Vec scale = splat(args.r[row]);
      for (int64_t j = 0; j < args.norm.width; j += Vec::lanes) {
        const int n = lanes_left(args.norm.width - j);
        put(out + row * args.norm.width + j, some(weight + j, n) * rounded(some(x + j, n) * scale, x), n);
      }
    }
  });
}

template <class T>
void norm_backward(const RmsNormBackwardArgs& args, int threads) {
  const T* weight = static_cast<const T*>(args.norm.weight);
  parallel_for(args.norm.rows, kGrain / args.norm.width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(args.norm.x) + row * args.norm.width;
      const T* dy = static_cast<const T*>(args.grad) + row * args.norm.width;
      T* dx = static_cast<T*>(args.dx) + row * args.norm.width;
      const Vec scale = splat(args.r[row]);
      Vec inner = splat(0.0f);
      for (int64_t j = 0; j < args.norm.width; j += Vec::lanes) {
        const int n = lanes_left(args.norm.width - j);
        inner = fma(rounded(some(weight + j, n) * some(dy + j, n), x), some(x + j, n) * scale, inner);
      }
      const Vec mean = splat(-sum(inner) / static_cast<float>(args.norm.width));
      for (int64_t j = 0; j < args.norm.width; j += Vec::lanes) {
        const int n = lanes_left(args.norm.width - j);
        const Vec g = rounded(some(weight + j, n) * some(dy + j, n), x);
        put(dx + j, fma(some(x + j, n) * scale, mean, g) * scale, n);
      }
    }
  });
}

NAPO_INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }

template <class T>
void product_forward(const SiluProductForwardArgs& args, int threads) {
  const T *gate = static_cast<const T*>(args.inputs.gate), *up = static_cast<const T*>(args.inputs.up);
  T* out = static_cast<T*>(args.out);
  parallel_for(args.inputs.n, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += Vec::lanes) {
      const int n = lanes_left(end - j);
      const Vec g = some(gate + j, n);
      put(out + j, rounded(g * sigmoid(g), gate) * some(up + j, n), n);
    }
  });
}

template <class T>
void product_backward(const SiluProductBackwardArgs& args, int threads) {
  const T *gate = static_cast<const T*>(args.inputs.gate), *up = static_cast<const T*>(args.inputs.up);
  const T* grad = static_cast<const T*>(args.grad);
  T *d_gate = static_cast<T*>(args.d_gate), *d_up = static_cast<T*>(args.d_up);
  parallel_for(args.inputs.n, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += Vec::lanes) {
      const int n = lanes_left(end - j);
      const Vec g = some(gate + j, n), dy = some(grad + j, n), s = sigmoid(g), one = splat(1.0f);
      put(d_up + j, dy * rounded(g * s, gate), n);
      put(d_gate + j, rounded(dy * some(up + j, n), gate) * s * fma(g, one - s, one), n);
    }
  });
}

}  // namespace

void rms_norm_forward(const RmsNormForwardArgs& args, int threads) {
  with_dtype(args.norm.dtype, [&](auto* tag) { norm_forward<typename Pointee<decltype(tag)>::type>(args, threads); });
}

void rms_norm_backward(const RmsNormBackwardArgs& args, int threads) {
  with_dtype(args.norm.dtype, [&](auto* tag) { norm_backward<typename Pointee<decltype(tag)>::type>(args, threads); });
}

void silu_product_forward(const SiluProductForwardArgs& args, int threads) {
  with_dtype(args.inputs.dtype,
             [&](auto* tag) { product_forward<typename Pointee<decltype(tag)>::type>(args, threads); });
}

void silu_product_backward(const SiluProductBackwardArgs& args, int threads) {
  with_dtype(args.inputs.dtype,
             [&](auto* tag) { product_backward<typename Pointee<decltype(tag)>::type>(args, threads); });
}

}  // namespace NAPO_ISA
}  // namespace napo
