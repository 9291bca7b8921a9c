"""The row kernel of linear_sequence_logps in Triton, for NVIDIA and AMD GPUs; functions as in reference/."""

# Triton kernels take untyped arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from napo_kernels.rows import LogitMap, LowRank, RowsProblem, Targets, Upstream
from napo_kernels.triton.softmax_rows import (
    BLOCK,
    REACH,
    STATISTICS,
    WALK_BLOCK,
    WALK_WARPS,
    block_of_logits,
    column_block,
    expm1,
    log_p,
    map_logit,
    origin_of,
    padded_width,
)

ROUNDS_OPERANDS = True  # matmuls are in the dtype of the hidden states

TARGET_BLOCK = 64  # targets of a row that are compared at a time
WIDTH_BLOCK = 256  # columns of hidden states
NO_COLUMN: tl.constexpr = tl.constexpr(2**31 - 1)


# ---- pieces --------------------------------------------------------------------------------------------------------


@triton.jit
def _sum_at(values_ptr, first, last, TARGETS: tl.constexpr):
    total = tl.zeros((TARGETS,), tl.float32)
    for q in range(first, last, TARGETS):
        at = q + tl.arange(0, TARGETS)
        total += tl.load(values_ptr + at, mask=at < last, other=0.0)
    return tl.sum(total)


@triton.jit
def _coefficient(logp, grad, grad_of_row):
    """G_v (1 - p_v) - (G_r - G_v) p_v"""
    return -grad * expm1(logp) - (grad_of_row - grad) * tl.exp(logp)


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=STATISTICS)
def target_logits_kernel(
    hidden_ptr,
    weight_ptr,
    low_ptr,
    lora_b_ptr,
    start_ptr,
    columns_ptr,
    bias_ptr,
    z_ptr,
    slope_ptr,
    hidden_stride,
    weight_stride,
    low_stride,
    lora_b_stride,
    width,
    rank,
    lora_scale,
    scale,
    softcap,
    HAS_LORA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row: fp32 dot products with the rows of weight that are its targets."""
    r = tl.program_id(0).to(tl.int64)
    for q in range(tl.load(start_ptr + r), tl.load(start_ptr + r + 1)):
        v = tl.load(columns_ptr + q)
        total = tl.zeros((WIDTH,), tl.float32)
        for c in range(0, width, WIDTH):
            at = c + tl.arange(0, WIDTH)
            h = tl.load(hidden_ptr + r * hidden_stride + at, mask=at < width, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + v * weight_stride + at, mask=at < width, other=0.0).to(tl.float32)
            total += h * w
        a = tl.sum(total)
        if HAS_LORA:
            low_total = tl.zeros((WIDTH,), tl.float32)
            for c in range(0, rank, WIDTH):
                at = c + tl.arange(0, WIDTH)
                h = tl.load(low_ptr + r * low_stride + at, mask=at < rank, other=0.0).to(tl.float32)
                w = tl.load(lora_b_ptr + v * lora_b_stride + at, mask=at < rank, other=0.0).to(tl.float32)
                low_total += h * w
            a += lora_scale * tl.sum(low_total)
        lane = tl.arange(0, 1)
        z, slope = map_logit(
            a + tl.zeros((1,), tl.float32), bias_ptr, v + lane, lane == 0, scale, softcap, HAS_BIAS, HAS_CAP
        )
        tl.store(z_ptr + q + lane, z)
        tl.store(slope_ptr + q + lane, slope)


@triton.jit
def _next_target(columns_ptr, q, last):
    """Column of target q of a row, beyond every vocabulary once there is none."""
    return tl.load(columns_ptr + q, mask=q < last, other=NO_COLUMN).to(tl.int32)


@triton.jit
def _without_targets(z, columns, end, columns_ptr, q, target, last):
    """z with -inf at the row's targets below column ``end``, and the first target from there on. Targets ascend, so one
    comparison a block tells that it has none."""
    while target < end:
        z = tl.where(columns == target, float("-inf"), z)
        q += 1
        target = _next_target(columns_ptr, q, last)
    return z, q, target


@triton.jit
def _largest(
    row_ptr,
    bias_ptr,
    columns_ptr,
    first,
    last,
    count,
    vocabulary,
    padded,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The largest logit of no target among the first ``count`` columns, a whole number of blocks."""
    best = tl.full((COLUMNS,), float("-inf"), tl.float32)
    q, target = first, _next_target(columns_ptr, first, last)
    for c in range(0, count, COLUMNS):
        columns = c + tl.arange(0, COLUMNS)
        mask = columns < vocabulary
        a = tl.load(row_ptr + columns, mask=columns < padded, other=0.0)
        z, _ = map_logit(a, bias_ptr, columns, mask, scale, softcap, HAS_BIAS, HAS_CAP)
        z = tl.where(mask, z, float("-inf"))
        z, q, target = _without_targets(z, columns, c + COLUMNS, columns_ptr, q, target, last)
        best = tl.maximum(best, z)
    return tl.max(best)


@triton.jit
def _exponentials(
    row_ptr,
    out_ptr,
    bias_ptr,
    columns_ptr,
    first,
    last,
    vocabulary,
    padded,
    scale,
    softcap,
    store_scale,
    shift,
    STORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Over all columns of no target: their largest logit, and the sum of exp(z - shift). What the second matmul reads
    is written. A block is asked for before the one before it is worked on: a GPU hides memory's latency only behind
    loads that are under way."""
    best = tl.full((COLUMNS,), float("-inf"), tl.float32)
    sums = tl.zeros((COLUMNS,), tl.float32)
    q, target = first, _next_target(columns_ptr, first, last)
    lanes = tl.arange(0, COLUMNS)
    coming = tl.load(row_ptr + lanes, mask=lanes < padded, other=0.0)
    for c in range(0, vocabulary, COLUMNS):
        a = coming
        columns = c + lanes
        mask = columns < vocabulary
        coming = tl.load(row_ptr + columns + COLUMNS, mask=columns + COLUMNS < padded, other=0.0)
        z, slope = map_logit(a, bias_ptr, columns, mask, scale, softcap, HAS_BIAS, HAS_CAP)
        z = tl.where(mask, z, float("-inf"))
        z, q, target = _without_targets(z, columns, c + COLUMNS, columns_ptr, q, target, last)
        best = tl.maximum(best, z)
        e = tl.exp(z - shift)
        sums += e
        if STORE:
            stored = store_scale * e * slope
            tl.store(out_ptr + columns, stored.to(out_ptr.dtype.element_ty), mask=columns < padded)
    return tl.max(best), tl.sum(sums)


@triton.jit(do_not_specialize_on_alignment=STATISTICS)
def rows_forward_kernel(
    logits_ptr,
    out_ptr,
    start_ptr,
    columns_ptr,
    bias_ptr,
    target_z_ptr,
    target_logp_ptr,
    row_max_ptr,
    row_log_sum_ptr,
    rescale_ptr,
    logits_stride,
    out_stride,
    first_row,
    vocabulary,
    padded,
    scale,
    softcap,
    store_scale,
    STORE: tl.constexpr,
    ONE_READ: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    COLUMNS: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """One program a row: exponentials, their sum and what the second matmul reads, then the targets.

    Exponents need a number near the row's largest logit. That of its first columns is one, as a rule, and spares a read
    of the row; where it is not, the row is read again.
    """
    local = tl.program_id(0).to(tl.int64)
    r = local + first_row
    row_ptr = logits_ptr + local * logits_stride
    first = tl.load(start_ptr + r)
    last = tl.load(start_ptr + r + 1)

    out_row_ptr = out_ptr + local * out_stride
    count = COLUMNS if ONE_READ else vocabulary
    sample = _largest(
        row_ptr,
        bias_ptr,
        columns_ptr,
        first,
        last,
        count,
        vocabulary,
        padded,
        scale,
        softcap,
        HAS_BIAS,
        HAS_CAP,
        COLUMNS,
    )
    shift = tl.where(sample == float("-inf"), 0.0, sample)
    m, total = sample, 0.0
    again = tl.full((), 1, tl.int1)
    while again:
        m, total = _exponentials(
            row_ptr,
            out_row_ptr,
            bias_ptr,
            columns_ptr,
            first,
            last,
            vocabulary,
            padded,
            scale,
            softcap,
            store_scale,
            shift,
            STORE,
            HAS_BIAS,
            HAS_CAP,
            COLUMNS,
        )
        again = (m != float("-inf")) & (tl.abs(m - shift) > REACH)
        shift = tl.where(again, m, shift)
    log_total = tl.where(total == 0.0, float("-inf"), tl.log(total))

    # The targets: for each, log-sum-exp of the others and of the rest of the row, minus its own logit.
    top = m
    for q in range(first, last):
        top = tl.maximum(top, tl.load(target_z_ptr + q))
    shift = origin_of(m, shift, top)
    whole = tl.exp(shift - top) * total
    for q in range(first, last):
        z_v = tl.load(target_z_ptr + q)
        whole += tl.exp(z_v - top)
        rest = (shift - z_v) + log_total
        rival = rest
        for p in range(first, last, TARGETS):
            at = p + tl.arange(0, TARGETS)
            other = tl.load(target_z_ptr + at, mask=(at < last) & (at != q), other=float("-inf")) - z_v
            rival = tl.maximum(rival, tl.max(other))
        base = tl.where(rival == float("-inf"), 0.0, rival)
        mass = tl.exp(rest - base)
        for p in range(first, last, TARGETS):
            at = p + tl.arange(0, TARGETS)
            other = tl.load(target_z_ptr + at, mask=(at < last) & (at != q), other=float("-inf")) - z_v
            mass += tl.sum(tl.exp(other - base))
        x = tl.where(mass == 0.0, float("-inf"), base + tl.log(mass))
        tl.store(target_logp_ptr + q, log_p(x, z_v))
    log_whole = tl.log(whole)
    tl.store(row_max_ptr + r, top)
    tl.store(row_log_sum_ptr + r, log_whole)
    tl.store(rescale_ptr + r, tl.exp((shift - top) - log_whole) / store_scale)


@triton.jit(do_not_specialize_on_alignment=STATISTICS)
def rows_gradient_kernel(
    logits_ptr,
    out_ptr,
    start_ptr,
    columns_ptr,
    bias_ptr,
    row_max_ptr,
    row_log_sum_ptr,
    target_logp_ptr,
    target_slope_ptr,
    target_grad_ptr,
    logits_stride,
    out_stride,
    first_column,
    chunk,
    padded,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    COLUMNS: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """One program a row and block of columns."""
    r = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = local < chunk
    columns = first_column + local
    first = tl.load(start_ptr + r)
    last = tl.load(start_ptr + r + 1)
    grad_of_row = _sum_at(target_grad_ptr, first, last, TARGETS)
    a = tl.load(logits_ptr + r * logits_stride + local, mask=local < padded, other=0.0)
    z, slope = map_logit(a, bias_ptr, columns, mask, scale, softcap, HAS_BIAS, HAS_CAP)
    p = tl.exp((z - tl.load(row_max_ptr + r)) - tl.load(row_log_sum_ptr + r))
    gradient = -grad_of_row * p * slope
    for q in range(first, last):
        coefficient = _coefficient(tl.load(target_logp_ptr + q), tl.load(target_grad_ptr + q), grad_of_row)
        coefficient *= tl.load(target_slope_ptr + q)
        at = (tl.load(columns_ptr + q) - first_column).to(tl.int32)
        gradient = tl.where(local == at, coefficient, gradient)
    tl.store(out_ptr + r * out_stride + local, gradient.to(out_ptr.dtype.element_ty), mask=local < padded)


@triton.jit(do_not_specialize_on_alignment=STATISTICS)
def hidden_gradient_kernel(
    out_ptr,
    weight_ptr,
    context_ptr,
    start_ptr,
    columns_ptr,
    rescale_ptr,
    target_logp_ptr,
    target_slope_ptr,
    target_grad_ptr,
    weight_stride,
    width,
    scale,
    HAS_CONTEXT: tl.constexpr,
    WIDTH: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """One program a row and block of hidden columns; the sum stays in registers."""
    r = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = at < width
    first = tl.load(start_ptr + r)
    last = tl.load(start_ptr + r + 1)
    grad_of_row = _sum_at(target_grad_ptr, first, last, TARGETS)
    total = tl.zeros((WIDTH,), tl.float32)
    if HAS_CONTEXT:
        context = tl.load(context_ptr + r * width + at, mask=mask, other=0.0).to(tl.float32)
        total += -(grad_of_row * tl.load(rescale_ptr + r) * scale) * context
    for q in range(first, last):
        coefficient = _coefficient(tl.load(target_logp_ptr + q), tl.load(target_grad_ptr + q), grad_of_row)
        coefficient *= tl.load(target_slope_ptr + q) * scale
        w = tl.load(weight_ptr + tl.load(columns_ptr + q) * weight_stride + at, mask=mask, other=0.0)
        total += coefficient * w.to(tl.float32)
    tl.store(out_ptr + r * width + at, total.to(out_ptr.dtype.element_ty), mask=mask)


# ---- host functions ------------------------------------------------------------------------------------------------


def target_logits(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    low_rank: LowRank,
    targets: Targets,
    logit_map: LogitMap,
) -> tuple[Tensor, Tensor]:  # (Q,)
    low, lora_b, lora_scale = low_rank
    z, slope = torch.zeros((2, len(targets.columns)), dtype=torch.float32, device=hidden.device)
    if len(hidden):
        target_logits_kernel[(len(hidden),)](
            hidden,
            weight,
            hidden if low is None else low,
            weight if lora_b is None else lora_b,
            targets.start,
            targets.columns,
            z if logit_map.bias is None else logit_map.bias,
            z,
            slope,
            hidden.stride(0),
            weight.stride(0),
            0 if low is None else low.stride(0),
            0 if lora_b is None else lora_b.stride(0),
            hidden.shape[1],
            0 if low is None else low.shape[1],
            lora_scale,
            logit_map.scale,
            logit_map.softcap,
            HAS_LORA=low is not None,
            HAS_BIAS=logit_map.bias is not None,
            HAS_CAP=logit_map.softcap != 0.0,
            WIDTH=WIDTH_BLOCK,
        )
    return z, slope


def rows_forward(
    logits: Tensor,  # (C, V)
    out: Tensor | None,  # (C, V)
    first_row: int,
    problem: RowsProblem,
) -> None:
    (start, columns), logit_map, target_z, stats, store_scale, vocabulary = problem
    # fp16 has no room for more than the largest logit itself, and logits that are overwritten cannot be read again.
    one_read = out is None or (out.dtype != torch.float16 and out.data_ptr() != logits.data_ptr())
    rows_forward_kernel[(len(logits),)](
        logits,
        logits if out is None else out,
        start,
        columns,
        target_z if logit_map.bias is None else logit_map.bias,
        target_z,
        stats.target_logp,
        stats.row_max,
        stats.row_log_sum,
        stats.store_rescale,
        logits.stride(0),
        0 if out is None else out.stride(0),
        first_row,
        vocabulary,
        padded_width(logits) if out is None else padded_width(logits, out),
        logit_map.scale,
        logit_map.softcap,
        store_scale,
        STORE=out is not None,
        ONE_READ=one_read,
        HAS_BIAS=logit_map.bias is not None,
        HAS_CAP=logit_map.softcap != 0.0,
        COLUMNS=column_block(vocabulary, block_of_logits(WALK_BLOCK, logit_map.softcap != 0.0)),
        TARGETS=TARGET_BLOCK,
        num_warps=WALK_WARPS,
    )


def rows_gradient(
    logits: Tensor,  # (R, C)
    out: Tensor,  # (R, C)
    first_column: int,
    logit_map: LogitMap,
    upstream: Upstream,
) -> None:
    (start, columns), stats, target_grad = upstream
    rows, chunk = logits.shape
    block = column_block(chunk, BLOCK)
    if rows:
        rows_gradient_kernel[(rows, triton.cdiv(chunk, block))](
            logits,
            out,
            start,
            columns,
            target_grad if logit_map.bias is None else logit_map.bias,
            stats.row_max,
            stats.row_log_sum,
            stats.target_logp,
            stats.target_slope,
            target_grad,
            logits.stride(0),
            out.stride(0),
            first_column,
            chunk,
            padded_width(logits, out),
            logit_map.scale,
            logit_map.softcap,
            HAS_BIAS=logit_map.bias is not None,
            HAS_CAP=logit_map.softcap != 0.0,
            COLUMNS=block,
            TARGETS=TARGET_BLOCK,
            num_warps=8,
        )


def hidden_gradient(
    out: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    context: Tensor | None,  # (R, H)
    upstream: Upstream,
    scale: float,
) -> None:
    (start, columns), stats, target_grad = upstream
    rows, width = out.shape
    if rows:
        hidden_gradient_kernel[(rows, triton.cdiv(width, WIDTH_BLOCK))](
            out,
            weight,
            out if context is None else context,
            start,
            columns,
            stats.store_rescale,
            stats.target_logp,
            stats.target_slope,
            target_grad,
            weight.stride(0),
            width,
            scale,
            HAS_CONTEXT=context is not None,
            WIDTH=WIDTH_BLOCK,
            TARGETS=TARGET_BLOCK,
        )
