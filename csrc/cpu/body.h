// What stands between the matmuls of a transformer's body, in one pass each: RMSNorm and the gated activation
// silu(gate) * up, with their gradients. Arithmetic in float, rounded where transformers rounds.
#pragma once

#include "cpu/dispatch.h"

namespace napo {

struct RmsNormArgs {
  DType dtype;
  int64_t rows, width;
  const void* x;       // (rows, width)
  const void* weight;  // (width,)
};

}  // namespace napo

// out = weight * round(x * r), r (rows,) = 1 / sqrt(mean(x^2) + eps).
NAPO_DECLARE_KERNEL(rms_norm_forward, (const RmsNormArgs& args, float eps, void* out, float* r, int threads))
// dx = r (w dy - n mean(w dy n)), n = x r; the weight is frozen.
NAPO_DECLARE_KERNEL(rms_norm_backward,
                    (const RmsNormArgs& args, const float* r, const void* grad, void* dx, int threads))
// out = round(silu(gate)) * up
NAPO_DECLARE_KERNEL(silu_product_forward,
                    (DType dtype, int64_t n, const void* gate, const void* up, void* out, int threads))
NAPO_DECLARE_KERNEL(silu_product_backward, (DType dtype, int64_t n, const void* gate, const void* up, const void* grad,
                                            void* d_gate, void* d_up, int threads))
