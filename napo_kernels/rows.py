"""What every backend of the row kernel shares: targets by row, the map from matmul to logit, and the statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    """What the forward pass leaves behind, all fp32 (fp64 in the reference)."""

    target_logp: Tensor  # (Q,)
    target_slope: Tensor  # (Q,)  dz/d(scale * a + bias) at the target
    row_max: Tensor  # (R,)  m and l = log(sum(exp(z - m))) over the whole row
    row_log_sum: Tensor  # (R,)
    store_rescale: Tensor  # (R,)  turns the numbers stored for the second matmul into p * slope


class Carried(NamedTuple):
    """What the rows hand on where their columns come in pieces, over the columns that are no target, (C,) each."""

    row_max: Tensor  # m of the columns so far
    row_sum: Tensor  # sum(exp(z - m)) of them, fp64
    keep: Tensor  # exp(m before - m): what this piece makes of the sums so far
    gain: Tensor  # exp(m of this piece - m): what its own numbers count for, which are stored relative to its own m

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
    key, order = torch.sort(rows * vocabulary + targets, stable=True)
    number = torch.zeros_like(key)  # of the distinct target, in sorted order
    number[1:] = torch.cumsum(key[1:] != key[:-1], 0)
    row_of = torch.full_like(key, num_rows).scatter_(0, number, key // vocabulary)
    columns = torch.zeros_like(key).scatter_(0, number, key % vocabulary)
    start = torch.searchsorted(row_of, ids[: num_rows + 1])
    return Targets(start, columns), torch.empty_like(key).scatter_(0, order, number)


def add_at(size: int, index: Tensor, values: Tensor) -> Tensor:
    """Sums of ``values`` by ``index``, (size,). On CUDA the sort behind index_put_ keeps it equal from run to run,
    where index_add_ would use atomics."""
    total = values.new_zeros(size)
    return (
        total.index_add_(0, index, values) if total.device.type == "cpu" else total.index_put_((index,), values, True)
    )


def check_range(name: str, values: Tensor, end: int, *, valid: Tensor | None = None) -> None:
    """ValueError where a value lies outside [0, end). On a GPU the check runs asynchronously and stops the device
    with an assertion, as torch's own losses do, because asking for the answer would wait for the device."""
    wrong = (values < 0) | (values >= end)
    if valid is not None:
        wrong &= valid
    if values.device.type == "cpu":
        if bool(wrong.any()):
            position = int(wrong.reshape(-1).nonzero()[0])
            value = int(values.reshape(-1)[position])
            raise ValueError(f"{name}: expected values in [0, {end}), got {value} at position {position}")
    elif values.device.type == "cuda":
        torch._assert_async(~wrong.any(), f"{name}: expected values in [0, {end})")
