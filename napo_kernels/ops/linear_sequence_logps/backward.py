"""Backward of ``linear_sequence_logps``: for the hidden states, and for the head from kept or recomputed logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from napo_kernels import dispatch
from napo_kernels.ops.linear_sequence_logps.arguments import Frozen, Head, Kept, Needed, Options, Saved
from napo_kernels.ops.linear_sequence_logps.head import OP, OutputHead, Workspace, lines, matmul_into, unit_rows
from napo_kernels.ops.linear_sequence_logps.pieces import Pieces, Plan, pitch
from napo_kernels.ops.registration import as_given, define, fake, fields, refuse_double_backward, split
from napo_kernels.rows import add_at, number_distinct, target_coefficients

HeadGradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of weight, bias, lora_a and lora_b; empty where not needed


@define("linear_sequence_logps_backward", f"(Tensor grad, {fields(Frozen, Saved, Options)}) -> Tensor")
def hidden_backward(grad: Tensor, *arguments: Any) -> Tensor:  # (S,) -> (R, H)
    """No matmul: a gather of Q rows of weight, and the context times one number per row."""
    (weight, lora_a, lora_b, context), saved, options = split(arguments, Frozen, Saved, Options)
    kernels = dispatch.kernels(OP, context, options.backend)
    scale, upstream = options.logit_scale, saved.upstream(grad, options.average)
    with as_given(context):
        if lora_a is None or lora_b is None:
            out = torch.empty_like(context)
            kernels.hidden_gradient(out, unit_rows(weight), context, upstream, scale)
            return out
        wide = torch.empty_like(context, dtype=upstream.stats.row_max.dtype)
        kernels.hidden_gradient(wide, unit_rows(weight), context, upstream, scale)
        low = torch.empty((len(context), len(lora_a)), dtype=wide.dtype, device=wide.device)
        kernels.hidden_gradient(low, unit_rows(lora_b), None, upstream, scale * options.lora_scale)
        return wide.addmm_(low, lora_a.to(wide.dtype)).to(context.dtype)


@fake(hidden_backward)
def _(grad: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(split(arguments, Frozen, Saved, Options)[0].context)


@define(
    "linear_sequence_logps_backward_head",
    f"(Tensor grad, {fields(Head, Saved, Needed, Plan, Options)}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def head_backward(grad: Tensor, *arguments: Any) -> HeadGradients:
    """The logits are computed again, one part of the vocabulary at a time and for all rows, so every row of the
    weight's gradient is finished by one matmul with its fp32 accumulation, and nothing is summed over chunks."""
    given, saved, needed, plan, options = split(arguments, Head, Saved, Needed, Plan, Options)
    hidden, vocabulary = given.hidden, len(given.weight)
    kernels = dispatch.kernels(OP, hidden, options.backend)
    upstream = saved.upstream(grad, options.average)
    unit = _gradient_unit(upstream.target_grad, hidden.dtype)
    upstream = upstream._replace(target_grad=upstream.target_grad / unit)
    d_weight, d_bias, d_a, d_b = gradients = _head_gradients(given, needed)
    with as_given(hidden):
        head = OutputHead(kernels, given, options)
        low, lora_b, _ = head.low_rank
        d_low = saved.per_row.new_zeros((len(hidden), 0 if low is None else low.shape[1]))
        chunks = Pieces(vocabulary, plan.known(hidden, vocabulary).column_piece_again)
        memory = Workspace(head, len(hidden), chunks.size)
        for first, size in chunks:
            chunk = slice(first, first + size)
            logits, gradient = memory.piece(len(hidden), size)
            head.logits(slice(None), chunk, logits)
            kernels.rows_gradient(logits, gradient, first, head.logit_map, upstream)
            if needed.need_weight:
                matmul_into(d_weight[chunk], gradient.t(), head.hidden)
            if needed.need_bias:
                d_bias[chunk] = gradient.sum(0, dtype=d_bias.dtype)
            if needed.need_lora and low is not None and lora_b is not None:
                matmul_into(d_b[chunk], gradient.t(), low)
                d_low += gradient @ lora_b[chunk]
        if needed.need_lora:
            d_a.copy_(d_low.t() @ hidden.to(d_low.dtype) * (unit * options.logit_scale * options.lora_scale))
            d_b.mul_(unit * options.logit_scale * options.lora_scale)
        if needed.need_bias:
            d_bias.mul_(unit)
        if needed.need_weight and (hidden.dtype == torch.float16 or options.logit_scale != 1.0):
            d_weight.mul_(unit * options.logit_scale)
    return gradients


@fake(head_backward)
def _(grad: Tensor, *arguments: Any) -> HeadGradients:
    given, _, needed, _, _ = split(arguments, Head, Saved, Needed, Plan, Options)
    return _head_gradients(given, needed)


@define(
    "linear_sequence_logps_backward_kept",
    f"(Tensor grad, {fields(Head, Saved, Kept, Needed, Plan, Options)}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def kept_backward(grad: Tensor, *arguments: Any) -> HeadGradients:
    """The same result as ``head_backward``, without logits: off the targets the gradient is -G_r p J, one number per
    row times what forward stored, and that number goes to the other factor, (R, H) or (R, r)."""
    given, saved, (low_context, kept, kept_scale), needed, plan, options = split(
        arguments, Head, Saved, Kept, Needed, Plan, Options
    )
    hidden, columns = given.hidden, saved.columns
    kernels = dispatch.kernels(OP, hidden, options.backend)
    upstream = saved.upstream(grad, options.average)
    upstream = upstream._replace(target_grad=upstream.target_grad * options.logit_scale)
    rows, coefficients, of_row = target_coefficients(upstream)
    number = number_distinct(columns)
    row_scale = -of_row * kept_scale

    def of_head(out: Tensor, right: Tensor) -> None:
        """out (V, k) = (gradient with respect to the logits).T @ right (R, k)"""
        for (first, width), scale in zip(Pieces(len(out), plan.column_piece), row_scale, strict=True):
            stored = lines(kept, len(hidden) * first, len(hidden), width, pitch(hidden, width))
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

    d_weight, _, d_a, d_b = gradients = _head_gradients(given, needed)
    with as_given(hidden):
        head = OutputHead(kernels, given, options)
        if needed.need_weight:
            of_head(d_weight, head.hidden)
        if needed.need_lora and head.low_rank.low is not None and given.lora_b is not None:
            of_head(d_b, head.low_rank.low.to(saved.per_row.dtype) * options.lora_scale)
            d_low = torch.empty(low_context.shape, dtype=saved.per_row.dtype, device=hidden.device)
            weights = unit_rows(given.lora_b)
            kernels.hidden_gradient(d_low, weights, low_context, upstream, options.lora_scale)
            d_a.copy_(d_low.t() @ hidden.to(d_low.dtype))
    return gradients


@fake(kept_backward)
def _(grad: Tensor, *arguments: Any) -> HeadGradients:
    given, _, _, needed, _, _ = split(arguments, Head, Saved, Kept, Needed, Plan, Options)
    return _head_gradients(given, needed)


def _head_gradients(head: Head, needed: Needed) -> HeadGradients:
    """Memory for them."""

    def like(x: Tensor | None, need: bool) -> Tensor:
        if x is None or not need:
            return head.weight.new_empty(0)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return (
        like(head.weight, needed.need_weight),
        like(head.bias, needed.need_bias),
        like(head.lora_a, needed.need_lora),
        like(head.lora_b, needed.need_lora),
    )


def _gradient_unit(target_grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A power of two by which upstream gradients are divided so that fp16 neither loses nor overflows them."""
    if dtype != torch.float16:
        return target_grad.new_ones(())
    return _power_of_two(target_grad.abs().sum() / 64)


def _power_of_two(size: Tensor) -> Tensor:
    """The smallest power of two that is not less than ``size``; 1 for 0."""
    return torch.where(size > 0, torch.exp2(torch.ceil(torch.log2(size))), 1.0)


refuse_double_backward(hidden_backward)
refuse_double_backward(head_backward)
refuse_double_backward(kept_backward)
