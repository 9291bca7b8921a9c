#include "linear_sequence_logps.h"

#include "cpu/lib/parallel.h"
#include "cpu/softmax_rows.h"

namespace napo {
namespace NAPO_ISA {
namespace {

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

// Over the columns of args from first_column on that are no target; with kStore they are replaced.
template <bool kPlain, bool kStore, class T>
NAPO_INLINE Sum sum_others(const ForwardArgs& args, int64_t r, int64_t first_column) {
  // addressed by the column of the whole vocabulary
  const int64_t local = r - args.first_row;
  const T* row = static_cast<const T*>(args.logits.data) + local * args.logits.stride[0] - first_column;
  T* out = kStore ? static_cast<T*>(args.out.data) + local * args.out.stride[0] - first_column : nullptr;
  const Targets& all = args.problem.targets;
  const LogitMap& map = args.problem.logit_map;
  const int64_t last_column = first_column + args.logits.size[1];
  int64_t first = all.start[r], last = all.start[r + 1];
  while (first < last && all.columns[first] < first_column) ++first;
  while (last > first && all.columns[last - 1] >= last_column) --last;
  const int64_t* targets = all.columns + first;
  float m = -INFINITY;
  between(targets, last - first, first_column, last_column,
          [&](int64_t begin, int64_t end) NAPO_LAMBDA { m = stretch_max<kPlain>(row, begin, end, map, m); });
  if (!kPlain && map.softcap != 0.0f) m = map.softcap * ::tanhf(m / map.softcap);
  const float shift = finite_or_zero(m);
  double total = 0.0;
  between(targets, last - first, first_column, last_column, [&](int64_t begin, int64_t end) NAPO_LAMBDA {
    total += stretch_sum<kPlain, kStore>(row, out, begin, end, map, shift, args.problem.store_scale);
  });
  if (kStore) {
    for (int64_t i = first; i < last; ++i) from_float(0.0f, out + all.columns[i]);
  }
  return {m, total};
}

NAPO_INLINE void write_row(const RowsProblem& problem, int64_t r, Sum others) {
  const RowStats& stats = problem.stats;
  const int64_t first = problem.targets.start[r], count = problem.targets.start[r + 1] - first;
  const RowEnd end = finish_row(others.m, others.total, problem.target_z + first, count, stats.target_logp + first);
  stats.row_max[r] = end.m;
  stats.row_log_sum[r] = end.l;
  // where no other logit is finite their sum is 0, relative to any number; exp(shift - m) would overflow for another
  const double shift = finite_or_zero(others.m == -INFINITY ? end.m : others.m);
  stats.store_rescale[r] = static_cast<float>(::exp(shift - static_cast<double>(end.m) - end.l) / problem.store_scale);
}

template <bool kPlain, bool kStore, class T>
void forward_row(const ForwardArgs& args, int64_t r) {
  write_row(args.problem, r, sum_others<kPlain, kStore, T>(args, r, 0));
}

template <bool kPlain, bool kStore, class T>
void forward_row_columns(const ColumnsArgs& args, int64_t r) {
  const Carried& carried = args.carried;
  const int64_t i = r - args.forward.first_row;
  const Sum here = sum_others<kPlain, kStore, T>(args.forward, r, args.first_column);
  const Sum before = args.first_column == 0 ? Sum{-INFINITY, 0.0} : Sum{carried.row_max[i], carried.row_sum[i]};
  const float m = here.m > before.m ? here.m : before.m;
  const double shift = finite_or_zero(m), keep = ::exp(before.m - shift), gain = ::exp(here.m - shift);
  // a sum of NaN, whose m is -inf, has to show
  const Sum now = {m, (before.m == -INFINITY ? before.total : keep * before.total) +
                          (here.m == -INFINITY ? here.total : gain * here.total)};
  carried.row_max[i] = now.m;
  carried.row_sum[i] = now.total;
  carried.keep[i] = static_cast<float>(keep);
  carried.gain[i] = static_cast<float>(gain);
  if (args.first_column + args.forward.logits.size[1] == args.forward.problem.vocabulary)
    write_row(args.forward.problem, r, now);
}

template <class T>
void add_row(const ColumnsAddArgs& args, int64_t r) {
  const int64_t width = args.product.size[1];
  float* total = args.total + r * width;
  const T* product = static_cast<const T*>(args.product.data) + r * args.product.stride[0];
  const Vec keep = splat(args.carried.keep[r]), gain = splat(args.carried.gain[r]);
  for_vectors(0, width, [&](int64_t c, auto lanes) NAPO_LAMBDA {
    store(total + c, fma(keep, load(total + c, lanes, 0.0f), gain * load(product + c, lanes, 0.0f)), lanes);
  });
}

template <bool kPlain, class T>
void gradient_row(const GradientArgs& args, int64_t r) {
  // addressed by the column of the whole vocabulary
  const int64_t first_column = args.first_column, last_column = first_column + args.logits.size[1];
  const T* row = static_cast<const T*>(args.logits.data) + r * args.logits.stride[0] - first_column;
  T* out = static_cast<T*>(args.out.data) + r * args.out.stride[0] - first_column;
  const Targets& targets = args.upstream.targets;
  const RowStats& stats = args.upstream.stats;
  const float* target_grad = args.upstream.target_grad;
  int64_t first = targets.start[r], last = targets.start[r + 1];
  const double grad_of_row = sum_of(target_grad, first, last);
  while (first < last && targets.columns[first] < first_column) ++first;
  while (last > first && targets.columns[last - 1] >= last_column) --last;
  const float m = stats.row_max[r], l = stats.row_log_sum[r], factor = static_cast<float>(-grad_of_row);
  between(targets.columns + first, last - first, first_column, last_column,
          [&](int64_t begin, int64_t end)
              NAPO_LAMBDA { stretch_gradient<kPlain>(row, out, begin, end, args.logit_map, m, l, factor); });
  for (int64_t q = first; q < last; ++q) {
    const double g = target_coefficient(stats.target_logp[q], target_grad[q], grad_of_row) * stats.target_slope[q];
    from_float(static_cast<float>(g), out + targets.columns[q]);
  }
}

template <class T, class Out>
void hidden_gradient_row(const HiddenGradientArgs& args, int64_t r) {
  const int64_t width = args.out.size[1];
  Out* out = static_cast<Out*>(args.out.data) + r * width;
  const T* context = static_cast<const T*>(args.context.data);
  const Targets& targets = args.upstream.targets;
  const RowStats& stats = args.upstream.stats;
  const float* target_grad = args.upstream.target_grad;
  const int64_t first = targets.start[r], last = targets.start[r + 1];
  const double grad_of_row = sum_of(target_grad, first, last);
  const float row_factor =
      context == nullptr ? 0.0f : static_cast<float>(-grad_of_row * stats.store_rescale[r] * args.scale);
  // The sum stays in registers, a strip of columns at a time: several targets cost no rounding of partial sums.
  // lanes_of(k): those of the strip's vector k that are inside the row.
  constexpr int kStrip = 4;
  const auto strip = [&](int64_t c, const auto& lanes_of) NAPO_LAMBDA {
    Vec sums[kStrip];
    for (int k = 0; k < kStrip; ++k) {
      sums[k] = splat(0.0f);
      if (context != nullptr) {
        sums[k] = load(context + r * width + c + k * kLanes, lanes_of(k), 0.0f) * splat(row_factor);
      }
    }
    for (int64_t q = first; q < last; ++q) {
      const T* w = static_cast<const T*>(args.weight.data) + targets.columns[q] * args.weight.stride[0] + c;
      const double g = target_coefficient(stats.target_logp[q], target_grad[q], grad_of_row);
      const Vec factor = splat(static_cast<float>(g * stats.target_slope[q] * args.scale));
      for (int k = 0; k < kStrip; ++k) sums[k] = fma(factor, load(w + k * kLanes, lanes_of(k), 0.0f), sums[k]);
    }
    for (int k = 0; k < kStrip; ++k) store(out + c + k * kLanes, sums[k], lanes_of(k));
  };
  int64_t c = 0;
  for (; c + kStrip * kLanes <= width; c += kStrip * kLanes) strip(c, [](int) { return AllLanes{}; });
  if (c == width) return;
  strip(c, [&](int k) {
    const int64_t left = width - c - k * kLanes;
    return FirstLanes{left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0};
  });
}

NAPO_INLINE bool is_plain(const LogitMap& map) {
  return map.scale == 1.0f && map.bias == nullptr && map.softcap == 0.0f;
}

}  // namespace

// ---- all rows ------------------------------------------------------------------------------------------------------

void target_logits(const TargetLogitsArgs& args, int threads) {
  const Tensor<2>&hidden = args.hidden, &weight = args.weight, &low = args.low_rank.low, &lora_b = args.low_rank.lora_b;
  const LogitMap& map = args.logit_map;
  with_dtype(hidden.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    parallel_for(hidden.size[0], 16, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* h = static_cast<const T*>(hidden.data) + r * hidden.stride[0];
        for (int64_t q = args.targets.start[r]; q < args.targets.start[r + 1]; ++q) {
          const int64_t v = args.targets.columns[q];
          double a = dot(h, static_cast<const T*>(weight.data) + v * weight.stride[0], weight.size[1]);
          if (low.data != nullptr) {
            a += static_cast<double>(args.low_rank.scale) *
                 dot(static_cast<const T*>(low.data) + r * low.stride[0],
                     static_cast<const T*>(lora_b.data) + v * lora_b.stride[0], low.size[1]);
          }
          double z = map.scale * a + (map.bias != nullptr ? map.bias[v] : 0.0f);
          double slope = 1.0;
          if (map.softcap != 0.0f) {
            const double x = z / map.softcap, e = ::exp(-2.0 * ::fabs(x));
            z = map.softcap * ::tanh(x);
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
  NAPO_CHECK(args.out.data == nullptr || args.out.dtype == args.logits.dtype,
             "out: expected the dtype of logits on the CPU");
  with_dtype(args.logits.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    const bool plain = is_plain(args.problem.logit_map);
    auto* row = plain ? (args.out.data != nullptr ? forward_row<true, true, T> : forward_row<true, false, T>)
                      : (args.out.data != nullptr ? forward_row<false, true, T> : forward_row<false, false, T>);
    parallel_for(args.logits.size[0], 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(args, args.first_row + r);
    });
  });
}

void softmax_columns_forward(const ColumnsArgs& args, int threads) {
  const ForwardArgs& forward = args.forward;
  NAPO_CHECK(forward.out.data == nullptr || forward.out.dtype == forward.logits.dtype,
             "out: expected the dtype of logits");
  with_dtype(forward.logits.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    const bool plain = is_plain(forward.problem.logit_map), keeps = forward.out.data != nullptr;
    auto* row = plain ? (keeps ? forward_row_columns<true, true, T> : forward_row_columns<true, false, T>)
                      : (keeps ? forward_row_columns<false, true, T> : forward_row_columns<false, false, T>);
    parallel_for(forward.logits.size[0], 4, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(args, forward.first_row + r);
    });
  });
}

void softmax_columns_add(const ColumnsAddArgs& args, int threads) {
  with_dtype(args.product.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    parallel_for(args.product.size[0], 16, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) add_row<T>(args, r);
    });
  });
}

void softmax_rows_gradient(const GradientArgs& args, int threads) {
  NAPO_CHECK(args.out.dtype == args.logits.dtype, "out: expected the dtype of logits on the CPU");
  with_dtype(args.logits.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    auto* row = is_plain(args.logit_map) ? gradient_row<true, T> : gradient_row<false, T>;
    parallel_for(args.logits.size[0], 4, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(args, r);
    });
  });
}

void hidden_gradient(const HiddenGradientArgs& args, int threads) {
  with_dtype(args.weight.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    auto* row = args.out.dtype == DType::f32 ? hidden_gradient_row<T, float> : hidden_gradient_row<T, T>;
    parallel_for(args.out.size[0], 8, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(args, r);
    });
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
