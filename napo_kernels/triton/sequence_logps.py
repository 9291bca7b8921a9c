"""The kernels of sequence_logps in Triton, for NVIDIA and AMD GPUs; functions as in reference/sequence_logps.py."""

# Triton kernels take untyped arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from napo_kernels.rows import TokenStats
from napo_kernels.triton.softmax_rows import (
    BLOCK,
    REACH,
    STATISTICS,
    WALK_BLOCK,
    WALK_WARPS,
    column_block,
    expm1,
    log_p,
    origin_of,
)


@triton.jit
def _token_logits(row_ptr, columns, label, vocabulary):
    """The label is taken out of the logits, not out of the load's mask, which would make each load only two bytes
    wide."""
    z = tl.load(row_ptr + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
    return tl.where(columns == label, float("-inf"), z)


@triton.jit
def _token_sums(row_ptr, first_logits, label, vocabulary, shift, COLUMNS: tl.constexpr):
    """The largest logit and the sum of exp(z - shift) over all columns except the label; the first block is at hand."""
    lanes = tl.arange(0, COLUMNS)
    best = first_logits
    sums = tl.exp(first_logits - shift)
    coming = _token_logits(row_ptr, COLUMNS + lanes, label, vocabulary)
    for c in range(COLUMNS, vocabulary, COLUMNS):
        z = coming
        coming = _token_logits(row_ptr, c + COLUMNS + lanes, label, vocabulary)
        best = tl.maximum(best, z)
        sums += tl.exp(z - shift)
    return tl.max(best), tl.sum(sums)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=STATISTICS)
def token_forward_kernel(
    logits_ptr,
    labels_ptr,
    logp_ptr,
    row_max_ptr,
    row_log_sum_ptr,
    stride_s,
    stride_t,
    tokens,
    vocabulary,
    ignore_index,
    COLUMNS: tl.constexpr,
):
    """One program per token: one read of its logits and one exponential each, relative to the largest logit of the
    first block. If that is too far from the row's largest, the row is read again."""
    i = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + i)
    logp = 0.0
    top = 0.0
    log_whole = 0.0
    if label != ignore_index:
        row_ptr = logits_ptr + (i // tokens) * stride_s + (i % tokens) * stride_t
        column = label.to(tl.int32)
        first_logits = _token_logits(row_ptr, tl.arange(0, COLUMNS), column, vocabulary)
        sample = tl.max(first_logits)
        shift = tl.where(sample == float("-inf"), 0.0, sample)
        m, total = sample, 0.0
        again = tl.full((), 1, tl.int1)
        while again:
            m, total = _token_sums(row_ptr, first_logits, column, vocabulary, shift, COLUMNS)
            again = (m != float("-inf")) & (tl.abs(m - shift) > REACH)
            shift = tl.where(again, m, shift)
        z_v = tl.load(row_ptr + label).to(tl.float32)
        logp = log_p((shift - z_v) + tl.where(total == 0.0, float("-inf"), tl.log(total)), z_v)
        top = tl.maximum(m, z_v)
        shift = origin_of(m, shift, top)
        log_whole = tl.log(tl.exp(shift - top) * total + tl.exp(z_v - top))
    tl.store(logp_ptr + i, logp)
    tl.store(row_max_ptr + i, top)
    tl.store(row_log_sum_ptr + i, log_whole)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=STATISTICS)
def token_backward_kernel(
    logits_ptr,
    labels_ptr,
    logp_ptr,
    row_max_ptr,
    row_log_sum_ptr,
    grad_ptr,
    out_ptr,
    stride_s,
    stride_t,
    out_stride_s,
    out_stride_t,
    tokens,
    vocabulary,
    ignore_index,
    COLUMNS: tl.constexpr,
):
    """One program per token and block of columns; the logits of ignored tokens are not read. out may be logits."""
    i = tl.program_id(0).to(tl.int64)
    s = i // tokens
    t = i % tokens
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < vocabulary
    label = tl.load(labels_ptr + i)
    counts = columns < tl.where(label == ignore_index, 0, vocabulary)
    grad = tl.load(grad_ptr + s)
    z = tl.load(logits_ptr + s * stride_s + t * stride_t + columns, mask=counts, other=0.0).to(tl.float32)
    p = tl.exp((z - tl.load(row_max_ptr + i)) - tl.load(row_log_sum_ptr + i))
    gradient = tl.where(columns == label.to(tl.int32), -grad * expm1(tl.load(logp_ptr + i)), -grad * p)
    gradient = tl.where(counts, gradient, 0.0)
    tl.store(out_ptr + s * out_stride_s + t * out_stride_t + columns, gradient.to(out_ptr.dtype.element_ty), mask=mask)


def token_forward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
) -> TokenStats:
    stats = TokenStats(*torch.empty((3, *labels.shape), dtype=torch.float32, device=logits.device))
    if labels.numel():
        token_forward_kernel[(labels.numel(),)](
            logits,
            labels,
            *stats,
            logits.stride(0),
            logits.stride(1),
            logits.shape[1],
            logits.shape[2],
            ignore_index,
            COLUMNS=column_block(logits.shape[2], WALK_BLOCK),
            num_warps=WALK_WARPS,
        )
    return stats


def token_backward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
    stats: TokenStats,
    grad: Tensor,  # (S,)
    out: Tensor,  # (S, T, V)
    *,
    out_is_zero: bool,
) -> None:
    block = column_block(logits.shape[2], BLOCK)
    if labels.numel():
        token_backward_kernel[(labels.numel(), triton.cdiv(logits.shape[2], block))](
            logits,
            labels,
            *stats,
            grad,
            out,
            logits.stride(0),
            logits.stride(1),
            out.stride(0),
            out.stride(1),
            logits.shape[1],
            logits.shape[2],
            ignore_index,
            COLUMNS=block,
            num_warps=8,
        )
