"""What stands between the matmuls of a transformer's body, on the CPU, in one pass each.

torch computes RMSNorm in six operations forward and more backward, and the gated activation in two and four; on a CPU
each is a pass over memory. On a GPU a compiler fuses them, so there are no kernels of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from napo_kernels.dispatch import register, room, why_not
from napo_kernels.native import calls

_OP = register("body", "body")


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels compute on these: on the CPU, of one dtype of float32, bfloat16, float16, contiguous."""
    first = tensors[0]
    return (
        first.dtype in calls.DTYPES
        and all(x.is_cpu and x.dtype == first.dtype and x.is_contiguous() for x in tensors)
        and why_not("cpu") is None
        and not torch.compiler.is_compiling()  # which fuses them itself
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (..., H), (H,) -> (..., H)
    """weight * (x / rms(x)), with a gradient for x alone: the weight is frozen. For what `serves` serves."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def silu_product(gate: Tensor, up: Tensor) -> Tensor:  # two of one shape
    """silu(gate) * up, with gradients. For what `serves` serves."""
    out: Tensor = _SiluProduct.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    """Keeps x and one number a row: dx = r (w dy - n mean(w dy n)), n = x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor
        out, r = room("cpu", _OP).rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return room("cpu", _OP).rms_norm_backward(grad.contiguous(), *ctx.saved_tensors), None, None


class _SiluProduct(torch.autograd.Function):
    """Keeps gate and up: silu(gate) is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out: Tensor = room("cpu", _OP).silu_product_forward(gate, up)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        d_gate, d_up = room("cpu", _OP).silu_product_backward(grad.contiguous(), *ctx.saved_tensors)
        return d_gate, d_up
