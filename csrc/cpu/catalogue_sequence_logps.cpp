#include "catalogue_sequence_logps.h"

#include "cpu/lib/parallel.h"
#include "cpu/lib/vectors.h"

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr int64_t kGrain = 1 << 14;  // multiplications of a piece of work
constexpr int kSums = 4;             // sums under way in a dot product

NAPO_INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec sums[kSums];
  for (Vec& s : sums) s = splat(0.0f);
  for_vectors_unrolled<kSums>(0, n, [&](int64_t j, auto lanes, int k) NAPO_LAMBDA {
    sums[k] = fma(load(a + j, lanes, 0.0f), load(b + j, lanes, 0.0f), sums[k]);
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Rows of a piece of work.
NAPO_INLINE int64_t grain_of(const AllowedBlockArgs& block) {
  const int64_t of_row = block.width * (block.sizes == nullptr ? 8 : block.hidden_width);
  return of_row < kGrain ? kGrain / (of_row > 0 ? of_row : 1) : 1;
}

NAPO_INLINE void finish_logits(const AllowedForwardArgs& args, const int64_t* columns, int64_t size, float* z,
                               float* slope) {
  const Vec scale = splat(args.block.logit_scale);
  for_vectors(0, size,
              [&](int64_t j, auto lanes) NAPO_LAMBDA { store(z + j, load(z + j, lanes, 0.0f) * scale, lanes); });
  if (args.bias != nullptr) {
    for (int64_t j = 0; j < size; ++j) z[j] += args.bias[columns[j]];
  }
  if (args.softcap == 0.0f) return;
  const Vec cap = splat(args.softcap);
  for_vectors(0, size, [&](int64_t j, auto lanes) NAPO_LAMBDA {
    Vec derivative;
    store(z + j, cap * tanh(load(z + j, lanes, 0.0f) / cap, &derivative), lanes);
    store(slope + j, derivative, lanes);
  });
}

// m, and log(1 + rest). A NaN, or two infinities, make the log-sum a NaN.
NAPO_INLINE void statistics(float* z, int64_t size, float* row_max, float* log_sum) {
  Vec most = splat(-INFINITY);
  for_vectors(0, size, [&](int64_t j, auto lanes) NAPO_LAMBDA { most = max(load(z + j, lanes, -INFINITY), most); });
  const float m = largest(most);
  int64_t at = 0;
  while (at < size && z[at] != m) ++at;
  if (at < size) z[at] = -INFINITY;  // it is no part of the rest
  Vec rest = splat(0.0f);
  const Vec origin = splat(m);
  for_vectors(0, size, [&](int64_t j, auto lanes) NAPO_LAMBDA {
    rest = rest + inside(exp(load(z + j, lanes, -INFINITY) - origin), lanes, 0.0f);
  });
  if (at < size) z[at] = m;
  *row_max = m;
  *log_sum = log1pf(sum(rest));
}

}  // namespace

void allowed_forward(const AllowedForwardArgs& args, int threads) {
  const AllowedBlockArgs& block = args.block;
  parallel_for(block.count, grain_of(block), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool own = block.sizes != nullptr;
      const int64_t size = own ? block.sizes[i] : block.width;
      const int64_t* columns = block.columns + (own ? i * block.width : 0);
      float *z = args.z + i * block.width, *slope = args.slope == nullptr ? nullptr : args.slope + i * block.width;
      if (own) {
        const float* h = block.hidden + block.rows[i] * block.hidden_width;
        for (int64_t j = 0; j < size; ++j) {
          z[j] = dot(h, block.weight + columns[j] * block.hidden_width, block.hidden_width);
        }
      }
      finish_logits(args, columns, size, z, slope);
      statistics(z, size, args.row_max + i, args.log_sum + i);
      for (int64_t j = size; j < block.width; ++j) {
        z[j] = -INFINITY;
        if (slope != nullptr) slope[j] = 0.0f;
      }
    }
  });
}

void allowed_backward(const AllowedBackwardArgs& args, int threads) {
  const AllowedBlockArgs& block = args.block;
  const int64_t hidden_width = block.hidden_width;
  parallel_for(block.count, grain_of(block), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool own = block.sizes != nullptr;
      const int64_t first = i * block.width, size = own ? block.sizes[i] : block.width;
      const float *z = args.z + first, *place_grad = args.place_grad + first;
      float* dz = args.dz + first;
      const float m = args.row_max[i], log_sum = args.log_sum[i], total = args.row_grad[i];
      for_vectors(0, size, [&](int64_t j, auto lanes) NAPO_LAMBDA {
        const Vec logp = (load(z + j, lanes, 0.0f) - splat(m)) - splat(log_sum);
        store(dz + j, splat(-total) * exp(logp), lanes);
      });
      for (int64_t j = 0; j < size; ++j) {  // the targets, few: 1 - p is exact for p near 1 too
        if (place_grad[j] == 0.0f) continue;
        const float logp = (z[j] - m) - log_sum;
        dz[j] = -place_grad[j] * expm1f(logp) - (total - place_grad[j]) * expf(logp);
      }
      if (args.slope != nullptr) {
        const float* slope = args.slope + first;
        for_vectors(0, size, [&](int64_t j, auto lanes) NAPO_LAMBDA {
          store(dz + j, load(dz + j, lanes, 0.0f) * load(slope + j, lanes, 0.0f), lanes);
        });
      }
      for (int64_t j = size; j < block.width; ++j) dz[j] = 0.0f;
      if (!own || args.hidden_grad == nullptr) continue;
      float* out = args.hidden_grad + block.rows[i] * hidden_width;
      memset(out, 0, static_cast<size_t>(hidden_width) * sizeof *out);
      for (int64_t j = 0; j < size; ++j) {
        const Vec coefficient = splat(block.logit_scale * dz[j]);
        const float* w = block.weight + block.columns[first + j] * hidden_width;
        for_vectors(0, hidden_width, [&](int64_t d, auto lanes) NAPO_LAMBDA {
          store(out + d, fma(coefficient, load(w + d, lanes, 0.0f), load(out + d, lanes, 0.0f)), lanes);
        });
      }
    }
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
