// One block a row of similarities. The threshold is searched by value as on the CPU, each step one pass of compare and
// count over the row, which is in shared memory where it fits: no sort, no histogram, no atomics.
#include "cuda/device.cuh"
#include "shared_negatives.h"

namespace napo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int32_t kBarred = INT32_MIN;  // not eligible: below every key

struct Min32 {
  static constexpr int32_t identity = INT32_MAX;
  __device__ static int32_t combine(int32_t a, int32_t b) { return a < b ? a : b; }
};
struct Max32 {
  static constexpr int32_t identity = INT32_MIN;
  __device__ static int32_t combine(int32_t a, int32_t b) { return a > b ? a : b; }
};

// Integers in the order of the floats, equal for -0 and 0; NaN below all of them.
__device__ __forceinline__ int32_t key_of(float x) {
  const int32_t bits = __float_as_int(x + 0.0f);
  return x != x ? kBarred + 1 : bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float value_of(int32_t key) { return __int_as_float(key ^ ((key >> 31) & 0x7fffffff)); }

// The keys of a row: computed once where kHeld of them fit, else again from the similarities, which the second-level
// cache holds. Every thread reads only the places that it wrote.
template <int kHeld>
struct Row {
  const float* score;
  const int64_t* pool_groups;
  int64_t group, own;
  int32_t* held;

  __device__ int32_t compute(int32_t j) const {
    if (j == own || (pool_groups != nullptr && pool_groups[j] == group)) return kBarred;
    return key_of(score[j]);
  }
  __device__ int32_t key(int32_t j) const { return kHeld > 0 ? held[j] : compute(j); }
};

template <int kHeld>
__device__ int32_t count_from(const Row<kHeld>& row, int32_t owners, int32_t threshold) {
  int32_t count = 0;
  for (int32_t j = threadIdx.x; j < owners; j += kThreads) count += row.key(j) >= threshold ? 1 : 0;
  return reduce<Sum>(count);
}

// The largest key that at least k of the eligible keys reach (k >= 1, more than k eligible, all in [low, high]), as
// kth_largest() of csrc/cpu/shared_negatives.cpp. Every thread takes the same steps. `reached` says how many do.
template <int kHeld>
__device__ int32_t kth_largest(const Row<kHeld>& row, int32_t owners, int32_t k, int32_t low, int32_t high,
                               int32_t eligible, int32_t* reached) {
  // count(lower) = at_low >= k > at_upper = count(upper)
  int64_t lower = low, upper = static_cast<int64_t>(high) + 1;
  int32_t at_low = eligible, at_upper = 0;
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
    const int32_t count = count_from(row, owners, static_cast<int32_t>(middle));
    if (count >= k) {
      lower = middle;
      at_low = count;
    } else {
      upper = middle;
      at_upper = count;
    }
  }
  *reached = at_low;
  return static_cast<int32_t>(lower);
}

// How many threads before this one have a true flag, and how many have one at all.
struct Rank {
  int32_t before, all;
};
__device__ Rank rank(bool flag) {
  __shared__ int32_t of_warp[kThreads / kWarp];
  const unsigned votes = __ballot_sync(kAllLanes, flag);
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // of_warp may still be read by the rank before
  if (lane == 0) of_warp[warp] = __popc(votes);
  __syncthreads();
  Rank result{__popc(votes & ((1u << lane) - 1u)), 0};
  for (unsigned w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) result.before += of_warp[w];
    result.all += of_warp[w];
  }
  return result;
}

template <int kHeld>
__global__ void select_kernel(SelectArgs args, const float* score, int64_t first_row) {
  __shared__ int32_t held[kHeld > 0 ? kHeld : 1];
  const int64_t r = blockIdx.x, u = first_row + r;
  const int32_t owners = static_cast<int32_t>(args.owners), k = static_cast<int32_t>(args.k);
  const Row<kHeld> row{score + r * args.owners, args.groups == nullptr ? nullptr : args.pool_groups,
                       args.groups == nullptr ? 0 : args.groups[u], args.pool_offset + u, held};
  uint8_t* share = args.share + u * args.owners;

  int32_t low = INT32_MAX, high = INT32_MIN, eligible = 0;
  for (int32_t j = threadIdx.x; j < owners; j += kThreads) {
    const int32_t key = row.compute(j);
    if (kHeld > 0) held[j] = key;
    if (key == kBarred) continue;
    low = key < low ? key : low;
    high = key > high ? key : high;
    ++eligible;
  }
  low = reduce<Min32>(low);
  high = reduce<Max32>(high);
  eligible = reduce<Sum>(eligible);

  int32_t reached = eligible, threshold = kBarred + 1;
  if (k == 0) {
    threshold = INT32_MAX;  // the key that only a NaN could have, which key_of() never gives
  } else if (eligible > k) {
    threshold = kth_largest(row, owners, k, low, high, eligible, &reached);
  }
  if (k == 0 || reached <= k) {
    for (int32_t j = threadIdx.x; j < owners; j += kThreads) share[j] = row.key(j) >= threshold || j == row.own;
    return;
  }
  // Ties at the threshold: as many as are left to take, the lower columns first.
  int32_t ties = k - count_from(row, owners, threshold + 1);
  for (int32_t first = 0; first < owners; first += kThreads) {
    const int32_t j = first + threadIdx.x;
    const int32_t key = j < owners ? row.key(j) : kBarred;
    const Rank tied = rank(key == threshold);
    if (j < owners) share[j] = key > threshold || (key == threshold && tied.before < ties) || j == row.own;
    ties -= tied.all;
  }
}

}  // namespace

void select_nearest_of_scores(const NearestOfScoresArgs& all, void* stream) {
  const SelectArgs& args = all.select;
  NAPO_CHECK(args.owners < INT32_MAX - kThreads, "pool_states: expected fewer than 2^31 users, got %lld",
             static_cast<long long>(args.owners));
  // At most 32 KiB of shared memory, which every GPU grants without being asked.
  const auto kernel = args.owners <= 2048   ? &select_kernel<2048>
                      : args.owners <= 4096 ? &select_kernel<4096>
                      : args.owners <= 8192 ? &select_kernel<8192>
                                            : &select_kernel<0>;
  launch("shared_negatives", kernel, all.rows, 1, kThreads, stream, args, all.score, all.first_row);
}

}  // namespace napo::cuda
