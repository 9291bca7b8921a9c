"""The row kernel of ``linear_sequence_logps`` in plain PyTorch, its specification (docs/design.md, section 4.2).

It computes in fp32 or fp64, on any device and for any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from napo_kernels.rows import Carried, LogitMap, LowRank, RowsProblem, Targets, Upstream, log_p, target_coefficients

ROUNDS_OPERANDS = False  # the specification's matmuls are in float32 at least


def apply_map(a: Tensor, m: LogitMap, columns: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
    """z = softcap * tanh((scale * a + bias) / softcap) and J = dz/d(scale * a + bias) = 1 - (z / softcap)^2."""
    z = m.scale * a if m.bias is None else m.scale * a + m.bias[columns]
    if not m.softcap:
        return z, torch.ones_like(z)
    x = z / m.softcap
    return m.softcap * torch.tanh(x), 1.0 / torch.cosh(x).square()


def _rows_of(targets: Targets) -> tuple[Tensor, Tensor]:
    """Row and column of each distinct target, unused entries left out."""
    counts = targets.start.diff()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return rows, targets.columns[: len(rows)]


def target_logits(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    low_rank: LowRank,
    targets: Targets,
    logit_map: LogitMap,
) -> tuple[Tensor, Tensor]:  # z and slope, (Q,)
    rows, columns = _rows_of(targets)
    a = (hidden[rows] * weight[columns]).sum(1)
    low, lora_b, scale = low_rank
    if low is not None and lora_b is not None:
        a = a + scale * (low[rows] * lora_b[columns]).sum(1)
    z, slope = apply_map(a, logit_map, columns)
    return _padded(z, targets), _padded(slope, targets)


def _padded(values: Tensor, targets: Targets) -> Tensor:
    return F.pad(values, (0, len(targets.columns) - len(values)))


def rows_forward(
    logits: Tensor,  # (C, V): rows first_row, first_row + 1, ...
    # (C, V), may be logits: becomes store_scale * exp(z - m) * J, 0 at the targets; m may be near the largest z only
    out: Tensor | None,
    first_row: int,
    problem: RowsProblem,
) -> None:
    columns_forward(logits, out, first_row, 0, Carried.of_rows(logits), problem)


def columns_forward(
    logits: Tensor,  # (C, number of columns): columns first_column, first_column + 1, ... of the rows
    out: Tensor | None,  # as in rows_forward, but m is the largest z of no target in these columns
    first_row: int,
    first_column: int,  # pieces of the vocabulary come in order; the last one fills the statistics
    carried: Carried,
    problem: RowsProblem,
) -> None:
    columns = slice(first_column, first_column + logits.shape[1])
    rows, of_target = _rows_of(problem.targets)
    of_chunk = (rows >= first_row) & (rows < first_row + len(logits))
    rows, of_target, z_v = rows[of_chunk] - first_row, of_target[of_chunk], problem.target_z[: len(rows)][of_chunk]
    z, slope = apply_map(logits, problem.logit_map, columns)
    here = (of_target >= columns.start) & (of_target < columns.stop)
    others = z.index_put((rows[here], of_target[here] - columns.start), z.new_tensor(-torch.inf))
    m = others.amax(1)
    e = torch.exp(others - _finite(m)[:, None])
    if out is not None:
        out.copy_(problem.store_scale * e * slope)
    if columns.start == 0:
        carried.row_max.fill_(-torch.inf)
        carried.row_sum.zero_()
    top = torch.maximum(carried.row_max, m)
    carried.keep.copy_(torch.exp(carried.row_max - _finite(top)))
    carried.gain.copy_(torch.exp(m - _finite(top)))
    carried.row_sum.mul_(carried.keep).add_(e.sum(1) * carried.gain)
    carried.row_max.copy_(top)
    if columns.stop == problem.vocabulary:
        _finish_rows(carried, slice(first_row, first_row + len(logits)), rows, z_v, problem)


def _finite(m: Tensor) -> Tensor:
    """The number that exponents are relative to: m, or 0 if every logit is -inf."""
    return m.masked_fill(m == -torch.inf, 0.0)


def _finish_rows(
    carried: Carried,
    chunk: slice,
    rows: Tensor,  # of each distinct target of the chunk
    z_v: Tensor,
    problem: RowsProblem,
) -> None:
    stats = problem.stats
    shift, total_others = _finite(carried.row_max), carried.row_sum.to(carried.row_max.dtype)
    # x_v = log-sum-exp over "not v", minus z_v; differences before sums
    same_row = (rows[:, None] == rows[None, :]).fill_diagonal_(False)
    between = (z_v[None, :] - z_v[:, None]).masked_fill(~same_row, -torch.inf)
    x = torch.logaddexp(
        (shift[rows] - z_v) + total_others.log()[rows],
        torch.logsumexp(F.pad(between, (0, 1), value=-torch.inf), 1),
    )
    first = int(problem.targets.start[chunk.start])
    stats.target_logp[first : first + len(rows)] = log_p(x, z_v)
    top = carried.row_max.scatter_reduce(0, rows, z_v, "amax")
    # A sum of nothing is 0 relative to any number; exp(shift - top) would overflow for another.
    shift = torch.where(carried.row_max == -torch.inf, _finite(top), shift)
    total = (torch.exp(shift - top) * total_others).index_add(0, rows, torch.exp(z_v - top[rows]))
    stats.row_max[chunk], stats.row_log_sum[chunk] = top, total.log()
    stats.store_rescale[chunk] = torch.exp((shift - top) - total.log()) / problem.store_scale


def add_columns(
    total: Tensor,  # (C, H) fp32, or fp64: the stored numbers so far times weight
    product: Tensor,  # (C, H): those of this piece times its rows of weight
    carried: Carried,
) -> None:
    total.mul_(carried.keep[:, None]).add_(product * carried.gain[:, None])


def rows_gradient(
    logits: Tensor,  # (R, C): columns first_column, first_column + 1, ...
    out: Tensor,  # (R, C), may be logits: becomes the gradient with respect to scale * a + bias
    first_column: int,
    logit_map: LogitMap,
    upstream: Upstream,
) -> None:
    stats = upstream.stats
    rows, columns = _rows_of(upstream.targets)
    _, coefficients, of_row = target_coefficients(upstream)
    coefficients = coefficients[: len(rows)]
    chunk = slice(first_column, first_column + logits.shape[1])
    z, slope = apply_map(logits, logit_map, chunk)
    p = torch.exp((z - stats.row_max[:, None]) - stats.row_log_sum[:, None])
    here = (columns >= chunk.start) & (columns < chunk.stop)
    gradient = -of_row[:, None] * p * slope  # -G_r p J off the targets
    out.copy_(gradient.index_put_((rows[here], columns[here] - first_column), coefficients[here]))


def hidden_gradient(
    out: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    context: Tensor | None,  # (R, H): stored numbers times weight
    upstream: Upstream,
    scale: float,
) -> None:
    """dh_r = scale * (sum_v coefficient_v W_v - G_r E_r)"""
    rows, columns = _rows_of(upstream.targets)
    _, coefficients, of_row = target_coefficients(upstream)
    coefficients = coefficients[: len(rows)]
    total = torch.zeros(out.shape, dtype=coefficients.dtype, device=out.device)
    if context is not None:
        total = -(of_row * upstream.stats.store_rescale)[:, None] * context
    out.copy_(scale * total.index_add(0, rows, coefficients[:, None] * weight[columns]))
