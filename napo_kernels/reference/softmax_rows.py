"""The row kernel's specification in plain PyTorch, fp32 or fp64 (DESIGN.md 4.1 and 4.2); any device, any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from napo_kernels.rows import Carried, LogitMap, RowStats, Targets, target_coefficients

ROUNDS_OPERANDS = False  # the specification's matmuls are in float32 at least

# Beyond it softplus(x) is x to the last bit of fp64, and below it exp(x) is finite in fp32.
SOFTPLUS_IS_LINEAR = 50.0


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
    low: Tensor | None,  # (R, r): hidden A^T of LoRA
    lora_b: Tensor | None,  # (V, r)
    lora_scale: float,
    targets: Targets,
    logit_map: LogitMap,
) -> tuple[Tensor, Tensor]:  # z and slope, (Q,)
    rows, columns = _rows_of(targets)
    a = (hidden[rows] * weight[columns]).sum(1)
    if low is not None and lora_b is not None:
        a = a + lora_scale * (low[rows] * lora_b[columns]).sum(1)
    z, slope = apply_map(a, logit_map, columns)
    return _padded(z, targets), _padded(slope, targets)


def _padded(values: Tensor, targets: Targets) -> Tensor:
    return F.pad(values, (0, len(targets.columns) - len(values)))


def takes_columns(hidden: Tensor) -> bool:
    """Whether columns_forward serves ``hidden``: it spares matmuls of few rows, which are slow on CPUs alone."""
    return hidden.device.type == "cpu"


def rows_forward(
    logits: Tensor,  # (C, V): rows first_row, first_row + 1, ...
    # (C, V), may be logits: becomes store_scale * exp(z - m) * J, 0 at the targets; m may be near the largest z only
    out: Tensor | None,
    first_row: int,
    targets: Targets,
    logit_map: LogitMap,
    target_z: Tensor,  # (Q,)
    stats: RowStats,  # filled for these rows
    store_scale: float,
) -> None:
    carried, vocabulary = Carried.of_rows(logits), logits.shape[1]
    rest = (targets, logit_map, target_z, stats, store_scale)
    columns_forward(logits, out, first_row, slice(0, vocabulary), vocabulary, carried, *rest)


def columns_forward(
    logits: Tensor,  # (C, number of columns)
    out: Tensor | None,  # as in rows_forward, but m is the largest z of no target in these columns
    first_row: int,
    columns: slice,  # pieces of the vocabulary come in order; the last one fills stats
    vocabulary: int,
    carried: Carried,
    targets: Targets,
    logit_map: LogitMap,
    target_z: Tensor,  # (Q,)
    stats: RowStats,
    store_scale: float,
) -> None:
    rows, of_target = _rows_of(targets)
    of_chunk = (rows >= first_row) & (rows < first_row + len(logits))
    rows, of_target, z_v = rows[of_chunk] - first_row, of_target[of_chunk], target_z[: len(rows)][of_chunk]
    z, slope = apply_map(logits, logit_map, columns)
    here = (of_target >= columns.start) & (of_target < columns.stop)
    others = z.index_put((rows[here], of_target[here] - columns.start), z.new_tensor(-torch.inf))
    m = others.amax(1)
    e = torch.exp(others - _finite(m)[:, None])
    if out is not None:
        out.copy_(store_scale * e * slope)
    if columns.start == 0:
        carried.row_max.fill_(-torch.inf)
        carried.row_sum.zero_()
    top = torch.maximum(carried.row_max, m)
    carried.keep.copy_(torch.exp(carried.row_max - _finite(top)))
    carried.gain.copy_(torch.exp(m - _finite(top)))
    carried.row_sum.mul_(carried.keep).add_(e.sum(1) * carried.gain)
    carried.row_max.copy_(top)
    if columns.stop == vocabulary:
        _finish_rows(carried, slice(first_row, first_row + len(logits)), rows, z_v, targets, stats, store_scale)


def _finite(m: Tensor) -> Tensor:
    """What exponents are taken relative to: 0 where no column has a logit above -inf."""
    return m.masked_fill(m == -torch.inf, 0.0)


def _log_p(x: Tensor, z: Tensor) -> Tensor:
    """log p of targets whose logits are z, x below the log-sum-exp of all else. With a logit of inf there is none."""
    return torch.where(z.isposinf(), torch.nan, -F.softplus(x, threshold=SOFTPLUS_IS_LINEAR))


def _finish_rows(
    carried: Carried,
    chunk: slice,
    rows: Tensor,  # of each distinct target of the chunk
    z_v: Tensor,
    targets: Targets,
    stats: RowStats,
    store_scale: float,
) -> None:
    shift, total_others = _finite(carried.row_max), carried.row_sum.to(carried.row_max.dtype)
    # x_v = log-sum-exp over "not v", minus z_v; differences before sums
    same_row = (rows[:, None] == rows[None, :]).fill_diagonal_(False)
    between = (z_v[None, :] - z_v[:, None]).masked_fill(~same_row, -torch.inf)
    x = torch.logaddexp(
        (shift[rows] - z_v) + total_others.log()[rows],
        torch.logsumexp(F.pad(between, (0, 1), value=-torch.inf), 1),
    )
    first = int(targets.start[chunk.start])
    stats.target_logp[first : first + len(rows)] = _log_p(x, z_v)
    top = carried.row_max.scatter_reduce(0, rows, z_v, "amax")
    total = (torch.exp(shift - top) * total_others).index_add(0, rows, torch.exp(z_v - top[rows]))
    stats.row_max[chunk], stats.row_log_sum[chunk] = top, total.log()
    stats.store_rescale[chunk] = torch.exp((shift - top) - total.log()) / store_scale


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
    targets: Targets,
    logit_map: LogitMap,  # bias of the whole vocabulary
    stats: RowStats,
    target_grad: Tensor,  # (Q,)
) -> None:
    rows, columns = _rows_of(targets)
    _, coefficients, of_row = target_coefficients(targets, stats, target_grad)
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
    targets: Targets,
    stats: RowStats,
    target_grad: Tensor,  # (Q,)
    scale: float,
) -> None:
    """dh_r = scale * (sum_v coefficient_v W_v - G_r E_r)"""
    rows, columns = _rows_of(targets)
    _, coefficients, of_row = target_coefficients(targets, stats, target_grad)
    coefficients = coefficients[: len(rows)]
    total = torch.zeros(out.shape, dtype=coefficients.dtype, device=out.device)
    if context is not None:
        total = -(of_row * stats.store_rescale)[:, None] * context
    out.copy_(scale * total.index_add(0, rows, coefficients[:, None] * weight[columns]))


def token_forward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # log p, m, l: (S, T)
    valid = labels != ignore_index
    column = labels.masked_fill(~valid, 0).unsqueeze(-1)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z_v = z.gather(-1, column)
    others = z.scatter(-1, column, -torch.inf)
    m = others.amax(-1, keepdim=True)
    shift = m.masked_fill(m == -torch.inf, 0.0)
    total = torch.exp(others - shift).sum(-1, keepdim=True)
    logp = _log_p((shift - z_v) + total.log(), z_v)
    top = torch.maximum(m, z_v)
    log_sum = (torch.exp(shift - top) * total + torch.exp(z_v - top)).log()
    return tuple(x.squeeze(-1).masked_fill(~valid, 0.0) for x in (logp, top, log_sum))  # type: ignore[return-value]


def token_backward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
    token_stats: tuple[Tensor, Tensor, Tensor],  # what token_forward gave
    grad: Tensor,  # (S,)
    out: Tensor,  # (S, T, V), may be logits
    out_is_zero: bool,
) -> None:
    """dlogits = G (onehot - p), with 1 - p = -expm1(log p) at the label; 0 where ignored."""
    logp, m, log_sum = token_stats
    valid = labels != ignore_index
    g = grad[:, None, None]
    gradient = -g * torch.exp((logits.to(logp.dtype) - m.unsqueeze(-1)) - log_sum.unsqueeze(-1))
    gradient.scatter_(-1, labels.masked_fill(~valid, 0).unsqueeze(-1), -g * torch.expm1(logp).unsqueeze(-1))
    out.copy_(gradient.masked_fill_(~valid.unsqueeze(-1), 0.0))
