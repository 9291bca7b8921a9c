// The row kernel behind sequence_logps, for logits that exist already; one label per row. docs/design.md, section 4.1,
// has the equations.
#pragma once

#include "kernels.h"

namespace napo {

struct TokenForwardArgs {
  Tensor<3> logits;       // (S, T, V)
  const int64_t* labels;  // (S, T) contiguous
  int64_t ignore_index;
  float* logp;         // (S, T) out, 0 where ignored
  float* row_max;      // (S, T) out
  float* row_log_sum;  // (S, T) out
  NAPO_FIELDS(TokenForwardArgs, logits, labels, ignore_index, logp, row_max, row_log_sum)
};

struct TokenBackwardArgs {
  TokenForwardArgs forward;  // what forward was given, and what it gave
  const float* grad;         // (S,) upstream, already divided by the count for averages
  Tensor<3> out;             // (S, T, V), may be the logits
  bool out_is_zero;          // rows that are ignored need no write
  NAPO_FIELDS(TokenBackwardArgs, forward, grad, out, out_is_zero)
  void check() const { NAPO_CHECK(out.dtype == forward.logits.dtype, "out: expected the dtype of logits"); }
};

}  // namespace napo

NAPO_CPU_KERNEL_BF16(token_logps_forward, TokenForwardArgs)
NAPO_CPU_KERNEL_BF16(token_logps_backward, TokenBackwardArgs)

NAPO_CUDA_KERNEL(token_logps_forward, TokenForwardArgs)
NAPO_CUDA_KERNEL(token_logps_backward, TokenBackwardArgs)
