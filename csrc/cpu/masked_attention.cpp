#include "cpu/masked_attention.h"

#include <stdlib.h>

#include "cpu/attention_blocks.h"
#include "cpu/parallel.h"

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr int64_t kTile = 64;  // queries whose probabilities are kept for the gradient of keys and values
static_assert(kMaskBlock % kKeys == 0 && kMaskBlock % kTile == 0 && kTile % kQueries == 0, "padding covers all blocks");

template <class T>
NAPO_INLINE const T* tokens_of(const HeadsOf& x, int64_t row, int64_t head) {
  return static_cast<const T*>(x.data) + row * x.row + head * x.head;
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

// x where the mask's byte is 1, else `hidden`.
NAPO_INLINE Vec where_visible(const uint8_t* mask, Vec x, float hidden) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(hidden), _mm_test_epi8_mask(bytes, bytes), x.v)};
#else
  float lanes[Vec::lanes];
  store(lanes, x);
  for (int j = 0; j < Vec::lanes; ++j) lanes[j] = mask[j] != 0 ? lanes[j] : hidden;
  return load(lanes);
#endif
}

template <class T>
NAPO_INLINE void write(T* out, Vec x, int64_t room) {
  if (room >= Vec::lanes) {
    store(out, x);
  } else if (room > 0) {
    store(out, x, static_cast<int>(room));
  }
}

// Rows `block` of columns [c, c + kKeys) to `out`, in the tensor's type and as far as it reaches.
template <class T>
NAPO_INLINE void write_block(const Block& block, int64_t first, int64_t c, const Sizes& size, T* out, int64_t stride) {
  for (int64_t i = 0; i < kQueries && first + i < size.length; ++i) {
    T* row = out + (first + i) * stride + c;
    write(row, block.v[i][0], size.width - c);
    write(row + Vec::lanes, block.v[i][1], size.width - c - Vec::lanes);
  }
}

// Memory of one task, handed out piece by piece.
struct Arena {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

NAPO_INLINE Sizes sizes_of(const AttentionArgs& args) {
  return {args.length, up(args.length, kMaskBlock), args.width, up(args.width, kKeys)};
}

// A task is a key head of a row with some of its query heads: all of them where there are enough tasks for the threads.
struct Tasks {
  int64_t parts, count, heads;  // parts of a key head's queries, tasks, query heads of a task
};
NAPO_INLINE Tasks tasks_of(const AttentionArgs& args, int threads) {
  const int64_t group = args.heads / args.key_heads, pairs = args.rows * args.key_heads;
  const int64_t parts = pairs >= 4 * threads ? 1 : group;
  return {parts, pairs * parts, group / parts};
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class U, class T>
void forward(const AttentionArgs& args, const HeadsOf& out, float* lse, int threads) {
  using Unit = typename U::type;
  const Sizes size = sizes_of(args);
  const Tasks tasks = tasks_of(args, threads);
  const int64_t units = size.columns / U::width, steps = size.padded / U::width;
  const int64_t matrix = up(size.padded * size.columns * 4 / U::width, 64);
  const int64_t bytes = 4 * matrix + kQueries * size.padded * 8 + up(size.padded / kKeys * 4, 64) + 64;
  parallel_for(tasks.count, 1, threads, [&](int64_t begin, int64_t end) {
    char* memory = static_cast<char*>(aligned_alloc(64, up(bytes, 64)));
    for (int64_t task = begin; task < end; ++task) {
      Arena arena{memory};
      Unit* packed = arena.take<Unit>(matrix / 4);
      Unit* keys = arena.take<Unit>(matrix / 4);
      Unit* values = arena.take<Unit>(matrix / 4);
      Unit* queries = arena.take<Unit>(matrix / 4);
      float* scores = arena.take<float>(kQueries * size.padded);
      Unit* probabilities = arena.take<Unit>(kQueries * steps);
      int32_t* blocks = arena.take<int32_t>(size.padded / kKeys);

      const int64_t pair = task / tasks.parts, row = pair / args.key_heads, key_head = pair % args.key_heads;
      pack_rows<U>(tokens_of<T>(args.key, row, key_head), args.key.token, size, packed);
      transpose<U>(packed, size, keys);
      pack_rows<U>(tokens_of<T>(args.value, row, key_head), args.value.token, size, packed);
      pack_panels(packed, size, values);
      const int64_t first_head = (pair % args.key_heads * tasks.parts + task % tasks.parts) * tasks.heads;
      for (int64_t head = first_head; head < first_head + tasks.heads; ++head) {
        pack_rows<U>(tokens_of<T>(args.query, row, head), args.query.token, size, queries);
        T* o = static_cast<T*>(out.data) + row * out.row + head * out.head;
        float* log_sums = lse + (row * args.heads + head) * size.length;
        for (int64_t q = 0; q < size.length; q += kQueries) {
          const uint8_t* mask = args.mask + (row * size.padded + q) * size.padded;
          const int64_t count = visible_blocks(mask, size.padded, blocks);
          Vec most[kQueries];
          for (int i = 0; i < kQueries; ++i) most[i] = splat(-INFINITY);
          for (int64_t b = 0; b < count; ++b) {
            const int64_t k = blocks[b];
            Block s = zeros();
            multiply<U>(s, queries + q * units, units, 1, keys + k * units, units);
            for (int i = 0; i < kQueries; ++i) {
              for (int half = 0; half < 2; ++half) {
                const int64_t at = k + half * Vec::lanes;
                const Vec x = where_visible(mask + i * size.padded + at, s.v[i][half] * splat(args.scale), -INFINITY);
                store(scores + i * size.padded + at, x);
                most[i] = max(most[i], x);
              }
            }
          }
          float inverse[kQueries];
          for (int i = 0; i < kQueries; ++i) {
            const float top = largest(most[i]);
            const Vec shift = splat(top == -INFINITY ? 0.0f : top);
            Vec total = splat(0.0f);
            for (int64_t b = 0; b < count; ++b) {
              for (int64_t at = blocks[b]; at < blocks[b] + kKeys; at += Vec::lanes) {
                const Vec p = exp(load(scores + i * size.padded + at) - shift);
                total = total + p;
                U::put(probabilities + i * steps + at / U::width, p);
              }
            }
            const float whole = sum(total);
            inverse[i] = whole > 0.0f ? 1.0f / whole : 0.0f;
            if (q + i < size.length) log_sums[q + i] = whole > 0.0f ? top + logf(whole) : -INFINITY;
          }
          for (int64_t c = 0; c < size.columns; c += kKeys) {
            Block sum = zeros();
            for (int64_t b = 0; b < count; ++b) {
              const int64_t s = blocks[b] / U::width;
              multiply<U>(sum, probabilities + s, steps, 1, values + c * steps + s * kKeys, kKeys / U::width);
            }
            for (int i = 0; i < kQueries; ++i) {
              for (int half = 0; half < 2; ++half) sum.v[i][half] = sum.v[i][half] * splat(inverse[i]);
            }
            write_block(sum, q, c, size, o, out.token);
          }
        }
      }
    }
    free(memory);
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// A row of the right operand's columns from two neighbours along the reduction (one of them where a unit is a float).
NAPO_INLINE void put_across(float* p, int64_t row, Vec even, Vec odd) {
  store(p, even);
  store(p + row, odd);
}
#if defined(__AVX512BF16__)
NAPO_INLINE void put_across(uint32_t* p, int64_t, Vec even, Vec odd) { PairUnit::put(p, even, odd); }
#endif

NAPO_INLINE void add_block(const Block& block, float* out, int64_t stride) {
  for (int i = 0; i < kQueries; ++i) {
    for (int half = 0; half < 2; ++half) {
      float* at = out + i * stride + half * Vec::lanes;
      store(at, load(at) + block.v[i][half]);
    }
  }
}

template <class T>
NAPO_INLINE void write_tokens(const float* x, const Sizes& size, T* out, int64_t stride) {
  for (int64_t t = 0; t < size.length; ++t) {
    for (int64_t c = 0; c < size.width; c += Vec::lanes) {
      write(out + t * stride + c, load(x + t * size.columns + c), size.width - c);
    }
  }
}

template <class U, class T>
void backward(const AttentionArgs& args, const HeadsOf& grad, const float* lse, const HeadsOf& d_query,
              const HeadsOf& d_key, const HeadsOf& d_value, int threads) {
  using Unit = typename U::type;
  const Sizes size = sizes_of(args);
  const Tasks tasks = tasks_of(args, threads);
  const int64_t units = size.columns / U::width, steps = size.padded / U::width;
  const int64_t matrix = up(size.padded * size.columns * 4 / U::width, 64);
  const int64_t wide = size.padded * size.columns;  // floats of a gradient
  const int64_t tile = kTile / U::width * size.padded;
  const int64_t bytes = 8 * matrix + 2 * kQueries * size.padded * 4 + kQueries * steps * 4 + 2 * tile * 4 +
                        up(size.padded / kKeys * 4, 64) + 64;
  // (tasks, 2, padded, columns): what each task adds to the gradients of its keys and values
  float* sums = static_cast<float*>(aligned_alloc(64, up(tasks.count * 2 * wide * 4, 64)));
  parallel_for(tasks.count, 1, threads, [&](int64_t begin, int64_t end) {
    char* memory = static_cast<char*>(aligned_alloc(64, up(bytes, 64)));
    for (int64_t task = begin; task < end; ++task) {
      Arena arena{memory};
      Unit* packed = arena.take<Unit>(matrix / 4);
      Unit* key_columns = arena.take<Unit>(matrix / 4);  // tokens as columns
      Unit* value_columns = arena.take<Unit>(matrix / 4);
      Unit* keys = arena.take<Unit>(matrix / 4);  // d as columns
      Unit* query_rows = arena.take<Unit>(matrix / 4);
      Unit* queries = arena.take<Unit>(matrix / 4);
      Unit* grad_rows = arena.take<Unit>(matrix / 4);
      Unit* grads = arena.take<Unit>(matrix / 4);
      float* p = arena.take<float>(kQueries * size.padded);
      float* dp = arena.take<float>(kQueries * size.padded);
      Unit* ds = arena.take<Unit>(kQueries * steps);
      Unit* tile_p = arena.take<Unit>(tile);  // (padded / kKeys, kTile / width, kKeys)
      Unit* tile_ds = arena.take<Unit>(tile);
      int32_t* blocks = arena.take<int32_t>(size.padded / kKeys);

      const int64_t pair = task / tasks.parts, row = pair / args.key_heads, key_head = pair % args.key_heads;
      pack_rows<U>(tokens_of<T>(args.value, row, key_head), args.value.token, size, packed);
      transpose<U>(packed, size, value_columns);
      pack_rows<U>(tokens_of<T>(args.key, row, key_head), args.key.token, size, packed);
      transpose<U>(packed, size, key_columns);
      pack_panels(packed, size, keys);
      float* sum_k = sums + task * 2 * wide;
      float* sum_v = sum_k + wide;
      memset(sum_k, 0, 2 * wide * sizeof(float));
      const int64_t first_head = (pair % args.key_heads * tasks.parts + task % tasks.parts) * tasks.heads;
      for (int64_t head = first_head; head < first_head + tasks.heads; ++head) {
        pack_rows<U>(tokens_of<T>(args.query, row, head), args.query.token, size, query_rows);
        pack_panels(query_rows, size, queries);
        pack_rows<U>(tokens_of<T>(grad, row, head), grad.token, size, grad_rows);
        pack_panels(grad_rows, size, grads);
        T* dq = static_cast<T*>(d_query.data) + row * d_query.row + head * d_query.head;
        const float* log_sums = lse + (row * args.heads + head) * size.length;
        for (int64_t first = 0; first < size.length; first += kTile) {
          memset(tile_p, 0, tile * sizeof(Unit));
          memset(tile_ds, 0, tile * sizeof(Unit));
          int64_t low = size.padded, high = 0;  // keys that a query of the tile sees
          for (int64_t q = first; q < first + kTile && q < size.length; q += kQueries) {
            const uint8_t* mask = args.mask + (row * size.padded + q) * size.padded;
            const int64_t count = visible_blocks(mask, size.padded, blocks);
            if (count == 0) {
              for (int64_t c = 0; c < size.columns; c += kKeys) write_block(zeros(), q, c, size, dq, d_query.token);
              continue;
            }
            low = blocks[0] < low ? blocks[0] : low;
            high = blocks[count - 1] + kKeys > high ? blocks[count - 1] + kKeys : high;
            Vec inner[kQueries];  // sum_k p dp
            float log_sum[kQueries];
            for (int i = 0; i < kQueries; ++i) {
              inner[i] = splat(0.0f);
              log_sum[i] = q + i < size.length && log_sums[q + i] > -INFINITY ? log_sums[q + i] : 0.0f;
            }
            for (int64_t b = 0; b < count; ++b) {
              const int64_t k = blocks[b];
              Block s = zeros();
              multiply<U>(s, query_rows + q * units, units, 1, key_columns + k * units, units);
              for (int i = 0; i < kQueries; ++i) {
                for (int half = 0; half < 2; ++half) {
                  const int64_t at = k + half * Vec::lanes;
                  const Vec x = fma(s.v[i][half], splat(args.scale), splat(-log_sum[i]));
                  store(p + i * size.padded + at, exp(where_visible(mask + i * size.padded + at, x, -INFINITY)));
                }
              }
              Block g = zeros();
              multiply<U>(g, grad_rows + q * units, units, 1, value_columns + k * units, units);
              for (int i = 0; i < kQueries; ++i) {
                for (int half = 0; half < 2; ++half) {
                  const int64_t at = i * size.padded + k + half * Vec::lanes;
                  store(dp + at, g.v[i][half]);
                  inner[i] = fma(load(p + at), g.v[i][half], inner[i]);
                }
              }
            }
            for (int i = 0; i < kQueries; i += 2) {
              const Vec delta0 = splat(sum(inner[i])), delta1 = splat(sum(inner[i + 1])), scale = splat(args.scale);
              const int64_t step = (q - first + i) / U::width;
              for (int64_t b = 0; b < count; ++b) {
                for (int64_t k = blocks[b]; k < blocks[b] + kKeys; k += Vec::lanes) {
                  const int64_t even = i * size.padded + k, odd = even + size.padded;
                  const Vec p0 = load(p + even), p1 = load(p + odd);
                  const Vec ds0 = p0 * (load(dp + even) - delta0) * scale;
                  const Vec ds1 = p1 * (load(dp + odd) - delta1) * scale;
                  U::put(ds + i * steps + k / U::width, ds0);
                  U::put(ds + (i + 1) * steps + k / U::width, ds1);
                  const int64_t at = blocks[b] * (kTile / U::width) + step * kKeys + (k - blocks[b]);
                  put_across(tile_p + at, kKeys, p0, p1);
                  put_across(tile_ds + at, kKeys, ds0, ds1);
                }
              }
            }
            for (int64_t c = 0; c < size.columns; c += kKeys) {
              Block total = zeros();
              for (int64_t b = 0; b < count; ++b) {
                const int64_t s = blocks[b] / U::width;
                multiply<U>(total, ds + s, steps, 1, keys + c * steps + s * kKeys, kKeys / U::width);
              }
              write_block(total, q, c, size, dq, d_query.token);
            }
          }
          for (int64_t k = low; k < high; k += kQueries) {
            const int64_t at = k / kKeys * kKeys * (kTile / U::width) + k % kKeys;
            for (int64_t c = 0; c < size.columns; c += kKeys) {
              const int64_t right = c * steps + first / U::width * kKeys;
              Block total = zeros();
              multiply<U>(total, tile_p + at, 1, kKeys, grads + right, kTile / U::width);
              add_block(total, sum_v + k * size.columns + c, size.columns);
              total = zeros();
              multiply<U>(total, tile_ds + at, 1, kKeys, queries + right, kTile / U::width);
              add_block(total, sum_k + k * size.columns + c, size.columns);
            }
          }
        }
      }
    }
    free(memory);
  });
  parallel_for(args.rows * args.key_heads, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      float* total = sums + pair * tasks.parts * 2 * wide;
      for (int64_t part = 1; part < tasks.parts; ++part) {
        const float* more = total + part * 2 * wide;
        for (int64_t j = 0; j < 2 * wide; j += Vec::lanes) store(total + j, load(total + j) + load(more + j));
      }
      const int64_t row = pair / args.key_heads, head = pair % args.key_heads;
      write_tokens(total, size, static_cast<T*>(d_key.data) + row * d_key.row + head * d_key.head, d_key.token);
      write_tokens(total + wide, size, static_cast<T*>(d_value.data) + row * d_value.row + head * d_value.head,
                   d_value.token);
    }
  });
  free(sums);
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

void attention_forward(const AttentionArgs& args, const HeadsOf& out, float* lse, int threads) {
  with_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    forward<typename UnitOf<T>::type, T>(args, out, lse, threads);
  });
}

void attention_backward(const AttentionArgs& args, const HeadsOf& grad, const float* lse, const HeadsOf& d_query,
                        const HeadsOf& d_key, const HeadsOf& d_value, int threads) {
  with_dtype(args.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    backward<typename UnitOf<T>::type, T>(args, grad, lse, d_query, d_key, d_value, threads);
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
