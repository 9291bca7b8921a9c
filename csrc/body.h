// What stands between the matmuls of a transformer's body, in one pass each: RMSNorm, the gated activation
// silu(gate) * up, and the rotation of queries and keys, with their gradients. Arithmetic in float, rounded where
// transformers rounds, but for the rotation, which is rounded once.
#pragma once

#include "kernels.h"

namespace napo {

struct RmsNormArgs {
  DType dtype;  // of all tensors but r
  int64_t rows, width;
  const void* x;       // (rows, width)
  const void* weight;  // (width,)
  NAPO_FIELDS(RmsNormArgs, dtype, rows, width, x, weight)
};

// out = weight * round(x * r), r = 1 / sqrt(mean(x^2) + eps).
struct RmsNormForwardArgs {
  RmsNormArgs norm;
  float eps;
  void* out;  // (rows, width)
  float* r;   // (rows,) out
  NAPO_FIELDS(RmsNormForwardArgs, norm, eps, out, r)
};

// dx = r (w dy - n mean(w dy n)), n = x r; the weight is frozen.
struct RmsNormBackwardArgs {
  RmsNormArgs norm;
  const float* r;
  const void* grad;  // (rows, width)
  void* dx;          // (rows, width) out
  NAPO_FIELDS(RmsNormBackwardArgs, norm, r, grad, dx)
};

struct SiluProductArgs {
  DType dtype;  // of all tensors
  int64_t n;
  const void* gate;  // (n,)
  const void* up;    // (n,)
  NAPO_FIELDS(SiluProductArgs, dtype, n, gate, up)
};

// out = round(silu(gate)) * up
struct SiluProductForwardArgs {
  SiluProductArgs inputs;
  void* out;  // (n,)
  NAPO_FIELDS(SiluProductForwardArgs, inputs, out)
};

struct SiluProductBackwardArgs {
  SiluProductArgs inputs;
  const void* grad;  // (n,)
  void* d_gate;      // (n,) out
  void* d_up;        // (n,) out
  NAPO_FIELDS(SiluProductBackwardArgs, inputs, grad, d_gate, d_up)
};

// Of each head x = (a, b), halves of equal size: (a cos - b sin, b cos + a sin), or the rotation back, which is the
// gradient.
struct RotationArgs {
  Tensor<4> query;     // (rows, heads, T, d), d even
  Tensor<4> key;       // (rows, key heads, T, d)
  Tensor<3> cos, sin;  // (rows or 1, T, d), of the same strides
  bool back;
  Tensor<4> query_out, key_out;  // out, like query and key
  NAPO_FIELDS(RotationArgs, query, key, cos, sin, back, query_out, key_out)
};

}  // namespace napo

NAPO_CPU_KERNEL(rms_norm_forward, RmsNormForwardArgs)
NAPO_CPU_KERNEL(rms_norm_backward, RmsNormBackwardArgs)
NAPO_CPU_KERNEL(silu_product_forward, SiluProductForwardArgs)
NAPO_CPU_KERNEL(silu_product_backward, SiluProductBackwardArgs)
NAPO_CPU_KERNEL(rotate, RotationArgs)
