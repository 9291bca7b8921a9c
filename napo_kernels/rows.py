"""Arguments of the kernels of linear_sequence_logps and sequence_logps, for all backends, and targets by row.

The compiled module takes most of these NamedTuples as they are (csrc/linear_sequence_logps.h).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Above it softplus(x) is x to the last bit of fp64, and below it exp(x) is finite in fp32.
SOFTPLUS_IS_LINEAR = 50.0


class LogitMap(NamedTuple):
    """z = softcap * tanh((scale * a + bias) / softcap); softcap 0 stands for none."""

    scale: float = 1.0
    bias: Tensor | None = None  # (V,) fp32
    softcap: float = 0.0


class Targets(NamedTuple):
    """The distinct targets of every row: those of row r are columns[start[r]:start[r + 1]], ascending.

    There are at most Q of them; entries from start[R] on are unused, so that no shape depends on the data.
    """

    start: Tensor  # (R + 1,) int64
    columns: Tensor  # (Q,) int64


class RowStats(NamedTuple):
    """Results of forward that backward needs, all fp32 (fp64 in the reference)."""

    target_logp: Tensor  # (Q,)
    target_slope: Tensor  # (Q,)  dz/d(scale * a + bias) at the target
    row_max: Tensor  # (R,)  m and l = log(sum(exp(z - m))) over the whole row
    row_log_sum: Tensor  # (R,)
    store_rescale: Tensor  # (R,)  turns the numbers stored for the second matmul into p * slope


class TokenStats(NamedTuple):
    """Results of the forward of sequence_logps for each token, (S, T) fp32 each (fp64 in the reference)."""

    logp: Tensor  # 0 where the label is ignored
    row_max: Tensor  # m and l = log(sum(exp(z - m))) over the vocabulary
    row_log_sum: Tensor


class LowRank(NamedTuple):
    """LoRA's part of the logits, scale * low @ lora_b.T; without tensors there is none."""

    low: Tensor | None = None  # (R, r): hidden A^T
    lora_b: Tensor | None = None  # (V, r)
    scale: float = 1.0


class RowsProblem(NamedTuple):
    """Arguments of the forward kernels that all pieces of the logits share."""

    targets: Targets
    logit_map: LogitMap  # bias of the whole vocabulary, here and everywhere
    target_z: Tensor  # (Q,)
    stats: RowStats  # the kernels fill it, except target_slope
    store_scale: float
    vocabulary: int


class Upstream(NamedTuple):
    """Arguments that all backward kernels share: the statistics and the gradient of each target's log-prob."""

    targets: Targets
    stats: RowStats
    target_grad: Tensor  # (Q,)


class Carried(NamedTuple):
    """Statistics of rows that pass from one piece of the vocabulary to the next. They cover the columns so far that are
    not targets of the row, (C,) each."""

    row_max: Tensor  # m of the columns so far
    row_sum: Tensor  # their sum of exp(z - m), fp64
    keep: Tensor  # exp(m before - m): the factor that this piece gives to earlier sums
    gain: Tensor  # exp(m of this piece - m): the factor of this piece's own numbers, stored relative to its own m

    @classmethod
    def of_rows(cls, hidden: Tensor) -> Carried:
        """Memory for it; the first piece fills it."""
        kind = torch.promote_types(hidden.dtype, torch.float32)
        return cls(*(hidden.new_empty(len(hidden), dtype=k) for k in (kind, torch.float64, kind, kind)))


def plan_targets(
    targets: Tensor,  # (Q,)
    rows: Tensor | None,  # (Q,), None: row q for pair q
    num_rows: int,
    vocabulary: int,
) -> tuple[Targets, Tensor]:
    """Targets by row, and for every pair the number of its distinct target, (Q,).

    Static shapes and no synchronisation: duplicates leave unused entries at the end.
    """
    ids = torch.arange(max(targets.numel(), num_rows) + 1, device=targets.device)
    if rows is None:
        return Targets(ids[: num_rows + 1], targets.clone()), ids[: targets.numel()].clone()
    key = rows * vocabulary + targets
    number = number_distinct(key)
    key_of = torch.full_like(key, num_rows * vocabulary).scatter_(0, number, key)
    start = torch.searchsorted(key_of // vocabulary, ids[: num_rows + 1])
    return Targets(start, key_of % vocabulary), number


def number_distinct(values: Tensor) -> Tensor:
    """The rank of each value among the distinct ones, (Q,)."""
    ascending, order = torch.sort(values, stable=True)
    number = torch.zeros_like(values)
    number[1:] = torch.cumsum(ascending[1:] != ascending[:-1], 0)
    return torch.empty_like(values).scatter_(0, order, number)


def target_coefficients(upstream: Upstream) -> tuple[Tensor, Tensor, Tensor]:
    """Row of each distinct target, (G_v (1 - p_v) - (G_r - G_v) p_v) J_v there, and G_r of each row: (Q,), (Q,), (R,).

    Unused entries have row R - 1 and coefficient 0.
    """
    targets, stats, target_grad = upstream
    num_rows = len(stats.row_max)
    ids = torch.arange(len(targets.columns), device=target_grad.device)
    rows = torch.searchsorted(targets.start[1:].contiguous(), ids, right=True)
    used = rows < num_rows
    rows = rows.clamp(max=max(0, num_rows - 1))
    grad, logp = target_grad.masked_fill(~used, 0.0), stats.target_logp
    of_row = add_at(num_rows, rows, grad)
    coefficients = (-grad * torch.expm1(logp) - (of_row[rows] - grad) * logp.exp()) * stats.target_slope
    return rows, torch.where(used, coefficients, 0.0), of_row


def log_p(x: Tensor, z: Tensor) -> Tensor:
    """log p of targets whose logits are z, where x is the log-sum-exp of all other logits, minus z. There is none where
    a logit is inf."""
    return torch.where(z.isposinf(), torch.nan, -F.softplus(x, threshold=SOFTPLUS_IS_LINEAR))


def add_at(size: int, index: Tensor, values: Tensor) -> Tensor:
    """Sums of ``values`` by ``index``, (size, ...). On CUDA the sort behind index_put_ keeps it equal from run to run,
    where index_add_ would use atomics."""
    total = values.new_zeros((size, *values.shape[1:]))
    return (
        total.index_add_(0, index, values) if total.device.type == "cpu" else total.index_put_((index,), values, True)
    )
