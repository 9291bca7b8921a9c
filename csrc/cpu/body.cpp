#include "cpu/body.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

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
void norm_forward(const RmsNormArgs& args, float eps, T* out, float* r, int threads) {
  const T* weight = static_cast<const T*>(args.weight);
  parallel_for(args.rows, kGrain / args.width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(args.x) + row * args.width;
      Vec squares = splat(0.0f);
      for (int64_t j = 0; j < args.width; j += Vec::lanes) {
        const Vec v = some(x + j, lanes_left(args.width - j));
        squares = fma(v, v, squares);
      }
      r[row] = 1.0f / sqrtf(sum(squares) / static_cast<float>(args.width) + eps);
      const Vec scale = splat(r[row]);
      for (int64_t j = 0; j < args.width; j += Vec::lanes) {
        const int n = lanes_left(args.width - j);
        put(out + row * args.width + j, some(weight + j, n) * rounded(some(x + j, n) * scale, x), n);
      }
    }
  });
}

template <class T>
void norm_backward(const RmsNormArgs& args, const float* r, const T* grad, T* dx, int threads) {
  const T* weight = static_cast<const T*>(args.weight);
  parallel_for(args.rows, kGrain / args.width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(args.x) + row * args.width;
      const T* dy = grad + row * args.width;
      const Vec scale = splat(r[row]);
      Vec inner = splat(0.0f);
      for (int64_t j = 0; j < args.width; j += Vec::lanes) {
        const int n = lanes_left(args.width - j);
        inner = fma(rounded(some(weight + j, n) * some(dy + j, n), x), some(x + j, n) * scale, inner);
      }
      const Vec mean = splat(-sum(inner) / static_cast<float>(args.width));
      for (int64_t j = 0; j < args.width; j += Vec::lanes) {
        const int n = lanes_left(args.width - j);
        const Vec g = rounded(some(weight + j, n) * some(dy + j, n), x);
        put(dx + row * args.width + j, fma(some(x + j, n) * scale, mean, g) * scale, n);
      }
    }
  });
}

NAPO_INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }

template <class T>
void product_forward(int64_t count, const T* gate, const T* up, T* out, int threads) {
  parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += Vec::lanes) {
      const int n = lanes_left(end - j);
      const Vec g = some(gate + j, n);
      put(out + j, rounded(g * sigmoid(g), gate) * some(up + j, n), n);
    }
  });
}

template <class T>
void product_backward(int64_t count, const T* gate, const T* up, const T* grad, T* d_gate, T* d_up, int threads) {
  parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += Vec::lanes) {
      const int n = lanes_left(end - j);
      const Vec g = some(gate + j, n), dy = some(grad + j, n), s = sigmoid(g), one = splat(1.0f);
      put(d_up + j, dy * rounded(g * s, gate), n);
      put(d_gate + j, rounded(dy * some(up + j, n), gate) * s * fma(g, one - s, one), n);
    }
  });
}

}  // namespace

void rms_norm_forward(const RmsNormArgs& args, float eps, void* out, float* r, int threads) {
  with_dtype(args.dtype, [&](auto* tag) { norm_forward(args, eps, static_cast<decltype(tag)>(out), r, threads); });
}

void rms_norm_backward(const RmsNormArgs& args, const float* r, const void* grad, void* dx, int threads) {
  with_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    norm_backward(args, r, static_cast<const T*>(grad), static_cast<T*>(dx), threads);
  });
}

void silu_product_forward(DType dtype, int64_t n, const void* gate, const void* up, void* out, int threads) {
  with_dtype(dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    product_forward(n, static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out), threads);
  });
}

void silu_product_backward(DType dtype, int64_t n, const void* gate, const void* up, const void* grad, void* d_gate,
                           void* d_up, int threads) {
  with_dtype(dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    product_backward(n, static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<const T*>(grad),
                     static_cast<T*>(d_gate), static_cast<T*>(d_up), threads);
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
