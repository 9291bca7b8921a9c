"""``linear_sequence_logps``: sequence log-probabilities from hidden states at two matmuls (DESIGN.md 4.2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from napo_kernels.ops.output_head import OutputHead, Pieces, default_chunk, unit_rows
from napo_kernels.ops.row_backends import FLOATS, check_index, check_tensor, refuse_double_backward, row_kernel
from napo_kernels.rows import Carried, RowStats, Targets, add_at, check_range, plan_targets

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b"
_NUMBERS = "float logit_scale, float softcap, float lora_scale, int chunk_bytes, str? backend"
_SAVED = "Tensor start, Tensor columns, Tensor pair_target, Tensor per_target, Tensor per_row"


@torch.library.custom_op(
    "napo::linear_sequence_logps",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor targets, Tensor? rows, Tensor sequence_ids, int num_sequences, bool average, "
    f"bool keep_context, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,) fp32
    lora_a: Tensor | None,  # (r, H)
    lora_b: Tensor | None,  # (V, r)
    targets: Tensor,  # (Q,)
    rows: Tensor | None,  # (Q,)
    sequence_ids: Tensor,  # (Q,)
    num_sequences: int,
    average: bool,
    keep_context: bool,
    logit_scale: float,
    softcap: float,
    lora_scale: float,
    chunk_bytes: int,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """-> log-probs (S,) and what backward needs: ``_SAVED`` and the context (R, H), which is the stored numbers of
    the row kernel times weight, empty unless ``keep_context``."""
    kernel = row_kernel("linear_sequence_logps", hidden, backend)
    num_rows, vocabulary = len(hidden), len(weight)
    check_range("targets", targets, vocabulary)
    check_range("sequence_ids", sequence_ids, num_sequences)
    if rows is not None:
        check_range("rows", rows, num_rows)
    plan, pair_target = plan_targets(targets, rows, num_rows, vocabulary)
    stats_dtype = torch.promote_types(hidden.dtype, torch.float32)
    per_target = torch.zeros((2, len(targets)), dtype=stats_dtype, device=hidden.device)  # log p, slope
    per_row = torch.zeros((3, num_rows), dtype=stats_dtype, device=hidden.device)  # m, l, store_rescale
    stats = RowStats(*per_target, *per_row)
    context = hidden.new_empty((num_rows if keep_context else 0, hidden.shape[1]))
    with torch.autocast(hidden.device.type, enabled=False):
        head = OutputHead(kernel.__name__, hidden, weight, bias, lora_a, lora_b, logit_scale, softcap, lora_scale)
        target_z, slope = kernel.target_logits(
            head.hidden, head.weight, head.low, head.lora_b, lora_scale, plan, head.logit_map
        )
        stats.target_slope.copy_(slope)
        store_scale = _store_scale(hidden.dtype, vocabulary)
        row_pieces, column_pieces = head.pieces(
            vocabulary, chunk_bytes or default_chunk(hidden), kernel.takes_columns(hidden)
        )
        logits_memory, stored_memory = head.workspace(row_pieces.size * column_pieces.size)
        for first_row, num in row_pieces:
            piece = slice(first_row, first_row + num)
            carried, total = Carried.of_rows(hidden[piece]), None
            if keep_context and column_pieces.size < vocabulary:
                total = torch.zeros((num, hidden.shape[1]), dtype=stats_dtype, device=hidden.device)
            for first_column, width in column_pieces:
                columns = slice(first_column, first_column + width)
                logits = head.logits(piece, columns, logits_memory)
                stored = stored_memory[: logits.numel()].view_as(logits) if keep_context else None
                row_arguments = (plan, head.logit_map, target_z, stats, store_scale)
                if width == vocabulary:
                    kernel.rows_forward(logits, stored, first_row, *row_arguments)
                else:
                    kernel.columns_forward(logits, stored, first_row, columns, vocabulary, carried, *row_arguments)
                if stored is not None:
                    head.times_weight(stored, columns, context[piece])
                if total is not None:
                    kernel.add_columns(total, context[piece], carried)
            if total is not None:
                context[piece] = total
        logps = add_at(num_sequences, sequence_ids, stats.target_logp[pair_target])
        if average:
            logps = logps / _lengths(sequence_ids, logps)
    return logps, plan.start, plan.columns, pair_target, per_target, per_row, context


@_op.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    targets, num_sequences, keep_context = rest[3], rest[6], rest[8]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((num_sequences,), dtype=dtype),
        targets.new_empty((hidden.shape[0] + 1,)),
        torch.empty_like(targets),
        torch.empty_like(targets),
        hidden.new_empty((2, targets.shape[0]), dtype=dtype),
        hidden.new_empty((3, hidden.shape[0]), dtype=dtype),
        hidden.new_empty((hidden.shape[0] if keep_context else 0, hidden.shape[1])),
    )


@torch.library.custom_op(
    "napo::linear_sequence_logps_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor sequence_ids, bool average, {_SAVED}, "
    "Tensor context, float logit_scale, float lora_scale, str? backend) -> Tensor",
)
def _hidden_backward_op(
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
    if lora_a is None or lora_b is None:
        out = torch.empty_like(context)
        kernel.hidden_gradient(out, unit_rows(weight), context, plan, stats, target_grad, logit_scale)
        return out
    with torch.autocast(context.device.type, enabled=False):
        wide = torch.empty_like(context, dtype=stats.row_max.dtype)
        kernel.hidden_gradient(wide, unit_rows(weight), context, plan, stats, target_grad, logit_scale)
        low = torch.empty((len(context), len(lora_a)), dtype=wide.dtype, device=wide.device)
        kernel.hidden_gradient(low, unit_rows(lora_b), None, plan, stats, target_grad, logit_scale * lora_scale)
        return wide.addmm_(low, lora_a.to(wide.dtype)).to(context.dtype)


@_hidden_backward_op.register_fake
def _(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[11])


@torch.library.custom_op(
    "napo::linear_sequence_logps_backward_head",
    mutates_args=(),
    schema=f"(Tensor grad, {_HEAD}, Tensor sequence_ids, bool average, {_SAVED}, bool need_weight, bool need_bias, "
    f"bool need_lora, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _head_backward_op(
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
    with torch.autocast(hidden.device.type, enabled=False):
        head = OutputHead(kernel.__name__, hidden, weight, bias, lora_a, lora_b, logit_scale, softcap, lora_scale)
        d_low = torch.zeros(
            (len(hidden), 0 if lora_a is None else len(lora_a)), dtype=per_row.dtype, device=grad.device
        )
        chunks = Pieces(len(weight), len(hidden) * head.bytes_per_logit, chunk_bytes or default_chunk(hidden))
        logits_memory, gradient_memory = head.workspace(len(hidden) * chunks.size)
        for first, size in chunks:
            chunk = slice(first, first + size)
            logits = head.logits(slice(None), chunk, logits_memory)
            gradient = gradient_memory[: logits.numel()].view_as(logits)
            kernel.rows_gradient(logits, gradient, first, plan, head.logit_map, stats, target_grad)
            if need_weight:
                d_weight[chunk] = gradient.t() @ head.hidden
            if need_bias:
                d_bias[chunk] = gradient.sum(0, dtype=d_bias.dtype)
            if need_lora and head.low is not None and head.lora_b is not None:
                d_b[chunk] = gradient.t() @ head.low
                d_low += gradient @ head.lora_b[chunk]
        if need_lora:
            d_a.copy_(d_low.t() @ hidden.to(d_low.dtype) * (unit * logit_scale * lora_scale))
            d_b.mul_(unit * logit_scale * lora_scale)
        if need_bias:
            d_bias.mul_(unit)
        if need_weight and (hidden.dtype == torch.float16 or logit_scale != 1.0):
            d_weight.mul_(unit * logit_scale)
    return d_weight, d_bias, d_a, d_b


@_head_backward_op.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _head_gradients(weight, *rest[:3], *rest[10:13])


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, lora_a, lora_b, _, _, sequence_ids, _, ctx.average, ctx.keep_context, *ctx.numbers = inputs
    ctx.mark_non_differentiable(*output[1:])
    head_trains = any(x is not None and x.requires_grad for x in (weight, bias, lora_a, lora_b))
    saved_hidden = hidden if head_trains else None  # a frozen head needs no hidden states any more
    ctx.save_for_backward(saved_hidden, weight, bias, lora_a, lora_b, sequence_ids, *output[1:])


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, lora_a, lora_b, sequence_ids, *saved, context = ctx.saved_tensors
    logit_scale, _, lora_scale, _, backend = ctx.numbers
    need_hidden, *need_head = ctx.needs_input_grad[:5]
    grads: list[Tensor | None] = [None] * 16
    if need_hidden:
        assert ctx.keep_context, "keep_context: expected True where hidden requires a gradient"
        grads[0] = _hidden_backward_op(
            grad, weight, lora_a, lora_b, sequence_ids, ctx.average, *saved, context, logit_scale, lora_scale, backend
        )
    if any(need_head):
        need = (need_head[0], need_head[1], need_head[2] or need_head[3])
        head_grads = _head_backward_op(
            grad, hidden, weight, bias, lora_a, lora_b, sequence_ids, ctx.average, *saved, *need, *ctx.numbers
        )
        grads[1:5] = [g if needed else None for g, needed in zip(head_grads, need_head, strict=True)]
    return tuple(grads)


_op.register_autograd(_autograd, setup_context=_setup_context)
refuse_double_backward(_hidden_backward_op)
refuse_double_backward(_head_backward_op)


def linear_sequence_logps(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (Q,) int64
    *,
    sequence_ids: Tensor,  # (Q,) int64
    num_sequences: int,
    rows: Tensor | None = None,  # (Q,) int64
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,  # A (r, H), B (V, r), scale
    average: bool = False,
    backend: str | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:  # (S,)
    """Log-probabilities of S sequences whose tokens are pairs (row of hidden, target), summed by ``sequence_ids``.

    Logits are ``softcap * tanh((logit_scale * (hidden @ weight.T + scale * hidden @ A.T @ B.T) + bias) / softcap)``
    and never exist as a whole. ``rows`` tells which row predicts each target, None: row q for pair q; a row may have
    many targets, and each row is computed once, so leave out rows that nothing refers to. With a frozen head forward
    is two matmuls and backward none. A sequence without a token gets 0.

    ``hidden`` and ``weight`` share a dtype (under autocast they are cast to its dtype); outputs are fp32, fp64 for
    fp64. A and B are cast to that dtype too; LoRA dropout on this branch is not offered. Indices out of range raise
    ValueError on the CPU; on a GPU they stop the device with an assertion, because a ValueError would have to wait for
    it. ``chunk_bytes`` bounds the logits that exist at a time (default ``output_head.CHUNK_BYTES``).

    >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)  # uniform over 8 tokens
    >>> ids = torch.tensor([0, 0])
    >>> linear_sequence_logps(hidden, weight, torch.tensor([1, 5]), sequence_ids=ids, num_sequences=1).exp() * 64
    tensor([1.])
    """
    _check(hidden, weight, targets, sequence_ids, num_sequences, rows, bias)
    if not math.isfinite(logit_scale) or logit_scale == 0.0:
        raise ValueError(f"logit_scale: expected a finite number other than 0, got {logit_scale}")
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: expected None or a positive number, got {softcap}")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: expected None or a positive number, got {chunk_bytes}")
    lora_a, lora_b, lora_scale = (None, None, 1.0) if lora is None else _checked_lora(lora, hidden, weight)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"weight: expected the dtype of hidden, {hidden.dtype}, got {weight.dtype}; cast one of them")
    if lora_a is not None and lora_b is not None:
        lora_a, lora_b = lora_a.to(hidden.dtype), lora_b.to(hidden.dtype)
    if bias is not None:
        bias = bias.to(torch.promote_types(hidden.dtype, torch.float32))
    keep_context = torch.is_grad_enabled() and hidden.requires_grad
    return _op(
        hidden,
        weight,
        bias,
        lora_a,
        lora_b,
        targets,
        rows,
        sequence_ids,
        num_sequences,
        average,
        keep_context,
        float(logit_scale),
        0.0 if softcap is None else float(softcap),
        float(lora_scale),
        chunk_bytes or 0,
        backend,
    )[0]


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    rows: Tensor | None,
    bias: Tensor | None,
) -> None:
    check_tensor("hidden", hidden, 2, "(R, H)", device=hidden.device)
    check_tensor("weight", weight, 2, "(V, H)", device=hidden.device)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: expected bfloat16, float16, float32 or float64, got {tensor.dtype}")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected (V, H) with H = {hidden.shape[1]} of hidden, got {tuple(weight.shape)}")
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight: expected at least one row and column, got {tuple(weight.shape)}")
    check_index("targets", targets, 1, "(Q,)", device=hidden.device)
    check_index("sequence_ids", sequence_ids, 1, "(Q,)", device=hidden.device)
    if sequence_ids.shape != targets.shape:
        raise ValueError(f"sequence_ids: expected one for each of {len(targets)} targets, got {len(sequence_ids)}")
    if not isinstance(num_sequences, int) or num_sequences < 0:
        raise ValueError(f"num_sequences: expected a number of at least 0, got {num_sequences!r}")
    if rows is None:
        if len(targets) != len(hidden):
            raise ValueError(f"rows: needed unless targets has one entry a row; got {len(targets)} for {len(hidden)}")
    else:
        check_index("rows", rows, 1, "(Q,)", device=hidden.device)
        if rows.shape != targets.shape:
            raise ValueError(f"rows: expected one for each of {len(targets)} targets, got {len(rows)}")
    if bias is not None:
        check_tensor("bias", bias, 1, "(V,)", device=hidden.device)
        if len(bias) != len(weight):
            raise ValueError(f"bias: expected shape ({len(weight)},), got {tuple(bias.shape)}")


def _checked_lora(lora: tuple[Tensor, Tensor, float], hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise ValueError(f"lora: expected (A (r, H), B (V, r), scale), got {type(lora).__name__}")
    a, b, scale = lora
    check_tensor("lora A", a, 2, "(r, H)", device=hidden.device)
    check_tensor("lora B", b, 2, "(V, r)", device=hidden.device)
    if a.shape[1] != hidden.shape[1] or b.shape != (len(weight), len(a)) or len(a) == 0:
        raise ValueError(
            f"lora: expected A (r, {hidden.shape[1]}) and B ({len(weight)}, r), got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    return a, b, scale


def _store_scale(dtype: torch.dtype, vocabulary: int) -> float:
    """A power of two that keeps sums over the vocabulary of numbers up to 1 within fp16."""
    return 2.0 ** -max(0, math.ceil(math.log2(vocabulary)) - 13) if dtype == torch.float16 else 1.0


def _gradient_unit(target_grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A power of two by which upstream gradients are divided so that fp16 neither loses nor overflows them."""
    if dtype != torch.float16:
        return target_grad.new_ones(())
    total = target_grad.abs().sum() / 64
    return torch.where(total > 0, torch.exp2(torch.ceil(torch.log2(total))), 1.0)


def _lengths(sequence_ids: Tensor, like: Tensor) -> Tensor:
    """Tokens of every sequence, at least 1, (S,)."""
    return add_at(len(like), sequence_ids, torch.ones_like(sequence_ids, dtype=like.dtype)).clamp_(min=1.0)


def _target_grad(grad: Tensor, sequence_ids: Tensor, average: bool, pair_target: Tensor) -> Tensor:
    """Upstream gradient of every distinct target: the sum over its pairs, (Q,)."""
    if average:
        grad = grad / _lengths(sequence_ids, grad)
    return add_at(len(pair_target), pair_target, grad[sequence_ids])
