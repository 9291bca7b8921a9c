#include "masked_attention.h"

#include "cpu/attention_blocks.h"
#include "cpu/lib/parallel.h"
#include "cpu/lib/vectors.h"

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr int64_t kTile = 64;  // queries whose probabilities are kept for the gradient of keys and values
static_assert(kMaskBlock % kKeys == 0 && kMaskBlock % kTile == 0 && kTile % kQueries == 0, "padding covers all blocks");

template <class T>
NAPO_INLINE T* tokens_of(const Tensor<4>& x, int64_t row, int64_t head) {
  return static_cast<T*>(x.data) + row * x.stride[0] + head * x.stride[1];
}

// The blocks of keys that some query of the group sees.
NAPO_INLINE int64_t visible_blocks(const uint8_t* mask, int64_t padded, int32_t* blocks) {
  int64_t count = 0;
  for (int64_t k = 0; k < padded; k += kKeys) {
    uint64_t any = 0;
    for (int i = 0; i < kQueries; ++i) {
      uint64_t eight;
      for (int j = 0; j < kKeys; j += 8) {
        memcpy(&eight, mask + i * padded + k + j, sizeof eight);
        any |= eight;
      }
    }
    if (any != 0) blocks[count++] = static_cast<int32_t>(k);
  }
  return count;
}

// Rows `block` of columns [c, c + kKeys) to `out`, in the tensor's type and as far as it reaches.
template <class T>
NAPO_INLINE void write_block(const Block& block, int64_t first, int64_t c, const Sizes& size, T* out, int64_t stride) {
  for (int64_t i = 0; i < kQueries && first + i < size.length; ++i) {
    T* row = out + (first + i) * stride + c;
    store_within(row, block.v[i][0], size.width - c);
    store_within(row + Vec::lanes, block.v[i][1], size.width - c - Vec::lanes);
  }
}

NAPO_INLINE Sizes sizes_of(const AttentionArgs& args) {
  return {args.length(), up(args.length(), kMaskBlock), args.width(), up(args.width(), kKeys)};
}

// A task is a key head of a row with some of its query heads: all of them where there are enough tasks for the threads.
struct Task {
  int64_t row, key_head, first_head, end_head;
};
struct Tasks {
  int64_t key_heads, parts, count, heads;  // parts of a key head's queries, tasks, query heads of a task

  Task operator[](int64_t task) const {
    const int64_t pair = task / parts, first = task % (key_heads * parts) * heads;
    return {pair / key_heads, pair % key_heads, first, first + heads};
  }
};
NAPO_INLINE Tasks tasks_of(const AttentionArgs& args, int threads) {
  const int64_t group = args.heads() / args.key_heads(), pairs = args.rows() * args.key_heads();
  const int64_t parts = pairs >= 4 * threads ? 1 : group;
  return {args.key_heads(), parts, pairs * parts, group / parts};
}

// ---- forward -------------------------------------------------------------------------------------------------------

// A task's memory. Rows and columns are packed for a reduction along d, the others for one along the tokens.
template <class U>
struct ForwardMemory {
  using Unit = typename U::type;
  Unit *packed, *key_columns, *values, *query_rows;
  float* scores;  // (kQueries, padded), of a group of queries
  Unit* p;        // (kQueries, padded / width)
  int32_t* blocks;

  static int64_t bytes(const Sizes& size) {
    return 4 * room<Unit>(size.matrix<U>()) + room<float>(kQueries * size.padded) +
           room<Unit>(kQueries * size.padded / U::width) + room<int32_t>(size.padded / kKeys);
  }
  ForwardMemory(Scratch memory, const Sizes& size) {
    packed = memory.take<Unit>(size.matrix<U>());
    key_columns = memory.take<Unit>(size.matrix<U>());
    values = memory.take<Unit>(size.matrix<U>());
    query_rows = memory.take<Unit>(size.matrix<U>());
    scores = memory.take<float>(kQueries * size.padded);
    p = memory.take<Unit>(kQueries * size.padded / U::width);
    blocks = memory.take<int32_t>(size.padded / kKeys);
  }
};

// The group's scores under its mask, and the largest of each query.
template <class U>
NAPO_INLINE void group_scores(const ForwardMemory<U>& m, const Sizes& size, float scale, const uint8_t* mask, int64_t q,
                              int64_t count, Vec* most) {
  const int64_t units = size.columns / U::width;
  for (int i = 0; i < kQueries; ++i) most[i] = splat(-INFINITY);
  for (int64_t b = 0; b < count; ++b) {
    Block s = zeros();
    multiply<U>(s, m.query_rows + q * units, units, 1, m.key_columns + m.blocks[b] * units, units);
    for (int i = 0; i < kQueries; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int64_t at = i * size.padded + m.blocks[b] + half * Vec::lanes;
        const Vec x = where(mask + at, AllLanes{}, s.v[i][half] * splat(scale), splat(-INFINITY));
        store(m.scores + at, x);
        most[i] = max(most[i], x);
      }
    }
  }
}

// exp(score - largest) of query i of the group, and their sum.
template <class U>
NAPO_INLINE float query_exponentials(const ForwardMemory<U>& m, const Sizes& size, int i, int64_t count, float most) {
  const Vec shift = splat(most == -INFINITY ? 0.0f : most);
  Vec total = splat(0.0f);
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t k = m.blocks[b]; k < m.blocks[b] + kKeys; k += Vec::lanes) {
      const Vec p = exp(load(m.scores + i * size.padded + k) - shift);
      total = total + p;
      U::put(m.p + (i * size.padded + k) / U::width, p);
    }
  }
  return sum(total);
}

template <class U, class T>
void forward(const AttentionForwardArgs& all, int threads) {
  const AttentionArgs& args = all.attention;
  const Sizes size = sizes_of(args);
  const Tasks tasks = tasks_of(args, threads);
  const int64_t steps = size.padded / U::width;
  parallel_for_with(
      tasks.count, 1, threads, ForwardMemory<U>::bytes(size), [&](int64_t begin, int64_t end, Scratch memory) {
        const ForwardMemory<U> m(memory, size);
        for (int64_t task = begin; task < end; ++task) {
          const auto [row, key_head, first_head, end_head] = tasks[task];
          pack_rows<U>(tokens_of<T>(args.key, row, key_head), args.key.stride[2], size, m.packed);
          transpose<U>(m.packed, size, m.key_columns);
          pack_rows<U>(tokens_of<T>(args.value, row, key_head), args.value.stride[2], size, m.packed);
          pack_panels(m.packed, size, m.values);
          for (int64_t head = first_head; head < end_head; ++head) {
            pack_rows<U>(tokens_of<T>(args.query, row, head), args.query.stride[2], size, m.query_rows);
            T* o = tokens_of<T>(all.out, row, head);
            float* log_sums = all.lse + (row * args.heads() + head) * size.length;
            for (int64_t q = 0; q < size.length; q += kQueries) {
              const uint8_t* mask = args.mask + (row * size.padded + q) * size.padded;
              const int64_t count = visible_blocks(mask, size.padded, m.blocks);
              Vec most[kQueries];
              group_scores(m, size, args.scale, mask, q, count, most);
              float inverse[kQueries];
              for (int i = 0; i < kQueries; ++i) {
                const float top = largest(most[i]), total = query_exponentials(m, size, i, count, top);
                inverse[i] = total > 0.0f ? 1.0f / total : 0.0f;
                if (q + i < size.length) log_sums[q + i] = total > 0.0f ? top + logf(total) : -INFINITY;
              }
              for (int64_t c = 0; c < size.columns; c += kKeys) {
                Block sum = zeros();
                for (int64_t b = 0; b < count; ++b) {
                  const int64_t step = m.blocks[b] / U::width;
                  multiply<U>(sum, m.p + step, steps, 1, m.values + c * steps + step * kKeys, kKeys / U::width);
                }
                for (int i = 0; i < kQueries; ++i) {
                  for (int half = 0; half < 2; ++half) sum.v[i][half] = sum.v[i][half] * splat(inverse[i]);
                }
                write_block(sum, q, c, size, o, all.out.stride[2]);
              }
            }
          }
        }
      });
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class U>
struct BackwardMemory {
  using Unit = typename U::type;
  Unit *packed, *key_columns, *value_columns, *keys;  // of the key head
  Unit *query_rows, *queries, *grad_rows, *grads;     // of a query head
  float *p, *dp;                                      // (kQueries, padded), of a group of queries
  Unit* ds;                                           // (kQueries, padded / width)
  Unit *tile_p, *tile_ds;                             // (padded / kKeys, kTile / width, kKeys), of a tile of queries
  int32_t* blocks;

  static int64_t tile(const Sizes& size) { return kTile / U::width * size.padded; }
  static int64_t bytes(const Sizes& size) {
    return 8 * room<Unit>(size.matrix<U>()) + 2 * room<float>(kQueries * size.padded) +
           room<Unit>(kQueries * size.padded / U::width) + 2 * room<Unit>(tile(size)) +
           room<int32_t>(size.padded / kKeys);
  }
  BackwardMemory(Scratch memory, const Sizes& size) {
    packed = memory.take<Unit>(size.matrix<U>());
    key_columns = memory.take<Unit>(size.matrix<U>());
    value_columns = memory.take<Unit>(size.matrix<U>());
    keys = memory.take<Unit>(size.matrix<U>());
    query_rows = memory.take<Unit>(size.matrix<U>());
    queries = memory.take<Unit>(size.matrix<U>());
    grad_rows = memory.take<Unit>(size.matrix<U>());
    grads = memory.take<Unit>(size.matrix<U>());
    p = memory.take<float>(kQueries * size.padded);
    dp = memory.take<float>(kQueries * size.padded);
    ds = memory.take<Unit>(kQueries * size.padded / U::width);
    tile_p = memory.take<Unit>(tile(size));
    tile_ds = memory.take<Unit>(tile(size));
    blocks = memory.take<int32_t>(size.padded / kKeys);
  }
};

// The group's probabilities p and their gradients dp; inner = sum_k p dp of each query, still in lanes.
template <class U>
NAPO_INLINE void group_probabilities(const BackwardMemory<U>& m, const Sizes& size, float scale, const uint8_t* mask,
                                     const float* log_sums, int64_t q, int64_t count, Vec* inner) {
  const int64_t units = size.columns / U::width;
  float log_sum[kQueries];
  for (int i = 0; i < kQueries; ++i) {
    inner[i] = splat(0.0f);
    log_sum[i] = q + i < size.length && log_sums[q + i] > -INFINITY ? log_sums[q + i] : 0.0f;
  }
  for (int64_t b = 0; b < count; ++b) {
    const int64_t k = m.blocks[b];
    Block s = zeros(), g = zeros();
    multiply<U>(s, m.query_rows + q * units, units, 1, m.key_columns + k * units, units);
    for (int i = 0; i < kQueries; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int64_t at = i * size.padded + k + half * Vec::lanes;
        const Vec x = fma(s.v[i][half], splat(scale), splat(-log_sum[i]));
        store(m.p + at, exp(where(mask + at, AllLanes{}, x, splat(-INFINITY))));
      }
    }
    multiply<U>(g, m.grad_rows + q * units, units, 1, m.value_columns + k * units, units);
    for (int i = 0; i < kQueries; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int64_t at = i * size.padded + k + half * Vec::lanes;
        store(m.dp + at, g.v[i][half]);
        inner[i] = fma(load(m.p + at), g.v[i][half], inner[i]);
      }
    }
  }
}

// Two queries that are neighbours in the reduction over queries, one of them in each unit where a unit is a float.
NAPO_INLINE void put_across(float* p, Vec even, Vec odd) {
  store(p, even);
  store(p + kKeys, odd);
}
#if defined(__AVX512BF16__)
NAPO_INLINE void put_across(uint32_t* p, Vec even, Vec odd) { PairUnit::put(p, even, odd); }
#endif

// ds = scale p (dp - sum_k p dp), for the gradient of the group's queries, and p and ds for that of keys and values.
template <class U>
NAPO_INLINE void group_gradient(const BackwardMemory<U>& m, const Sizes& size, float scale, int64_t q, int64_t count,
                                const Vec* inner) {
  for (int i = 0; i < kQueries; i += 2) {
    const Vec sum0 = splat(sum(inner[i])), sum1 = splat(sum(inner[i + 1]));
    const int64_t step = (q % kTile + i) / U::width;
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t j = 0; j < kKeys; j += Vec::lanes) {
        const int64_t even = i * size.padded + m.blocks[b] + j, odd = even + size.padded;
        const int64_t across = m.blocks[b] * (kTile / U::width) + step * kKeys + j;
        const Vec p0 = load(m.p + even), p1 = load(m.p + odd);
        const Vec ds0 = p0 * (load(m.dp + even) - sum0) * splat(scale);
        const Vec ds1 = p1 * (load(m.dp + odd) - sum1) * splat(scale);
        U::put(m.ds + even / U::width, ds0);
        U::put(m.ds + odd / U::width, ds1);
        put_across(m.tile_p + across, p0, p1);
        put_across(m.tile_ds + across, ds0, ds1);
      }
    }
  }
}

template <class U, class T>
NAPO_INLINE void write_query_gradient(const BackwardMemory<U>& m, const Sizes& size, int64_t q, int64_t count, T* dq,
                                      int64_t stride) {
  const int64_t steps = size.padded / U::width;
  for (int64_t c = 0; c < size.columns; c += kKeys) {
    Block total = zeros();
    for (int64_t b = 0; b < count; ++b) {
      const int64_t step = m.blocks[b] / U::width;
      multiply<U>(total, m.ds + step, steps, 1, m.keys + c * steps + step * kKeys, kKeys / U::width);
    }
    write_block(total, q, c, size, dq, stride);
  }
}

NAPO_INLINE void add_block(const Block& block, float* out, int64_t stride) {
  for (int i = 0; i < kQueries; ++i) {
    for (int half = 0; half < 2; ++half) {
      float* at = out + i * stride + half * Vec::lanes;
      store(at, load(at) + block.v[i][half]);
    }
  }
}

// Adds what the tile of queries from `first` on gives to the keys and values in [low, high).
template <class U>
NAPO_INLINE void add_key_gradients(const BackwardMemory<U>& m, const Sizes& size, int64_t first, int64_t low,
                                   int64_t high, float* dk, float* dv) {
  const int64_t steps = size.padded / U::width;
  for (int64_t k = low; k < high; k += kQueries) {
    const int64_t across = k / kKeys * kKeys * (kTile / U::width) + k % kKeys;
    for (int64_t c = 0; c < size.columns; c += kKeys) {
      const int64_t right = c * steps + first / U::width * kKeys;
      Block of_values = zeros(), of_keys = zeros();
      multiply<U>(of_values, m.tile_p + across, 1, kKeys, m.grads + right, kTile / U::width);
      add_block(of_values, dv + k * size.columns + c, size.columns);
      multiply<U>(of_keys, m.tile_ds + across, 1, kKeys, m.queries + right, kTile / U::width);
      add_block(of_keys, dk + k * size.columns + c, size.columns);
    }
  }
}

template <class T>
NAPO_INLINE void write_tokens(const float* x, const Sizes& size, T* out, int64_t stride) {
  for (int64_t t = 0; t < size.length; ++t) {
    for_vectors(0, size.width, [&](int64_t c, auto lanes) NAPO_LAMBDA {
      store(out + t * stride + c, load(x + t * size.columns + c), lanes);
    });
  }
}

template <class U, class T>
void backward(const AttentionBackwardArgs& all, int threads) {
  const AttentionArgs& args = all.attention;
  const Sizes size = sizes_of(args);
  const Tasks tasks = tasks_of(args, threads);
  const int64_t wide = size.padded * size.columns;
  // (tasks, 2, padded, columns): what each task gives to its keys and values
  const Array<float> sums(tasks.count * 2 * wide);
  float* totals = sums.get();
  parallel_for_with(tasks.count, 1, threads, BackwardMemory<U>::bytes(size),
                    [&](int64_t begin, int64_t end, Scratch memory) {
                      const BackwardMemory<U> m(memory, size);
                      for (int64_t task = begin; task < end; ++task) {
                        const auto [row, key_head, first_head, end_head] = tasks[task];
                        pack_rows<U>(tokens_of<T>(args.value, row, key_head), args.value.stride[2], size, m.packed);
                        transpose<U>(m.packed, size, m.value_columns);
                        pack_rows<U>(tokens_of<T>(args.key, row, key_head), args.key.stride[2], size, m.packed);
                        transpose<U>(m.packed, size, m.key_columns);
                        pack_panels(m.packed, size, m.keys);
                        float *dk = totals + task * 2 * wide, *dv = dk + wide;
                        memset(dk, 0, 2 * wide * sizeof(float));
                        for (int64_t head = first_head; head < end_head; ++head) {
                          pack_rows<U>(tokens_of<T>(args.query, row, head), args.query.stride[2], size, m.query_rows);
                          pack_panels(m.query_rows, size, m.queries);
                          pack_rows<U>(tokens_of<T>(all.grad, row, head), all.grad.stride[2], size, m.grad_rows);
                          pack_panels(m.grad_rows, size, m.grads);
                          T* dq = tokens_of<T>(all.d_query, row, head);
                          const float* log_sums = all.lse + (row * args.heads() + head) * size.length;
                          for (int64_t first = 0; first < size.length; first += kTile) {
                            memset(m.tile_p, 0, BackwardMemory<U>::tile(size) * 4);
                            memset(m.tile_ds, 0, BackwardMemory<U>::tile(size) * 4);
                            int64_t low = size.padded, high = 0;  // keys that a query of the tile sees
                            for (int64_t q = first; q < first + kTile && q < size.length; q += kQueries) {
                              const uint8_t* mask = args.mask + (row * size.padded + q) * size.padded;
                              const int64_t count = visible_blocks(mask, size.padded, m.blocks);
                              if (count > 0) {
                                low = m.blocks[0] < low ? m.blocks[0] : low;
                                high = m.blocks[count - 1] + kKeys > high ? m.blocks[count - 1] + kKeys : high;
                              }
                              Vec inner[kQueries];
                              group_probabilities(m, size, args.scale, mask, log_sums, q, count, inner);
                              group_gradient(m, size, args.scale, q, count, inner);
                              write_query_gradient(m, size, q, count, dq, all.d_query.stride[2]);
                            }
                            add_key_gradients(m, size, first, low, high, dk, dv);
                          }
                        }
                      }
                    });
  parallel_for(args.rows() * args.key_heads(), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      float* total = totals + pair * tasks.parts * 2 * wide;
      for (int64_t part = 1; part < tasks.parts; ++part) {
        const float* more = total + part * 2 * wide;
        for (int64_t j = 0; j < 2 * wide; j += Vec::lanes) store(total + j, load(total + j) + load(more + j));
      }
      const int64_t row = pair / args.key_heads(), head = pair % args.key_heads();
      write_tokens(total, size, tokens_of<T>(all.d_key, row, head), all.d_key.stride[2]);
      write_tokens(total + wide, size, tokens_of<T>(all.d_value, row, head), all.d_value.stride[2]);
    }
  });
}

template <class T>
struct UnitOf {
  using type = FloatUnit;
};
#if defined(__AVX512BF16__)
template <>
struct UnitOf<BFloat16> {
  using type = PairUnit;
};
#endif

}  // namespace

void attention_forward(const AttentionForwardArgs& args, int threads) {
  with_dtype(args.attention.query.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    forward<typename UnitOf<T>::type, T>(args, threads);
  });
}

void attention_backward(const AttentionBackwardArgs& args, int threads) {
  with_dtype(args.attention.query.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    backward<typename UnitOf<T>::type, T>(args, threads);
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
