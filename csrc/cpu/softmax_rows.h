// Pieces of one row of a softmax, for linear_sequence_logps and sequence_logps: the largest logit, sums of exponentials
// and the gradient over a stretch of columns, and the log-probs of the targets.
#pragma once

#include "cpu/lib/vectors.h"
#include "linear_sequence_logps.h"

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr int kLanes = Vec::lanes;
// Rows are cut into blocks whose sums are folded into a double: the error of a long row stays that of a short one.
constexpr int64_t kBlock = 64 * kLanes;

// ---- one row -------------------------------------------------------------------------------------------------------

struct Logit {
  Vec z, slope;
};

// Applies the map to raw logits whose first column is `column`.
template <bool kPlain, class Lanes>
NAPO_INLINE Logit map_logit(Vec a, const LogitMap& map, int64_t column, Lanes lanes) {
  const Vec one = splat(1.0f);
  if (kPlain) return {a, one};
  Vec z = a * splat(map.scale);
  if (map.bias != nullptr) z = z + load(map.bias + column, lanes, 0.0f);
  if (map.softcap == 0.0f) return {z, one};
  Vec slope;
  z = splat(map.softcap) * tanh(z / splat(map.softcap), &slope);
  return {z, slope};
}

// Calls f(begin, end) for the stretches of [first, last) between the row's targets.
template <class F>
NAPO_INLINE void between(const int64_t* targets, int64_t count, int64_t first, int64_t last, const F& f) {
  int64_t begin = first;
  for (int64_t i = 0; i < count; ++i) {
    if (targets[i] > begin) f(begin, targets[i]);
    begin = targets[i] + 1;
  }
  if (begin < last) f(begin, last);
}

// Largest z on [begin, end). The slope of the map may be negative (scale < 0), so z itself is compared.
template <bool kPlain, class T>
NAPO_INLINE float stretch_max(const T* row, int64_t begin, int64_t end, const LogitMap& map, float m) {
  // softcap * tanh(x / softcap) grows with x: the tanh can wait until the maximum is known
  LogitMap linear = map;
  linear.softcap = 0.0f;
  Vec best[4];
  for (Vec& b : best) b = splat(-INFINITY);
  for_vectors_unrolled<4>(begin, end, [&](int64_t c, auto lanes, int k) NAPO_LAMBDA {
    const Vec z = map_logit<kPlain>(load(row + c, lanes, 0.0f), linear, c, lanes).z;
    best[k] = max(best[k], inside(z, lanes, -INFINITY));
  });
  const float largest_here = largest(max(max(best[0], best[1]), max(best[2], best[3])));
  return largest_here > m ? largest_here : m;
}

constexpr float kLog2e = 1.44269504088896341f;

// exp(y - l) for y = z - m. Where logits have 16 bits, exp2: that of y = -20 is off by 1e-6 of e^-20, far less than
// half a bit of what is stored, and nothing in a sum that has e^0 in it.
NAPO_INLINE Vec exp_of_row(Vec y, float l, const float*) { return exp(y - splat(l)); }
template <class T>
NAPO_INLINE Vec exp_of_row(Vec y, float l, const T*) {
  return exp2(fma(y, splat(kLog2e), splat(-l * kLog2e)));
}

// Sum of exp(z - m) on [begin, end); with kStore also out = store_scale * exp(z - m) * slope. out may be row.
template <bool kPlain, bool kStore, class T>
NAPO_INLINE double stretch_sum(const T* row, T* out, int64_t begin, int64_t end, const LogitMap& map, float m,
                               float store_scale) {
  const Vec minus_m = splat(-m), scale = splat(store_scale);
  double total = 0.0;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    Vec sums[2] = {splat(0.0f), splat(0.0f)};
    for_vectors_unrolled<2>(block, stop, [&](int64_t c, auto lanes, int k) NAPO_LAMBDA {
      const Logit logit = map_logit<kPlain>(load(row + c, lanes, 0.0f), map, c, lanes);
      const Vec e = exp_of_row(logit.z + minus_m, 0.0f, row);
      sums[k] = sums[k] + inside(e, lanes, 0.0f);
      if (kStore) store(out + c, kPlain ? e * scale : e * scale * logit.slope, lanes);
    });
    total += sum(sums[0] + sums[1]);
  }
  return total;
}

// out = factor * exp((z - m) - l) * slope on [begin, end); out may be row.
template <bool kPlain, class T>
NAPO_INLINE void stretch_gradient(const T* row, T* out, int64_t begin, int64_t end, const LogitMap& map, float m,
                                  float l, float factor) {
  const Vec minus_m = splat(-m), factors = splat(factor);
  for_vectors(begin, end, [&](int64_t c, auto lanes) NAPO_LAMBDA {
    const Logit logit = map_logit<kPlain>(load(row + c, lanes, 0.0f), map, c, lanes);
    const Vec g = factors * exp_of_row(logit.z + minus_m, l, row);
    store(out + c, kPlain ? g : g * logit.slope, lanes);
  });
}

// ---- the targets of one row, in double because there are few -------------------------------------------------------

// log p from x = log-sum-exp of everything else minus z; never above 0.
NAPO_INLINE double minus_softplus(double x) { return x > 0.0 ? -(x + ::log1p(::exp(-x))) : -::log1p(::exp(x)); }

struct RowEnd {
  float m, l;  // of all columns
};

// `others` = (m, sum of exp(z - m)) over the columns that are no target. Writes the log-prob of each target. Sums are
// taken relative to the largest logit: beside one of 1e20 no logarithm of a sum would be left of them.
NAPO_INLINE RowEnd finish_row(float others_m, double others_sum, const float* z, int64_t count, float* logp) {
  float m = others_m;
  for (int64_t i = 0; i < count; ++i) m = z[i] > m ? z[i] : m;
  if (m == -INFINITY) {  // every logit is -inf
    for (int64_t i = 0; i < count; ++i) logp[i] = NAN;
    return {m, NAN};
  }
  const auto above = [m](float x) { return static_cast<double>(x) - m; };
  const double others =
      others_sum > 0.0 ? above(others_m) + ::log(others_sum) : (others_sum != others_sum ? NAN : -INFINITY);
  double total = ::exp(others);
  for (int64_t i = 0; i < count; ++i) total += ::exp(above(z[i]));
  for (int64_t i = 0; i < count; ++i) {
    const double own = ::exp(above(z[i]));
    double rest;  // log-sum-exp of all but this target, less m
    if (own <= 0.5 * total) {
      rest = ::log(total - own);
    } else {  // the difference would cancel; it happens to one or two targets of a row
      double top = others;
      for (int64_t j = 0; j < count; ++j) top = j != i && above(z[j]) > top ? above(z[j]) : top;
      double left = top == -INFINITY ? 0.0 : ::exp(others - top);
      for (int64_t j = 0; j < count && top != -INFINITY; ++j) {
        if (j != i) left += ::exp(above(z[j]) - top);
      }
      rest = top == -INFINITY ? -INFINITY : top + ::log(left);
    }
    logp[i] = static_cast<float>(minus_softplus(rest - above(z[i])));
  }
  return {m, static_cast<float>(::log(total))};
}

// G_v (1 - p_v) - (G_r - G_v) p_v: the gradient of the row's loss with respect to the target's logit.
NAPO_INLINE double target_coefficient(float logp, float grad, double grad_of_row) {
  const double p = ::exp(static_cast<double>(logp));
  return -grad * ::expm1(static_cast<double>(logp)) - (grad_of_row - grad) * p;
}

NAPO_INLINE float finite_or_zero(float m) { return m == -INFINITY ? 0.0f : m; }

}  // namespace
}  // namespace NAPO_ISA
}  // namespace napo
