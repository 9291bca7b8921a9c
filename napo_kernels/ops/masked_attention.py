"""Attention under a boolean mask that hides most pairs, on the CPU: for the packed rows of `napo.scoring`.

A packed row is a prompt and the titles behind it, which do not see one another: more than half of all pairs are
hidden. torch's kernel computes every score and then masks it. This one skips the blocks that are hidden, shares a key
head among its query heads without copies, keeps one number per query for the backward, and multiplies bfloat16 in pairs
where the machine does. On a GPU FlexAttention skips blocks too, so there is no kernel of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from napo_kernels.checks import check_mask, check_number, check_shape, check_tensor, describe
from napo_kernels.dispatch import register, resolve, room, why_not
from napo_kernels.native import calls
from napo_kernels.ops.registration import refuse_graph

_OP = register("masked_attention")


def pad_mask(mask: Tensor) -> Tensor | None:  # (rows, T, T) bool, [query, key] -> (rows, T padded, T padded) uint8
    """The form of a mask that `masked_attention` takes, made once for all layers; None where the kernel cannot run."""
    check_tensor("mask", mask, 3, "(rows, T, T)")
    check_mask("mask", mask)
    rows, length, _ = mask.shape
    check_shape("mask", mask, (rows, length, length))
    if not mask.is_cpu or why_not("cpu") is not None:
        return None
    side = _side(length)
    padded = torch.zeros(rows, side, side, dtype=torch.uint8)
    padded[:, :length, :length] = mask
    return padded


def _side(length: int) -> int:
    block: int = room("cpu", _OP).MASK_BLOCK
    return -(-length // block) * block


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes this: float32, bfloat16 or float16, one head size, elements of a head in a row."""
    return (
        all(isinstance(x, Tensor) for x in (query, key, value))
        and query.dtype == key.dtype == value.dtype
        and query.dtype in calls.DTYPES
        and key.shape == value.shape
        and query.ndim == key.ndim == 4
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and query.shape[0] == key.shape[0]
        and query.shape[2:] == key.shape[2:]
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
        and not (query.is_neg() or key.is_neg() or value.is_neg())  # the sign of a lazy negative is not in memory
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
    )


@_disable_dynamo  # torch.compiler.disable imports Dynamo, 2 s; this one does so at the first call
def masked_attention(
    query: Tensor,  # (rows, heads, T, d)
    key: Tensor,  # (rows, key heads, T, d)
    value: Tensor,  # (rows, key heads, T, d)
    padded: Tensor,  # of pad_mask
    scale: float,
) -> Tensor:  # (rows, heads, T, d)
    """softmax(scale q k^T + mask) v, with gradients. A query that sees no key gives zeros.

    Raises ValueError for what `serves` does not.
    """
    if not serves(query, key, value):
        got = describe(query, key, value)
        raise ValueError(f"query, key, value: expected one dtype and head size, elements in a row; got {got}")
    side = _side(query.shape[2])
    check_tensor("padded", padded, 3, "(rows, T padded, T padded)", device=query.device)
    if padded.dtype != torch.uint8 or padded.shape != (len(query), side, side) or not padded.is_contiguous():
        got = describe(padded)
        raise ValueError(f"padded: expected {(len(query), side, side)} torch.uint8 as pad_mask makes it, got {got}")
    check_number("scale", scale, "a finite number")
    resolve(_OP, query.device, "cpu", query.dtype)
    out: Tensor = _MaskedAttention.apply(query, key, value, padded, scale)  # type: ignore[no-untyped-call]
    return out


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, padded: Tensor, scale: float) -> Tensor:
        out: Tensor
        out, lse = room("cpu", _OP).forward(query, key, value, padded, scale)
        ctx.save_for_backward(query, key, value, padded, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph("masked_attention")
        grad = grad.resolve_neg()
        if grad.stride(3) != 1:
            grad = grad.contiguous()
        return *room("cpu", _OP).backward(grad, *ctx.saved_tensors, scale=ctx.scale), None, None
