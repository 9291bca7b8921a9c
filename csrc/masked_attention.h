// Attention under a boolean mask that hides most pairs, and its gradient: softmax(scale q k^T + mask) v.
//
// Blocks of keys that a group of queries does not see are skipped, and of a head only one tile of scores exists.
#pragma once

#include "kernels.h"

namespace napo {

constexpr int64_t kMaskBlock = 64;  // the mask's sides are padded to a multiple of it

struct AttentionArgs {
  Tensor<4> query;       // (rows, heads, T, d)
  Tensor<4> key, value;  // (rows, key heads, T, d), each head shared by heads / key_heads query heads
  const uint8_t* mask;   // (rows, T padded, T padded), [query][key], 1 where visible, 0 in the padding
  float scale;
  NAPO_FIELDS(AttentionArgs, query, key, value, mask, scale)
  int64_t rows() const { return query.size[0]; }
  int64_t heads() const { return query.size[1]; }
  int64_t key_heads() const { return key.size[1]; }
  int64_t length() const { return query.size[2]; }
  int64_t width() const { return query.size[3]; }
};

struct AttentionForwardArgs {
  AttentionArgs attention;
  Tensor<4> out;  // like query
  float* lse;  // (rows, heads, T) out: log of the sum of exponentials, -inf (and out 0) for a query that sees nothing
  NAPO_FIELDS(AttentionForwardArgs, attention, out, lse)
};

struct AttentionBackwardArgs {
  AttentionArgs attention;
  Tensor<4> grad;
  const float* lse;
  Tensor<4> d_query, d_key, d_value;  // out
  NAPO_FIELDS(AttentionBackwardArgs, attention, grad, lse, d_query, d_key, d_value)
};

}  // namespace napo

NAPO_CPU_KERNEL_BF16(attention_forward, AttentionForwardArgs)
NAPO_CPU_KERNEL_BF16(attention_backward, AttentionBackwardArgs)
