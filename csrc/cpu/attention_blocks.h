// The matmuls of masked_attention, kept in registers and cache.
//
// All products are made of one small matmul, kQueries x kKeys at a time in registers. It reads its operands in units of
// four bytes along the reduction: a float, or, where the machine multiplies pairs of bfloat16, two of them. The left
// operand is broadcast unit by unit; the right one lies in panels of kKeys columns, so that it is read in order.
#pragma once

#include "cpu/simd.h"

namespace napo {
namespace NAPO_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kQueries = 8;
#else
constexpr int kQueries = 4;  // 16 registers
#endif
constexpr int kKeys = 2 * Vec::lanes;

struct FloatUnit {
  using type = float;
  static constexpr int width = 1;
  using Operand = Vec;
  NAPO_INLINE Operand load(const type* p) { return NAPO_ISA::load(p); }
  NAPO_INLINE Operand splat(type x) { return NAPO_ISA::splat(x); }
  NAPO_INLINE Vec dot(Operand a, Operand b, Vec sum) { return fma(a, b, sum); }
  // Lanes of one row, neighbours along the reduction.
  NAPO_INLINE void put(type* p, Vec a) { store(p, a); }
};

#if defined(__AVX512BF16__)
struct PairUnit {
  using type = uint32_t;
  static constexpr int width = 2;
  using Operand = __m512i;
  NAPO_INLINE Operand load(const type* p) { return _mm512_loadu_si512(p); }
  NAPO_INLINE Operand splat(type x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  NAPO_INLINE Vec dot(Operand a, Operand b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
  }
  NAPO_INLINE __m256i narrow(Vec a) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)); }
  NAPO_INLINE void put(type* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
  // Lanes of two rows that are neighbours along the reduction.
  NAPO_INLINE void put(type* p, Vec even, Vec odd) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(even)), high = _mm512_cvtepu16_epi32(narrow(odd));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};
#endif

NAPO_INLINE int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- packing -------------------------------------------------------------------------------------------------------

struct Sizes {
  int64_t length, padded;  // T, and the mask's side
  int64_t width, columns;  // d, and d in whole panels

  // Units of a packed matrix.
  template <class U>
  int64_t matrix() const {
    return padded * columns / U::width;
  }
};

NAPO_INLINE void put_units(float* unit, const float* x, int64_t n) { memcpy(unit, x, n * sizeof *x); }
template <class T>
NAPO_INLINE void put_units(float* unit, const T* x, int64_t n) {
  int64_t j = 0;
  for (; j + Vec::lanes <= n; j += Vec::lanes) store(unit + j, load(x + j));
  for (; j < n; ++j) unit[j] = to_float(x[j]);
}
NAPO_INLINE void put_units(uint32_t* unit, const BFloat16* x, int64_t n) { memcpy(unit, x, n * sizeof *x); }

// (padded, columns / width) units: reduction along d.
template <class U, class T>
NAPO_INLINE void pack_rows(const T* x, int64_t stride, const Sizes& size, typename U::type* out) {
  const int64_t units = size.columns / U::width;
  for (int64_t t = 0; t < size.padded; ++t, out += units) {
    if (t >= size.length || size.width < size.columns) memset(out, 0, units * sizeof *out);
    if (t < size.length) put_units(out, x + t * stride, size.width);
  }
}

// Panels (padded / kKeys, columns / width, kKeys) units: tokens as columns, reduction along d.
template <class U>
NAPO_INLINE void transpose(const typename U::type* rows, const Sizes& size, typename U::type* out) {
  const int64_t units = size.columns / U::width;
  for (int64_t t = 0; t < size.padded; t += kKeys, rows += kKeys * units, out += kKeys * units) {
    for (int64_t j = 0; j < kKeys; ++j) {
      for (int64_t s = 0; s < units; ++s) out[s * kKeys + j] = rows[j * units + s];
    }
  }
}

// Panels (columns / kKeys, padded / width, kKeys) units: d as columns, reduction along the tokens.
NAPO_INLINE void pack_panels(const float* rows, const Sizes& size, float* out) {
  for (int64_t c = 0; c < size.columns; c += kKeys) {
    for (int64_t t = 0; t < size.padded; ++t, out += kKeys) {
      memcpy(out, rows + t * size.columns + c, kKeys * sizeof *out);
    }
  }
}
#if defined(__AVX512BF16__)
NAPO_INLINE void pack_panels(const uint32_t* rows, const Sizes& size, uint32_t* out) {
  const int64_t units = size.columns / 2;
  for (int64_t c = 0; c < size.columns; c += kKeys) {
    for (int64_t t = 0; t < size.padded; t += 2, out += kKeys) {
      const uint32_t* first = rows + t * units + c / 2;
      for (int half = 0; half < 2; ++half) {
        const __m256i* even = reinterpret_cast<const __m256i*>(first) + half;
        const __m256i* odd = reinterpret_cast<const __m256i*>(first + units) + half;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(odd));
        _mm512_storeu_si512(out + 16 * half, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }
}
#endif

// ---- the small matmul ----------------------------------------------------------------------------------------------

struct Block {
  Vec v[kQueries][2];
};

NAPO_INLINE Block zeros() {
  Block b;
  for (int i = 0; i < kQueries; ++i) b.v[i][0] = b.v[i][1] = splat(0.0f);
  return b;
}

// total[i] += sum_s left[i * row + s * step] right[s]
template <class U>
NAPO_INLINE void multiply(Block& total, const typename U::type* __restrict__ left, int64_t row, int64_t step,
                          const typename U::type* __restrict__ right, int64_t steps) {
  Block sum = total;  // a copy, or the compiler moves the sums between registers in every step
  for (int64_t s = 0; s < steps; ++s) {
    const typename U::Operand b0 = U::load(right + s * kKeys), b1 = U::load(right + s * kKeys + Vec::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      const typename U::Operand a = U::splat(left[i * row + s * step]);
      sum.v[i][0] = U::dot(a, b0, sum.v[i][0]);
      sum.v[i][1] = U::dot(a, b1, sum.v[i][1]);
    }
  }
  total = sum;
}

}  // namespace
}  // namespace NAPO_ISA
}  // namespace napo
