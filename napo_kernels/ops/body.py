"""The operations between the matmuls of a transformer's body, in one pass each: RMSNorm, the gated activation, and the
rotation of queries and keys.

torch computes RMSNorm in six operations forward and more backward, the gated activation in two and four, the rotation
in ten and more. On a CPU each is a pass over memory; on a GPU each is a launch, and launches are what a training step
waits for. CPU: the compiled module; GPU: Triton.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from napo_kernels.checks import describe
from napo_kernels.dispatch import register, room, why_not
from napo_kernels.native import calls
from napo_kernels.ops.registration import refuse_graph

_OP = register("body")
WIDEST = 16384  # columns of a row that a GPU kernel holds at once


def serves(*tensors: Tensor) -> bool:
    """Whether `rms_norm` and `silu_product` compute on these: on one device, a CPU or a GPU with Triton, of one dtype
    of float32, bfloat16, float16, contiguous and stored as they are: a kernel
    does not see the sign of torch's lazy negatives."""
    first = tensors[0]
    return (
        all(isinstance(x, Tensor) for x in tensors)
        and _has_kernels(first)
        and first.ndim > 0
        and first.shape[-1] > 0
        and (first.is_cpu or first.shape[-1] <= WIDEST)
        and all(x.device == first.device and x.dtype == first.dtype and x.is_contiguous() for x in tensors)
        and not any(x.is_neg() for x in tensors)
    )


def rotates(x: Tensor) -> bool:
    """Whether there is a kernel for `rotate` where `x` lies."""
    return _has_kernels(x)


def serves_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` computes on these: on one device, of one dtype, heads dense, of even size and rotated whole."""
    return (
        rotates(q)
        and all(x.device == q.device and x.dtype == q.dtype and x.stride(-1) == 1 for x in (k, cos, sin))
        and q.ndim == k.ndim == 4
        and k.shape[0] == q.shape[0]
        and k.shape[2:] == q.shape[2:]
        and q.stride(-1) == 1
        and q.shape[-1] % 2 == 0
        and cos.ndim == 3
        and cos.shape == sin.shape
        and cos.stride() == sin.stride()
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1:] == (q.shape[2], q.shape[3])
        and not cos.requires_grad
        and not any(x.is_neg() for x in (q, k, cos, sin))
    )


def _has_kernels(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # it fuses them itself; first, because it cannot trace the checks below
        and x.dtype in calls.DTYPES
        and (why_not("cpu") is None if x.is_cpu else x.is_cuda and why_not("triton") is None)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (..., H), (H,) -> (..., H)
    """weight * (x / rms(x)), with a gradient only for x: the weight is frozen. `serves` must be true."""
    if not serves(x, weight) or weight.shape != x.shape[-1:]:
        raise ValueError(f"x, weight: expected (..., H) and (H,) that `serves` serves, got {describe(x, weight)}")
    out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def silu_product(gate: Tensor, up: Tensor) -> Tensor:  # two of one shape
    """silu(gate) * up, with gradients. `serves` must be true."""
    if not serves(gate, up) or gate.shape != up.shape:
        raise ValueError(f"gate, up: expected one shape that `serves` serves, got {describe(gate, up)}")
    out: Tensor = _SiluProduct.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of queries (rows, heads, T, d) and keys (rows, key heads, T, d) by cos and sin (rows or 1, T,
    d), as transformers' apply_rotary_pos_emb, with gradients for both. `serves_rotation` must be true."""
    rotated: tuple[Tensor, Tensor] = _Rotation.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


def _kernels(x: Tensor) -> ModuleType:
    return room("cpu" if x.is_cpu else "triton", _OP)


def _run(name: str, x: Tensor, *others: Any) -> Any:
    """The function of the kernels for `x`, on its device, which need not be the current one."""
    function = getattr(_kernels(x), name)
    if x.is_cpu:
        return function(x, *others)
    with torch.cuda.device_of(x):
        return function(x, *others)


class _RmsNorm(torch.autograd.Function):
    """Keeps x and one number per row: dx = r (w dy - n mean(w dy n)), n = x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor
        out, r = _run("rms_norm_forward", x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph("rms_norm")
        return _run("rms_norm_backward", grad.resolve_neg().contiguous(), *ctx.saved_tensors), None, None


class _SiluProduct(torch.autograd.Function):
    """Keeps gate and up: silu(gate) is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out: Tensor = _run("silu_product_forward", gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        refuse_graph("silu_product")
        d_gate, d_up = _run("silu_product_backward", grad.resolve_neg().contiguous(), *ctx.saved_tensors)
        return d_gate, d_up


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so only the angles are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        rotated_q, rotated_k = _run("rotate", q, k, cos, sin, False)
        return rotated_q, rotated_k

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph("rotate")
        stored = (grad_q.resolve_neg(), grad_k.resolve_neg())
        dense_q, dense_k = (g if g.stride(-1) == 1 else g.contiguous() for g in stored)
        return *_run("rotate", dense_q, dense_k, *ctx.saved_tensors, True), None, None
