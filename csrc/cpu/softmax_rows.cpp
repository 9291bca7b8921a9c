#include "softmax_rows.h"

#include "cpu/lib/parallel.h"
#include "cpu/lib/vectors.h"

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

struct RowStats {
  float m, l;  // of all columns
};

// `others` = (m, sum of exp(z - m)) over the columns that are no target. Writes the log-prob of each target. Sums are
// taken relative to the largest logit: beside one of 1e20 no logarithm of a sum would be left of them.
NAPO_INLINE RowStats finish_row(float others_m, double others_sum, const float* z, int64_t count, float* logp) {
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

NAPO_INLINE double sum_of(const float* x, int64_t begin, int64_t end) {
  double total = 0.0;
  for (int64_t i = begin; i < end; ++i) total += x[i];
  return total;
}

template <class T>
NAPO_INLINE double dot(const T* a, const T* b, int64_t n) {
  Vec sums[2] = {splat(0.0f), splat(0.0f)};
  for_vectors_unrolled<2>(0, n, [&](int64_t c, auto lanes, int k) NAPO_LAMBDA {
    sums[k] = fma(load(a + c, lanes, 0.0f), load(b + c, lanes, 0.0f), sums[k]);
  });
  return sum(sums[0] + sums[1]);
}

struct Sum {
  float m;       // largest z
  double total;  // sum of exp(z - m)
};

NAPO_INLINE float finite_or_zero(float m) { return m == -INFINITY ? 0.0f : m; }

// Over the columns of args from first_column on that are no target; with kStore they are replaced.
template <bool kPlain, bool kStore, class T>
NAPO_INLINE Sum sum_others(const ForwardArgs& args, int64_t r, int64_t first_column) {
  // addressed by the column of the whole vocabulary
  const T* row = static_cast<const T*>(args.logits) + (r - args.first_row) * args.logits_stride - first_column;
  T* out = static_cast<T*>(args.out) + (r - args.first_row) * args.out_stride - first_column;
  const int64_t last_column = first_column + args.columns;
  int64_t first = args.targets.start[r], last = args.targets.start[r + 1];
  while (first < last && args.targets.columns[first] < first_column) ++first;
  while (last > first && args.targets.columns[last - 1] >= last_column) --last;
  const int64_t* targets = args.targets.columns + first;
  float m = -INFINITY;
  between(targets, last - first, first_column, last_column,
          [&](int64_t begin, int64_t end) NAPO_LAMBDA { m = stretch_max<kPlain>(row, begin, end, args.map, m); });
  if (!kPlain && args.map.softcap != 0.0f) m = args.map.softcap * ::tanhf(m / args.map.softcap);
  const float shift = finite_or_zero(m);
  double total = 0.0;
  between(targets, last - first, first_column, last_column, [&](int64_t begin, int64_t end) NAPO_LAMBDA {
    total += stretch_sum<kPlain, kStore>(row, out, begin, end, args.map, shift, args.store_scale);
  });
  if (kStore) {
    for (int64_t i = first; i < last; ++i) from_float(0.0f, out + args.targets.columns[i]);
  }
  return {m, total};
}

NAPO_INLINE void write_row(const ForwardArgs& args, int64_t r, Sum others) {
  const int64_t first = args.targets.start[r], count = args.targets.start[r + 1] - first;
  const RowStats stats = finish_row(others.m, others.total, args.target_z + first, count, args.target_logp + first);
  args.row_max[r] = stats.m;
  args.row_log_sum[r] = stats.l;
  const double shift = finite_or_zero(others.m);
  args.store_rescale[r] = static_cast<float>(::exp(shift - static_cast<double>(stats.m) - stats.l) / args.store_scale);
}

template <bool kPlain, bool kStore, class T>
void forward_row(const ForwardArgs& args, int64_t r) {
  write_row(args, r, sum_others<kPlain, kStore, T>(args, r, 0));
}

template <bool kPlain, bool kStore, class T>
void forward_row_columns(const ColumnsArgs& args, int64_t r) {
  const int64_t i = r - args.forward.first_row;
  const Sum here = sum_others<kPlain, kStore, T>(args.forward, r, args.first_column);
  const Sum before = args.first_column == 0 ? Sum{-INFINITY, 0.0} : Sum{args.max[i], args.sum[i]};
  const float m = here.m > before.m ? here.m : before.m;
  const double shift = finite_or_zero(m), keep = ::exp(before.m - shift), gain = ::exp(here.m - shift);
  // a sum of NaN, whose m is -inf, has to show
  const Sum now = {m, (before.m == -INFINITY ? before.total : keep * before.total) +
                          (here.m == -INFINITY ? here.total : gain * here.total)};
  args.max[i] = now.m;
  args.sum[i] = now.total;
  args.keep[i] = static_cast<float>(keep);
  args.gain[i] = static_cast<float>(gain);
  if (args.first_column + args.forward.columns == args.vocabulary) write_row(args.forward, r, now);
}

template <class T>
void add_row(const ColumnsAddArgs& args, int64_t r) {
  float* total = args.total + r * args.width;
  const T* product = static_cast<const T*>(args.product) + r * args.width;
  const Vec keep = splat(args.keep[r]), gain = splat(args.gain[r]);
  for_vectors(0, args.width, [&](int64_t c, auto lanes) NAPO_LAMBDA {
    store(total + c, fma(keep, load(total + c, lanes, 0.0f), gain * load(product + c, lanes, 0.0f)), lanes);
  });
}

template <bool kPlain, class T>
void gradient_row(const GradientArgs& args, int64_t r) {
  // addressed by the column of the whole vocabulary
  const T* row = static_cast<const T*>(args.logits) + r * args.logits_stride - args.first_column;
  T* out = static_cast<T*>(args.out) + r * args.out_stride - args.first_column;
  LogitMap map = args.map;
  if (map.bias != nullptr) map.bias -= args.first_column;
  const int64_t first_column = args.first_column, last_column = first_column + args.columns;
  int64_t first = args.targets.start[r], last = args.targets.start[r + 1];
  const double grad_of_row = sum_of(args.target_grad, first, last);
  while (first < last && args.targets.columns[first] < first_column) ++first;
  while (last > first && args.targets.columns[last - 1] >= last_column) --last;
  const float m = args.row_max[r], l = args.row_log_sum[r], factor = static_cast<float>(-grad_of_row);
  between(args.targets.columns + first, last - first, first_column, last_column,
          [&](int64_t begin, int64_t end)
              NAPO_LAMBDA { stretch_gradient<kPlain>(row, out, begin, end, map, m, l, factor); });
  for (int64_t q = first; q < last; ++q) {
    const double g = target_coefficient(args.target_logp[q], args.target_grad[q], grad_of_row) * args.target_slope[q];
    from_float(static_cast<float>(g), out + args.targets.columns[q]);
  }
}

template <class T, class Out>
void hidden_gradient_row(const HiddenGradientArgs& args, int64_t r) {
  Out* out = static_cast<Out*>(args.out) + r * args.width;
  const T* context = static_cast<const T*>(args.context);
  const int64_t first = args.targets.start[r], last = args.targets.start[r + 1];
  const double grad_of_row = sum_of(args.target_grad, first, last);
  const float row_factor =
      context == nullptr ? 0.0f : static_cast<float>(-grad_of_row * args.store_rescale[r] * args.scale);
  // The sum stays in registers, a strip of columns at a time: several targets cost no rounding of partial sums.
  // lanes_of(k): those of the strip's vector k that are inside the row.
  constexpr int kStrip = 4;
  const auto strip = [&](int64_t c, const auto& lanes_of) NAPO_LAMBDA {
    Vec sums[kStrip];
    for (int k = 0; k < kStrip; ++k) {
      sums[k] = splat(0.0f);
      if (context != nullptr) {
        sums[k] = load(context + r * args.width + c + k * kLanes, lanes_of(k), 0.0f) * splat(row_factor);
      }
    }
    for (int64_t q = first; q < last; ++q) {
      const T* w = static_cast<const T*>(args.weight) + args.targets.columns[q] * args.weight_stride + c;
      const double g = target_coefficient(args.target_logp[q], args.target_grad[q], grad_of_row);
      const Vec factor = splat(static_cast<float>(g * args.target_slope[q] * args.scale));
      for (int k = 0; k < kStrip; ++k) sums[k] = fma(factor, load(w + k * kLanes, lanes_of(k), 0.0f), sums[k]);
    }
    for (int k = 0; k < kStrip; ++k) store(out + c + k * kLanes, sums[k], lanes_of(k));
  };
  int64_t c = 0;
  for (; c + kStrip * kLanes <= args.width; c += kStrip * kLanes) strip(c, [](int) { return AllLanes{}; });
  if (c == args.width) return;
  strip(c, [&](int k) {
    const int64_t left = args.width - c - k * kLanes;
    return FirstLanes{left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0};
  });
}

NAPO_INLINE bool is_plain(const LogitMap& map) {
  return map.scale == 1.0f && map.bias == nullptr && map.softcap == 0.0f;
}

constexpr LogitMap kNoMap = {1.0f, nullptr, 0.0f};

template <class T>
void token_forward_row(const TokenForwardArgs& args, int64_t s, int64_t t) {
  const int64_t at = s * args.tokens + t, label = args.labels[at];
  if (label == args.ignore_index) {
    args.logp[at] = args.row_max[at] = args.row_log_sum[at] = 0.0f;
    return;
  }
  const T* row = static_cast<const T*>(args.logits) + s * args.stride_s + t * args.stride_t;
  float m = -INFINITY;
  between(&label, 1, 0, args.columns,
          [&](int64_t begin, int64_t end) NAPO_LAMBDA { m = stretch_max<true>(row, begin, end, kNoMap, m); });
  const float shift = m == -INFINITY ? 0.0f : m;
  double total = 0.0;  // the row is in the second-level cache by now
  between(&label, 1, 0, args.columns, [&](int64_t begin, int64_t end) NAPO_LAMBDA {
    total += stretch_sum<true, false>(row, static_cast<T*>(nullptr), begin, end, kNoMap, shift, 1.0f);
  });
  const float z = to_float(row[label]);
  const RowStats stats = finish_row(m, total, &z, 1, args.logp + at);
  args.row_max[at] = stats.m;
  args.row_log_sum[at] = stats.l;
}

template <class T>
void token_backward_row(const TokenBackwardArgs& args, int64_t s, int64_t t) {
  const int64_t at = s * args.tokens + t, label = args.labels[at];
  T* out = static_cast<T*>(args.out) + s * args.out_stride_s + t * args.out_stride_t;
  if (label == args.ignore_index) {
    if (!args.out_is_zero) memset(out, 0, args.columns * sizeof(T));
    return;
  }
  const T* row = static_cast<const T*>(args.logits) + s * args.stride_s + t * args.stride_t;
  const float grad = args.grad[s];
  between(&label, 1, 0, args.columns, [&](int64_t begin, int64_t end) NAPO_LAMBDA {
    stretch_gradient<true>(row, out, begin, end, kNoMap, args.row_max[at], args.row_log_sum[at], -grad);
  });
  from_float(static_cast<float>(target_coefficient(args.logp[at], grad, grad)), out + label);
}

}  // namespace

// ---- all rows ------------------------------------------------------------------------------------------------------

void target_logits(const TargetLogitsArgs& args, int threads) {
  with_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    parallel_for(args.rows, 16, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* h = static_cast<const T*>(args.hidden) + r * args.hidden_stride;
        for (int64_t q = args.targets.start[r]; q < args.targets.start[r + 1]; ++q) {
          const int64_t v = args.targets.columns[q];
          double a = dot(h, static_cast<const T*>(args.weight) + v * args.weight_stride, args.width);
          if (args.low != nullptr) {
            a += static_cast<double>(args.lora_scale) * dot(static_cast<const T*>(args.low) + r * args.low_stride,
                                                            static_cast<const T*>(args.lora_b) + v * args.lora_b_stride,
                                                            args.rank);
          }
          double z = args.map.scale * a + (args.map.bias != nullptr ? args.map.bias[v] : 0.0f);
          double slope = 1.0;
          if (args.map.softcap != 0.0f) {
            const double x = z / args.map.softcap, e = ::exp(-2.0 * ::fabs(x));
            z = args.map.softcap * ::tanh(x);
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e));
          }
          args.z[q] = static_cast<float>(z);
          args.slope[q] = static_cast<float>(slope);
        }
      }
    });
  });
}

void softmax_rows_forward(const ForwardArgs& args, int threads) {
  NAPO_CHECK(args.out == nullptr || args.out_dtype == args.dtype, "out: expected the dtype of logits on the CPU");
  with_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    const bool plain = is_plain(args.map);
    auto* row = plain ? (args.out != nullptr ? forward_row<true, true, T> : forward_row<true, false, T>)
                      : (args.out != nullptr ? forward_row<false, true, T> : forward_row<false, false, T>);
    parallel_for(args.rows, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(args, args.first_row + r);
    });
  });
}

void softmax_columns_forward(const ColumnsArgs& args, int threads) {
  const ForwardArgs& forward = args.forward;
  NAPO_CHECK(forward.out == nullptr || forward.out_dtype == forward.dtype, "out: expected the dtype of logits");
  with_dtype(forward.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    const bool plain = is_plain(forward.map), keeps = forward.out != nullptr;
    auto* row = plain ? (keeps ? forward_row_columns<true, true, T> : forward_row_columns<true, false, T>)
                      : (keeps ? forward_row_columns<false, true, T> : forward_row_columns<false, false, T>);
    parallel_for(forward.rows, 4, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(args, forward.first_row + r);
    });
  });
}

void softmax_columns_add(const ColumnsAddArgs& args, int threads) {
  with_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    parallel_for(args.rows, 16, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) add_row<T>(args, r);
    });
  });
}

void softmax_rows_gradient(const GradientArgs& args, int threads) {
  NAPO_CHECK(args.out_dtype == args.dtype, "out: expected the dtype of logits on the CPU");
  with_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    auto* row = is_plain(args.map) ? gradient_row<true, T> : gradient_row<false, T>;
    parallel_for(args.rows, 4, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(args, r);
    });
  });
}

void hidden_gradient(const HiddenGradientArgs& args, int threads) {
  with_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    auto* row = args.out_dtype == DType::f32 ? hidden_gradient_row<T, float> : hidden_gradient_row<T, T>;
    parallel_for(args.rows, 8, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(args, r);
    });
  });
}

void token_logps_forward(const TokenForwardArgs& args, int threads) {
  with_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    parallel_for(args.sequences * args.tokens, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) token_forward_row<T>(args, i / args.tokens, i % args.tokens);
    });
  });
}

void token_logps_backward(const TokenBackwardArgs& args, int threads) {
  with_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    parallel_for(args.sequences * args.tokens, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) token_backward_row<T>(args, i / args.tokens, i % args.tokens);
    });
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
