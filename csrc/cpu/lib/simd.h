// Vectors of floats for the CPU kernels: one type `Vec` and free functions on it, the same on every instruction set.
//
// Included by csrc/cpu/<room>.cpp, which is compiled once an instruction set; everything lives in napo::NAPO_ISA, so
// that no function compiled for a large set can be picked by the linker for a small one. For the same reason nothing
// here, nor in a kernel, may use a std:: template or an inline function of another namespace.
//
//   load(p) store(p, v)              Vec::lanes elements of float, BFloat16 or Float16; no alignment needed
//   load(p, n, fill) store(p, v, n)  the first n lanes (0 <= n <= lanes); the other lanes read as `fill`
//   splat(x) fma(a, b, c) max(a, b) min(a, b) abs(a) select_less(a, b, x, y)   (a < b ? x : y), and + - * /
//   sum(v) largest(v)                across lanes, in a fixed order
//   exp(v)                           1 ulp or so; 0 below -86.6 at the latest; inf and NaN as they should be
//   exp2(v)                          for v < 128: 2^v within 1e-7 of it, 0 below -126; half the work of exp
//   tanh(v, &derivative)             2 ulp or so, and 1 - tanh^2 without cancellation
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef NAPO_ISA
#error "simd.h is for sources that are compiled once an instruction set (see CMakeLists.txt)"
#endif

#define NAPO_INLINE static inline __attribute__((always_inline))
#define NAPO_LAMBDA __attribute__((always_inline))

namespace napo {
namespace NAPO_ISA {

// ---- scalars -------------------------------------------------------------------------------------------------------

NAPO_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

NAPO_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

NAPO_INLINE float to_float(float x) { return x; }

NAPO_INLINE float to_float(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

NAPO_INLINE float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  // The multiplication by 2^112 moves the exponent to float's bias and normalises subnormal halves.
  float magnitude = from_bits((x.bits & 0x7fffu) << 13) * from_bits(0x77800000u);
  if (magnitude >= 65536.0f) magnitude = from_bits(to_bits(magnitude) | 0x7f800000u);  // inf, NaN
  return from_bits(to_bits(magnitude) | sign);
}

NAPO_INLINE void from_float(float x, float* out) { *out = x; }

NAPO_INLINE void from_float(float x, BFloat16* out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

NAPO_INLINE void from_float(float x, Float16* out) {
  const uint32_t sign = (to_bits(x) >> 16) & 0x8000u;
  uint32_t bits = to_bits(x) & 0x7fffffffu;
  uint32_t half;
  if (bits >= 0x47800000u) {  // 65536 and above, inf, NaN
    half = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the bits of a subnormal half, with rounding
    half = to_bits(from_bits(bits) + 0.5f) - 0x3f000000u;
  } else {
    bits += 0xc8000fffu + ((bits >> 13) & 1u);  // rebias the exponent and round to nearest even
    half = bits >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

// ---- vectors -------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

struct Vec {
  static constexpr int lanes = 16;
  __m512 v;
};
NAPO_INLINE Vec splat(float x) { return {_mm512_set1_ps(x)}; }
NAPO_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
NAPO_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
NAPO_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
NAPO_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
NAPO_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
NAPO_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
NAPO_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
NAPO_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
NAPO_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
NAPO_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

NAPO_INLINE Vec widen(__m256i halves, const BFloat16*) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
NAPO_INLINE Vec widen(__m256i halves, const Float16*) { return {_mm512_cvtph_ps(halves)}; }
NAPO_INLINE __m256i narrow(Vec a, const BFloat16*) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));  // a subnormal becomes 0
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
NAPO_INLINE __m256i narrow(Vec a, const Float16*) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

NAPO_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
NAPO_INLINE Vec load(const float* p, int n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p)};
}
template <class T>
NAPO_INLINE Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}
template <class T>
NAPO_INLINE Vec load(const T* p, int n, float fill) {
  const Vec v = widen(_mm256_maskz_loadu_epi16(first(n), p), p);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), v.v)};
}
NAPO_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
NAPO_INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
template <class T>
NAPO_INLINE void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, p));
}
template <class T>
NAPO_INLINE void store(T* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(a, p));
}

NAPO_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
NAPO_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int lanes = 8;
  __m256 v;
};
NAPO_INLINE Vec splat(float x) { return {_mm256_set1_ps(x)}; }
NAPO_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
NAPO_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
NAPO_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
NAPO_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
NAPO_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
NAPO_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
NAPO_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
NAPO_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
NAPO_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
NAPO_INLINE __m256i bits_of(Vec a) { return _mm256_castps_si256(a.v); }

NAPO_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
NAPO_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
NAPO_INLINE Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
NAPO_INLINE void store(BFloat16* p, Vec a) {
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits_of(a), 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits_of(a), _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i halves = _mm256_srli_epi32(rounded, 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
NAPO_INLINE Vec load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
NAPO_INLINE void store(Float16* p, Vec a) {
  const __m128i halves = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
NAPO_INLINE float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
NAPO_INLINE float largest(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

#else

// Vector extensions of GCC and Clang: SSE2 on x86-64, NEON on arm64, plain code elsewhere.
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint16_t u16x4 __attribute__((vector_size(8)));

struct Vec {
  static constexpr int lanes = 4;
  f32x4 v;
};
NAPO_INLINE u32x4 bits_of(Vec a) { return reinterpret_cast<u32x4>(a.v); }
NAPO_INLINE Vec vec_of(u32x4 bits) { return {reinterpret_cast<f32x4>(bits)}; }
NAPO_INLINE Vec choose(i32x4 mask, Vec x, Vec y) {
  const u32x4 m = reinterpret_cast<u32x4>(mask);
  return vec_of((bits_of(x) & m) | (bits_of(y) & ~m));
}
NAPO_INLINE Vec splat(float x) { return {f32x4{x, x, x, x}}; }
NAPO_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
NAPO_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
NAPO_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
NAPO_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
NAPO_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
NAPO_INLINE Vec max(Vec a, Vec b) { return choose(a.v > b.v, a, b); }
NAPO_INLINE Vec min(Vec a, Vec b) { return choose(a.v < b.v, a, b); }
NAPO_INLINE Vec abs(Vec a) { return vec_of(bits_of(a) & 0x7fffffffu); }
NAPO_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) { return choose(a.v < b.v, x, y); }

NAPO_INLINE Vec load(const float* p) {
  Vec a;
  memcpy(&a.v, p, sizeof a.v);
  return a;
}
NAPO_INLINE void store(float* p, Vec a) { memcpy(p, &a.v, sizeof a.v); }
NAPO_INLINE Vec load(const BFloat16* p) {
  u16x4 halves;
  memcpy(&halves, p, sizeof halves);
  return vec_of(__builtin_convertvector(halves, u32x4) << 16);
}
NAPO_INLINE void store(BFloat16* p, Vec a) {
  const u32x4 bits = bits_of(a);
  const u32x4 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vec quiet = choose(a.v != a.v, vec_of(u32x4{0x7fc0u, 0x7fc0u, 0x7fc0u, 0x7fc0u}), vec_of(rounded));
  const u16x4 halves = __builtin_convertvector(bits_of(quiet), u16x4);
  memcpy(p, &halves, sizeof halves);
}
NAPO_INLINE Vec load(const Float16* p) {
  return {f32x4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
NAPO_INLINE void store(Float16* p, Vec a) {
  for (int i = 0; i < 4; ++i) from_float(a.v[i], p + i);
}
NAPO_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
NAPO_INLINE float largest(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < 4; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

#endif

#if !defined(__AVX512F__)
template <class T>
NAPO_INLINE Vec load(const T* p, int n, float fill) {
  float lanes[Vec::lanes];
  for (int i = 0; i < Vec::lanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}
template <class T>
NAPO_INLINE void store(T* p, Vec a, int n) {
  float lanes[Vec::lanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) from_float(lanes[i], p + i);
}
#endif

// ---- functions -----------------------------------------------------------------------------------------------------

// e^r for |r| <= ln(2) / 2 (Cephes expf).
NAPO_INLINE Vec exp_reduced(Vec r) {
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return fma(p, r * r, r + splat(1.0f));
}

NAPO_INLINE Vec exp(Vec x) {
  const Vec log2e = splat(1.44269504088896341f), ln2_high = splat(-0.693359375f), ln2_low = splat(2.12194440e-4f);
#if defined(__AVX512F__)
  // max and min give their second operand where one is NaN: a NaN in x passes. e^89 is inf. Below -87 the lanes are
  // zeroed rather than scaled: a subnormal result costs a microcode assist, more than all the rest.
  const Vec low = splat(-87.0f), y = min(splat(89.0f), max(low, x));
  const Vec n = {_mm512_roundscale_ps((y * log2e).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const Vec r = fma(n, ln2_low, fma(n, ln2_high, y));
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, low.v, _CMP_NLT_UQ), exp_reduced(r).v, n.v)};
#else
  const Vec low = splat(-86.6f), high = splat(88.7228f);
  const Vec y = min(high, max(low, x));
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vec magic = splat(12582912.0f), shifted = fma(y, log2e, magic), n = shifted - magic;
  const Vec r = fma(n, ln2_low, fma(n, ln2_high, y));
  // 2^(n - 1), doubled afterwards, because 2^128 is not a float while e^88.72 is.
#if defined(__AVX2__)
  const __m256i power = _mm256_add_epi32(_mm256_slli_epi32(bits_of(shifted), 23), _mm256_set1_epi32(0x3f000000));
  const Vec half = {_mm256_castsi256_ps(power)};
#else
  const Vec half = vec_of((bits_of(shifted) << 23) + 0x3f000000u);
#endif
  const Vec result = exp_reduced(r) * half * splat(2.0f);
  return select_less(x, low, splat(0.0f), select_less(high, x, splat(INFINITY), result));
#endif
}

// A power of two needs no reduction in two steps: a polynomial for 2^r, 0 <= r < 1, with 2^0 = 1 (minimax, relative).
NAPO_INLINE Vec exp2(Vec x) {
  const auto fraction = [](Vec r) NAPO_LAMBDA {
    Vec p = splat(1.8671302823e-3f);
    p = fma(p, r, splat(9.0170297772e-3f));
    p = fma(p, r, splat(5.5799912661e-2f));
    p = fma(p, r, splat(2.4016444385e-1f));
    p = fma(p, r, splat(6.9315129519e-1f));
    return fma(p, r, splat(1.0f));
  };
#if defined(__AVX512F__)
  // scalef takes the floor of x by itself; the lanes below -126 are zeroed, see exp(). A NaN in x passes.
  const Vec r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, splat(-126.0f).v, _CMP_NLT_UQ), fraction(r).v, x.v)};
#else
  const Vec low = splat(-126.0f), y = max(low, x);
  // Adding 1.5 * 2^23 rounds to the nearest integer, of y - 0.5 to the floor or, where y is one, to y - 1 and r to 1.
  const Vec magic = splat(12582912.0f), shifted = (y - splat(0.5f)) + magic, r = y - (shifted - magic);
#if defined(__AVX2__)
  const Vec power = {
      _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bits_of(shifted), 23), _mm256_set1_epi32(0x3f800000)))};
#else
  const Vec power = vec_of((bits_of(shifted) << 23) + 0x3f800000u);
#endif
  return select_less(x, low, splat(0.0f), fraction(r) * power);
#endif
}

NAPO_INLINE Vec tanh(Vec x, Vec* derivative) {
  const Vec one = splat(1.0f), size = abs(x), e = exp(splat(-2.0f) * size), inverse = one / (one + e);
  *derivative = splat(4.0f) * e * inverse * inverse;
  const Vec far = (one - e) * inverse, s = x * x;
  // Near 0 the quotient cancels: Cephes tanhf.
  Vec p = splat(-5.70498872745e-3f);
  p = fma(p, s, splat(2.06390887954e-2f));
  p = fma(p, s, splat(-5.37397155531e-2f));
  p = fma(p, s, splat(1.33314422036e-1f));
  p = fma(p, s, splat(-3.33332819422e-1f));
  const Vec near = fma(p * s, x, x);
  const Vec signed_far = select_less(x, splat(0.0f), splat(0.0f) - far, far);
  return select_less(size, splat(0.625f), near, signed_far);
}

}  // namespace NAPO_ISA
}  // namespace napo
