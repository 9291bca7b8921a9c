// Attention under a boolean mask that hides most pairs, and its gradient: softmax(scale q k^T + mask) v.
//
// Blocks of keys that a group of queries does not see are skipped, and of a head only one tile of scores exists.
#pragma once

#include "kernels.h"

namespace napo {

constexpr int64_t kMaskBlock = 64;  // the mask's sides are padded to a multiple of it

// (rows, heads, T, d): elements of d next to one another, strides in elements. Comes as the tensor itself.
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
  NAPO_FIELDS(AttentionArgs, dtype, rows, heads, key_heads, length, width, query, key, value, mask, scale)
};

struct AttentionForwardArgs {
  AttentionArgs attention;
  HeadsOf out;  // like query
  float* lse;   // (rows, heads, T) out: log of the sum of exponentials, -inf (and out 0) for a query that sees nothing
  NAPO_FIELDS(AttentionForwardArgs, attention, out, lse)
};

struct AttentionBackwardArgs {
  AttentionArgs attention;
  HeadsOf grad;
  const float* lse;
  HeadsOf d_query, d_key, d_value;  // out
  NAPO_FIELDS(AttentionBackwardArgs, attention, grad, lse, d_query, d_key, d_value)
};

}  // namespace napo

NAPO_CPU_KERNEL_BF16(attention_forward, AttentionForwardArgs)
NAPO_CPU_KERNEL_BF16(attention_backward, AttentionBackwardArgs)
