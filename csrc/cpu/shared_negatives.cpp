#include "shared_negatives.h"

#include "cpu/lib/parallel.h"
#include "cpu/lib/small_matmul.h"

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr int32_t kBarred = INT32_MIN;  // not eligible: below every key

// Integers in the order of the floats, equal for -0 and 0; NaN below all of them.
NAPO_INLINE int32_t key_of(float x) {
  const int32_t bits = static_cast<int32_t>(to_bits(x + 0.0f));
  const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return x != x ? kBarred + 1 : ordered;
}

NAPO_INLINE float value_of(int32_t key) { return from_bits(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff))); }

NAPO_INLINE int64_t count_from(const int32_t* __restrict__ keys, int64_t n, int32_t threshold) {
  int64_t total = 0, j = 0;
#if defined(__AVX512F__)
  const __m512i wanted = _mm512_set1_epi32(threshold);
  for (; j + 16 <= n; j += 16) {
    total += __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + j), wanted));
  }
#endif
  for (int64_t begin = j; begin < n;
       begin += 1 << 20) {  // 32-bit counters, so that a vector counts as many as it holds
    const int64_t end = begin + (1 << 20) < n ? begin + (1 << 20) : n;
    int32_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += keys[i] >= threshold ? 1 : 0;
    total += count;
  }
  return total;
}

#if defined(__AVX512F__)
constexpr int64_t kWorthPicking = 64;

// Writes the keys in [lower, upper) to `out` (room for 16 more; may be `keys` itself) and returns their number.
NAPO_INLINE int64_t pick(const int32_t* keys, int64_t n, int32_t lower, int32_t upper, int32_t* out) {
  const __m512i least = _mm512_set1_epi32(lower), end = _mm512_set1_epi32(upper);
  int64_t count = 0;
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 inside = n - j < 16 ? first(static_cast<int>(n - j)) : static_cast<__mmask16>(0xffff);
    const __m512i x = _mm512_maskz_loadu_epi32(inside, keys + j);
    const __mmask16 wanted = _mm512_mask_cmplt_epi32_mask(_mm512_mask_cmpge_epi32_mask(inside, x, least), x, end);
    // Compressed in the register: compressing stores are microcode on some machines.
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(wanted, x));
    count += __builtin_popcount(wanted);
  }
  return count;
}
#endif

// The largest key that at least k of the n keys reach; `reached` says how many do. Needs k >= 1 and k eligible keys,
// all of them in [low, high]. `scratch` has room for n + 16.
//
// A search by value over the row, which stays in the first-level cache, and not a sort or a heap: each step is one
// pass of compare and count. Regula falsi on the count finds a smooth distribution's quantile in about ten passes;
// every third step halves the interval, so that no distribution needs more than about a hundred. Where compressing is
// an instruction, the passes are only over the keys that are still in question.
NAPO_INLINE int32_t kth_largest(const int32_t* keys, int64_t n, int64_t k, int32_t low, int32_t high, int64_t eligible,
                                [[maybe_unused]] int32_t* scratch, int64_t* reached) {
  // count(lower) = at_low >= k > at_upper = count(upper)
  int64_t lower = low, upper = static_cast<int64_t>(high) + 1, at_low = eligible, at_upper = 0;
  int64_t settled = 0;  // keys at or above `upper` that `keys` holds no longer
  for (int step = 1; at_low > k && upper - lower > 1; ++step) {
    int64_t middle = lower + (upper - lower) / 2;
    if (step % 3 != 0) {
      const float from = value_of(static_cast<int32_t>(lower)), to = value_of(static_cast<int32_t>(upper - 1));
      const float part = static_cast<float>(at_low - k) / static_cast<float>(at_low - at_upper);
      const float guess = from + (to - from) * part;
      if (guess > from && guess <= to) middle = key_of(guess);
    }
    if (middle <= lower) middle = lower + 1;
    if (middle >= upper) middle = upper - 1;
    const int64_t count = settled + count_from(keys, n, static_cast<int32_t>(middle));
    if (count >= k) {
      lower = middle;
      at_low = count;
    } else {
      upper = middle;
      at_upper = count;
    }
#if defined(__AVX512F__)
    if (n > kWorthPicking && 4 * (at_low - at_upper) < n && upper <= INT32_MAX) {
      n = pick(keys, n, static_cast<int32_t>(lower), static_cast<int32_t>(upper), scratch);
      keys = scratch;
      settled = at_upper;
    }
#endif
  }
  *reached = at_low;
  return static_cast<int32_t>(lower);
}

void select_row(const float* __restrict__ score, int64_t n, int64_t k, int64_t own, const int64_t* group,
                const int64_t* __restrict__ pool_groups, int32_t* __restrict__ keys, int32_t* __restrict__ scratch,
                uint8_t* __restrict__ share) {
  for (int64_t j = 0; j < n; ++j) keys[j] = key_of(score[j]);
  if (group != nullptr) {
    const int64_t mine = *group;
    for (int64_t j = 0; j < n; ++j) keys[j] = pool_groups[j] == mine ? kBarred : keys[j];
  }
  keys[own] = kBarred;
  // Less one, a barred key wraps around to the largest: one loop each, or the compiler makes no vectors of them.
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t j = 0; j < n; ++j) {
    const int32_t less = static_cast<int32_t>(static_cast<uint32_t>(keys[j]) - 1u);
    low = less < low ? less : low;
  }
  for (int64_t j = 0; j < n; ++j) high = keys[j] > high ? keys[j] : high;
  const int64_t eligible = count_from(keys, n, kBarred + 1);

  int64_t reached = eligible;
  int32_t threshold = kBarred + 1;
  if (k == 0) {
    threshold = INT32_MAX;  // the key that only a NaN could have, which key_of() never gives
  } else if (eligible > k) {
    threshold = kth_largest(keys, n, k, low + 1, high, eligible, scratch, &reached);
  }
  for (int64_t j = 0; j < n; ++j) share[j] = keys[j] >= threshold ? 1 : 0;
  if (k > 0 && reached > k) {  // ties at the threshold: the lower columns come first, so the last ones go
    int64_t surplus = reached - k;
    for (int64_t j = n - 1; surplus > 0; --j) {
      if (keys[j] != threshold) continue;
      share[j] = 0;
      --surplus;
    }
  }
  share[own] = 1;
}

// Users at a time: their similarities stay in the second-level cache, and a panel of the pool serves all of them.
constexpr int64_t kUsers = 16;
static_assert(kUsers % kBlockRows == 0, "whole blocks");

}  // namespace

// torch's matmul would do, but for MKL, which on AMD leaves half of the vector unused: 180 Gflop/s for states of 64 on
// two cores of a Zen 5, three quarters of the time of everything here.
void select_nearest(const NearestArgs& all, int threads) {
  const SelectArgs& args = all.select;
  const int64_t width = all.width;
  const int64_t padded = up(args.owners, kBlockColumns);
  const Array<float> panels(padded * width);
  parallel_for(padded / kBlockColumns, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kBlockColumns;
      pack_transposed(all.pool, args.owners, width, first, panels.get() + first * width);
    }
  });
  // Similarities, keys twice, and the last users with zeros behind them.
  const int64_t keys_size = 2 * args.owners + 16;
  const int64_t bytes = room<float>(kUsers * padded) + room<int32_t>(keys_size) + room<float>(kUsers * width);
  parallel_for_with(args.users, kUsers, threads, bytes, [&](int64_t begin, int64_t end, Scratch memory) {
    float* scores = memory.take<float>(kUsers * padded);
    int32_t* keys = memory.take<int32_t>(keys_size);
    const int64_t count = end - begin;
    const float* rows = whole_blocks(all.states + begin * width, count, width, memory.take<float>(kUsers * width));
    multiply_rows(rows, count, width, panels.get(), padded, scores);
    for (int64_t u = begin; u < end; ++u) {
      select_row(scores + (u - begin) * padded, args.owners, args.k, args.pool_offset + u,
                 args.groups == nullptr ? nullptr : args.groups + u, args.pool_groups, keys, keys + args.owners,
                 args.share + u * args.owners);
    }
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
