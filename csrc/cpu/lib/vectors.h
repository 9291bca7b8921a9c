// Loops over arrays with a byte mask (torch.bool), in vectors and one partial vector at the end.
#pragma once

#include "cpu/lib/simd.h"

namespace napo {
namespace NAPO_ISA {

// Which lanes of a vector are inside the array.
struct AllLanes {
  static constexpr int n = Vec::lanes;
};
struct FirstLanes {
  int n;
};

NAPO_INLINE Vec load(const float* p, AllLanes, float) { return load(p); }
NAPO_INLINE Vec load(const float* p, FirstLanes lanes, float fill) { return load(p, lanes.n, fill); }
NAPO_INLINE void store(float* p, Vec v, AllLanes) { store(p, v); }
NAPO_INLINE void store(float* p, Vec v, FirstLanes lanes) { store(p, v, lanes.n); }

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

// f(i, lanes) for every vector of [0, count).
template <class F>
NAPO_INLINE void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + Vec::lanes <= count; i += Vec::lanes) f(i, AllLanes{});
  if (i < count) f(i, FirstLanes{static_cast<int>(count - i)});
}

}  // namespace NAPO_ISA
}  // namespace napo
