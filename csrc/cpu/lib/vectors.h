// Loops over arrays in vectors, the last of which may be cut off, and byte masks (torch.bool).
#pragma once

#include "cpu/lib/simd.h"

namespace napo {
namespace NAPO_ISA {

// Which lanes of a vector are inside the array: all, which costs nothing, or the first n.
struct AllLanes {
  static constexpr int n = Vec::lanes;
};
struct FirstLanes {
  int n;
};

// `fill` stands in the lanes outside.
template <class T>
NAPO_INLINE Vec load(const T* p, AllLanes, float) {
  return load(p);
}
template <class T>
NAPO_INLINE Vec load(const T* p, FirstLanes lanes, float fill) {
  return load(p, lanes.n, fill);
}
template <class T>
NAPO_INLINE void store(T* p, Vec v, AllLanes) {
  store(p, v);
}
template <class T>
NAPO_INLINE void store(T* p, Vec v, FirstLanes lanes) {
  store(p, v, lanes.n);
}
NAPO_INLINE Vec inside(Vec v, AllLanes, float) { return v; }
NAPO_INLINE Vec inside(Vec v, FirstLanes lanes, float fill) {
  float all[Vec::lanes];
  store(all, v);
  return load(all, lanes.n, fill);
}

// f(i, lanes, k) for the vectors of [begin, end), kUnrolled at a time: k is the number of the vector among these, for
// as many sums under way; 0 for those that are left.
template <int kUnrolled, class F>
NAPO_INLINE void for_vectors_unrolled(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kUnrolled * Vec::lanes <= end; i += kUnrolled * Vec::lanes) {
    for (int k = 0; k < kUnrolled; ++k) f(i + k * Vec::lanes, AllLanes{}, k);
  }
  for (; i + Vec::lanes <= end; i += Vec::lanes) f(i, AllLanes{}, 0);
  if (i < end) f(i, FirstLanes{static_cast<int>(end - i)}, 0);
}

// f(i, lanes) for the vectors of [begin, end).
template <class F>
NAPO_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + Vec::lanes <= end; i += Vec::lanes) f(i, AllLanes{});
  if (i < end) f(i, FirstLanes{static_cast<int>(end - i)});
}

// The lanes of v for which there is room, which may be none.
template <class T>
NAPO_INLINE void store_within(T* p, Vec v, int64_t room) {
  if (room >= Vec::lanes) {
    store(p, v);
  } else if (room > 0) {
    store(p, v, static_cast<int>(room));
  }
}

// `yes` where the byte is not zero, `no` elsewhere and in the lanes outside. A null mask is true everywhere.
NAPO_INLINE Vec where(const uint8_t* mask, AllLanes, Vec yes, Vec no) {
  if (mask == nullptr) return yes;
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
  return {_mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), no.v, yes.v)};
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask)));
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256())))};
#else
  i32x4 chosen;
  for (int i = 0; i < Vec::lanes; ++i) chosen[i] = mask[i] != 0 ? -1 : 0;
  return choose(chosen, yes, no);
#endif
}

NAPO_INLINE Vec where(const uint8_t* mask, FirstLanes lanes, Vec yes, Vec no) {
  uint8_t bytes[Vec::lanes] = {};
  for (int i = 0; i < lanes.n; ++i) bytes[i] = mask == nullptr ? 1 : mask[i];
  return where(bytes, AllLanes{}, yes, no);
}

}  // namespace NAPO_ISA
}  // namespace napo
