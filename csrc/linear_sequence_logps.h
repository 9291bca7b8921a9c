// The row kernel behind linear_sequence_logps: log-sum-exp over the columns that are no target of the row, log-probs of
// the targets, and the two forms of the gradient. docs/design.md, section 4.2, has the equations.
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

// Results of forward that backward needs.
struct RowStats {
  float* target_logp;    // (Q,)
  float* target_slope;   // (Q,) dz/da / scale
  float* row_max;        // (R,) m and l = log(sum(exp(z - m))) over all columns
  float* row_log_sum;    // (R,)
  float* store_rescale;  // (R,) turns the stored numbers into p * slope
  NAPO_FIELDS(RowStats, target_logp, target_slope, row_max, row_log_sum, store_rescale)
};

// The low-rank part of the logits, scale * low B^T; null tensors without LoRA.
struct LowRank {
  Tensor<2> low;     // (R, r) hidden A^T
  Tensor<2> lora_b;  // (V, r)
  float scale;
  NAPO_FIELDS(LowRank, low, lora_b, scale)
};

// Dot products of the targets only, in fp32 where the matmul would round them.
struct TargetLogitsArgs {
  Tensor<2> hidden;  // (R, H)
  Tensor<2> weight;  // (V, H)
  LowRank low_rank;
  Targets targets;
  LogitMap logit_map;
  float* z;      // (Q,) out
  float* slope;  // (Q,) out: dz/da / scale
  NAPO_FIELDS(TargetLogitsArgs, hidden, weight, low_rank, targets, logit_map, z, slope)
};

// Arguments of forward that are the same for all pieces of the logits.
struct RowsProblem {
  Targets targets;
  LogitMap logit_map;
  const float* target_z;  // (Q,)
  RowStats stats;         // out, but for target_slope
  float store_scale;
  int64_t vocabulary;
  NAPO_FIELDS(RowsProblem, targets, logit_map, target_z, stats, store_scale, vocabulary)
  void check() const { NAPO_CHECK(store_scale > 0.0f, "store_scale: expected a positive number, got %g", store_scale); }
};

// Rows from first_row on: statistics and target log-probs, and where `out` is given
// out = store_scale * exp(z - m) * slope, 0 at the targets, where m is the largest z of no target, or on CUDA near it.
// On the CPU out is the logits' own memory or null; on CUDA it may have another dtype.
struct ForwardArgs {
  Tensor<2> logits;  // (rows, V)
  Tensor<2> out;     // (rows, V) or null
  int64_t first_row;
  RowsProblem problem;
  NAPO_FIELDS(ForwardArgs, logits, out, first_row, problem)
};

// Sums of the rows over the columns so far that are no target, (rows,) each.
struct Carried {
  float* row_max;   // in and out: m
  double* row_sum;  // in and out: sum(exp(z - m))
  float* keep;      // out: exp(m before - m), what this piece makes of the sums so far
  float* gain;      // out: exp(m of this piece - m), what its stored numbers count for
  NAPO_FIELDS(Carried, row_max, row_sum, keep, gain)
};

// As above, where the columns come in pieces, in order: here the logits are columns first_column and on, and `out` is
// relative to the largest z of no target in these columns. The last piece fills what ForwardArgs gives.
struct ColumnsArgs {
  ForwardArgs forward;
  int64_t first_column;
  Carried carried;
  NAPO_FIELDS(ColumnsArgs, forward, first_column, carried)
};

// total = keep * total + gain * product, row by row.
struct ColumnsAddArgs {
  float* total;       // (rows, H) contiguous
  Tensor<2> product;  // (rows, H)
  Carried carried;
  NAPO_FIELDS(ColumnsAddArgs, total, product, carried)
};

// Arguments that all backward kernels share.
struct Upstream {
  Targets targets;
  RowStats stats;
  const float* target_grad;  // (Q,) upstream gradient of each distinct target
  NAPO_FIELDS(Upstream, targets, stats, target_grad)
};

// Columns from first_column on of the logits of all rows; out is the gradient with respect to scale * a + bias. On the
// CPU out is the logits' own memory.
struct GradientArgs {
  Tensor<2> logits;  // (R, columns)
  Tensor<2> out;     // (R, columns)
  int64_t first_column;
  LogitMap logit_map;
  Upstream upstream;
  NAPO_FIELDS(GradientArgs, logits, out, first_column, logit_map, upstream)
};

// dh_r = scale * (sum_v (G_v (1 - p_v) - (G_r - G_v) p_v) slope_v W_v - G_r store_rescale_r context_r)
struct HiddenGradientArgs {
  Tensor<2> out;      // (R, H) contiguous
  Tensor<2> weight;   // (V, H)
  Tensor<2> context;  // (R, H) contiguous, or null: only the sum over targets
  Upstream upstream;
  float scale;
  NAPO_FIELDS(HiddenGradientArgs, out, weight, context, upstream, scale)
  void check() const {
    NAPO_CHECK(out.dtype == weight.dtype || out.dtype == DType::f32, "out: expected float32 or the dtype of weight");
  }
};

}  // namespace napo

NAPO_CPU_KERNEL_BF16(target_logits, TargetLogitsArgs)
NAPO_CPU_KERNEL_BF16(softmax_rows_forward, ForwardArgs)
NAPO_CPU_KERNEL_BF16(softmax_columns_forward, ColumnsArgs)
NAPO_CPU_KERNEL_BF16(softmax_columns_add, ColumnsAddArgs)
NAPO_CPU_KERNEL_BF16(softmax_rows_gradient, GradientArgs)
NAPO_CPU_KERNEL_BF16(hidden_gradient, HiddenGradientArgs)

NAPO_CUDA_KERNEL(target_logits, TargetLogitsArgs)
NAPO_CUDA_KERNEL(softmax_rows_forward, ForwardArgs)
NAPO_CUDA_KERNEL(softmax_rows_gradient, GradientArgs)
NAPO_CUDA_KERNEL(hidden_gradient, HiddenGradientArgs)
