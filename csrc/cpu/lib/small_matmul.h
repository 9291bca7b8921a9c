// A matmul kept in registers: kBlockRows x kBlockColumns sums at a time.
//
// It reads its operands in units of four bytes along the reduction: a float, or, where the machine multiplies pairs of
// bfloat16, two of them. The left operand is broadcast unit by unit; the right one lies in panels of kBlockColumns
// columns, so that it is read in order.
#pragma once

#include "cpu/lib/simd.h"

namespace napo {
namespace NAPO_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 4;  // 16 registers
#endif
constexpr int kBlockColumns = 2 * Vec::lanes;

NAPO_INLINE int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

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

struct Block {
  Vec v[kBlockRows][2];
};

NAPO_INLINE Block zeros() {
  Block b;
  for (int i = 0; i < kBlockRows; ++i) b.v[i][0] = b.v[i][1] = splat(0.0f);
  return b;
}

// total[i] += sum_s left[i * row + s * step] right[s]
template <class U>
NAPO_INLINE void multiply(Block& total, const typename U::type* __restrict__ left, int64_t row, int64_t step,
                          const typename U::type* __restrict__ right, int64_t steps) {
  Block sum = total;  // a copy, or the compiler moves the sums between registers in every step
  for (int64_t s = 0; s < steps; ++s) {
    const typename U::Operand b0 = U::load(right + s * kBlockColumns),
                              b1 = U::load(right + s * kBlockColumns + Vec::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i) {
      const typename U::Operand a = U::splat(left[i * row + s * step]);
      sum.v[i][0] = U::dot(a, b0, sum.v[i][0]);
      sum.v[i][1] = U::dot(a, b1, sum.v[i][1]);
    }
  }
  total = sum;
}

// Columns `first` to `first + kBlockColumns` of the transpose of `rows` (count, width), zeros behind the last, as a
// panel (width, kBlockColumns).
NAPO_INLINE void pack_transposed(const float* rows, int64_t count, int64_t width, int64_t first, float* panel) {
  for (int64_t j = 0; j < kBlockColumns; ++j) {
    const float* row = rows + (first + j) * width;
    for (int64_t d = 0; d < width; ++d) panel[d * kBlockColumns + j] = first + j < count ? row[d] : 0.0f;
  }
}

// out (up(count), columns) = rows (count, width) times the panels of so many columns, up() to whole blocks: `rows` are
// readable as far as that, see whole_blocks.
NAPO_INLINE void multiply_rows(const float* rows, int64_t count, int64_t width, const float* panels, int64_t columns,
                               float* out) {
  for (int64_t c = 0; c < columns; c += kBlockColumns) {  // a panel serves all rows
    for (int64_t r = 0; r < count; r += kBlockRows) {
      Block block = zeros();
      multiply<FloatUnit>(block, rows + r * width, width, 1, panels + c * width, width);
      for (int i = 0; i < kBlockRows; ++i) {
        store(out + (r + i) * columns + c, block.v[i][0]);
        store(out + (r + i) * columns + c + Vec::lanes, block.v[i][1]);
      }
    }
  }
}

// The rows, or where they are no whole number of blocks a copy in `buffer` with zeros behind it.
NAPO_INLINE const float* whole_blocks(const float* rows, int64_t count, int64_t width, float* buffer) {
  if (count % kBlockRows == 0) return rows;
  memset(buffer, 0, static_cast<size_t>(up(count, kBlockRows) * width) * sizeof(float));
  memcpy(buffer, rows, static_cast<size_t>(count * width) * sizeof(float));
  return buffer;
}

}  // namespace
}  // namespace NAPO_ISA
}  // namespace napo
