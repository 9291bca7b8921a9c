"""The pool across ranks: a differentiable gather in which a borrowed negative's gradient returns to its rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from napo_kernels.ops.registration import refuse_graph


class PoolLayout(NamedTuple):
    """How many rows each rank brings to the pool, and where this rank's begin (``pool_offset``)."""

    sizes: tuple[int, ...]
    offset: int


def pool_layout(size: int, *, group: Any = None) -> PoolLayout:
    """Exchanges the batch sizes of the ranks. Shapes live on the host, so this waits for the other ranks: call it once
    per step, where the batch is made, and hand the layout to every ``gather_pool``."""
    if not (dist.is_available() and dist.is_initialized()):
        return PoolLayout((size,), 0)
    sizes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, size, group=group)
    return PoolLayout(tuple(sizes), sum(sizes[: dist.get_rank(group)]))


def gather_pool(
    rows: Tensor,  # (B, ...)
    layout: PoolLayout,
    *,
    group: Any = None,
) -> Tensor:  # (B', ...)
    """The rows of all ranks, in rank order; every rank must call it, with the same trailing shape.

    In the backward every rank must take part too: a row's gradient is the sum over the ranks that used it, so what is
    differentiated is the sum of the ranks' losses. A trainer whose data parallelism averages gradients multiplies by
    the number of ranks.
    """
    rank = dist.get_rank(group) if len(layout.sizes) > 1 else 0
    if rows.shape[0] != layout.sizes[rank]:
        raise ValueError(f"rows: expected {layout.sizes[rank]} as in the layout, got {rows.shape[0]}")
    if len(layout.sizes) == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, layout, group)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: PoolLayout, group: Any) -> Tensor:
        ctx.layout, ctx.group = layout, group
        return _gather(rows, layout.sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        refuse_graph("gather_pool")
        # An all-reduce of the whole pool and a slice: a reduce-scatter needs equal sizes, and log-probs are small.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        own = ctx.layout.sizes[dist.get_rank(ctx.group)]
        return grad.narrow(0, ctx.layout.offset, own), None, None


def _gather(rows: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    # Collectives want equal shapes: pad to the largest rank, drop the padding afterwards.
    largest = max(sizes)
    wire = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    padded = wire.new_zeros((largest, *rows.shape[1:]))
    padded[: rows.shape[0]] = wire
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(rows.dtype)
