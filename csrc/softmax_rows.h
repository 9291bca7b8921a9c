// The row kernel behind sequence_logps and linear_sequence_logps: log-sum-exp over the columns that are no target of
// the row, log-probs of the targets, and the two forms of the gradient. DESIGN.md 4.1 and 4.2 have the equations.
#pragma once

#include "kernels.h"

namespace napo {

// z = softcap * tanh((scale * a + bias) / softcap) for the raw logit a; softcap 0 stands for none.
struct LogitMap {
  float scale;
  const float* bias;  // (V,) or null
  float softcap;
  NAPO_FIELDS(LogitMap, scale, bias, softcap)
  void check() const {
    NAPO_CHECK(softcap >= 0.0f, "softcap: expected 0 for none or a positive number, got %g", softcap);
  }
};

// Distinct targets of row r: columns[start[r]] ... columns[start[r + 1] - 1], ascending.
struct Targets {
  const int64_t* start;    // (R + 1,)
  const int64_t* columns;  // (Q,)
  NAPO_FIELDS(Targets, start, columns)
};

// Dot products of the targets alone, in fp32 where the matmul would round them.
struct TargetLogitsArgs {
  DType dtype;
  const void* hidden;  // (R, H)
  int64_t hidden_stride;
  const void* weight;  // (V, H)
  int64_t weight_stride;
  int64_t rows, width;
  const void* low;     // (R, r) hidden A^T of LoRA, or null
  const void* lora_b;  // (V, r)
  int64_t low_stride, lora_b_stride, rank;
  float lora_scale;
  Targets targets;
  LogitMap map;
  float* z;      // (Q,) out
  float* slope;  // (Q,) out: dz/da / scale
  NAPO_FIELDS(TargetLogitsArgs, dtype, hidden, hidden_stride, weight, weight_stride, rows, width, low, lora_b,
              low_stride, lora_b_stride, rank, lora_scale, targets, map, z, slope)
};

// Rows [first_row, first_row + rows) of the logits: statistics and target log-probs, and where `out` is given
// out = store_scale * exp(z - m) * slope, 0 at the targets, where m is the largest z of no target, or on CUDA near it.
// On the CPU out is the logits' own memory or null; on CUDA it may have another dtype.
struct ForwardArgs {
  DType dtype;
  const void* logits;  // (rows, V)
  int64_t logits_stride;
  DType out_dtype;
  void* out;  // (rows, V) or null
  int64_t out_stride, first_row, rows, columns;
  Targets targets;
  LogitMap map;
  const float* target_z;  // (Q,)
  float* target_logp;     // (Q,) out
  float* row_max;         // (R,) out: m and l = log(sum(exp(z - m))) over all columns
  float* row_log_sum;     // (R,) out
  float* store_rescale;   // (R,) out: what turns the stored numbers into p * slope
  float store_scale;
  NAPO_FIELDS(ForwardArgs, dtype, logits, logits_stride, out_dtype, out, out_stride, first_row, rows, columns, targets,
              map, target_z, target_logp, row_max, row_log_sum, store_rescale, store_scale)
  void check() const { NAPO_CHECK(store_scale > 0.0f, "store_scale: expected a positive number, got %g", store_scale); }
};

// The same where the columns come in pieces, in order: here [first_column, first_column + columns) of the logits, and
// `out` is relative to the largest z of no target in these columns. The last piece fills what ForwardArgs gives.
struct ColumnsArgs {
  ForwardArgs forward;  // bias, targets and statistics as there
  int64_t first_column, vocabulary;
  float* max;   // (rows,) in and out: m and sum(exp(z - m)) of the columns so far that are no target
  double* sum;  // (rows,) in and out
  float* keep;  // (rows,) out: exp(m before - m), what this piece makes of the sums so far
  float* gain;  // (rows,) out: exp(m of this piece - m), what its stored numbers count for
  NAPO_FIELDS(ColumnsArgs, forward, first_column, vocabulary, max, sum, keep, gain)
};

// total = keep * total + gain * product, row by row.
struct ColumnsAddArgs {
  DType dtype;
  float* total;         // (rows, H) contiguous
  const void* product;  // (rows, H) contiguous
  int64_t rows, width;
  const float* keep;  // (rows,)
  const float* gain;  // (rows,)
  NAPO_FIELDS(ColumnsAddArgs, dtype, total, product, rows, width, keep, gain)
};

// Columns [first_column, first_column + columns) of the logits of all rows; out is the gradient with respect to
// scale * a + bias. On the CPU out is the logits' own memory.
struct GradientArgs {
  DType dtype;
  const void* logits;  // (R, columns)
  int64_t logits_stride;
  DType out_dtype;
  void* out;  // (R, columns)
  int64_t out_stride, rows, first_column, columns;
  Targets targets;
  LogitMap map;               // bias points at first_column
  const float* row_max;       // (R,)
  const float* row_log_sum;   // (R,)
  const float* target_logp;   // (Q,)
  const float* target_slope;  // (Q,)
  const float* target_grad;   // (Q,) upstream gradient of each distinct target
  NAPO_FIELDS(GradientArgs, dtype, logits, logits_stride, out_dtype, out, out_stride, rows, first_column, columns,
              targets, map, row_max, row_log_sum, target_logp, target_slope, target_grad)
};

// dh_r = scale * (sum_v (G_v (1 - p_v) - (G_r - G_v) p_v) slope_v W_v - G_r store_rescale_r context_r)
struct HiddenGradientArgs {
  DType dtype;
  const void* weight;  // (V, H)
  int64_t weight_stride;
  const void* context;  // (R, H) contiguous, or null: the sum over targets alone
  int64_t rows, width;
  Targets targets;
  const float* store_rescale;  // (R,)
  const float* target_logp;    // (Q,)
  const float* target_slope;   // (Q,)
  const float* target_grad;    // (Q,)
  float scale;
  DType out_dtype;
  void* out;  // (R, H) contiguous
  NAPO_FIELDS(HiddenGradientArgs, dtype, weight, weight_stride, context, rows, width, targets, store_rescale,
              target_logp, target_slope, target_grad, scale, out_dtype, out)
  void check() const {
    NAPO_CHECK(out_dtype == dtype || out_dtype == DType::f32, "out_dtype: expected float32 or the dtype of weight");
  }
};

// Logits that exist already; one label a row.
struct TokenForwardArgs {
  DType dtype;
  const void* logits;  // (S, T, V), unit stride along V
  int64_t stride_s, stride_t, sequences, tokens, columns;
  const int64_t* labels;  // (S, T) contiguous
  int64_t ignore_index;
  float* logp;         // (S, T) out, 0 where ignored
  float* row_max;      // (S, T) out
  float* row_log_sum;  // (S, T) out
  NAPO_FIELDS(TokenForwardArgs, dtype, logits, stride_s, stride_t, sequences, tokens, columns, labels, ignore_index,
              logp, row_max, row_log_sum)
};

struct TokenBackwardArgs {
  DType dtype;
  const void* logits;
  int64_t stride_s, stride_t, sequences, tokens, columns;
  const int64_t* labels;
  int64_t ignore_index;
  const float* logp;
  const float* row_max;
  const float* row_log_sum;
  const float* grad;  // (S,) upstream, already divided by the count for averages
  void* out;          // (S, T, V), may be logits itself
  int64_t out_stride_s, out_stride_t;
  bool out_is_zero;  // rows that are ignored need no write
  NAPO_FIELDS(TokenBackwardArgs, dtype, logits, stride_s, stride_t, sequences, tokens, columns, labels, ignore_index,
              logp, row_max, row_log_sum, grad, out, out_stride_s, out_stride_t, out_is_zero)
};

}  // namespace napo

NAPO_CPU_KERNEL_BF16(target_logits, TargetLogitsArgs)
NAPO_CPU_KERNEL_BF16(softmax_rows_forward, ForwardArgs)
NAPO_CPU_KERNEL_BF16(softmax_columns_forward, ColumnsArgs)
NAPO_CPU_KERNEL_BF16(softmax_columns_add, ColumnsAddArgs)
NAPO_CPU_KERNEL_BF16(softmax_rows_gradient, GradientArgs)
NAPO_CPU_KERNEL_BF16(hidden_gradient, HiddenGradientArgs)
NAPO_CPU_KERNEL_BF16(token_logps_forward, TokenForwardArgs)
NAPO_CPU_KERNEL_BF16(token_logps_backward, TokenBackwardArgs)

NAPO_CUDA_KERNEL(target_logits, TargetLogitsArgs)
NAPO_CUDA_KERNEL(softmax_rows_forward, ForwardArgs)
NAPO_CUDA_KERNEL(softmax_rows_gradient, GradientArgs)
NAPO_CUDA_KERNEL(hidden_gradient, HiddenGradientArgs)
NAPO_CUDA_KERNEL(token_logps_forward, TokenForwardArgs)
NAPO_CUDA_KERNEL(token_logps_backward, TokenBackwardArgs)
