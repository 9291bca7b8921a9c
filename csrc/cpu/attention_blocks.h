// The matmuls of masked_attention, kept in registers and cache.
//
// All products are made of one small matmul (small_matmul.h); here its operands are packed.
#pragma once

#include "cpu/lib/small_matmul.h"
#include "cpu/lib/vectors.h"

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr int kQueries = kBlockRows, kKeys = kBlockColumns;

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
  for_vectors(0, n, [&](int64_t j, auto lanes) NAPO_LAMBDA { store(unit + j, load(x + j, lanes, 0.0f), lanes); });
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

}  // namespace
}  // namespace NAPO_ISA
}  // namespace napo
