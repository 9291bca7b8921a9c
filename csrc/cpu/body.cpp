#include "body.h"

#include "cpu/lib/parallel.h"
#include "cpu/lib/vectors.h"

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of a piece of work

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
  const int64_t width = args.norm.width;
  const T* weight = static_cast<const T*>(args.norm.weight);
  parallel_for(args.norm.rows, kGrain / width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(args.norm.x) + row * width;
      T* out = static_cast<T*>(args.out) + row * width;
      Vec squares = splat(0.0f);
      for_vectors(0, width, [&](int64_t j, auto lanes) NAPO_LAMBDA {
        const Vec v = load(x + j, lanes, 0.0f);
        squares = fma(v, v, squares);
      });
      args.r[row] = 1.0f / sqrtf(sum(squares) / static_cast<float>(width) + args.eps);
      const Vec scale = splat(args.r[row]);
      for_vectors(0, width, [&](int64_t j, auto lanes) NAPO_LAMBDA {
        store(out + j, load(weight + j, lanes, 0.0f) * rounded(load(x + j, lanes, 0.0f) * scale, x), lanes);
      });
    }
  });
}

template <class T>
void norm_backward(const RmsNormBackwardArgs& args, int threads) {
  const int64_t width = args.norm.width;
  const T* weight = static_cast<const T*>(args.norm.weight);
  parallel_for(args.norm.rows, kGrain / width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(args.norm.x) + row * width;
      const T* dy = static_cast<const T*>(args.grad) + row * width;
      T* dx = static_cast<T*>(args.dx) + row * width;
      const Vec scale = splat(args.r[row]);
      const auto weighted = [&](int64_t j, auto lanes) NAPO_LAMBDA {
        return rounded(load(weight + j, lanes, 0.0f) * load(dy + j, lanes, 0.0f), x);
      };
      Vec inner = splat(0.0f);
      for_vectors(0, width, [&](int64_t j, auto lanes) NAPO_LAMBDA {
        inner = fma(weighted(j, lanes), load(x + j, lanes, 0.0f) * scale, inner);
      });
      const Vec mean = splat(-sum(inner) / static_cast<float>(width));
      for_vectors(0, width, [&](int64_t j, auto lanes) NAPO_LAMBDA {
        store(dx + j, fma(load(x + j, lanes, 0.0f) * scale, mean, weighted(j, lanes)) * scale, lanes);
      });
    }
  });
}

NAPO_INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }

template <class T>
void product_forward(const SiluProductForwardArgs& args, int threads) {
  const T *gate = static_cast<const T*>(args.inputs.gate), *up = static_cast<const T*>(args.inputs.up);
  T* out = static_cast<T*>(args.out);
  parallel_for(args.inputs.n, kGrain, threads, [&](int64_t begin, int64_t end) {
    for_vectors(begin, end, [&](int64_t j, auto lanes) NAPO_LAMBDA {
      const Vec g = load(gate + j, lanes, 0.0f);
      store(out + j, rounded(g * sigmoid(g), gate) * load(up + j, lanes, 0.0f), lanes);
    });
  });
}

template <class T>
void product_backward(const SiluProductBackwardArgs& args, int threads) {
  const T *gate = static_cast<const T*>(args.inputs.gate), *up = static_cast<const T*>(args.inputs.up);
  const T* grad = static_cast<const T*>(args.grad);
  T *d_gate = static_cast<T*>(args.d_gate), *d_up = static_cast<T*>(args.d_up);
  parallel_for(args.inputs.n, kGrain, threads, [&](int64_t begin, int64_t end) {
    for_vectors(begin, end, [&](int64_t j, auto lanes) NAPO_LAMBDA {
      const Vec g = load(gate + j, lanes, 0.0f), dy = load(grad + j, lanes, 0.0f), s = sigmoid(g), one = splat(1.0f);
      store(d_up + j, dy * rounded(g * s, gate), lanes);
      store(d_gate + j, rounded(dy * load(up + j, lanes, 0.0f), gate) * s * fma(g, one - s, one), lanes);
    });
  });
}

template <class T, bool kBack>
NAPO_INLINE void rotate_head(const T* x, const T* cos, const T* sin, int64_t half, T* out) {
  for_vectors(0, half, [&](int64_t j, auto lanes) NAPO_LAMBDA {
    const Vec a = load(x + j, lanes, 0.0f), b = load(x + half + j, lanes, 0.0f);
    const Vec sin1 = load(sin + j, lanes, 0.0f), sin2 = load(sin + half + j, lanes, 0.0f);
    const Vec low = a * load(cos + j, lanes, 0.0f), high = b * load(cos + half + j, lanes, 0.0f);
    store(out + j, kBack ? low + b * sin2 : low - b * sin1, lanes);
    store(out + half + j, kBack ? high - a * sin1 : high + a * sin2, lanes);
  });
}

template <class T, bool kBack>
void rotate_tokens(const RotationArgs& args, int threads) {
  const int64_t length = args.query.size[2], width = args.query.size[3], heads = args.query.size[1] + args.key.size[1];
  const int64_t angles = args.cos.size[0] > 1 ? args.cos.stride[0] : 0;  // from row to row
  const int64_t of_token = heads * width > 0 ? heads * width : 1;
  parallel_for(args.query.size[0] * length, kGrain / of_token, threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = at / length, token = at % length;
      const int64_t angle = row * angles + token * args.cos.stride[1];
      const T *cos = static_cast<const T*>(args.cos.data) + angle, *sin = static_cast<const T*>(args.sin.data) + angle;
      const auto rotate_all = [&](const Tensor<4>& from, const Tensor<4>& to) {
        const T* x = static_cast<const T*>(from.data) + row * from.stride[0] + token * from.stride[2];
        T* out = static_cast<T*>(to.data) + row * to.stride[0] + token * to.stride[2];
        for (int64_t head = 0; head < from.size[1]; ++head) {
          rotate_head<T, kBack>(x + head * from.stride[1], cos, sin, width / 2, out + head * to.stride[1]);
        }
      };
      rotate_all(args.query, args.query_out);
      rotate_all(args.key, args.key_out);
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

void rotate(const RotationArgs& args, int threads) {
  with_dtype(args.query.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    args.back ? rotate_tokens<T, true>(args, threads) : rotate_tokens<T, false>(args, threads);
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
