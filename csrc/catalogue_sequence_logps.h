// Log-probabilities over the tokens that each row allows: the logits of a block of rows, their statistics, and the
// gradient of the logits.
//
// A block's rows share their columns, whose products with the hidden states are then a matmul of torch's, or each row
// has columns of its own, whose products are computed here: gathered rows of the weight, nothing copied.
#pragma once

#include "kernels.h"

namespace napo {

struct AllowedBlockArgs {
  int64_t count, width, hidden_width;  // rows, logits of each, H
  const float* hidden;                 // (R, H)
  const float* weight;                 // (U, H)
  const int64_t* rows;                 // (count,) of hidden
  const int64_t* columns;              // (width,) of weight, or (count, width) where there are sizes
  const int64_t* sizes;                // (count,) or null: the logits of a row that count, the first ones
  float logit_scale;
  NAPO_FIELDS(AllowedBlockArgs, count, width, hidden_width, hidden, weight, rows, columns, sizes, logit_scale)
};

// z = softcap * tanh((logit_scale * h w + bias) / softcap), -inf where a logit does not count; m and log(1 + rest) with
// rest the sum of exp(z - m) over all but the largest.
struct AllowedForwardArgs {
  AllowedBlockArgs block;
  const float* bias;  // (U,) or null
  float softcap;      // 0: none
  float* z;           // (count, width) in (the products, without sizes) and out
  float* slope;       // (count, width) out: dz / d(logit_scale * h w + bias); null without a softcap
  float* row_max;     // (count,) out
  float* log_sum;     // (count,) out
  NAPO_FIELDS(AllowedForwardArgs, block, bias, softcap, z, slope, row_max, log_sum)
};

// dz_c = (G_c (1 - p_c) - (G - G_c) p_c) slope_c, G_c over the pairs whose target is c, G over all of the row; and
// where rows have columns of their own dh = logit_scale * sum_c dz_c w_c.
struct AllowedBackwardArgs {
  AllowedBlockArgs block;
  const float* z;           // (count, width)
  const float* slope;       // (count, width) or null
  const float* row_max;     // (count,)
  const float* log_sum;     // (count,)
  const float* place_grad;  // (count, width) G_c
  const float* row_grad;    // (count,) G
  float* dz;                // (count, width) out
  float* hidden_grad;       // (R, H) out, the block's rows; null: not wanted, or no sizes
  NAPO_FIELDS(AllowedBackwardArgs, block, z, slope, row_max, log_sum, place_grad, row_grad, dz, hidden_grad)
};

}  // namespace napo

NAPO_CPU_KERNEL(allowed_forward, AllowedForwardArgs)
NAPO_CPU_KERNEL(allowed_backward, AllowedBackwardArgs)
