// One block a row; every sum in a fixed order, no atomics, so results are bitwise equal from run to run.
//
// The kernels are bound by memory. Of a row a thread holds packs of neighbouring columns, and it asks for several
// vectors of 16 bytes before it uses the first. Packs lie where what is written lies on multiples of a pack, from as
// many columns before the row's begin as that takes, so that no row, however it is aligned, is written number by number
// but at its two ends; where what is read lies otherwise, it is shifted in registers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/device.cuh"
#include "softmax_rows.h"

// For measuring: -DNAPO_ROW_THREADS=256 and so on.
#ifndef NAPO_ROW_THREADS  // of a block
#define NAPO_ROW_THREADS 512
#endif
#ifndef NAPO_ROW_LOADS  // vectors of 16 bytes that a thread has under way: 2, 4 or 8
#define NAPO_ROW_LOADS 4
#endif
#ifndef NAPO_ROW_BLOCKS  // at least so many on a multiprocessor at a time, which limits registers
#define NAPO_ROW_BLOCKS 2
#endif
#ifndef NAPO_ROW_FLOAT_PACK  // columns of a pack of fp32: 4, one load, or 8, one store of 16 bytes for half the bytes
#define NAPO_ROW_FLOAT_PACK 4
#endif
#ifndef NAPO_ROW_STREAM  // 1: what is read once is the first to leave the caches
#define NAPO_ROW_STREAM 1
#endif

namespace napo::cuda {
namespace {

constexpr int kThreads = NAPO_ROW_THREADS;
constexpr int kVector = 16;  // bytes

// ---- numbers, vectors, packs ---------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half* out) { *out = __float2half_rn(x); }

template <class T>
constexpr int kPack = sizeof(T) == 4 ? NAPO_ROW_FLOAT_PACK : 8;  // columns

// Packs of a thread at a time: half as many where there is more to compute (a bias, a softcap), which takes registers.
template <class T, bool kPlain>
constexpr int kPacks = NAPO_ROW_LOADS * kVector >= 2 * kPack<T> * int{sizeof(T)}
                           ? NAPO_ROW_LOADS * kVector / (kPack<T> * int{sizeof(T)}) / (kPlain ? 1 : 2)
                           : 1;

enum class Use { once, again };

template <Use use>
__device__ __forceinline__ uint4 load_vector(const void* at) {
  const uint4* vector = static_cast<const uint4*>(at);
  return use == Use::once && NAPO_ROW_STREAM != 0 ? __ldcs(vector) : *vector;
}

// N numbers of type T as they lie in memory, some whole vectors, or one number.
template <class T, int N>
struct Raw {
  static constexpr int words = N * sizeof(T) / 4, vectors = N * sizeof(T) / kVector;
  static_assert(vectors * kVector == N * sizeof(T), "a pack is some whole vectors");
  uint32_t word[words];
};
template <class T>
struct Raw<T, 1> {
  float number;
};

template <Use use, class T, int N>
__device__ __forceinline__ void load(const T* at, Raw<T, N>& raw) {
#pragma unroll
  for (int i = 0; i < Raw<T, N>::vectors; ++i) {
    const uint4 vector = load_vector<use>(reinterpret_cast<const char*>(at) + i * kVector);
    raw.word[4 * i] = vector.x;
    raw.word[4 * i + 1] = vector.y;
    raw.word[4 * i + 2] = vector.z;
    raw.word[4 * i + 3] = vector.w;
  }
}

template <Use use, class T>
__device__ __forceinline__ void load(const T* at, Raw<T, 1>& raw) {
  raw.number = to_float(*at);
}

// Vectors that begin `shift` bytes before N numbers, and the vector after them.
template <class T, int N>
using Around = Raw<T, N + kVector / sizeof(T)>;

// The N numbers.
template <class T, int N>
__device__ __forceinline__ void shift_down(Around<T, N>& around, int shift, Raw<T, N>& raw) {
  constexpr int words = Raw<T, N>::words;
  if ((shift & 8) != 0) {
#pragma unroll
    for (int i = 0; i < words + 2; ++i) around.word[i] = around.word[i + 2];
  }
  if ((shift & 4) != 0) {
#pragma unroll
    for (int i = 0; i < words + 1; ++i) around.word[i] = around.word[i + 1];
  }
#pragma unroll
  for (int i = 0; i < words; ++i) raw.word[i] = __funnelshift_r(around.word[i], around.word[i + 1], (shift & 3) * 8);
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Raw<T, N>& raw, float (&x)[N]) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {  // one instruction a number, where __bfloat162float takes up to two
      x[2 * i] = __uint_as_float(raw.word[i] << 16);
      x[2 * i + 1] = __uint_as_float(raw.word[i] & 0xffff0000u);
    }
  } else {
    T lane[N];
    memcpy(lane, raw.word, sizeof(lane));
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = to_float(lane[k]);
  }
}

template <class T>
__device__ __forceinline__ void unpack(const Raw<T, 1>& raw, float (&x)[1]) {
  x[0] = raw.number;
}

__device__ __forceinline__ void pack(const float* x, float* out) { *out = *x; }
__device__ __forceinline__ void pack(const float* x, __nv_bfloat16* out) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(x[0], x[1]);
  out[0] = two.x;
  out[1] = two.y;
}
__device__ __forceinline__ void pack(const float* x, __half* out) {
  const __half2 two = __floats2half2_rn(x[0], x[1]);
  out[0] = two.x;
  out[1] = two.y;
}

// `at` is a multiple of N numbers.
template <class T, int N>
__device__ __forceinline__ void store(T* at, const float (&x)[N]) {
  constexpr int bytes = N * sizeof(T);
  T lane[N];
#pragma unroll
  for (int k = 0; k < N; k += 4 / sizeof(T)) pack(x + k, lane + k);
  uint32_t word[bytes / 4];
  memcpy(word, lane, bytes);
  if constexpr (bytes == 8) {
    *reinterpret_cast<uint2*>(at) = make_uint2(word[0], word[1]);
  } else {
#pragma unroll
    for (int i = 0; i < bytes / kVector; ++i) {
      reinterpret_cast<uint4*>(at)[i] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
    }
  }
}

template <class T>
__device__ __forceinline__ void store(T* at, const float (&x)[1]) {
  from_float(x[0], at);
}

// x[k] for a k that is known only at run time, without an array in memory.
template <int N>
__device__ __forceinline__ void set(float (&x)[N], int k, float value) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = i == k ? value : x[i];
}

template <int N>
__device__ __forceinline__ float sum(const float (&x)[N]) {
  float total[N];
#pragma unroll
  for (int k = 0; k < N; ++k) total[k] = x[k];
#pragma unroll
  for (int step = N / 2; step > 0; step /= 2) {
#pragma unroll
    for (int k = 0; k < step; ++k) total[k] += total[k + step];
  }
  return total[0];
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// How many columns before `row` the packs begin that lie on multiples of N numbers.
template <int N, class T>
__device__ __forceinline__ int lead_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % N);
}

// Calls f(c, x, whole) for the packs of a row of `end` columns that belong to this thread, in ascending order. x are
// columns c .. c + N - 1; where `whole` (a type) is false, some of them lie outside the row and are 0. kShifts is false
// where `lead` is of this very row.
template <Use use, int packs, bool kShifts = true, class T, class F>
__device__ __forceinline__ void for_each_pack(const T* row, int lead, int end, F&& f) {
  constexpr int N = kPack<T>, lanes = kVector / sizeof(T);
  const int step = kThreads * N;
  const int shift = kShifts ? static_cast<int>(reinterpret_cast<uintptr_t>(row - lead) % kVector) : 0;
  // The vectors of a pack in [low, high] lie in the row.
  const int low = shift / static_cast<int>(sizeof(T)), high = end - N - (shift == 0 ? 0 : lanes - low);
  float x[N];
  for (int c = static_cast<int>(threadIdx.x) * N - lead; c < end;) {
    if (c < low || c > high) {
#pragma unroll
      for (int k = 0; k < N; ++k) x[k] = c + k >= 0 && c + k < end ? to_float(row[c + k]) : 0.0f;
      f(c, x, std::false_type());
      c += step;
      continue;
    }
    Raw<T, N> raw[packs];
    if (shift == 0) {
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        if (c + i * step <= high) load<use>(row + c + i * step, raw[i]);
      }
    } else {
      constexpr int together = packs < 2 ? 1 : packs / 2;  // as many vectors as above
#pragma unroll
      for (int j = 0; j < packs; j += together) {
        Around<T, N> around[together];
#pragma unroll
        for (int i = 0; i < together; ++i) {
          if (c + (j + i) * step <= high) load<use>(row + c + (j + i) * step - low, around[i]);
        }
#pragma unroll
        for (int i = 0; i < together; ++i) shift_down<T, N>(around[i], shift, raw[j + i]);
      }
    }
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (c > high) break;
      unpack(raw[i], x);
      f(c, x, std::true_type());
      c += step;
    }
  }
}

// What for_each_pack gave, c and whole, back to a row of the lead that it was called with.
template <class T, int N, class Whole>
__device__ __forceinline__ void store(T* row, int c, int end, const float (&x)[N], Whole) {
  if (Whole::value) {
    store(row + c, x);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (c + k >= 0 && c + k < end) from_float(x[k], row + c + k);
    }
  }
}

// ---- logits, exponentials, targets ---------------------------------------------------------------------------------

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

__device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// exp of a difference of logits of type T. One instruction and a product, where expf takes eight: an error of 2e-7, and
// 6e-8 |x| more, which is far below what rounded logits carry. 0 below 1e-38.
template <class T>
__device__ __forceinline__ float exponential(float x) {
  return sizeof(T) == 4 ? expf(x) : exp2_of(1.44269504f * x);
}

// log p of a target whose rivals' log-sum-exp lies x above it; never above 0.
// log p of a target whose logit is z, x below the log-sum-exp of all else.
__device__ __forceinline__ float log_p(float x, float z) {
  return z == INFINITY ? NAN : -(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
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
  const int64_t warps = int64_t{gridDim.x} * (kPairThreads / kWarp), pairs = args.targets.start[args.rows];
  for (int64_t q = (int64_t{blockIdx.x} * kPairThreads + threadIdx.x) / kWarp; q < pairs; q += warps) {
    const int64_t r = row_of(args.targets.start, args.rows, q), v = args.targets.columns[q];
    float a = dot(static_cast<const T*>(args.hidden) + r * args.hidden_stride,
                  static_cast<const T*>(args.weight) + v * args.weight_stride, static_cast<int>(args.width));
    if (args.low != nullptr) {
      a += args.lora_scale * dot(static_cast<const T*>(args.low) + r * args.low_stride,
                                 static_cast<const T*>(args.lora_b) + v * args.lora_b_stride,
                                 static_cast<int>(args.rank));
    }
    if (threadIdx.x % kWarp == 0) {
      const Logit logit = map_logit<false>(a, args.map, v);
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
  TargetWalk walk(args.targets, args.first_row + local, 0);
  float m = -INFINITY;
  for_each_pack<Use::again, kPacks<T, kPlain>>(row, lead, count, [&](int c, auto& z, auto whole) {
    constexpr int N = kPack<T>;
#pragma unroll
    for (int k = 0; k < N; ++k) z[k] = logit_of<kPlain>(z[k], args.map, c + k, count, whole).z;
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
  TargetWalk walk(args.targets, args.first_row + local, 0);
  const int end = static_cast<int>(args.columns);
  m = -INFINITY;
  total = 0.0f;
  for_each_pack<Use::once, kPacks<T, kPlain>>(row, lead, end, [&](int c, auto& z, auto whole) {
    constexpr int N = kPack<T>;
    float slope[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Logit logit = logit_of<kPlain>(z[k], args.map, c + k, end, whole);
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
    for (int k = 0; k < N; ++k) z[k] = args.store_scale * z[k] * slope[k];
    store(out, c, end, z, whole);
  });
  m = reduce<Max>(m);
  total = reduce<Sum>(total);
}

__device__ __forceinline__ float finite(float m) { return m == -INFINITY ? 0.0f : m; }

// How far exponents may lie from 0 at the largest logit: e^40 times any weight is far from the ends of fp32 and bf16.
constexpr float kReach = 40.0f;

// The first columns of a row, a pack of each thread.
template <class T>
__device__ __forceinline__ int sample_of(int columns, int lead) {
  const int sample = kThreads * kPack<T> - lead;
  return sample < columns ? sample : columns;
}

template <class T, class Out, bool kPlain>
__global__ void __launch_bounds__(kThreads, NAPO_ROW_BLOCKS) forward_kernel(ForwardArgs args) {
  const int64_t local = blockIdx.x, r = args.first_row + local;
  const int64_t first = args.targets.start[r], last = args.targets.start[r + 1];
  const T* row = static_cast<const T*>(args.logits) + local * args.logits_stride;
  Out* out = args.out == nullptr ? nullptr : static_cast<Out*>(args.out) + local * args.out_stride;
  const int lead = out == nullptr ? lead_of<kPack<T>>(row) : lead_of<kPack<T>>(out);
  const int columns = static_cast<int>(args.columns);

  // Exponents need a number near the row's largest logit. That of its first columns is one, as a rule, and spares a
  // read of the row; where it is not, the row is read again. fp16 has no room for more than the largest itself, and
  // logits that are overwritten cannot be read again.
  const bool one_read = !std::is_same<Out, __half>::value && args.out != args.logits;
  const int count = one_read ? sample_of<T>(columns, lead) : columns;
  float shift = finite(largest<T, kPlain>(args, local, row, lead, count)), m, total;
  for (bool again = true; again;) {
    exponentials<T, Out, kPlain>(args, local, row, out, lead, shift, m, total);
    again = m != -INFINITY && fabsf(m - shift) > kReach;
    if (again) shift = m;
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
    args.target_logp[q] = log_p(base + logf(mass), z[q]);
  }
  whole = reduce<Sum>(whole) + expf(shift - top) * total;
  if (threadIdx.x == 0) {
    const float log_whole = logf(whole);
    args.row_max[r] = top;
    args.row_log_sum[r] = log_whole;
    args.store_rescale[r] = expf((shift - top) - log_whole) / args.store_scale;
  }
}

template <class T, class Out, bool kPlain>
__global__ void __launch_bounds__(kThreads, NAPO_ROW_BLOCKS) gradient_kernel(GradientArgs args) {
  const int64_t r = blockIdx.x;
  const T* row = static_cast<const T*>(args.logits) + r * args.logits_stride;
  Out* out = static_cast<Out*>(args.out) + r * args.out_stride;
  const int end = static_cast<int>(args.columns);
  const float grad_of_row = sum_of_row(args.target_grad, args.targets.start[r], args.targets.start[r + 1]);
  const float m = args.row_max[r], l = args.row_log_sum[r];
  TargetWalk walk(args.targets, r, args.first_column);
  for_each_pack<Use::once, kPacks<T, kPlain>>(row, lead_of<kPack<T>>(out), end, [&](int c, auto& a, auto whole) {
    constexpr int N = kPack<T>;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Logit logit = logit_of<kPlain>(a[k], args.map, c + k, end, whole);
      a[k] = -grad_of_row * exponential<T>((logit.z - m) - l) * logit.slope;
    }
    walk.within(c, N, [&](int k, const int64_t* at) {
      const int64_t q = at - args.targets.columns;
      set(a, k, coefficient(args.target_logp[q], args.target_grad[q], grad_of_row) * args.target_slope[q]);
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
  const int64_t r = blockIdx.x, first = args.targets.start[r], last = args.targets.start[r + 1];
  const float grad_of_row = sum_of_row(args.target_grad, first, last);
  const int width = static_cast<int>(args.width), threads = static_cast<int>(blockDim.x);
  const T* weight = static_cast<const T*>(args.weight);
  for (int base = 0; base < width; base += threads * N) {
    const int c = base + static_cast<int>(threadIdx.x) * N;
    float total[N] = {};
    if (args.context != nullptr && c < width) {
      Raw<T, N> raw;
      load<Use::once>(static_cast<const T*>(args.context) + r * width + c, raw);
      unpack(raw, total);
      const float g = -grad_of_row * args.store_rescale[r] * args.scale;
#pragma unroll
      for (int k = 0; k < N; ++k) total[k] *= g;
    }
    for (int64_t some = first; some < last; some += threads) {
      const int count = last - some < threads ? static_cast<int>(last - some) : threads;
      __syncthreads();  // the coefficients before may still be read
      if (static_cast<int>(threadIdx.x) < count) {
        const int64_t q = some + threadIdx.x;
        coefficients[threadIdx.x] =
            coefficient(args.target_logp[q], args.target_grad[q], grad_of_row) * args.target_slope[q] * args.scale;
        places[threadIdx.x] = args.targets.columns[q] * args.weight_stride;
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
    if (c < width) store(static_cast<Out*>(args.out) + r * width + c, total);
  }
}

// Calls f(k) where column c + k of c .. c + N - 1 is the label: one comparison a pack.
template <int N, class F>
__device__ __forceinline__ void at_label(int c, int label, F&& f) {
  const int k = label - c;
  if (k >= 0 && k < N) f(k);
}

// -inf at the label and outside the row.
template <int N, class Whole>
__device__ __forceinline__ void leave_out(float (&z)[N], int c, int label, int end, Whole) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (!Whole::value && (c + k < 0 || c + k >= end)) z[k] = -INFINITY;
  }
  at_label<N>(c, label, [&](int k) { set(z, k, -INFINITY); });
}

template <class T>
__global__ void __launch_bounds__(kThreads, NAPO_ROW_BLOCKS) token_forward_kernel(TokenForwardArgs args) {
  const int64_t i = blockIdx.x, label = args.labels[i];
  if (label == args.ignore_index) {
    if (threadIdx.x == 0) args.logp[i] = args.row_max[i] = args.row_log_sum[i] = 0.0f;
    return;
  }
  const T* row = static_cast<const T*>(args.logits) + i / args.tokens * args.stride_s + i % args.tokens * args.stride_t;
  const int lead = lead_of<kPack<T>>(row), end = static_cast<int>(args.columns), column = static_cast<int>(label);

  // As in forward_kernel, one read and a shift from the first columns.
  const int count = sample_of<T>(end, lead);
  float m = -INFINITY, total;
  for_each_pack<Use::again, 1, false>(row, lead, count, [&](int c, auto& z, auto whole) {
    leave_out(z, c, column, count, whole);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) m = fmaxf(m, z[k]);
  });
  float shift = finite(reduce<Max>(m));
  for (bool again = true; again;) {
    m = -INFINITY;
    total = 0.0f;
    for_each_pack<Use::once, kPacks<T, true>, false>(row, lead, end, [&](int c, auto& z, auto whole) {
      leave_out(z, c, column, end, whole);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        m = fmaxf(m, z[k]);
        z[k] = exponential<T>(z[k] - shift);
      }
      total += sum(z);
    });
    m = reduce<Max>(m);
    total = reduce<Sum>(total);
    again = m != -INFINITY && fabsf(m - shift) > kReach;
    if (again) shift = m;
  }
  if (threadIdx.x == 0) {
    const float z = to_float(row[label]), top = fmaxf(m, z);
    args.logp[i] = log_p((shift - z) + logf(total), z);
    args.row_max[i] = top;
    args.row_log_sum[i] = logf(expf(shift - top) * total + expf(z - top));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, NAPO_ROW_BLOCKS) token_backward_kernel(TokenBackwardArgs args) {
  constexpr int N = kPack<T>;
  const int64_t i = blockIdx.x, s = i / args.tokens, t = i % args.tokens, label = args.labels[i];
  const bool counts = label != args.ignore_index;
  if (!counts && args.out_is_zero) return;
  const T* row = static_cast<const T*>(args.logits) + s * args.stride_s + t * args.stride_t;
  T* out = static_cast<T*>(args.out) + s * args.out_stride_s + t * args.out_stride_t;
  const int lead = lead_of<N>(out), end = static_cast<int>(args.columns), column = static_cast<int>(label);
  if (!counts) {
    const float zero[N] = {};
    for (int c = static_cast<int>(threadIdx.x) * N - lead; c < end; c += kThreads * N) {
      if (c >= 0 && c + N <= end) {
        store(out, c, end, zero, std::true_type());
      } else {
        store(out, c, end, zero, std::false_type());
      }
    }
    return;
  }
  const float grad = args.grad[s], m = args.row_max[i], l = args.row_log_sum[i];
  const float at_its_label = -grad * expm1f(args.logp[i]);
  for_each_pack<Use::once, kPacks<T, true>>(row, lead, end, [&](int c, auto& a, auto whole) {
#pragma unroll
    for (int k = 0; k < N; ++k) a[k] = -grad * exponential<T>((a[k] - m) - l);
    at_label<N>(c, column, [&](int k) { set(a, k, at_its_label); });
    store(out, c, end, a, whole);
  });
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

void check_columns(int64_t columns) {
  constexpr int64_t most = INT32_MAX - 16 * kThreads * NAPO_ROW_LOADS;  // a thread counts beyond the end of a row
  NAPO_CHECK(columns <= most, "columns: expected at most %lld, got %lld", static_cast<long long>(most),
             static_cast<long long>(columns));
}

// Logits are either written in their own dtype or, from fp32, in half the bytes.
template <class F>
void with_logits_and_out(DType dtype, DType out_dtype, F&& f) {
  NAPO_CHECK(out_dtype == dtype || dtype == DType::f32,
             "out_dtype: expected that of the logits, code %d, or logits of float32, got code %d",
             static_cast<int>(dtype), static_cast<int>(out_dtype));
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
  while (threads < kThreads && threads * N < args.width) threads *= 2;
  launch("hidden_gradient", &hidden_gradient_kernel<T, Out, N>, args.rows, 1, threads, stream, args);
}

}  // namespace

void target_logits(const TargetLogitsArgs& args, void* stream) {
  if (args.rows == 0) return;
  with_cuda_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    constexpr int64_t warps = kPairThreads / kWarp;
    const int64_t blocks = (args.rows + warps - 1) / warps;
    launch("target_logits", &target_logits_kernel<T>, blocks < kPairBlocks ? kPairBlocks : blocks, 1, kPairThreads,
           stream, args);
  });
}

void softmax_rows_forward(const ForwardArgs& args, void* stream) {
  check_columns(args.columns);
  with_logits_and_out(args.dtype, args.out_dtype, [&](auto* in, auto* out) {
    using T = typename Pointee<decltype(in)>::type;
    using Out = typename Pointee<decltype(out)>::type;
    const auto kernel = is_plain(args.map) ? &forward_kernel<T, Out, true> : &forward_kernel<T, Out, false>;
    launch("softmax_rows_forward", kernel, args.rows, 1, kThreads, stream, args);
  });
}

void softmax_rows_gradient(const GradientArgs& args, void* stream) {
  check_columns(args.columns);
  with_logits_and_out(args.dtype, args.out_dtype, [&](auto* in, auto* out) {
    using T = typename Pointee<decltype(in)>::type;
    using Out = typename Pointee<decltype(out)>::type;
    const auto kernel = is_plain(args.map) ? &gradient_kernel<T, Out, true> : &gradient_kernel<T, Out, false>;
    launch("softmax_rows_gradient", kernel, args.rows, 1, kThreads, stream, args);
  });
}

void hidden_gradient(const HiddenGradientArgs& args, void* stream) {
  with_cuda_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    constexpr int N = kVector / sizeof(T);
    const int64_t row = args.width * static_cast<int64_t>(sizeof(T));
    const bool aligned = is_aligned(args.weight, args.weight_stride * static_cast<int64_t>(sizeof(T))) &&
                         is_aligned(args.context, row) && is_aligned(args.out, row);
    const auto run = [&](auto* out) {
      using Out = typename Pointee<decltype(out)>::type;
      if (aligned) return launch_hidden_gradient<T, Out, N>(args, stream);
      launch_hidden_gradient<T, Out, 1>(args, stream);
    };
    if (args.out_dtype == args.dtype) return run(tag);
    NAPO_CHECK(args.out_dtype == DType::f32, "out_dtype: expected float32 or the dtype of weight, got code %d",
               static_cast<int>(args.out_dtype));
    run(static_cast<float*>(nullptr));
  });
}

void token_logps_forward(const TokenForwardArgs& args, void* stream) {
  check_columns(args.columns);
  with_cuda_dtype(args.dtype, [&](auto* tag) {
    launch("token_logps_forward", &token_forward_kernel<typename Pointee<decltype(tag)>::type>,
           args.sequences * args.tokens, 1, kThreads, stream, args);
  });
}

void token_logps_backward(const TokenBackwardArgs& args, void* stream) {
  check_columns(args.columns);
  with_cuda_dtype(args.dtype, [&](auto* tag) {
    launch("token_logps_backward", &token_backward_kernel<typename Pointee<decltype(tag)>::type>,
           args.sequences * args.tokens, 1, kThreads, stream, args);
  });
}

}  // namespace napo::cuda
