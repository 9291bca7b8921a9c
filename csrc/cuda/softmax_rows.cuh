// Parts that the row kernels of linear_sequence_logps and sequence_logps share. One block per row; every sum in a fixed
// order, no atomics, so results are bitwise equal from run to run.
//
// The kernels are bound by memory. A thread holds packs of neighbouring columns of its row, and it asks for several
// vectors of 16 bytes before it uses the first. Packs lie where what is written lies on multiples of a pack, from as
// many columns before the row's begin as that takes, so that no row, however it is aligned, is written number by number
// but at its two ends; where what is read lies otherwise, it is shifted in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/device.cuh"

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

// Writes the numbers x that f of for_each_pack made of a pack, to a row of the same lead; c and whole are those of f.
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

// ---- exponentials --------------------------------------------------------------------------------------------------

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

// log p of a target whose logit is z, x below the log-sum-exp of all else; never above 0.
__device__ __forceinline__ float log_p(float x, float z) {
  return z == INFINITY ? NAN : -(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
}

__device__ __forceinline__ float finite(float m) { return m == -INFINITY ? 0.0f : m; }

// What the sum of the columns of no target is relative to, once `top`, the row's largest logit, is known. Where m, the
// largest of these columns, is -inf, their sum is 0 relative to any number; exp(shift - top) would overflow for
// another.
__device__ __forceinline__ float origin_of(float m, float shift, float top) {
  return m == -INFINITY ? finite(top) : shift;
}

// How far exponents may lie from 0 at the largest logit: e^40 times any weight is far from the ends of fp32 and bf16.
constexpr float kReach = 40.0f;

// The first columns of a row, a pack of each thread.
template <class T>
__device__ __forceinline__ int sample_of(int columns, int lead) {
  const int sample = kThreads * kPack<T> - lead;
  return sample < columns ? sample : columns;
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

}  // namespace
}  // namespace napo::cuda
