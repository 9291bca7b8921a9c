// One block a row; every sum in a fixed order, no atomics, so results are bitwise equal from run to run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/softmax_rows.h"

namespace napo::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kPack = 4;  // columns that a thread holds at a time

// ---- pieces --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half* out) { *out = __float2half_rn(x); }

template <class T>
struct alignas(kPack * sizeof(T)) Pack {
  T lane[kPack];
};

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T>) == 0;
}

// Columns c .. c + kPack - 1 of a row that ends at `end`; what lies beyond reads as 0.
template <class T>
__device__ __forceinline__ void load(const T* row, int64_t c, int64_t end, bool aligned, float (&x)[kPack]) {
  if (aligned && c + kPack <= end) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(row + c);
    for (int k = 0; k < kPack; ++k) x[k] = to_float(pack.lane[k]);
  } else {
    for (int k = 0; k < kPack; ++k) x[k] = c + k < end ? to_float(row[c + k]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store(T* row, int64_t c, int64_t end, bool aligned, const float (&x)[kPack]) {
  if (aligned && c + kPack <= end) {
    Pack<T> pack;
    for (int k = 0; k < kPack; ++k) from_float(x[k], &pack.lane[k]);
    *reinterpret_cast<Pack<T>*>(row + c) = pack;
  } else {
    for (int k = 0; k < kPack; ++k) {
      if (c + k < end) from_float(x[k], row + c + k);
    }
  }
}

struct Logit {
  float z, slope;
};

__device__ __forceinline__ Logit map_logit(float a, const LogitMap& map, int64_t column) {
  float z = map.scale * a;
  if (map.bias != nullptr) z += map.bias[column];
  if (map.softcap == 0.0f) return {z, 1.0f};
  const float x = z / map.softcap, e = expf(-2.0f * fabsf(x)), inverse = 1.0f / (1.0f + e);
  return {map.softcap * tanhf(x), 4.0f * e * inverse * inverse};  // 1 - tanh^2 would cancel
}

// log p of a target whose rivals' log-sum-exp lies x above it; never above 0.
__device__ __forceinline__ float minus_softplus(float x) { return -(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)))); }

// G_v (1 - p_v) - (G_r - G_v) p_v
__device__ __forceinline__ float coefficient(float logp, float grad, float grad_of_row) {
  return -grad * expm1f(logp) - (grad_of_row - grad) * expf(logp);
}

__device__ float sum_of_row(const float* values, int64_t first, int64_t last) {
  float total = 0.0f;
  for (int64_t q = first + threadIdx.x; q < last; q += blockDim.x) total += values[q];
  return reduce<Sum>(total);
}

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class T>
__global__ void target_logits_kernel(TargetLogitsArgs args) {
  const int64_t r = blockIdx.x;
  const T* h = static_cast<const T*>(args.hidden) + r * args.hidden_stride;
  for (int64_t q = args.targets.start[r]; q < args.targets.start[r + 1]; ++q) {
    const int64_t v = args.targets.columns[q];
    const T* w = static_cast<const T*>(args.weight) + v * args.weight_stride;
    float total = 0.0f;
    for (int64_t c = threadIdx.x; c < args.width; c += blockDim.x) total += to_float(h[c]) * to_float(w[c]);
    float a = reduce<Sum>(total);
    if (args.low != nullptr) {
      const T* low = static_cast<const T*>(args.low) + r * args.low_stride;
      const T* b = static_cast<const T*>(args.lora_b) + v * args.lora_b_stride;
      float low_total = 0.0f;
      for (int64_t c = threadIdx.x; c < args.rank; c += blockDim.x) low_total += to_float(low[c]) * to_float(b[c]);
      a += args.lora_scale * reduce<Sum>(low_total);
    }
    if (threadIdx.x == 0) {
      const Logit logit = map_logit(a, args.map, v);
      args.z[q] = logit.z;
      args.slope[q] = logit.slope;
    }
  }
}

// Mapped logits of a row as a thread walks through them: -inf at the row's targets, which ascend, so that one
// comparison a pack tells that it has none, and beyond the end.
template <class T>
struct Walk {
  const T* row;
  int64_t end;
  const LogitMap& map;
  const int64_t *next, *last;  // targets
  int64_t next_column;
  bool aligned;

  __device__ Walk(const ForwardArgs& args, int64_t local, int64_t end_)
      : row(static_cast<const T*>(args.logits) + local * args.logits_stride),
        end(end_),
        map(args.map),
        next(args.targets.columns + args.targets.start[args.first_row + local]),
        last(args.targets.columns + args.targets.start[args.first_row + local + 1]),
        next_column(next == last ? end + kPack : *next),
        aligned(is_aligned(row)) {}

  __device__ __forceinline__ void read(int64_t c, float (&z)[kPack], float (&slope)[kPack]) {
    load(row, c, end, aligned, z);
    for (int k = 0; k < kPack; ++k) {
      const Logit logit = c + k < end ? map_logit(z[k], map, c + k) : Logit{-INFINITY, 1.0f};
      z[k] = logit.z;
      slope[k] = logit.slope;
    }
    while (next_column < c + kPack) {
      for (int k = 0; k < kPack; ++k) z[k] = c + k == next_column ? -INFINITY : z[k];
      ++next;
      next_column = next == last ? end + kPack : *next;
    }
  }
};

// The largest logit of no target among the first `count` columns.
template <class T>
__device__ float largest(const ForwardArgs& args, int64_t local, int64_t count) {
  Walk<T> walk(args, local, count);
  float z[kPack], slope[kPack], m = -INFINITY;
  for (int64_t c = int64_t(threadIdx.x) * kPack; c < count; c += int64_t(blockDim.x) * kPack) {
    walk.read(c, z, slope);
    for (int k = 0; k < kPack; ++k) m = fmaxf(m, z[k]);
  }
  return reduce<Max>(m);
}

// Over all columns of no target: m, their largest logit, and total, the sum of exp(z - shift). What the second matmul
// reads is written.
template <class T, class Out>
__device__ void exponentials(const ForwardArgs& args, int64_t local, float shift, float& m, float& total) {
  Walk<T> walk(args, local, args.columns);
  Out* out = args.out == nullptr ? nullptr : static_cast<Out*>(args.out) + local * args.out_stride;
  const bool out_aligned = is_aligned(out);
  float z[kPack], slope[kPack];
  m = -INFINITY;
  total = 0.0f;
  for (int64_t c = int64_t(threadIdx.x) * kPack; c < args.columns; c += int64_t(blockDim.x) * kPack) {
    walk.read(c, z, slope);
    for (int k = 0; k < kPack; ++k) {
      m = fmaxf(m, z[k]);
      const float e = expf(z[k] - shift);
      total += e;
      z[k] = args.store_scale * e * slope[k];
    }
    if (out != nullptr) store(out, c, args.columns, out_aligned, z);
  }
  m = reduce<Max>(m);
  total = reduce<Sum>(total);
}

__device__ __forceinline__ float finite(float m) { return m == -INFINITY ? 0.0f : m; }

// How far exponents may lie from 0 at the largest logit: e^40 times any weight is far from the ends of fp32 and bf16.
constexpr float kReach = 40.0f;

template <class T, class Out>
__global__ void forward_kernel(ForwardArgs args) {
  const int64_t local = blockIdx.x, r = args.first_row + local;
  const int64_t first = args.targets.start[r], last = args.targets.start[r + 1];

  // Exponents need a number near the row's largest logit. That of its first columns is one, as a rule, and spares a
  // read of the row; where it is not, the row is read again. fp16 has no room for more than the largest itself, and
  // logits that are overwritten cannot be read again.
  const bool one_read = !std::is_same<Out, __half>::value && args.out != args.logits;
  const int64_t pack = int64_t(blockDim.x) * kPack;
  const int64_t sample = one_read && pack < args.columns ? pack : args.columns;
  float shift = finite(largest<T>(args, local, sample)), m, total;
  exponentials<T, Out>(args, local, shift, m, total);
  if (m != -INFINITY && fabsf(m - shift) > kReach) {
    shift = m;
    exponentials<T, Out>(args, local, shift, m, total);
  }

  // The targets: for each, log-sum-exp of the others and of the rest of the row, minus its own logit.
  const float* z = args.target_z;
  float top = m;
  for (int64_t q = first + threadIdx.x; q < last; q += blockDim.x) top = fmaxf(top, z[q]);
  top = reduce<Max>(top);
  float whole = 0.0f;
  for (int64_t q = first + threadIdx.x; q < last; q += blockDim.x) {
    whole += expf(z[q] - top);
    const float rest = (shift - z[q]) + logf(total);
    float rival = rest;
    for (int64_t p = first; p < last; ++p) rival = p == q ? rival : fmaxf(rival, z[p] - z[q]);
    const float base = rival == -INFINITY ? 0.0f : rival;
    float mass = expf(rest - base);
    for (int64_t p = first; p < last; ++p) mass += p == q ? 0.0f : expf((z[p] - z[q]) - base);
    args.target_logp[q] = minus_softplus(base + logf(mass));
  }
  whole = reduce<Sum>(whole) + expf(shift - top) * total;
  if (threadIdx.x == 0) {
    const float log_whole = logf(whole);
    args.row_max[r] = top;
    args.row_log_sum[r] = log_whole;
    args.store_rescale[r] = expf((shift - top) - log_whole) / args.store_scale;
  }
}

template <class T, class Out>
__global__ void gradient_kernel(GradientArgs args) {
  const int64_t r = blockIdx.x;
  const T* row = static_cast<const T*>(args.logits) + r * args.logits_stride;
  Out* out = static_cast<Out*>(args.out) + r * args.out_stride;
  const int64_t first = args.targets.start[r], last = args.targets.start[r + 1];
  const bool aligned = is_aligned(row), out_aligned = is_aligned(out);
  const float grad_of_row = sum_of_row(args.target_grad, first, last);
  const float m = args.row_max[r], l = args.row_log_sum[r];
  float a[kPack];
  for (int64_t c = int64_t(threadIdx.x) * kPack; c < args.columns; c += int64_t(blockDim.x) * kPack) {
    load(row, c, args.columns, aligned, a);
    for (int k = 0; k < kPack; ++k) {
      if (c + k < args.columns) {
        const Logit logit = map_logit(a[k], args.map, c + k);
        a[k] = -grad_of_row * expf((logit.z - m) - l) * logit.slope;
        for (int64_t q = first; q < last; ++q) {
          if (args.targets.columns[q] == args.first_column + c + k) {
            a[k] = coefficient(args.target_logp[q], args.target_grad[q], grad_of_row) * args.target_slope[q];
          }
        }
      }
    }
    store(out, c, args.columns, out_aligned, a);
  }
}

template <class T, class Out>
__global__ void hidden_gradient_kernel(HiddenGradientArgs args) {
  const int64_t r = blockIdx.x;
  const int64_t first = args.targets.start[r], last = args.targets.start[r + 1];
  const float grad_of_row = sum_of_row(args.target_grad, first, last);
  for (int64_t c = threadIdx.x; c < args.width; c += blockDim.x) {
    float total = 0.0f;
    if (args.context != nullptr) {
      total = -grad_of_row * args.store_rescale[r] * args.scale *
              to_float(static_cast<const T*>(args.context)[r * args.width + c]);
    }
    for (int64_t q = first; q < last; ++q) {
      const T* w = static_cast<const T*>(args.weight) + args.targets.columns[q] * args.weight_stride;
      const float g = coefficient(args.target_logp[q], args.target_grad[q], grad_of_row) * args.target_slope[q];
      total += g * args.scale * to_float(w[c]);
    }
    from_float(total, static_cast<Out*>(args.out) + r * args.width + c);
  }
}

template <class T>
__global__ void token_forward_kernel(TokenForwardArgs args) {
  const int64_t i = blockIdx.x, label = args.labels[i];
  if (label == args.ignore_index) {
    if (threadIdx.x == 0) args.logp[i] = args.row_max[i] = args.row_log_sum[i] = 0.0f;
    return;
  }
  const T* row = static_cast<const T*>(args.logits) + i / args.tokens * args.stride_s + i % args.tokens * args.stride_t;
  const bool aligned = is_aligned(row);
  float a[kPack];
  // One read: every thread keeps a maximum and a sum relative to it.
  float best = -INFINITY, sum = 0.0f;
  for (int64_t c = int64_t(threadIdx.x) * kPack; c < args.columns; c += int64_t(blockDim.x) * kPack) {
    load(row, c, args.columns, aligned, a);
    float higher = best;
    for (int k = 0; k < kPack; ++k) {
      if (c + k >= args.columns || c + k == label) a[k] = -INFINITY;
      higher = fmaxf(higher, a[k]);
    }
    const float base = higher == -INFINITY ? 0.0f : higher;
    sum *= expf(best - base);
    for (int k = 0; k < kPack; ++k) sum += expf(a[k] - base);
    best = higher;
  }
  const float m = reduce<Max>(best), shift = m == -INFINITY ? 0.0f : m;
  const float total = reduce<Sum>(sum * expf(best - shift));
  if (threadIdx.x == 0) {
    const float z = to_float(row[label]), top = fmaxf(m, z);
    args.logp[i] = minus_softplus((shift - z) + logf(total));
    args.row_max[i] = top;
    args.row_log_sum[i] = logf(expf(shift - top) * total + expf(z - top));
  }
}

template <class T>
__global__ void token_backward_kernel(TokenBackwardArgs args) {
  const int64_t i = blockIdx.x, s = i / args.tokens, t = i % args.tokens, label = args.labels[i];
  const bool counts = label != args.ignore_index;
  if (!counts && args.out_is_zero) return;
  const T* row = static_cast<const T*>(args.logits) + s * args.stride_s + t * args.stride_t;
  T* out = static_cast<T*>(args.out) + s * args.out_stride_s + t * args.out_stride_t;
  const bool aligned = is_aligned(row), out_aligned = is_aligned(out);
  const float grad = args.grad[s], m = args.row_max[i], l = args.row_log_sum[i];
  float a[kPack] = {};
  for (int64_t c = int64_t(threadIdx.x) * kPack; c < args.columns; c += int64_t(blockDim.x) * kPack) {
    if (counts) {
      load(row, c, args.columns, aligned, a);
      for (int k = 0; k < kPack; ++k) {
        a[k] = c + k == label ? -grad * expm1f(args.logp[i]) : -grad * expf((a[k] - m) - l);
      }
    }
    store(out, c, args.columns, out_aligned, a);
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

template <class F>
void with_cuda_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::bf16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f16: return f(static_cast<__half*>(nullptr));
  }
  fail("dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got %d", static_cast<int>(dtype));
}

// Logits are either written in their own dtype or, from fp32, in half the bytes.
template <template <class, class> class Kernel, class Args>
void launch_pair(const Args& args, int64_t rows, void* stream) {
  with_cuda_dtype(args.dtype, [&](auto* in) {
    with_cuda_dtype(args.out_dtype, [&](auto* out) {
      using In = typename Pointee<decltype(in)>::type;
      using Out = typename Pointee<decltype(out)>::type;
      launch("softmax_rows", Kernel<In, Out>::run(), rows, 1, kThreads, stream, args);
    });
  });
}

template <class In, class Out>
struct Forward {
  static auto run() { return &forward_kernel<In, Out>; }
};
template <class In, class Out>
struct Gradient {
  static auto run() { return &gradient_kernel<In, Out>; }
};
template <class In, class Out>
struct HiddenGradient {
  static auto run() { return &hidden_gradient_kernel<In, Out>; }
};

}  // namespace

void target_logits(const TargetLogitsArgs& args, void* stream) {
  with_cuda_dtype(args.dtype, [&](auto* tag) {
    launch("softmax_rows", &target_logits_kernel<typename Pointee<decltype(tag)>::type>, args.rows, 1, 128, stream,
           args);
  });
}

void softmax_rows_forward(const ForwardArgs& args, void* stream) { launch_pair<Forward>(args, args.rows, stream); }

void softmax_rows_gradient(const GradientArgs& args, void* stream) { launch_pair<Gradient>(args, args.rows, stream); }

void hidden_gradient(const HiddenGradientArgs& args, void* stream) {
  launch_pair<HiddenGradient>(args, args.rows, stream);
}

void token_logps_forward(const TokenForwardArgs& args, void* stream) {
  with_cuda_dtype(args.dtype, [&](auto* tag) {
    launch("softmax_rows", &token_forward_kernel<typename Pointee<decltype(tag)>::type>, args.sequences * args.tokens,
           1, kThreads, stream, args);
  });
}

void token_logps_backward(const TokenBackwardArgs& args, void* stream) {
  with_cuda_dtype(args.dtype, [&](auto* tag) {
    launch("softmax_rows", &token_backward_kernel<typename Pointee<decltype(tag)>::type>, args.sequences * args.tokens,
           1, kThreads, stream, args);
  });
}

}  // namespace napo::cuda
