// The separable form runs over the owners' log-sums and the general one over the negatives, both by the same two
// kernels: sums have a block a user, gradients a thread a column of the problem. A term costs one exponential in each
// and a byte of the mask. Sums have a fixed order and there are no atomics: results are bitwise equal from run to run.
#include "cuda/device.cuh"
#include "napo_loss.h"

namespace napo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 128;                   // terms of a block of the gradient
constexpr int kRowsApart = 128;                 // users whose sums are kept apart, as on the CPU
constexpr int kTile = 4096;                     // terms of a user whose exclusions are marked at a time
constexpr int64_t kScratch = int64_t{1} << 18;  // floats that slabs of users may take: 2048 blocks fill any GPU
constexpr int64_t kSlabs = 1024;                // of users, at most
constexpr float kNone = -INFINITY;

// ---- pieces --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float origin_of(float x) { return x == kNone ? 0.0f : x; }

// A running log sum exp(beta * s + margin), as log(total) + beta * m + peak: no exponent is above 0. A NaN among what
// is added stays in the total. While there are but terms without any probability, m is -inf and peak is 0.
struct LogSum {
  float m, peak, total;

  __device__ void add(float s, float margin, float beta) {
    if (margin == kNone) return;
    if (s == kNone) {
      if (!(margin < INFINITY)) total = NAN;
      if (m == kNone) peak = 0.0f;
      return;
    }
    if (s > m) {
      const float old = beta * (m - s) + peak, high = fmaxf(old, margin);
      total = total * expf(old - high) + expf(margin - high);
      m = s;
      peak = high;
    } else {
      const float term = beta * (s - m) + margin;
      if (term > peak) {
        total = total * expf(peak - term) + 1.0f;
        peak = term;
      } else {
        total += expf(term - peak);
      }
    }
  }

  __device__ void add(const LogSum& other, float beta) {
    const float high_m = fmaxf(m, other.m), base = origin_of(high_m);
    const float mine = beta * (m - base) + peak, theirs = beta * (other.m - base) + other.peak;
    const float high = fmaxf(mine, theirs), zero = origin_of(high);
    total = total * expf(mine - zero) + other.total * expf(theirs - zero);
    peak = high_m == kNone ? fmaxf(peak, other.peak) : high;
    m = high_m;
  }

  // The pair (m, rest) of the log-sums of all lanes; in lane 0.
  __device__ void add_lanes(float beta) {
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const LogSum other{__shfl_xor_sync(kAllLanes, m, step), __shfl_xor_sync(kAllLanes, peak, step),
                         __shfl_xor_sync(kAllLanes, total, step)};
      add(other, beta);
    }
  }

  __device__ void write(float* m_out, float* rest_out) const {
    *m_out = m;
    *rest_out = m == INFINITY ? NAN : total == 0.0f ? peak : peak + logf(total);
  }
};

__device__ __forceinline__ LogSum no_sum() { return {kNone, kNone, 0.0f}; }

__device__ __forceinline__ float weight_of(float s, float margin, float m, float rest, float beta) {
  return expf(beta * (s - m) + (margin - rest));
}

// What the two kernels run over: term i of user u is owner i of the separable form, negative i % n of owner i / n in
// the general one.
struct Terms {
  GeneralArgs args;
  const float* s;       // (terms,)
  const float* margin;  // (terms,) the part that is the same for all users, -inf where left out
  int32_t terms, of_owner;
  Excluded excluded;
};

// The margin of term i for row r of the block, -inf where it is not in the user's set.
template <bool kGeneral>
__device__ __forceinline__ float margin_of(const Terms& p, int64_t r, int32_t i) {
  const LossArgs& loss = p.args.loss;
  const int64_t u = p.args.first_row + r;
  const uint32_t n = kGeneral ? static_cast<uint32_t>(p.of_owner) : 1;  // unsigned: a cheaper division
  const int64_t v = static_cast<uint32_t>(i) / n, j = static_cast<uint32_t>(i) % n;
  if (loss.share[u * loss.owners + v] == 0) return kNone;
  float margin = p.margin[i];
  if (!kGeneral || margin == kNone) return margin;
  if (p.args.full_keep != nullptr) {
    const int64_t* stride = p.args.keep_stride;
    if (p.args.full_keep[u * stride[0] + v * stride[1] + j * stride[2]] == 0) return kNone;
  }
  if (p.args.full_margin != nullptr) {
    const int64_t* stride = p.args.margin_stride;
    margin += p.args.full_margin[u * stride[0] + v * stride[1] + j * stride[2]];
  }
  if (p.args.score != nullptr) {
    float z = p.args.score[r * p.terms + i];
    if (p.args.bias != nullptr) z += p.args.bias[i];
    const float of_pair = p.args.line[1] + p.args.line[0] * z;
    margin += of_pair < 0.0f ? 0.0f : of_pair;  // a NaN passes
  }
  return margin;
}

// First index in [begin, end) whose key is not below `wanted`.
__device__ int64_t first_from(const int64_t* key, int64_t begin, int64_t end, int64_t wanted) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (key[middle] < wanted) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// A warp an owner.
__global__ void owner_sums_kernel(LossArgs args, float* m, float* rest) {
  const int64_t v = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (v >= args.owners) return;  // the whole warp
  LogSum sum = no_sum();
  for (int64_t j = threadIdx.x % kWarp; j < args.n; j += kWarp) {
    sum.add(args.rejected[v * args.n + j], args.margin[v * args.n + j], args.beta);
  }
  sum.add_lanes(args.beta);
  if (threadIdx.x % kWarp == 0) sum.write(m + v, rest + v);
}

// The negatives that are left of the owners of which user u has some excluded, which the common sums do not fit.
__device__ void add_touched(const LossArgs& loss, const Excluded& excluded, int64_t u, LogSum* sum) {
  const int64_t begin = excluded.bounds[u], end = excluded.bounds[u + 1], first_key = u * loss.owners * loss.n;
  for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) {
    const int64_t v = (excluded.key[e] - first_key) / loss.n, from = first_key + v * loss.n;
    if (e > begin && excluded.key[e - 1] >= from) continue;  // the first triple of an owner serves them all
    if (loss.share[u * loss.owners + v] == 0) continue;
    int64_t next = e;
    for (int64_t j = 0; j < loss.n; ++j) {
      bool kept = true;
      for (; next < end && excluded.key[next] == from + j; ++next) kept = false;
      if (kept) sum->add(loss.rejected[v * loss.n + j], loss.margin[v * loss.n + j], loss.beta);
    }
  }
}

template <bool kGeneral>
__global__ void sums_kernel(Terms p, float* m, float* rest) {
  __shared__ uint8_t left_out[kTile];
  __shared__ LogSum of_warp[kThreads / kWarp];
  const LossArgs& loss = p.args.loss;
  const int64_t r = blockIdx.x, u = p.args.first_row + r;
  const bool excludes = p.excluded.bounds != nullptr && p.excluded.bounds[u] < p.excluded.bounds[u + 1];
  LogSum sum = no_sum();
  for (int32_t first = 0; first < p.terms; first += kTile) {
    const int32_t count = p.terms - first < kTile ? p.terms - first : kTile;
    if (excludes) {  // a thread clears the places that it reads itself, so the tile before needs no barrier
      for (int32_t i = threadIdx.x; i < count; i += kThreads) left_out[i] = 0;
      __syncthreads();
      const int64_t per_term = kGeneral ? 1 : loss.n, first_key = u * loss.owners * loss.n + first * per_term;
      const int64_t begin = p.excluded.bounds[u], end = p.excluded.bounds[u + 1];
      for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) {
        const int64_t at = p.excluded.key[e] - first_key;
        if (at >= 0 && at < count * per_term) left_out[at / per_term] = 1;
      }
      __syncthreads();
    }
    for (int32_t i = threadIdx.x; i < count; i += kThreads) {
      if (excludes && left_out[i] != 0) continue;
      sum.add(p.s[first + i], margin_of<kGeneral>(p, r, first + i), loss.beta);
    }
  }
  if (!kGeneral && excludes) add_touched(loss, p.excluded, u, &sum);
  sum.add_lanes(loss.beta);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  sum = threadIdx.x < kThreads / kWarp ? of_warp[threadIdx.x] : no_sum();
  sum.add_lanes(loss.beta);
  if (threadIdx.x == 0) sum.write(m + u, rest + u);
}

// ---- gradients -----------------------------------------------------------------------------------------------------

// partial[slab, i] = sum over the slab's users of g_u exp(beta * s_i + margin_ui - lse_u).
template <bool kGeneral>
__global__ void partial_kernel(Terms p, int64_t rows_of_slab, const float* g, const float* m, const float* rest,
                               float* partial) {
  __shared__ float row_g[kRowsApart], row_m[kRowsApart], row_rest[kRowsApart];
  const LossArgs& loss = p.args.loss;
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const int64_t begin = int64_t(blockIdx.y) * rows_of_slab;
  const int64_t end = begin + rows_of_slab < p.args.rows ? begin + rows_of_slab : p.args.rows;
  const bool inside = column < p.terms;
  const int32_t i = inside ? static_cast<int32_t>(column) : 0;
  const float s = inside ? p.s[i] : 0.0f;
  // The owner's triples come in the order of the users, so each thread walks along those of its owner.
  const int64_t v = i / p.of_owner, j = i % p.of_owner, first_key = v * loss.users * loss.n;
  int64_t next = 0, stop = 0;
  if (inside && p.excluded.bounds != nullptr) {
    stop = p.excluded.bounds[v + 1];
    next = first_from(p.excluded.key, p.excluded.bounds[v], stop, first_key + (p.args.first_row + begin) * loss.n);
  }

  float total = 0.0f;
  for (int64_t block = begin; block < end; block += kRowsApart) {
    const int64_t count = end - block < kRowsApart ? end - block : kRowsApart;
    __syncthreads();  // the rows before may still be read
    for (int64_t r = threadIdx.x; r < count; r += kColumns) {
      const int64_t u = p.args.first_row + block + r;
      const bool counts = g[u] != 0.0f;  // not a user without negatives, whose log-sum is -inf
      row_g[r] = counts ? g[u] : 0.0f;
      row_m[r] = counts ? m[u] : 0.0f;
      row_rest[r] = counts ? rest[u] : INFINITY;
    }
    __syncthreads();
    if (!inside) continue;
    float apart = 0.0f;
    for (int64_t r = 0; r < count; ++r) {
      bool excluded = false;
      if (next < stop) {
        const int64_t from = first_key + (p.args.first_row + block + r) * loss.n;
        for (; next < stop && p.excluded.key[next] < from + loss.n; ++next) {
          excluded = excluded || !kGeneral || p.excluded.key[next] == from + j;
        }
      }
      if (excluded) continue;
      const float margin = margin_of<kGeneral>(p, block + r, i);
      if (margin != kNone && row_g[r] != 0.0f)
        apart += row_g[r] * weight_of(s, margin, row_m[r], row_rest[r], loss.beta);
    }
    total += apart;
  }
  if (inside) partial[int64_t(blockIdx.y) * p.terms + i] = total;
}

// out[i] = factor * sum over slabs of partial[slab, i], or added to it.
__global__ void collect_kernel(const float* partial, int64_t slabs, int64_t terms, float factor, bool add, float* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= terms) return;
  float total = 0.0f;
  for (int64_t slab = 0; slab < slabs; ++slab) total += partial[slab * terms + i];
  out[i] = add ? out[i] + factor * total : factor * total;
}

// The share of users that have some of an owner's negatives excluded: a warp an owner, a lane a negative.
__global__ void touched_gradient_kernel(LossArgs args, Excluded excluded, const float* g, const float* m,
                                        const float* rest, float* d_rejected) {
  const int64_t v = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (v >= args.owners) return;
  const int64_t begin = excluded.bounds[v], end = excluded.bounds[v + 1], first_key = v * args.users * args.n;
  if (begin == end) return;
  for (int64_t j = threadIdx.x % kWarp; j < args.n; j += kWarp) {
    const int64_t at = v * args.n + j;
    const float s = args.rejected[at], margin = args.margin[at];
    float total = 0.0f, apart = 0.0f;
    int64_t in_apart = 0;
    for (int64_t e = begin; e < end;) {
      const int64_t u = (excluded.key[e] - first_key) / args.n, from = first_key + u * args.n;
      bool kept = margin != kNone && args.share[u * args.owners + v] != 0 && g[u] != 0.0f;
      for (; e < end && excluded.key[e] < from + args.n; ++e) kept = kept && excluded.key[e] != from + j;
      if (kept) apart += g[u] * weight_of(s, margin, m[u], rest[u], args.beta);
      if (++in_apart == kRowsApart) {
        total += apart;
        apart = 0.0f;
        in_apart = 0;
      }
    }
    d_rejected[at] += args.beta * (total + apart);
  }
}

__global__ void owner_gradient_kernel(LossArgs args, const float* owner_m, const float* owner_rest, const float* c,
                                      float* d_rejected) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= args.owners * args.n) return;
  const int64_t v = at / args.n;
  const float margin = args.margin[at];
  // An owner that adds nothing may have a sum of NaN, of negatives that all its users exclude.
  if (margin == kNone || owner_rest[v] == kNone || c[v] == 0.0f) return;
  d_rejected[at] += args.beta * c[v] * weight_of(args.rejected[at], margin, owner_m[v], owner_rest[v], args.beta);
}

// ---- users ---------------------------------------------------------------------------------------------------------

// t_u = lse_u + margin_u - beta * chosen_u; differences are taken before they are scaled.
__device__ __forceinline__ float logit_of(const UserArgs& args, int64_t u) {
  const float chosen = args.chosen[u], margin = args.margin[u], rest = args.rest[u];
  if ((rest == kNone || margin == kNone) && chosen == chosen) return kNone;  // no negatives
  return args.beta * (args.m[u] - chosen) + (rest + margin);
}

__global__ void losses_kernel(LossesArgs args) {
  const int64_t u = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (u >= args.user.users) return;
  const float t = logit_of(args.user, u);
  args.losses[u] = (t < 0.0f ? 0.0f : t) + log1pf(expf(-fabsf(t)));  // a NaN shows
}

__global__ void chosen_gradient_kernel(ChosenGradientArgs args) {
  const int64_t u = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (u >= args.user.users) return;
  const float t = logit_of(args.user, u), e = expf(-fabsf(t));
  const float g = args.grad[u] * ((t > 0.0f ? 1.0f : e) / (1.0f + e));
  args.g[u] = g;
  args.d_chosen[u] = -args.user.beta * g;
}

// ---- launches ------------------------------------------------------------------------------------------------------

constexpr const char* kName = "napo_loss";

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// More than one slab of users where the columns alone would not fill a GPU; the same on every GPU.
int64_t slabs_of(int64_t users, int64_t terms) {
  const int64_t most = divide_up(users, kRowsApart), room = kScratch / (terms > 0 ? terms : 1);
  int64_t slabs = most < room ? most : room;
  slabs = slabs < kSlabs ? slabs : kSlabs;
  return slabs > 1 ? slabs : 1;
}

int32_t narrow(int64_t terms) {
  NAPO_CHECK(terms < INT32_MAX - kTile, "rejected_logps: expected B' * N below 2^31, got %lld",
             static_cast<long long>(terms));
  return static_cast<int32_t>(terms);
}

Terms separable(const LossArgs& args, const float* owner_m, const float* owner_rest) {
  GeneralArgs all{};
  all.loss = args;
  all.rows = args.users;
  return {all, owner_m, owner_rest, narrow(args.owners), 1, args.excluded};
}

Terms general(const GeneralArgs& args) {
  const LossArgs& loss = args.loss;
  return {args, loss.rejected, loss.margin, narrow(loss.owners * loss.n), narrow(loss.n), loss.excluded};
}

// The sums of all users over each term: factor * them, or added, in out (terms).
template <bool kGeneral>
void launch_gradient(const Terms& p, const float* g, const float* m, const float* rest, float* scratch, float factor,
                     bool add, float* out, void* stream) {
  const int64_t slabs = slabs_of(p.args.rows, p.terms);
  const int64_t rows_of_slab = divide_up(divide_up(p.args.rows, slabs), kRowsApart) * kRowsApart;
  launch(kName, &partial_kernel<kGeneral>, divide_up(p.terms, kColumns), slabs, kColumns, stream, p, rows_of_slab, g, m,
         rest, scratch);
  launch(kName, &collect_kernel, divide_up(p.terms, kThreads), 1, kThreads, stream, scratch, slabs, int64_t{p.terms},
         factor, add, out);
}

}  // namespace

int64_t gradient_scratch(int64_t users, int64_t terms) { return slabs_of(users, terms) * terms; }

void napo_owner_sums(const OwnerSumsArgs& args, void* stream) {
  launch(kName, &owner_sums_kernel, divide_up(args.loss.owners, kThreads / kWarp), 1, kThreads, stream, args.loss,
         args.m, args.rest);
}

void napo_owner_gradient(const OwnerGradientArgs& args, void* stream) {
  launch(kName, &owner_gradient_kernel, divide_up(args.loss.owners * args.loss.n, kThreads), 1, kThreads, stream,
         args.loss, args.owner_m, args.owner_rest, args.c, args.d_rejected);
}

void napo_separable_sums(const SeparableSumsArgs& args, void* stream) {
  launch(kName, &sums_kernel<false>, args.loss.users, 1, kThreads, stream,
         separable(args.loss, args.owner_m, args.owner_rest), args.m, args.rest);
}

void napo_separable_gradient(const SeparableGradientArgs& args, void* stream) {
  const LossArgs& loss = args.loss;
  launch_gradient<false>(separable(loss, args.owner_m, args.owner_rest), args.g, args.m, args.rest, args.scratch, 1.0f,
                         false, args.c, stream);
  if (loss.excluded.bounds == nullptr) return;
  launch(kName, &touched_gradient_kernel, divide_up(loss.owners, kThreads / kWarp), 1, kThreads, stream, loss,
         loss.excluded, args.g, args.m, args.rest, args.d_rejected);
}

void napo_general_sums(const GeneralSumsArgs& args, void* stream) {
  launch(kName, &sums_kernel<true>, args.general.rows, 1, kThreads, stream, general(args.general), args.m, args.rest);
}

void napo_general_gradient(const GeneralGradientArgs& args, void* stream) {
  launch_gradient<true>(general(args.general), args.g, args.m, args.rest, args.scratch, args.general.loss.beta, true,
                        args.d_rejected, stream);
}

void napo_losses(const LossesArgs& args, void* stream) {
  launch(kName, &losses_kernel, divide_up(args.user.users, kThreads), 1, kThreads, stream, args);
}

void napo_chosen_gradient(const ChosenGradientArgs& args, void* stream) {
  launch(kName, &chosen_gradient_kernel, divide_up(args.user.users, kThreads), 1, kThreads, stream, args);
}

}  // namespace napo::cuda
