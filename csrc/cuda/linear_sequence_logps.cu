#include "cuda/softmax_rows.cuh"
#include "linear_sequence_logps.h"

namespace napo::cuda {
namespace {

// ---- logits, targets -----------------------------------------------------------------------------------------------

struct Logit {
  float z, slope;
};

// kPlain: neither bias nor softcap.
template <bool kPlain>
__device__ __forceinline__ Logit map_logit(float a, const LogitMap& map, int64_t column) {
  float z = map.scale * a;
  if (kPlain) return {z, 1.0f};
  if (map.bias != nullptr) z += __ldg(map.bias + column);
  if (map.softcap == 0.0f) return {z, 1.0f};
  const float x = z / map.softcap, e = expf(-2.0f * fabsf(x)), inverse = 1.0f / (1.0f + e);
  return {map.softcap * tanhf(x), 4.0f * e * inverse * inverse};  // 1 - tanh^2 would cancel
}

// G_v (1 - p_v) - (G_r - G_v) p_v
__device__ __forceinline__ float coefficient(float logp, float grad, float grad_of_row) {
  return -grad * expm1f(logp) - (grad_of_row - grad) * expf(logp);
}

__device__ float sum_of_row(const float* values, int64_t first, int64_t last) {
  float total = 0.0f;
  for (int64_t q = first + threadIdx.x; q < last; q += blockDim.x) total += values[q];
  return reduce<Sum>(total);
}

// The targets of a row as a thread meets them: they ascend as its packs do, so that one comparison a pack tells that it
// has none.
class TargetWalk {
 public:
  __device__ TargetWalk(const Targets& targets, int64_t row, int64_t first_column)
      : at_(targets.columns + targets.start[row]),
        left_(static_cast<int>(targets.start[row + 1] - targets.start[row])),
        first_column_(first_column) {
    read();
  }

  // Calls f(k, at) for the targets in columns c + k of c .. c + count - 1; `at` is where their column stands.
  template <class F>
  __device__ __forceinline__ void within(int c, int count, F&& f) {
    while (next_ < c + count) {
      if (next_ >= c) f(next_ - c, at_);
      ++at_;
      --left_;
      read();
    }
  }

 private:
  __device__ void read() { next_ = left_ == 0 ? INT32_MAX : static_cast<int>(*at_ - first_column_); }

  const int64_t* at_;
  int left_;
  int64_t first_column_;
  int next_;
};

// ---- kernels -------------------------------------------------------------------------------------------------------

// The dot product of n numbers by a warp; every lane gets it.
template <class T>
__device__ __forceinline__ float dot(const T* a, const T* b, int n) {
  constexpr int N = kVector / sizeof(T), packs = 4;
  const int lane = static_cast<int>(threadIdx.x % kWarp), step = static_cast<int>(kWarp) * N;
  float total = 0.0f, x[N], y[N];
  if ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | n * sizeof(T)) % kVector == 0) {
    for (int c = lane * N; c < n; c += packs * step) {
      Raw<T, N> of_a[packs] = {}, of_b[packs] = {};
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        if (c + i * step < n) {
          load<Use::again>(a + c + i * step, of_a[i]);
          load<Use::again>(b + c + i * step, of_b[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        unpack(of_a[i], x);
        unpack(of_b[i], y);
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] *= y[k];
        total += sum(x);
      }
    }
  } else {
    for (int c = lane; c < n; c += static_cast<int>(kWarp)) total += to_float(a[c]) * to_float(b[c]);
  }
  return reduce_warp<Sum>(total);
}

// The row whose pair q is: the last r with start[r] <= q. The lanes of a warp look at 32 places at a time.
__device__ int64_t row_of(const int64_t* start, int64_t rows, int64_t q) {
  int64_t low = 0, end = rows;
  while (end - low > 1) {
    const int64_t step = (end - low + kWarp - 1) / kWarp, at = low + threadIdx.x % kWarp * step;
    const int lanes = __popc(__ballot_sync(kAllLanes, at < end && start[at] <= q));  // the first of them
    low += (lanes - 1) * step;
    end = end < low + step ? end : low + step;
  }
  return low;
}

constexpr int kPairThreads = 256, kPairBlocks = 64;

// One warp a (row, target) pair, so that a row of many targets takes many warps.
template <class T>
__global__ void __launch_bounds__(kPairThreads) target_logits_kernel(TargetLogitsArgs args) {
  const Tensor<2>&hidden = args.hidden, &weight = args.weight, &low = args.low_rank.low, &lora_b = args.low_rank.lora_b;
  const int64_t rows = hidden.size[0];
  const int64_t warps = int64_t{gridDim.x} * (kPairThreads / kWarp), pairs = args.targets.start[rows];
  for (int64_t q = (int64_t{blockIdx.x} * kPairThreads + threadIdx.x) / kWarp; q < pairs; q += warps) {
    const int64_t r = row_of(args.targets.start, rows, q), v = args.targets.columns[q];
    float a = dot(static_cast<const T*>(hidden.data) + r * hidden.stride[0],
                  static_cast<const T*>(weight.data) + v * weight.stride[0], static_cast<int>(weight.size[1]));
    if (low.data != nullptr) {
      a += args.low_rank.scale * dot(static_cast<const T*>(low.data) + r * low.stride[0],
                                     static_cast<const T*>(lora_b.data) + v * lora_b.stride[0],
                                     static_cast<int>(low.size[1]));
    }
    if (threadIdx.x % kWarp == 0) {
      const Logit logit = map_logit<false>(a, args.logit_map, v);
      args.z[q] = logit.z;
      args.slope[q] = logit.slope;
    }
  }
}

// A mapped logit of a pack of a row of `end` columns, -inf outside the row.
template <bool kPlain, class Whole>
__device__ __forceinline__ Logit logit_of(float a, const LogitMap& map, int column, int end, Whole) {
  return Whole::value || (column >= 0 && column < end) ? map_logit<kPlain>(a, map, column) : Logit{-INFINITY, 1.0f};
}

// The largest logit of no target among the first `count` columns.
template <class T, bool kPlain>
__device__ float largest(const ForwardArgs& args, int64_t local, const T* row, int lead, int count) {
  TargetWalk walk(args.problem.targets, args.first_row + local, 0);
  float m = -INFINITY;
  for_each_pack<Use::again, kPacks<T, kPlain>>(row, lead, count, [&](int c, auto& z, auto whole) {
    constexpr int N = kPack<T>;
#pragma unroll
    for (int k = 0; k < N; ++k) z[k] = logit_of<kPlain>(z[k], args.problem.logit_map, c + k, count, whole).z;
    walk.within(c, N, [&](int k, const int64_t*) { set(z, k, -INFINITY); });
#pragma unroll
    for (int k = 0; k < N; ++k) m = fmaxf(m, z[k]);
  });
  return reduce<Max>(m);
}

// Over all columns of no target: m, their largest logit, and total, the sum of exp(z - shift). What the second matmul
// reads is written.
template <class T, class Out, bool kPlain>
__device__ void exponentials(const ForwardArgs& args, int64_t local, const T* row, Out* out, int lead, float shift,
                             float& m, float& total) {
  TargetWalk walk(args.problem.targets, args.first_row + local, 0);
  const int end = static_cast<int>(args.logits.size[1]);
  m = -INFINITY;
  total = 0.0f;
  for_each_pack<Use::once, kPacks<T, kPlain>>(row, lead, end, [&](int c, auto& z, auto whole) {
    constexpr int N = kPack<T>;
    float slope[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Logit logit = logit_of<kPlain>(z[k], args.problem.logit_map, c + k, end, whole);
      z[k] = logit.z;
      slope[k] = logit.slope;
    }
    walk.within(c, N, [&](int k, const int64_t*) { set(z, k, -INFINITY); });
#pragma unroll
    for (int k = 0; k < N; ++k) {
      m = fmaxf(m, z[k]);
      z[k] = exponential<T>(z[k] - shift);
    }
    total += sum(z);
    if (out == nullptr) return;
#pragma unroll
    for (int k = 0; k < N; ++k) z[k] = args.problem.store_scale * z[k] * slope[k];
    store(out, c, end, z, whole);
  });
  m = reduce<Max>(m);
  total = reduce<Sum>(total);
}

template <class T, class Out, bool kPlain>
__global__ void __launch_bounds__(kThreads, NAPO_ROW_BLOCKS) forward_kernel(ForwardArgs args) {
  const int64_t local = blockIdx.x, r = args.first_row + local;
  const int64_t first = args.problem.targets.start[r], last = args.problem.targets.start[r + 1];
  const T* row = static_cast<const T*>(args.logits.data) + local * args.logits.stride[0];
  Out* out = args.out.data == nullptr ? nullptr : static_cast<Out*>(args.out.data) + local * args.out.stride[0];
  const int lead = out == nullptr ? lead_of<kPack<T>>(row) : lead_of<kPack<T>>(out);
  const int columns = static_cast<int>(args.logits.size[1]);

  // Exponents need a number near the row's largest logit. That of its first columns is one, as a rule, and spares a
  // read of the row; where it is not, the row is read again. fp16 has no room for more than the largest itself, and
  // logits that are overwritten cannot be read again.
  const bool one_read = !std::is_same<Out, __half>::value && args.out.data != args.logits.data;
  const int count = one_read ? sample_of<T>(columns, lead) : columns;
  float shift = finite(largest<T, kPlain>(args, local, row, lead, count)), m, total;
  for (bool again = true; again;) {
    exponentials<T, Out, kPlain>(args, local, row, out, lead, shift, m, total);
    again = m != -INFINITY && fabsf(m - shift) > kReach;
    if (again) shift = m;
  }

  // The targets: for each, log-sum-exp of the others and of the rest of the row, minus its own logit.
  const RowStats& stats = args.problem.stats;
  const float* z = args.problem.target_z;
  float top = m;
  for (int64_t q = first + threadIdx.x; q < last; q += blockDim.x) top = fmaxf(top, z[q]);
  top = reduce<Max>(top);
  shift = origin_of(m, shift, top);
  float whole = 0.0f;
  for (int64_t q = first + threadIdx.x; q < last; q += blockDim.x) {
    whole += expf(z[q] - top);
    const float rest = (shift - z[q]) + logf(total);
    float rival = rest;
    for (int64_t p = first; p < last; ++p) rival = p == q ? rival : fmaxf(rival, z[p] - z[q]);
    const float base = rival == -INFINITY ? 0.0f : rival;
    float mass = expf(rest - base);
    for (int64_t p = first; p < last; ++p) mass += p == q ? 0.0f : expf((z[p] - z[q]) - base);
    stats.target_logp[q] = log_p(base + logf(mass), z[q]);
  }
  whole = reduce<Sum>(whole) + expf(shift - top) * total;
  if (threadIdx.x == 0) {
    const float log_whole = logf(whole);
    stats.row_max[r] = top;
    stats.row_log_sum[r] = log_whole;
    stats.store_rescale[r] = expf((shift - top) - log_whole) / args.problem.store_scale;
  }
}

template <class T, class Out, bool kPlain>
__global__ void __launch_bounds__(kThreads, NAPO_ROW_BLOCKS) gradient_kernel(GradientArgs args) {
  const int64_t r = blockIdx.x;
  const Targets& targets = args.upstream.targets;
  const RowStats& stats = args.upstream.stats;
  const float* target_grad = args.upstream.target_grad;
  const T* row = static_cast<const T*>(args.logits.data) + r * args.logits.stride[0];
  Out* out = static_cast<Out*>(args.out.data) + r * args.out.stride[0];
  const int end = static_cast<int>(args.logits.size[1]);
  const float grad_of_row = sum_of_row(target_grad, targets.start[r], targets.start[r + 1]);
  const float m = stats.row_max[r], l = stats.row_log_sum[r];
  TargetWalk walk(targets, r, args.first_column);
  for_each_pack<Use::once, kPacks<T, kPlain>>(row, lead_of<kPack<T>>(out), end, [&](int c, auto& a, auto whole) {
    constexpr int N = kPack<T>;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Logit logit = logit_of<kPlain>(a[k], args.logit_map, c + k, end, whole);
      a[k] = -grad_of_row * exponential<T>((logit.z - m) - l) * logit.slope;
    }
    walk.within(c, N, [&](int k, const int64_t* at) {
      const int64_t q = at - targets.columns;
      set(a, k, coefficient(stats.target_logp[q], target_grad[q], grad_of_row) * stats.target_slope[q]);
    });
    store(out, c, end, a, whole);
  });
}

// One block a row, as many threads as it has packs. N is 1 where rows are not aligned.
template <class T, class Out, int N>
__global__ void __launch_bounds__(kThreads) hidden_gradient_kernel(HiddenGradientArgs args) {
  constexpr int kTogether = 4;  // targets whose rows of weight are under way
  __shared__ float coefficients[kThreads];
  __shared__ int64_t places[kThreads];
  const Targets& targets = args.upstream.targets;
  const RowStats& stats = args.upstream.stats;
  const float* target_grad = args.upstream.target_grad;
  const int64_t r = blockIdx.x, first = targets.start[r], last = targets.start[r + 1];
  const float grad_of_row = sum_of_row(target_grad, first, last);
  const int width = static_cast<int>(args.out.size[1]), threads = static_cast<int>(blockDim.x);
  const T* weight = static_cast<const T*>(args.weight.data);
  for (int base = 0; base < width; base += threads * N) {
    const int c = base + static_cast<int>(threadIdx.x) * N;
    float total[N] = {};
    if (args.context.data != nullptr && c < width) {
      Raw<T, N> raw;
      load<Use::once>(static_cast<const T*>(args.context.data) + r * width + c, raw);
      unpack(raw, total);
      const float g = -grad_of_row * stats.store_rescale[r] * args.scale;
#pragma unroll
      for (int k = 0; k < N; ++k) total[k] *= g;
    }
    for (int64_t some = first; some < last; some += threads) {
      const int count = last - some < threads ? static_cast<int>(last - some) : threads;
      __syncthreads();  // the coefficients before may still be read
      if (static_cast<int>(threadIdx.x) < count) {
        const int64_t q = some + threadIdx.x;
        coefficients[threadIdx.x] =
            coefficient(stats.target_logp[q], target_grad[q], grad_of_row) * stats.target_slope[q] * args.scale;
        places[threadIdx.x] = targets.columns[q] * args.weight.stride[0];
      }
      __syncthreads();
      for (int i = 0; i < count && c < width; i += kTogether) {
        Raw<T, N> raw[kTogether] = {};
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (i + j < count) load<Use::again>(weight + places[i + j] + c, raw[j]);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (i + j < count) {
            float w[N];
            unpack(raw[j], w);
#pragma unroll
            for (int k = 0; k < N; ++k) total[k] += coefficients[i + j] * w[k];
          }
        }
      }
    }
    if (c < width) store(static_cast<Out*>(args.out.data) + r * width + c, total);
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

// Logits are either written in their own dtype or, from fp32, in half the bytes.
template <class F>
void with_logits_and_out(DType dtype, DType out_dtype, F&& f) {
  NAPO_CHECK(out_dtype == dtype || dtype == DType::f32,
             "out: expected the dtype of the logits, %s, or logits of float32; got %s", name_of(dtype),
             name_of(out_dtype));
  with_cuda_dtype(out_dtype, [&](auto* out) {
    if (out_dtype == dtype) return f(out, out);
    f(static_cast<float*>(nullptr), out);
  });
}

bool is_plain(const LogitMap& map) { return map.bias == nullptr && map.softcap == 0.0f; }

bool is_aligned(const void* address, int64_t bytes_between_rows) {
  return (reinterpret_cast<uintptr_t>(address) | static_cast<uintptr_t>(bytes_between_rows)) % kVector == 0;
}

template <class T, class Out, int N>
void launch_hidden_gradient(const HiddenGradientArgs& args, void* stream) {
  int threads = static_cast<int>(kWarp);
  while (threads < kThreads && threads * N < args.out.size[1]) threads *= 2;
  launch("hidden_gradient", &hidden_gradient_kernel<T, Out, N>, args.out.size[0], 1, threads, stream, args);
}

}  // namespace

void target_logits(const TargetLogitsArgs& args, void* stream) {
  const int64_t rows = args.hidden.size[0];
  if (rows == 0) return;
  with_cuda_dtype(args.hidden.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    constexpr int64_t warps = kPairThreads / kWarp;
    const int64_t blocks = (rows + warps - 1) / warps;
    launch("target_logits", &target_logits_kernel<T>, blocks < kPairBlocks ? kPairBlocks : blocks, 1, kPairThreads,
           stream, args);
  });
}

void softmax_rows_forward(const ForwardArgs& args, void* stream) {
  check_columns(args.logits.size[1]);
  const DType out_dtype = args.out.data == nullptr ? args.logits.dtype : args.out.dtype;
  with_logits_and_out(args.logits.dtype, out_dtype, [&](auto* in, auto* out) {
    using T = typename Pointee<decltype(in)>::type;
    using Out = typename Pointee<decltype(out)>::type;
    const auto kernel =
        is_plain(args.problem.logit_map) ? &forward_kernel<T, Out, true> : &forward_kernel<T, Out, false>;
    launch("softmax_rows_forward", kernel, args.logits.size[0], 1, kThreads, stream, args);
  });
}

void softmax_rows_gradient(const GradientArgs& given, void* stream) {
  GradientArgs args = given;
  if (args.logit_map.bias != nullptr) args.logit_map.bias += args.first_column;
  check_columns(args.logits.size[1]);
  with_logits_and_out(args.logits.dtype, args.out.dtype, [&](auto* in, auto* out) {
    using T = typename Pointee<decltype(in)>::type;
    using Out = typename Pointee<decltype(out)>::type;
    const auto kernel = is_plain(args.logit_map) ? &gradient_kernel<T, Out, true> : &gradient_kernel<T, Out, false>;
    launch("softmax_rows_gradient", kernel, args.logits.size[0], 1, kThreads, stream, args);
  });
}

void hidden_gradient(const HiddenGradientArgs& args, void* stream) {
  with_cuda_dtype(args.weight.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    constexpr int N = kVector / sizeof(T);
    const int64_t row = args.out.size[1] * static_cast<int64_t>(sizeof(T));
    const bool aligned = is_aligned(args.weight.data, args.weight.stride[0] * static_cast<int64_t>(sizeof(T))) &&
                         is_aligned(args.context.data, row) && is_aligned(args.out.data, row);
    const auto run = [&](auto* out) {
      using Out = typename Pointee<decltype(out)>::type;
      if (aligned) return launch_hidden_gradient<T, Out, N>(args, stream);
      launch_hidden_gradient<T, Out, 1>(args, stream);
    };
    if (args.out.dtype == args.weight.dtype) return run(tag);
    run(static_cast<float*>(nullptr));  // HiddenGradientArgs allows no other dtype
  });
}

}  // namespace napo::cuda
