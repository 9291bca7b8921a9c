"""Forward of ``linear_sequence_logps``, and what it keeps for the backward ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from napo_kernels import dispatch
from napo_kernels.checks import check_range
from napo_kernels.ops.linear_sequence_logps.arguments import (
    Frozen,
    Head,
    Kept,
    Needed,
    Options,
    Output,
    Saved,
    Tokens,
    lengths,
)
from napo_kernels.ops.linear_sequence_logps.backward import head_backward, hidden_backward, kept_backward
from napo_kernels.ops.linear_sequence_logps.head import OP, OutputHead, Workspace, operand_dtype, store_scale
from napo_kernels.ops.linear_sequence_logps.pieces import Pieces, Plan, pitch
from napo_kernels.ops.registration import (
    as_given,
    define,
    differentiate,
    fake,
    fields,
    refuse_graph,
    refuse_reshaped,
    shapes_of,
    split,
)
from napo_kernels.rows import Carried, RowsProblem, RowStats, add_at, plan_targets


@define(
    "linear_sequence_logps",
    f"({fields(Head, Tokens, Plan, Options)}) -> ({', '.join(['Tensor'] * len(Output._fields))})",
)
def forward_op(*arguments: Any) -> Output:
    given, (targets, rows, sequence_ids), plan, options = split(arguments, Head, Tokens, Plan, Options)
    hidden = given.hidden
    kernels = dispatch.kernels(OP, hidden, options.backend)
    num_rows, vocabulary = len(hidden), len(given.weight)
    check_range("targets", targets, vocabulary)
    check_range("sequence_ids", sequence_ids, options.num_sequences)
    if rows is not None:
        check_range("rows", rows, num_rows)
    by_row, pair_target = plan_targets(targets, rows, num_rows, vocabulary)
    stats_dtype = torch.promote_types(hidden.dtype, torch.float32)
    per_target = torch.zeros((2, len(targets)), dtype=stats_dtype, device=hidden.device)  # log p, slope
    per_row = torch.zeros((3, num_rows), dtype=stats_dtype, device=hidden.device)  # m, l, store_rescale
    stats = RowStats(*per_target, *per_row)
    plan = plan.known(hidden, vocabulary)
    row_pieces, column_pieces = Pieces(num_rows, plan.row_piece), Pieces(vocabulary, plan.column_piece)
    memory = _memory(given, plan, options, operand_dtype(kernels, hidden.dtype))
    context, low_context, kept, kept_scale = memory
    with as_given(hidden):
        head = OutputHead(kernels, given, options)
        target_z, slope = kernels.target_logits(head.hidden, head.weight, head.low_rank, by_row, head.logit_map)
        stats.target_slope.copy_(slope)
        scale = store_scale(hidden.dtype, vocabulary)
        problem = RowsProblem(by_row, head.logit_map, target_z, stats, scale, vocabulary)
        workspace = Workspace(head, row_pieces.size, column_pieces.size, kept if plan.keeps else None)
        for first_row, num in row_pieces:
            piece, carried = slice(first_row, first_row + num), Carried.of_rows(hidden[first_row : first_row + num])
            products = [x[piece] if len(x) else None for x in (context, low_context)]
            totals = []
            if column_pieces.count > 1:
                totals = [(torch.zeros_like(x, dtype=stats_dtype), x) for x in products if x is not None]
            for index, (first_column, width) in enumerate(column_pieces):
                columns = slice(first_column, first_column + width)
                logits, out = workspace.piece(num, width, first_row, num_rows * first_column)
                head.logits(piece, columns, logits)
                stored = out if options.keep_context or plan.keeps else None
                if width == vocabulary:
                    kernels.rows_forward(logits, stored, first_row, problem)
                else:
                    kernels.columns_forward(logits, stored, first_row, first_column, carried, problem)
                    if plan.keeps:
                        kept_scale[:index, piece] *= carried.keep
                        kept_scale[index, piece] = carried.gain
                if stored is not None:
                    head.times_weight(stored, columns, *products)
                for total, product in totals:
                    kernels.add_columns(total, product, carried)
            for total, product in totals:
                product.copy_(total)
        kept_scale *= stats.store_rescale
        logps = add_at(options.num_sequences, sequence_ids, stats.target_logp[pair_target])
        if options.average:
            logps = logps / lengths(sequence_ids, logps)
    return Output(logps, *by_row, pair_target, per_target, per_row, *memory)


@fake(forward_op)
def _(*arguments: Any) -> Output:
    head, (targets, _, _), plan, options = split(arguments, Head, Tokens, Plan, Options)
    hidden = head.hidden
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    kernels = dispatch.kernels(OP, hidden, options.backend)
    return Output(
        hidden.new_empty((options.num_sequences,), dtype=dtype),
        targets.new_empty((hidden.shape[0] + 1,)),
        torch.empty_like(targets),
        torch.empty_like(targets),
        hidden.new_empty((2, targets.shape[0]), dtype=dtype),
        hidden.new_empty((3, hidden.shape[0]), dtype=dtype),
        *_memory(head, plan, options, operand_dtype(kernels, hidden.dtype)),
    )


def _memory(
    head: Head, plan: Plan, options: Options, stored_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the last four outputs; the scales are 1."""
    hidden, lora_b, vocabulary = head.hidden, head.lora_b, head.weight.shape[0]
    num_rows, width = hidden.shape
    kind = torch.promote_types(hidden.dtype, torch.float32)
    low = (num_rows if plan.keeps and lora_b is not None else 0, 0 if lora_b is None else lora_b.shape[1])
    return (
        hidden.new_empty((num_rows if options.keep_context else 0, width)),
        hidden.new_empty(low),
        hidden.new_empty(num_rows * pitch(hidden, vocabulary) if plan.keeps else 0, dtype=stored_dtype),
        hidden.new_ones((Pieces(vocabulary, plan.column_piece).count if plan.keeps else 0, num_rows), dtype=kind),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, tokens, ctx.plan, ctx.options = split(inputs, Head, Tokens, Plan, Options)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # for the stored numbers zeros would be a tensor of R V
    head_trains = any(x is not None and x.requires_grad for x in head[1:])
    saved_hidden = head.hidden if head_trains else None  # a frozen head needs no hidden states any more
    ctx.shapes = shapes_of((saved_hidden, *head[1:]))
    # A copy: backward finds its way by the ids that were checked, whatever becomes of the caller's.
    ctx.save_for_backward(saved_hidden, *head[1:], tokens.sequence_ids.clone(), *output[1:])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    head_grads: list[Tensor | None] = [None] * len(Head._fields)
    others = [None] * (len(Tokens._fields) + len(Plan._fields) + len(Options._fields))
    if grad is None:
        return *head_grads, *others
    refuse_graph(OP)  # the context stands for the hidden states, but no graph leads from it to them
    plan, options = ctx.plan, ctx.options
    tensors = ctx.saved_tensors
    refuse_reshaped(OP, ctx.shapes, tensors[:5])
    head, sequence_ids = Head(*tensors[:5]), tensors[5]
    output = Output(grad, *tensors[6:])
    saved = Saved(sequence_ids, *output[1:6])
    need_hidden, *need_head = ctx.needs_input_grad[: len(Head._fields)]
    if need_hidden:
        assert options.keep_context, "keep_context: expected True where hidden requires a gradient"
        frozen = Frozen(head.weight, head.lora_a, head.lora_b, output.context)
        head_grads[0] = hidden_backward(grad, *frozen, *saved, *options)
    if any(need_head):
        needed = Needed(need_head[0], need_head[1], need_head[2] or need_head[3])
        if plan.keeps:
            kept = Kept(output.low_context, output.kept, output.kept_scale)
            found = kept_backward(grad, *head, *saved, *kept, *needed, *plan, *options)
        else:
            found = head_backward(grad, *head, *saved, *needed, *plan, *options)
        head_grads[1:] = [g if need else None for g, need in zip(found, need_head, strict=True)]
    return *head_grads, *others


differentiate(forward_op, _autograd, _setup_context)
