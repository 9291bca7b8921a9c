"""Cases of the kernels of a transformer's body, with what transformers computes for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from napo_kernels.ops import body

Device = torch.device | str
Case = tuple[Callable[..., Any], Callable[..., Any], list[Tensor], list[Tensor]]  # ours, plain, inputs, gradients


def check(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: list[Tensor],
    grads: list[Tensor],
    times: float = 1.1,
) -> None:
    """Outputs and gradients of `ours` are no further from fp64 than `times` those of `plain`."""

    def results(op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = op(*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        return [*outs, *torch.autograd.grad(outs, leaves, [grad.to(dtype) for grad in grads])]

    dtype = inputs[0].dtype
    for got, theirs, truth in zip(
        results(ours, dtype), results(plain, dtype), results(plain, torch.float64), strict=True
    ):
        assert got.dtype == dtype and got.shape == truth.shape
        error, other = ((x.double() - truth).norm() for x in (got, theirs))
        assert error <= times * other + 2e-7 * truth.norm(), (
            f"{dtype} {tuple(got.shape)}: {error:.2e}, torch {other:.2e}"
        )


def as_transformers(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_case(dtype: torch.dtype, shape: tuple[int, ...], scale: float = 1.0, device: Device = "cpu") -> Case:
    torch.manual_seed(0)
    x, grad = ((s * torch.randn(shape, device=device)).to(dtype) for s in (scale, 1.0))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    return (
        lambda x: body.rms_norm(x, weight.to(x.dtype), 1e-5),
        lambda x: as_transformers(x, weight.to(x.dtype), 1e-5),
        [x],
        [grad],
    )


def product_case(dtype: torch.dtype, shape: tuple[int, ...], scale: float = 1.0, device: Device = "cpu") -> Case:
    torch.manual_seed(0)
    gate, up, grad = ((s * torch.randn(shape, device=device)).to(dtype) for s in (scale, 1.0, 1.0))
    return body.silu_product, lambda gate, up: silu(gate) * up, [gate, up], [grad]


def rotated(
    dtype: torch.dtype, shape: tuple[int, ...], one_row: bool, device: Device = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries and keys as projections leave them, their gradients, and cos and sin."""
    torch.manual_seed(0)
    rows, tokens, heads, key_heads, d = shape
    made = [
        torch.randn(rows, tokens, count, d, device=device).to(dtype).transpose(1, 2) for count in (heads, key_heads) * 2
    ]
    angles = torch.randn(1 if one_row else rows, tokens, d // 2, device=device).repeat(1, 1, 2)
    return made[:2], made[2:], [angles.cos().to(dtype), angles.sin().to(dtype)]


def rotation_case(dtype: torch.dtype, shape: tuple[int, ...], one_row: bool = False, device: Device = "cpu") -> Case:
    inputs, grads, (cos, sin) = rotated(dtype, shape, one_row, device)

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        c, s = (x.to(q.dtype).unsqueeze(1) for x in (cos, sin))
        half = q.shape[-1] // 2
        turned = (torch.cat((-x[..., half:], x[..., :half]), -1) for x in (q, k))
        return tuple(x * c + t * s for x, t in zip((q, k), turned, strict=True))  # type: ignore[return-value]

    return lambda q, k: body.rotate(q, k, cos.to(q.dtype), sin.to(q.dtype)), plain, inputs, grads
