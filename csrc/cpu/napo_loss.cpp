#include "cpu/napo_loss.h"

#include <stdlib.h>

#include "cpu/mask.h"
#include "cpu/parallel.h"

#define NAPO_LAMBDA __attribute__((always_inline))

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr float kNone = -INFINITY;
// Rows whose sums are kept apart, so that the rounding of a sum over thousands of users does not grow with them.
constexpr int64_t kRowsApart = 128;
// Owners of one piece of a gradient: its columns of every row are one thread's, so sums are the same from run to run.
constexpr int64_t kOwnersApart = 256;

float* floats(int64_t count) { return static_cast<float*>(malloc(static_cast<size_t>(count) * sizeof(float))); }
uint8_t* bytes(int64_t count) { return static_cast<uint8_t*>(malloc(static_cast<size_t>(count))); }

// log sum exp(beta * s + margin) over the unmasked with a margin above -inf.
NAPO_INLINE void log_sum(const float* __restrict__ s, const float* __restrict__ margin, const uint8_t* mask,
                         int64_t count, float beta, float* m_out, float* rest_out) {
  const Vec none = splat(kNone), scale = splat(beta);
  Vec top = none;
  for_vectors(count, [&](int64_t i, auto lanes) NAPO_LAMBDA {
    const Vec value = select_less(none, load(margin + i, lanes, kNone), load(s + i, lanes, kNone), none);
    top = max(top, where(mask == nullptr ? nullptr : mask + i, lanes, value, none));
  });
  const float m = largest(top);
  *m_out = m;
  *rest_out = kNone;
  if (m == kNone) return;
  // Terms are measured from the largest of them, computed alike in both passes: no exponent is above 0.
  const Vec origin = splat(m);
  const auto term = [&](int64_t i, auto lanes) NAPO_LAMBDA {
    const Vec value = fma(load(s + i, lanes, m) - origin, scale, load(margin + i, lanes, kNone));
    return where(mask == nullptr ? nullptr : mask + i, lanes, value, none);
  };
  Vec high = none;
  for_vectors(count, [&](int64_t i, auto lanes) NAPO_LAMBDA { high = max(high, term(i, lanes)); });
  const Vec peak = splat(largest(high));
  Vec total = splat(0.0f);
  for_vectors(count, [&](int64_t i, auto lanes) NAPO_LAMBDA { total = total + exp(term(i, lanes) - peak); });
  *rest_out = largest(high) + logf(sum(total));
}

// out += weight * exp(beta * (s - m) + (margin - rest)) over the unmasked.
NAPO_INLINE void add_weights(const float* __restrict__ s, const float* __restrict__ margin, const uint8_t* mask,
                             int64_t count, float beta, float m, float rest, float weight, float* __restrict__ out) {
  const Vec origin = splat(m), origin_rest = splat(rest), scale = splat(beta), factor = splat(weight);
  for_vectors(count, [&](int64_t i, auto lanes) NAPO_LAMBDA {
    const Vec x = fma(load(s + i, lanes, m) - origin, scale, load(margin + i, lanes, kNone) - origin_rest);
    const Vec e = exp(where(mask == nullptr ? nullptr : mask + i, lanes, x, splat(kNone)));
    store(out + i, fma(e, factor, load(out + i, lanes, 0.0f)), lanes);
  });
}

// First index in [begin, end) whose place is not below `wanted`.
NAPO_INLINE int64_t first_from(const int32_t* place, int64_t begin, int64_t end, int64_t wanted) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (place[middle] < wanted) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// f(owner, margin) for each owner of `place[begin ... end)`, with the owner's margins less the excluded; `scratch` (N).
template <class F>
NAPO_INLINE void for_touched(const LossArgs& args, int64_t begin, int64_t end, float* scratch, const F& f) {
  const int32_t* place = args.excluded.place;
  while (begin < end) {
    const int64_t owner = place[begin] / args.n, from = owner * args.n;
    memcpy(scratch, args.margin + from, static_cast<size_t>(args.n) * sizeof(float));
    for (; begin < end && place[begin] < from + args.n; ++begin) scratch[place[begin] - from] = kNone;
    f(owner, scratch);
  }
}

}  // namespace

void napo_owner_sums(const LossArgs& args, float* m, float* rest, int threads) {
  parallel_for(args.owners, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      log_sum(args.rejected + v * args.n, args.margin + v * args.n, nullptr, args.n, args.beta, m + v, rest + v);
    }
  });
}

void napo_owner_gradient(const LossArgs& args, const float* owner_m, const float* owner_rest, const float* c,
                         float* d_rejected, int threads) {
  parallel_for(args.owners, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      if (owner_rest[v] == kNone) continue;
      const int64_t at = v * args.n;
      add_weights(args.rejected + at, args.margin + at, nullptr, args.n, args.beta, owner_m[v], owner_rest[v],
                  args.beta * c[v], d_rejected + at);
    }
  });
}

void napo_separable_sums(const LossArgs& args, const float* owner_m, const float* owner_rest, float* m, float* rest,
                         int threads) {
  const int64_t owners = args.owners;
  const int64_t* bounds = args.excluded.bounds;
  parallel_for(args.users, 16, threads, [&](int64_t begin, int64_t end) {
    if (bounds == nullptr) {
      for (int64_t u = begin; u < end; ++u) {
        log_sum(owner_m, owner_rest, args.share + u * owners, owners, args.beta, m + u, rest + u);
      }
      return;
    }
    // Owners with an excluded negative have another log-sum for this user: written over the common one, and put back.
    float* row_m = floats(2 * owners + args.n);
    float *row_rest = row_m + owners, *scratch = row_rest + owners;
    memcpy(row_m, owner_m, static_cast<size_t>(owners) * sizeof(float));
    memcpy(row_rest, owner_rest, static_cast<size_t>(owners) * sizeof(float));
    for (int64_t u = begin; u < end; ++u) {
      const uint8_t* share = args.share + u * owners;
      for_touched(args, bounds[2 * u], bounds[2 * u + 1], scratch, [&](int64_t v, const float* margin) {
        if (share[v] == 0) return;
        log_sum(args.rejected + v * args.n, margin, nullptr, args.n, args.beta, row_m + v, row_rest + v);
      });
      log_sum(row_m, row_rest, share, owners, args.beta, m + u, rest + u);
      for (int64_t i = bounds[2 * u]; i < bounds[2 * u + 1]; ++i) {
        const int64_t v = args.excluded.place[i] / args.n;
        row_m[v] = owner_m[v];
        row_rest[v] = owner_rest[v];
      }
    }
    free(row_m);
  });
}

void napo_separable_gradient(const LossArgs& args, const float* owner_m, const float* owner_rest, const float* g,
                             const float* m, const float* rest, float* c, float* d_rejected, int threads) {
  const int64_t* bounds = args.excluded.bounds;
  parallel_for(args.owners, kOwnersApart, threads, [&](int64_t first, int64_t last) {
    const int64_t width = last - first;
    float* apart = floats(width + args.n);
    float* scratch = apart + width;
    uint8_t untouched[kOwnersApart];
    for (int64_t j = 0; j < width; ++j) c[first + j] = 0.0f;
    for (int64_t block = 0; block < args.users; block += kRowsApart) {
      const int64_t stop = block + kRowsApart < args.users ? block + kRowsApart : args.users;
      for (int64_t j = 0; j < width; ++j) apart[j] = 0.0f;
      for (int64_t u = block; u < stop; ++u) {
        if (g[u] == 0.0f) continue;
        const uint8_t* share = args.share + u * args.owners + first;
        if (bounds != nullptr) {
          const int64_t begin = first_from(args.excluded.place, bounds[2 * u], bounds[2 * u + 1], first * args.n);
          const int64_t end = first_from(args.excluded.place, begin, bounds[2 * u + 1], last * args.n);
          if (begin < end) {
            memcpy(untouched, share, static_cast<size_t>(width));
            for_touched(args, begin, end, scratch, [&](int64_t v, const float* margin) {
              if (share[v - first] == 0) return;
              untouched[v - first] = 0;
              const int64_t at = v * args.n;
              add_weights(args.rejected + at, margin, nullptr, args.n, args.beta, m[u], rest[u], args.beta * g[u],
                          d_rejected + at);
            });
            share = untouched;
          }
        }
        add_weights(owner_m + first, owner_rest + first, share, width, args.beta, m[u], rest[u], g[u], apart);
      }
      for (int64_t j = 0; j < width; ++j) c[first + j] += apart[j];
    }
    free(apart);
  });
}

namespace {

// Margins of row r of the block for the owners [first, last), -inf where a negative is not in the user's set.
NAPO_INLINE void write_margins(const GeneralArgs& args, int64_t r, int64_t first, int64_t last, float* __restrict__ out,
                               uint8_t* __restrict__ keep) {
  const LossArgs& loss = args.loss;
  const int64_t u = args.first_row + r, n = loss.n, from = first * n, count = (last - first) * n;
  const uint8_t* share = loss.share + u * loss.owners;
  for (int64_t v = first; v < last; ++v) memset(keep + (v - first) * n, share[v], static_cast<size_t>(n));
  if (args.full_keep != nullptr) {
    const uint8_t* row = args.full_keep + u * args.keep_stride[0];
    for (int64_t v = first; v < last; ++v) {
      for (int64_t j = 0; j < n; ++j) {
        keep[(v - first) * n + j] &= row[v * args.keep_stride[1] + j * args.keep_stride[2]];
      }
    }
  }
  if (loss.excluded.bounds != nullptr) {
    const int32_t* place = loss.excluded.place;
    const int64_t stop = loss.excluded.bounds[2 * u + 1];
    const int64_t begin = first_from(place, loss.excluded.bounds[2 * u], stop, from);
    for (int64_t i = begin; i < stop && place[i] < from + count; ++i) keep[place[i] - from] = 0;
  }
  const float* common = loss.margin + from;
  if (args.full_margin != nullptr) {
    const float* row = args.full_margin + u * args.margin_stride[0];
    for (int64_t v = first; v < last; ++v) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t i = (v - first) * n + j;
        out[i] = common[i] + row[v * args.margin_stride[1] + j * args.margin_stride[2]];
      }
    }
    common = out;
  }
  const float* score = args.score == nullptr ? nullptr : args.score + r * loss.owners * n + from;
  const Vec slope = splat(score == nullptr ? 0.0f : args.line[0]), zero = splat(0.0f);
  const Vec offset = splat(score == nullptr ? 0.0f : args.line[1]);
  for_vectors(count, [&](int64_t i, auto lanes) NAPO_LAMBDA {
    Vec margin = load(common + i, lanes, 0.0f);
    if (score != nullptr) {
      Vec z = load(score + i, lanes, 0.0f);
      if (args.bias != nullptr) z = z + load(args.bias + from + i, lanes, 0.0f);
      margin = margin + max(zero, fma(slope, z, offset));
    }
    store(out + i, where(keep + i, lanes, margin, splat(kNone)), lanes);
  });
}

}  // namespace

void napo_general_sums(const GeneralArgs& args, float* m, float* rest, int threads) {
  const int64_t count = args.loss.owners * args.loss.n;
  parallel_for(args.rows, 4, threads, [&](int64_t begin, int64_t end) {
    float* margin = floats(count);
    uint8_t* keep = bytes(count);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t u = args.first_row + r;
      write_margins(args, r, 0, args.loss.owners, margin, keep);
      log_sum(args.loss.rejected, margin, nullptr, count, args.loss.beta, m + u, rest + u);
    }
    free(margin);
    free(keep);
  });
}

void napo_general_gradient(const GeneralArgs& args, const float* g, const float* m, const float* rest,
                           float* d_rejected, int threads) {
  const LossArgs& loss = args.loss;
  parallel_for(loss.owners, kOwnersApart, threads, [&](int64_t first, int64_t last) {
    const int64_t count = (last - first) * loss.n, from = first * loss.n;
    float* margin = floats(2 * count);
    float* apart = margin + count;
    uint8_t* keep = bytes(count);
    for (int64_t i = 0; i < count; ++i) apart[i] = 0.0f;
    for (int64_t r = 0; r < args.rows; ++r) {
      const int64_t u = args.first_row + r;
      if (g[u] == 0.0f) continue;
      write_margins(args, r, first, last, margin, keep);
      add_weights(loss.rejected + from, margin, nullptr, count, loss.beta, m[u], rest[u], loss.beta * g[u], apart);
    }
    for (int64_t i = 0; i < count; ++i) d_rejected[from + i] += apart[i];
    free(margin);
    free(keep);
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
