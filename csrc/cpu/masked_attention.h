// Attention under a boolean mask that hides most pairs, and its gradient: softmax(scale q k^T + mask) v.
//
// Blocks of keys that a group of queries does not see are skipped, and of a head only one tile of scores exists.
#pragma once

#include "cpu/dispatch.h"

namespace napo {

constexpr int64_t kMaskBlock = 64;  // the mask's sides are padded to a multiple of it

// (rows, heads, T, d): elements of d next to one another, strides in elements.
struct HeadsOf {
  void* data;
  int64_t row, head, token;
};

struct AttentionArgs {
  DType dtype;                                    // of all tensors
  int64_t rows, heads, key_heads, length, width;  // length T, width d
  HeadsOf query, key, value;  // key and value have key_heads heads, each shared by heads / key_heads query heads
  const uint8_t* mask;        // (rows, T padded, T padded), [query][key], 1 where visible, 0 in the padding
  float scale;
};

}  // namespace napo

// Out: `out` like query, lse (rows, heads, T): log of the sum of exponentials, -inf for a query that sees nothing (its
// output is zero).
NAPO_DECLARE_KERNEL_BF16(attention_forward, (const AttentionArgs& args, const HeadsOf& out, float* lse, int threads))
// Out: the gradients of query, key and value.
NAPO_DECLARE_KERNEL_BF16(attention_backward,
                         (const AttentionArgs& args, const HeadsOf& grad, const float* lse, const HeadsOf& d_query,
                          const HeadsOf& d_key, const HeadsOf& d_value, int threads))
