"""Backward of ``linear_sequence_logps``: of the hidden states, and of the head from what forward kept or anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from napo_kernels.ops.output_head import (
    OutputHead,
    Pieces,
    Workspace,
    column_pieces,
    default_chunk,
    matmul_into,
    unit_rows,
)
from napo_kernels.ops.registration import as_given
from napo_kernels.ops.row_backends import refuse_double_backward, row_kernel
from napo_kernels.rows import RowStats, Targets, add_at, number_distinct, target_coefficients

HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b"
NUMBERS = "float logit_scale, float softcap, float lora_scale, int chunk_bytes, str? backend"
_SAVED = "Tensor start, Tensor columns, Tensor pair_target, Tensor per_target, Tensor per_row"


@torch.library.custom_op(
    "napo::linear_sequence_logps_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor sequence_ids, bool average, {_SAVED}, "
    "Tensor context, float logit_scale, float lora_scale, str? backend) -> Tensor",
)
def hidden_backward(
    grad: Tensor,  # (S,)
    weight: Tensor,  # (V, H)
    lora_a: Tensor | None,  # (r, H)
    lora_b: Tensor | None,  # (V, r)
    sequence_ids: Tensor,  # (Q,)
    average: bool,
    start: Tensor,  # (R + 1,)
    columns: Tensor,  # (Q,)
    pair_target: Tensor,  # (Q,)
    per_target: Tensor,  # (2, Q)
    per_row: Tensor,  # (3, R)
    context: Tensor,  # (R, H)
    logit_scale: float,
    lora_scale: float,
    backend: str | None,
) -> Tensor:  # (R, H)
    """No matmul: a gather of Q rows of weight, and the context times a number a row."""
    kernel = row_kernel("linear_sequence_logps", context, backend)
    plan, stats = Targets(start, columns), RowStats(*per_target, *per_row)
    target_grad = _target_grad(grad, sequence_ids, average, pair_target)
    with as_given(context):
        if lora_a is None or lora_b is None:
            out = torch.empty_like(context)
            kernel.hidden_gradient(out, unit_rows(weight), context, plan, stats, target_grad, logit_scale)
            return out
        wide = torch.empty_like(context, dtype=stats.row_max.dtype)
        kernel.hidden_gradient(wide, unit_rows(weight), context, plan, stats, target_grad, logit_scale)
        low = torch.empty((len(context), len(lora_a)), dtype=wide.dtype, device=wide.device)
        kernel.hidden_gradient(low, unit_rows(lora_b), None, plan, stats, target_grad, logit_scale * lora_scale)
        return wide.addmm_(low, lora_a.to(wide.dtype)).to(context.dtype)


@hidden_backward.register_fake
def _(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[11])


@torch.library.custom_op(
    "napo::linear_sequence_logps_backward_head",
    mutates_args=(),
    schema=f"(Tensor grad, {HEAD}, Tensor sequence_ids, bool average, {_SAVED}, bool need_weight, bool need_bias, "
    f"bool need_lora, {NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def head_backward(
    grad: Tensor,  # (S,)
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    lora_a: Tensor | None,  # (r, H)
    lora_b: Tensor | None,  # (V, r)
    sequence_ids: Tensor,  # (Q,)
    average: bool,
    start: Tensor,  # (R + 1,)
    columns: Tensor,  # (Q,)
    pair_target: Tensor,  # (Q,)
    per_target: Tensor,  # (2, Q)
    per_row: Tensor,  # (3, R)
    need_weight: bool,
    need_bias: bool,
    need_lora: bool,
    logit_scale: float,
    softcap: float,
    lora_scale: float,
    chunk_bytes: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of weight, bias, lora_a and lora_b; empty where not needed.

    The logits are computed again, a stretch of the vocabulary at a time and for all rows: so every row of the weight's
    gradient is finished by one matmul with its fp32 accumulation, and nothing is summed over chunks.
    """
    kernel = row_kernel("linear_sequence_logps", hidden, backend)
    plan, stats = Targets(start, columns), RowStats(*per_target, *per_row)
    target_grad = _target_grad(grad, sequence_ids, average, pair_target)
    unit = _gradient_unit(target_grad, hidden.dtype)
    target_grad = target_grad / unit
    d_weight, d_bias, d_a, d_b = _head_gradients(weight, bias, lora_a, lora_b, need_weight, need_bias, need_lora)
    with as_given(hidden):
        head = OutputHead(kernel.__name__, hidden, weight, bias, lora_a, lora_b, logit_scale, softcap, lora_scale)
        d_low = torch.zeros(
            (len(hidden), 0 if lora_a is None else len(lora_a)), dtype=per_row.dtype, device=grad.device
        )
        chunks = column_pieces(hidden, len(hidden), len(weight), chunk_bytes or default_chunk(hidden, len(weight)))
        memory = Workspace(head, len(hidden) * chunks.size)
        for first, size in chunks:
            chunk = slice(first, first + size)
            logits, gradient = memory.piece(len(hidden), size, 0)
            head.logits(slice(None), chunk, logits)
            kernel.rows_gradient(logits, gradient, first, plan, head.logit_map, stats, target_grad)
            if need_weight:
                matmul_into(d_weight[chunk], gradient.t(), head.hidden)
            if need_bias:
                d_bias[chunk] = gradient.sum(0, dtype=d_bias.dtype)
            if need_lora and head.low is not None and head.lora_b is not None:
                matmul_into(d_b[chunk], gradient.t(), head.low)
                d_low += gradient @ head.lora_b[chunk]
        if need_lora:
            d_a.copy_(d_low.t() @ hidden.to(d_low.dtype) * (unit * logit_scale * lora_scale))
            d_b.mul_(unit * logit_scale * lora_scale)
        if need_bias:
            d_bias.mul_(unit)
        if need_weight and (hidden.dtype == torch.float16 or logit_scale != 1.0):
            d_weight.mul_(unit * logit_scale)
    return d_weight, d_bias, d_a, d_b


@head_backward.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _head_gradients(weight, *rest[:3], *rest[10:13])


@torch.library.custom_op(
    "napo::linear_sequence_logps_backward_kept",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor sequence_ids, "
    f"bool average, {_SAVED}, Tensor low_context, Tensor kept, Tensor kept_scale, bool need_weight, bool need_lora, "
    "SymInt keep_columns, float logit_scale, float lora_scale, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def kept_backward(
    grad: Tensor,  # (S,)
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    lora_a: Tensor | None,  # (r, H)
    lora_b: Tensor | None,  # (V, r)
    sequence_ids: Tensor,  # (Q,)
    average: bool,
    start: Tensor,  # (R + 1,)
    columns: Tensor,  # (Q,)
    pair_target: Tensor,  # (Q,)
    per_target: Tensor,  # (2, Q)
    per_row: Tensor,  # (3, R)
    low_context: Tensor,  # (R, r)
    kept: Tensor,  # (R V,)
    kept_scale: Tensor,  # (pieces, R)
    need_weight: bool,
    need_lora: bool,
    keep_columns: int,
    logit_scale: float,
    lora_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``head_backward`` gives, without logits: off the targets the gradient is -G_r p J, a number a row times
    what forward stored, and that number goes to the other factor, (R, H) or (R, r)."""
    kernel = row_kernel("linear_sequence_logps", hidden, backend)
    plan, stats = Targets(start, columns), RowStats(*per_target, *per_row)
    target_grad = _target_grad(grad, sequence_ids, average, pair_target) * logit_scale
    rows, coefficients, of_row = target_coefficients(plan, stats, target_grad)
    number = number_distinct(columns)
    row_scale = -of_row * kept_scale

    def of_head(out: Tensor, right: Tensor) -> None:
        """out (V, k) = (gradient with respect to the logits).T @ right (R, k)"""
        for (first, width), scale in zip(Pieces(len(out), keep_columns), row_scale, strict=True):
            stored = kept[len(hidden) * first : len(hidden) * (first + width)].view(len(hidden), width)
            scaled = scale[:, None] * right
            if hidden.dtype == torch.float16:
                # Within fp16 both here and in the sums; the unit itself too, for CUDA multiplies by it in fp16.
                unit = _power_of_two(scaled.abs().sum(0).amax() / 2**14).clamp(2.0**-14, 2.0**15)
                matmul_into(out[first : first + width], stored.t(), (scaled / unit).to(kept.dtype))
                out[first : first + width] *= unit
            else:
                matmul_into(out[first : first + width], stored.t(), scaled.to(kept.dtype))
        # Each distinct column's targets are summed in fp32; all of its entries then write the same number.
        at_targets = add_at(len(columns), number, coefficients[:, None] * right[rows])
        out[columns] = (out[columns] + at_targets[number]).to(out.dtype)

    d_weight, d_bias, d_a, d_b = _head_gradients(weight, None, lora_a, lora_b, need_weight, False, need_lora)
    with as_given(hidden):
        head = OutputHead(kernel.__name__, hidden, weight, None, lora_a, lora_b, logit_scale, 0.0, lora_scale)
        if need_weight:
            of_head(d_weight, head.hidden)
        if need_lora and head.low is not None and lora_b is not None:
            of_head(d_b, head.low.to(per_row.dtype) * lora_scale)
            d_low = torch.empty(low_context.shape, dtype=per_row.dtype, device=hidden.device)
            kernel.hidden_gradient(d_low, unit_rows(lora_b), low_context, plan, stats, target_grad, lora_scale)
            d_a.copy_(d_low.t() @ hidden.to(d_low.dtype))
    return d_weight, d_bias, d_a, d_b


@kept_backward.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lora_a, lora_b, need_weight, need_lora = (rest[i] for i in (0, 1, 12, 13))
    return _head_gradients(weight, None, lora_a, lora_b, need_weight, False, need_lora)


def _head_gradients(
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    need_weight: bool,
    need_bias: bool,
    need_lora: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needed = ((weight, need_weight), (bias, need_bias), (lora_a, need_lora), (lora_b, need_lora))
    return tuple(  # type: ignore[return-value]
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and need else weight.new_empty(0)
        for x, need in needed
    )


def _gradient_unit(target_grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A power of two by which upstream gradients are divided so that fp16 neither loses nor overflows them."""
    if dtype != torch.float16:
        return target_grad.new_ones(())
    return _power_of_two(target_grad.abs().sum() / 64)


def _power_of_two(size: Tensor) -> Tensor:
    """The next from ``size`` on, 1 for 0."""
    return torch.where(size > 0, torch.exp2(torch.ceil(torch.log2(size))), 1.0)


def lengths(sequence_ids: Tensor, like: Tensor) -> Tensor:
    """Tokens of every sequence, at least 1, (S,)."""
    return add_at(len(like), sequence_ids, torch.ones_like(sequence_ids, dtype=like.dtype)).clamp_(min=1.0)


def _target_grad(grad: Tensor, sequence_ids: Tensor, average: bool, pair_target: Tensor) -> Tensor:
    """Upstream gradient of every distinct target: the sum over its pairs, (Q,)."""
    if average:
        grad = grad / lengths(sequence_ids, grad)
    return add_at(len(pair_target), pair_target, grad[sequence_ids])


refuse_double_backward(hidden_backward)
refuse_double_backward(head_backward)
refuse_double_backward(kept_backward)
