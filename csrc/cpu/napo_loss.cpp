#include "napo_loss.h"

#include "cpu/lib/parallel.h"
#include "cpu/lib/small_matmul.h"
#include "cpu/lib/vectors.h"

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr float kNone = -INFINITY;
// Rows whose sums are kept apart, so that the rounding of a sum over thousands of users does not grow with them.
constexpr int64_t kRowsApart = 128;
// Owners of one piece of a gradient: its columns of every row are one thread's, so sums are the same from run to run.
constexpr int64_t kOwnersApart = 256;
// Places of a piece of a row in the general form: its margins stay in the first-level cache between the passes.
constexpr int64_t kPlacesApart = 1024;
// Users whose pair scores are computed at a time, for the places of a piece: what the second-level cache holds.
constexpr int64_t kUsersScored = 32;
// ln(2^-40). Users whose log-sum is further below the pool's are summed with exponentials of their own.
constexpr double kFar = -27.7;

// `yes` where the margin is -inf, which leaves a negative out; `no` elsewhere, a margin of NaN among it.
NAPO_INLINE Vec where_left_out(Vec margin, Vec yes, Vec no) { return select_less(margin, splat(-FLT_MAX), yes, no); }

// The rest of a log-sum whose terms all have an m of -inf or NaN.
NAPO_INLINE float rest_of_nothing(const float* s, const float* margin, const uint8_t* mask, int64_t count) {
  float rest = kNone;
  for (int64_t i = 0; i < count; ++i) {
    if ((mask != nullptr && mask[i] == 0) || margin[i] == kNone) continue;
    if (s[i] != s[i] || !(margin[i] < INFINITY)) return NAN;
    rest = 0.0f;
  }
  return rest;
}

// log sum exp(beta * s + margin) over the unmasked with a margin above -inf. A NaN among them is one of the rest, and
// so is an infinity above 0.
NAPO_INLINE void log_sum(const float* __restrict__ s, const float* __restrict__ margin, const uint8_t* mask,
                         int64_t count, float beta, float* m_out, float* rest_out) {
  const Vec none = splat(kNone), scale = splat(beta);
  Vec top = none;
  for_vectors(0, count, [&](int64_t i, auto lanes) NAPO_LAMBDA {
    const Vec value = where_left_out(load(margin + i, lanes, kNone), none, load(s + i, lanes, kNone));
    top = max(where(mask == nullptr ? nullptr : mask + i, lanes, value, none), top);  // a NaN leaves top as it is
  });
  const float m = largest(top);
  *m_out = m;
  if (m == kNone) {
    *rest_out = rest_of_nothing(s, margin, mask, count);
    return;
  }
  // Terms are measured from the largest of them, computed alike in both passes: no exponent is above 0.
  const Vec origin = splat(m);
  const auto term = [&](int64_t i, auto lanes) NAPO_LAMBDA {
    const Vec gamma = load(margin + i, lanes, kNone);
    const Vec value = where_left_out(gamma, none, fma(load(s + i, lanes, m) - origin, scale, gamma));
    return where(mask == nullptr ? nullptr : mask + i, lanes, value, none);
  };
  Vec high = none;
  for_vectors(0, count, [&](int64_t i, auto lanes) NAPO_LAMBDA { high = max(term(i, lanes), high); });
  const Vec peak = splat(largest(high));
  Vec total = splat(0.0f);
  for_vectors(0, count, [&](int64_t i, auto lanes) NAPO_LAMBDA { total = total + exp(term(i, lanes) - peak); });
  *rest_out = largest(high) + logf(sum(total));
}

// out += weight * exp(beta * (s - m) + (margin - rest)) over the unmasked with a margin above -inf.
NAPO_INLINE void add_weights(const float* __restrict__ s, const float* __restrict__ margin, const uint8_t* mask,
                             int64_t count, float beta, float m, float rest, float weight, float* __restrict__ out) {
  const Vec origin = splat(m), origin_rest = splat(rest), scale = splat(beta), factor = splat(weight);
  for_vectors(0, count, [&](int64_t i, auto lanes) NAPO_LAMBDA {
    const Vec gamma = load(margin + i, lanes, kNone), before = load(out + i, lanes, 0.0f);
    const Vec e = exp(fma(load(s + i, lanes, m) - origin, scale, gamma - origin_rest));
    const Vec after = where_left_out(gamma, before, fma(e, factor, before));
    store(out + i, where(mask == nullptr ? nullptr : mask + i, lanes, after, before), lanes);
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
    const int64_t owner = place[begin] / static_cast<int32_t>(args.n), from = owner * args.n;
    memcpy(scratch, args.margin + from, static_cast<size_t>(args.n) * sizeof(float));
    for (; begin < end && place[begin] < from + args.n; ++begin) scratch[place[begin] - from] = kNone;
    f(owner, scratch);
  }
}

// The owners' sums as plain numbers, exp(beta * owner_m + owner_rest), measured from the pool's largest: with them a
// user's sum is an addition an owner and needs no exponential of its own. They are computed in fp64, so that a user far
// below the origin loses no digits, and serve the users within kFar of it: what underflows is nothing beside their
// sums. Owners whose sum is no number have no part in the origin, and users whose sum is none are not served.
struct Scaled {
  double m = -INFINITY, rest = -INFINITY;  // the origin, beta * m + rest
  Array<float> memory;
  float* owner;  // (B')
  float* place;  // (B', N), where negatives are excluded

  explicit Scaled(const LossArgs& args)
      : memory(args.owners * (args.excluded.bounds != nullptr ? args.n + 1 : 1)),
        owner(memory.get()),
        place(args.excluded.bounds != nullptr ? owner + args.owners : nullptr) {}
};

void scale_owners(const LossArgs& args, const float* owner_m, const float* owner_rest, int threads, Scaled& scaled) {
  const double beta = args.beta;
  const auto counts = [&](int64_t v) { return ::fabsf(owner_m[v]) <= FLT_MAX && ::fabsf(owner_rest[v]) <= FLT_MAX; };
  for (int64_t v = 0; v < args.owners; ++v) {
    if (counts(v) && owner_m[v] > scaled.m) scaled.m = owner_m[v];
  }
  for (int64_t v = 0; v < args.owners; ++v) {
    const double rest = beta * (owner_m[v] - scaled.m) + owner_rest[v];
    if (counts(v) && rest > scaled.rest) scaled.rest = rest;
  }
  const auto above = [&](float m, float rest) {
    const double x = rest == kNone ? -INFINITY : beta * (m - scaled.m) + (rest - scaled.rest);
    return x < -87.0 ? 0.0f : static_cast<float>(::exp(x));  // never a subnormal number, which would be slow
  };
  parallel_for(args.owners, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) scaled.owner[v] = above(owner_m[v], owner_rest[v]);
    if (scaled.place == nullptr) return;
    for (int64_t i = begin * args.n; i < end * args.n; ++i) scaled.place[i] = above(args.rejected[i], args.margin[i]);
  });
}

// For each owner of `place[begin ... end)` that `share` (from column `first`) has: its column leaves `share`, and
// f(i) is called for the places i of its negatives that are kept.
template <class F>
NAPO_INLINE void for_kept(const LossArgs& args, int64_t begin, int64_t end, int64_t first, uint8_t* share, const F& f) {
  const int32_t *place = args.excluded.place, n = static_cast<int32_t>(args.n);
  while (begin < end) {
    const int32_t owner = place[begin] / n, stop = (owner + 1) * n;
    const bool shared = share[owner - first] != 0;
    share[owner - first] = 0;
    for (int32_t i = owner * n; i < stop; ++i) {
      if (begin < end && place[begin] == i) {
        ++begin;
      } else if (shared) {
        f(i);
      }
    }
  }
}

// The largest of m and the sum of x over the unmasked.
NAPO_INLINE void masked_sum(const float* __restrict__ m, const float* __restrict__ x, const uint8_t* top_mask,
                            const uint8_t* mask, int64_t count, float* m_out, double* sum_out) {
  constexpr int kUnrolled = 4;  // as many additions under way
  const Vec none = splat(kNone), zero = splat(0.0f);
  Vec top = none, totals[kUnrolled] = {zero, zero, zero, zero};
  for_vectors_unrolled<kUnrolled>(0, count, [&](int64_t i, auto lanes, int k) NAPO_LAMBDA {
    top = max(where(top_mask + i, lanes, load(m + i, lanes, kNone), none), top);
    totals[k] = totals[k] + where(mask + i, lanes, load(x + i, lanes, 0.0f), zero);
  });
  *m_out = largest(top);
  *sum_out = static_cast<double>(sum(totals[0]) + sum(totals[1])) + (sum(totals[2]) + sum(totals[3]));
}

}  // namespace

void napo_owner_sums(const OwnerSumsArgs& args, int threads) {
  const LossArgs& loss = args.loss;
  parallel_for(loss.owners, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      log_sum(loss.rejected + v * loss.n, loss.margin + v * loss.n, nullptr, loss.n, loss.beta, args.m + v,
              args.rest + v);
    }
  });
}

void napo_owner_gradient(const OwnerGradientArgs& args, int threads) {
  const LossArgs& loss = args.loss;
  parallel_for(loss.owners, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      // An owner that adds nothing may have a sum of NaN, of negatives that all its users exclude.
      if (args.owner_rest[v] == kNone || args.c[v] == 0.0f) continue;
      const int64_t at = v * loss.n;
      add_weights(loss.rejected + at, loss.margin + at, nullptr, loss.n, loss.beta, args.owner_m[v], args.owner_rest[v],
                  loss.beta * args.c[v], args.d_rejected + at);
    }
  });
}

void napo_separable_sums(const SeparableSumsArgs& args, int threads) {
  const LossArgs& loss = args.loss;
  const int64_t owners = loss.owners;
  const int64_t* bounds = loss.excluded.bounds;
  Scaled scaled(loss);
  scale_owners(loss, args.owner_m, args.owner_rest, threads, scaled);
  const int64_t bytes = bounds == nullptr ? 0 : 2 * room<float>(owners) + room<float>(loss.n) + room<uint8_t>(owners);
  parallel_for_with(loss.users, 16, threads, bytes, [&](int64_t begin, int64_t end, Scratch memory) {
    float *row_m = nullptr, *row_rest = nullptr, *scratch = nullptr;
    uint8_t* untouched = nullptr;
    if (bounds != nullptr) {
      row_m = memory.take<float>(owners);
      row_rest = memory.take<float>(owners);
      scratch = memory.take<float>(loss.n);
      untouched = memory.take<uint8_t>(owners);
      memcpy(row_m, args.owner_m, static_cast<size_t>(owners) * sizeof(float));
      memcpy(row_rest, args.owner_rest, static_cast<size_t>(owners) * sizeof(float));
    }
    for (int64_t u = begin; u < end; ++u) {
      const uint8_t *share = loss.share + u * owners, *mask = share;
      float top;
      double kept = 0.0, total;
      if (bounds != nullptr && bounds[2 * u] < bounds[2 * u + 1]) {
        memcpy(untouched, share, static_cast<size_t>(owners));
        for_kept(loss, bounds[2 * u], bounds[2 * u + 1], 0, untouched,
                 [&](int64_t i) NAPO_LAMBDA { kept += scaled.place[i]; });
        mask = untouched;
      }
      masked_sum(args.owner_m, scaled.owner, share, mask, owners, &top, &total);
      const double log_total = ::log(total + kept);
      if (log_total >= kFar && log_total < INFINITY && top < INFINITY) {
        args.m[u] = top;
        args.rest[u] = static_cast<float>(loss.beta * (scaled.m - top) + scaled.rest + log_total);
        continue;
      }
      if (mask == share) {
        log_sum(args.owner_m, args.owner_rest, share, owners, loss.beta, args.m + u, args.rest + u);
        continue;
      }
      // Owners with an excluded negative have another log-sum for this user: written over the common one, and put back.
      for_touched(loss, bounds[2 * u], bounds[2 * u + 1], scratch, [&](int64_t v, const float* margin) {
        if (share[v] == 0) return;
        log_sum(loss.rejected + v * loss.n, margin, nullptr, loss.n, loss.beta, row_m + v, row_rest + v);
      });
      log_sum(row_m, row_rest, share, owners, loss.beta, args.m + u, args.rest + u);
      for (int64_t i = bounds[2 * u]; i < bounds[2 * u + 1]; ++i) {
        const int64_t v = loss.excluded.place[i] / loss.n;
        row_m[v] = args.owner_m[v];
        row_rest[v] = args.owner_rest[v];
      }
    }
  });
}

void napo_separable_gradient(const SeparableGradientArgs& args, int threads) {
  const LossArgs& loss = args.loss;
  const float *g = args.g, *m = args.m, *rest = args.rest;
  const int64_t* bounds = loss.excluded.bounds;
  Scaled scaled(loss);
  scale_owners(loss, args.owner_m, args.owner_rest, threads, scaled);
  // g_u exp(origin - lse_u), by which scaled owners are multiplied; NaN for the users far from the origin or whose
  // log-sum is no number.
  const Array<float> weights(loss.users);
  float* weight = weights.get();
  parallel_for(loss.users, 256, threads, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const double above = loss.beta * (m[u] - scaled.m) + (rest[u] - scaled.rest);
      const bool is_near = above >= kFar && above <= -kFar;
      weight[u] = g[u] == 0.0f ? 0.0f : static_cast<float>(is_near ? g[u] * ::exp(-above) : NAN);
    }
  });
  const int64_t bytes = room<float>(2 * kOwnersApart) + room<float>(loss.n);
  parallel_for_with(loss.owners, kOwnersApart, threads, bytes, [&](int64_t first, int64_t last, Scratch memory) {
    const int64_t width = last - first;
    float *near = memory.take<float>(2 * kOwnersApart), *far = near + width, *scratch = memory.take<float>(loss.n);
    uint8_t untouched[kOwnersApart];
    for (int64_t j = 0; j < width; ++j) args.c[first + j] = 0.0f;
    for (int64_t block = 0; block < loss.users; block += kRowsApart) {
      const int64_t stop = block + kRowsApart < loss.users ? block + kRowsApart : loss.users;
      for (int64_t j = 0; j < 2 * width; ++j) near[j] = 0.0f;
      for (int64_t u = block; u < stop; ++u) {
        if (weight[u] == 0.0f) continue;
        const bool is_far = weight[u] != weight[u];
        const uint8_t* share = loss.share + u * loss.owners + first;
        if (bounds != nullptr) {
          const int64_t begin = first_from(loss.excluded.place, bounds[2 * u], bounds[2 * u + 1], first * loss.n);
          const int64_t end = first_from(loss.excluded.place, begin, bounds[2 * u + 1], last * loss.n);
          if (begin < end) {
            memcpy(untouched, share, static_cast<size_t>(width));
            share = untouched;
            if (is_far) {
              for_touched(loss, begin, end, scratch, [&](int64_t v, const float* margin) {
                if (untouched[v - first] == 0) return;
                untouched[v - first] = 0;
                const int64_t at = v * loss.n;
                add_weights(loss.rejected + at, margin, nullptr, loss.n, loss.beta, m[u], rest[u], loss.beta * g[u],
                            args.d_rejected + at);
              });
            } else {
              const float factor = loss.beta * weight[u];
              for_kept(loss, begin, end, first, untouched,
                       [&](int64_t i) NAPO_LAMBDA { args.d_rejected[i] += factor * scaled.place[i]; });
            }
          }
        }
        if (is_far) {
          add_weights(args.owner_m + first, args.owner_rest + first, share, width, loss.beta, m[u], rest[u], g[u], far);
          continue;
        }
        const Vec w = splat(weight[u]), zero = splat(0.0f);
        for_vectors(0, width, [&](int64_t j, auto lanes) NAPO_LAMBDA {
          store(near + j, load(near + j, lanes, 0.0f) + where(share + j, lanes, w, zero), lanes);
        });
      }
      for (int64_t j = 0; j < width; ++j) {  // an owner of NaN is no near user's
        args.c[first + j] += (near[j] == 0.0f ? 0.0f : near[j] * scaled.owner[first + j]) + far[j];
      }
    }
  });
}

namespace {

// f(u, t_u, exp(-|t_u|)) for every user.
template <class F>
NAPO_INLINE void for_users(const UserArgs& args, int threads, const F& f) {
  parallel_for(args.users, 512, threads, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const float chosen = args.chosen[u], margin = args.margin[u];
      float t = args.beta * (args.m[u] - chosen) + (args.rest[u] + margin);
      if ((args.rest[u] == kNone || margin == kNone) && chosen == chosen) t = kNone;  // no negatives
      f(u, t, ::expf(-::fabsf(t)));
    }
  });
}

}  // namespace

void napo_losses(const LossesArgs& args, int threads) {
  for_users(args.user, threads,
            [&](int64_t u, float t, float e) NAPO_LAMBDA { args.losses[u] = (t > 0.0f ? t : 0.0f) + ::log1pf(e); });
}

void napo_chosen_gradient(const ChosenGradientArgs& args, int threads) {
  for_users(args.user, threads, [&](int64_t u, float t, float e) NAPO_LAMBDA {
    args.g[u] = args.grad[u] * ((t > 0.0f ? 1.0f : e) / (1.0f + e));
    args.d_chosen[u] = -args.user.beta * args.g[u];
  });
}

namespace {

// Margins of row r of the block for the owners [first, last), -inf where a negative is not in the user's set. `score`:
// of the pair margin, from owner `first` on. `keep` is scratch with room for 8 bytes more.
NAPO_INLINE void write_margins(const GeneralArgs& args, int64_t r, int64_t first, int64_t last, const float* score,
                               float* __restrict__ out, uint8_t* __restrict__ keep) {
  const LossArgs& loss = args.loss;
  const int64_t u = args.first_row + r, n = loss.n, from = first * n, count = (last - first) * n;
  const uint8_t* share = loss.share + u * loss.owners;
  for (int64_t v = first; v < last; ++v) {  // eight bytes at a time: the next owner's overwrite what is too much
    const uint64_t eight = share[v] == 0 ? 0 : 0x0101010101010101u;
    for (int64_t j = 0; j < n; j += 8) memcpy(keep + (v - first) * n + j, &eight, sizeof eight);
  }
  if (args.full_keep != nullptr) {
    const uint8_t* row = args.full_keep + u * args.keep_stride[0];
    for (int64_t v = first; v < last; ++v) {
      for (int64_t j = 0; j < n; ++j) {
        if (row[v * args.keep_stride[1] + j * args.keep_stride[2]] == 0) keep[(v - first) * n + j] = 0;
      }
    }
  }
  if (loss.excluded.bounds != nullptr) {
    const int32_t* place = loss.excluded.place;
    const int64_t stop = loss.excluded.bounds[2 * u + 1];
    const int64_t begin = first_from(place, loss.excluded.bounds[2 * u], stop, from);
    for (int64_t i = begin; i < stop && place[i] < from + count; ++i) keep[place[i] - from] = 0;
  }
  const float *of_owner = loss.margin + from, *common = of_owner;
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
  const Vec slope = splat(score == nullptr ? 0.0f : args.line[0]), zero = splat(0.0f);
  const Vec offset = splat(score == nullptr ? 0.0f : args.line[1]);
  for_vectors(0, count, [&](int64_t i, auto lanes) NAPO_LAMBDA {
    Vec margin = load(common + i, lanes, 0.0f);
    if (score != nullptr) {
      Vec z = load(score + i, lanes, 0.0f);
      if (args.bias != nullptr) z = z + load(args.bias + from + i, lanes, 0.0f);
      margin = margin + max(zero, fma(slope, z, offset));
    }
    margin = where_left_out(load(of_owner + i, lanes, 0.0f), splat(kNone), margin);
    store(out + i, where(keep + i, lanes, margin, splat(kNone)), lanes);
  });
}

// The items of the places [from, from + count) as panels.
NAPO_INLINE void pack_items(const GeneralArgs& args, int64_t from, int64_t count, float* panels) {
  for (int64_t c = 0; c < count; c += kBlockColumns) {
    pack_transposed(args.items + from * args.width, count, args.width, c, panels + c * args.width);
  }
}

}  // namespace

void napo_general_sums(const GeneralSumsArgs& all, int threads) {
  const GeneralArgs& args = all.general;
  const int64_t owners = args.loss.owners, n = args.loss.n, width = args.width;
  const int64_t step = n == 0 ? owners : n < kPlacesApart ? kPlacesApart / n : 1;
  const int64_t pieces = owners == 0 ? 0 : (owners + step - 1) / step;
  const int64_t padded = up(step * n, kBlockColumns);  // places of a piece, in whole panels
  const auto owners_of = [&](int64_t piece) { return (piece + 1) * step < owners ? step : owners - piece * step; };
  const bool scored = args.items != nullptr;
  const Array<float> of_items(scored ? pieces * padded * width : 0);
  float* panels = of_items.get();
  if (scored) {
    parallel_for(pieces, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        pack_items(args, piece * step * n, owners_of(piece) * n, panels + piece * padded * width);
      }
    });
  }
  const int64_t of_thread = up((args.rows + threads - 1) / threads, kBlockRows);
  const int64_t grain = !scored ? 4 : of_thread < kUsersScored ? of_thread : kUsersScored;
  const int64_t bytes = room<float>(padded) + 2 * room<float>(pieces * grain) + room<uint8_t>(step * n + 8) +
                        (scored ? room<float>(kUsersScored * padded) + room<float>(kUsersScored * width) : 0);
  parallel_for_with(args.rows, grain, threads, bytes, [&](int64_t begin, int64_t end, Scratch memory) {
    const int64_t rows = end - begin;
    float* margin = memory.take<float>(padded);
    float *piece_m = memory.take<float>(pieces * grain), *piece_rest = memory.take<float>(pieces * grain);
    uint8_t* keep = memory.take<uint8_t>(step * n + 8);
    float* scores = scored ? memory.take<float>(kUsersScored * padded) : nullptr;
    const float* states = scored ? whole_blocks(args.states + (args.first_row + begin) * width, rows, width,
                                                memory.take<float>(kUsersScored * width))
                                 : nullptr;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = piece * step, last = first + owners_of(piece), places = (last - first) * n;
      const int64_t columns = up(places, kBlockColumns);
      if (scored) multiply_rows(states, rows, width, panels + piece * padded * width, columns, scores);
      for (int64_t r = begin; r < end; ++r) {
        const float* score = scored ? scores + (r - begin) * columns : nullptr;
        const int64_t at = (r - begin) * pieces + piece;
        write_margins(args, r, first, last, score, margin, keep);
        log_sum(args.loss.rejected + first * n, margin, nullptr, places, args.loss.beta, piece_m + at, piece_rest + at);
      }
    }
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = (r - begin) * pieces, u = args.first_row + r;
      log_sum(piece_m + at, piece_rest + at, nullptr, pieces, args.loss.beta, all.m + u, all.rest + u);
    }
  });
}

void napo_general_gradient(const GeneralGradientArgs& all, int threads) {
  const GeneralArgs& args = all.general;
  const float *g = all.g, *m = all.m, *rest = all.rest;
  const LossArgs& loss = args.loss;
  const int64_t width = args.width;
  const bool scored = args.items != nullptr;
  const int64_t most = (loss.owners < kOwnersApart ? loss.owners : kOwnersApart) * loss.n;  // places of a piece
  const int64_t padded = scored ? up(most, kBlockColumns) : 0;
  const int64_t bytes = 2 * room<float>(most) + room<uint8_t>(most + 8) + room<float>(kUsersScored * padded) +
                        room<float>(padded * width) + room<float>(kUsersScored * width);
  parallel_for_with(loss.owners, kOwnersApart, threads, bytes, [&](int64_t first, int64_t last, Scratch memory) {
    const int64_t count = (last - first) * loss.n, from = first * loss.n, columns = up(count, kBlockColumns);
    float *margin = memory.take<float>(most), *apart = memory.take<float>(most);
    uint8_t* keep = memory.take<uint8_t>(most + 8);
    float *scores = memory.take<float>(kUsersScored * padded), *panels = memory.take<float>(padded * width);
    float* last_states = memory.take<float>(kUsersScored * width);
    if (scored) pack_items(args, from, count, panels);
    for (int64_t i = 0; i < count; ++i) apart[i] = 0.0f;
    for (int64_t begin = 0; begin < args.rows; begin += kUsersScored) {
      const int64_t rows = args.rows - begin < kUsersScored ? args.rows - begin : kUsersScored;
      if (scored) {
        const float* states = args.states + (args.first_row + begin) * width;
        multiply_rows(whole_blocks(states, rows, width, last_states), rows, width, panels, columns, scores);
      }
      for (int64_t r = begin; r < begin + rows; ++r) {
        const int64_t u = args.first_row + r;
        if (g[u] == 0.0f) continue;
        write_margins(args, r, first, last, scored ? scores + (r - begin) * columns : nullptr, margin, keep);
        add_weights(loss.rejected + from, margin, nullptr, count, loss.beta, m[u], rest[u], loss.beta * g[u], apart);
      }
    }
    for (int64_t i = 0; i < count; ++i) all.d_rejected[from + i] += apart[i];
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
