"""``linear_sequence_logps``: sequence log-probabilities from hidden states at two matmuls (DESIGN.md 4.2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from napo_kernels.ops.linear_sequence_logps_backward import (
    HEAD,
    NUMBERS,
    head_backward,
    hidden_backward,
    kept_backward,
    lengths,
)
from napo_kernels.ops.output_head import (
    OutputHead,
    Pieces,
    Workspace,
    default_chunk,
    default_kept,
    operand_dtype,
    pieces,
    store_scale,
)
from napo_kernels.ops.registration import as_given
from napo_kernels.ops.row_backends import FLOATS, check_index, check_tensor, row_kernel
from napo_kernels.rows import Carried, RowStats, add_at, check_range, plan_targets


@torch.library.custom_op(
    "napo::linear_sequence_logps",
    mutates_args=(),
    schema=f"({HEAD}, Tensor targets, Tensor? rows, Tensor sequence_ids, int num_sequences, bool average, bool "
    f"keep_context, SymInt keep_columns, {NUMBERS}) -> ({', '.join(['Tensor'] * 10)})",
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
    keep_columns: int,
    logit_scale: float,
    softcap: float,
    lora_scale: float,
    chunk_bytes: int,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """-> log-probs (S,), and what backward needs: targets and statistics; the context (R, H), which is the stored
    numbers of the row kernel times weight, empty unless ``keep_context``; and, empty unless ``keep_columns`` is the
    width of the column pieces, the same times lora_b (R, r), the stored numbers themselves (R V,), one column piece
    with all its rows after the other, and what turns those of each piece and row into p * slope (pieces, R)."""
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
    row_pieces, column_pieces = pieces(
        hidden, vocabulary, chunk_bytes or default_chunk(hidden, vocabulary), kernel.takes_columns(hidden)
    )
    keeps = keep_columns == column_pieces.size
    context, low_context, kept, kept_scale = _memory(
        hidden, lora_b, operand_dtype(kernel.__name__, hidden.dtype), vocabulary, keep_context, keep_columns * keeps
    )
    with as_given(hidden):
        head = OutputHead(kernel.__name__, hidden, weight, bias, lora_a, lora_b, logit_scale, softcap, lora_scale)
        target_z, slope = kernel.target_logits(
            head.hidden, head.weight, head.low, head.lora_b, lora_scale, plan, head.logit_map
        )
        stats.target_slope.copy_(slope)
        scale_of_stored = store_scale(hidden.dtype, vocabulary)
        memory = Workspace(head, row_pieces.size * column_pieces.size, kept if keeps else None)
        for first_row, num in row_pieces:
            piece, carried = slice(first_row, first_row + num), Carried.of_rows(hidden[first_row : first_row + num])
            products = [x[piece] if len(x) else None for x in (context, low_context)]
            totals = []
            if column_pieces.count > 1:
                totals = [(torch.zeros_like(x, dtype=stats_dtype), x) for x in products if x is not None]
            for index, (first_column, width) in enumerate(column_pieces):
                columns = slice(first_column, first_column + width)
                logits, out = memory.piece(num, width, num_rows * first_column + first_row * width)
                head.logits(piece, columns, logits)
                stored = out if keep_context or keeps else None
                row_arguments = (plan, head.logit_map, target_z, stats, scale_of_stored)
                if width == vocabulary:
                    kernel.rows_forward(logits, stored, first_row, *row_arguments)
                else:
                    kernel.columns_forward(logits, stored, first_row, columns, vocabulary, carried, *row_arguments)
                    if keeps:
                        kept_scale[:index, piece] *= carried.keep
                        kept_scale[index, piece] = carried.gain
                if stored is not None:
                    head.times_weight(stored, columns, *products)
                for total, product in totals:
                    kernel.add_columns(total, product, carried)
            for total, product in totals:
                product.copy_(total)
        kept_scale *= stats.store_rescale
        logps = add_at(num_sequences, sequence_ids, stats.target_logp[pair_target])
        if average:
            logps = logps / lengths(sequence_ids, logps)
    return logps, *plan, pair_target, per_target, per_row, context, low_context, kept, kept_scale


@_op.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lora_b, targets, num_sequences, keep_context, keep_columns, backend = (rest[i] for i in (2, 3, 6, 8, 9, 14))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    kernel = row_kernel("linear_sequence_logps", hidden, backend)
    stored_dtype = operand_dtype(kernel.__name__, hidden.dtype)
    return (
        hidden.new_empty((num_sequences,), dtype=dtype),
        targets.new_empty((hidden.shape[0] + 1,)),
        torch.empty_like(targets),
        torch.empty_like(targets),
        hidden.new_empty((2, targets.shape[0]), dtype=dtype),
        hidden.new_empty((3, hidden.shape[0]), dtype=dtype),
        *_memory(hidden, lora_b, stored_dtype, weight.shape[0], keep_context, keep_columns),
    )


def _memory(
    hidden: Tensor,  # (R, H)
    lora_b: Tensor | None,  # (V, r)
    stored_dtype: torch.dtype,
    vocabulary: int,
    keep_context: bool,
    keep_columns: int,  # 0: none
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the last four outputs, the scales 1."""
    (num_rows, width), keeps = hidden.shape, keep_columns > 0
    kind = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((num_rows if keep_context else 0, width)),
        hidden.new_empty((num_rows if keeps and lora_b is not None else 0, 0 if lora_b is None else lora_b.shape[1])),
        hidden.new_empty(num_rows * vocabulary if keeps else 0, dtype=stored_dtype),
        hidden.new_ones((Pieces(vocabulary, keep_columns).count if keeps else 0, num_rows), dtype=kind),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, lora_a, lora_b, _, _, sequence_ids, _, ctx.average, ctx.keep_context, *numbers = inputs
    ctx.keep_columns, *ctx.numbers = numbers
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of what is kept that would be R V zeros
    head_trains = any(x is not None and x.requires_grad for x in (weight, bias, lora_a, lora_b))
    saved_hidden = hidden if head_trains else None  # a frozen head needs no hidden states any more
    ctx.save_for_backward(saved_hidden, weight, bias, lora_a, lora_b, sequence_ids, *output[1:])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, lora_a, lora_b, sequence_ids, *saved, context, low_context, kept, kept_scale = (
        ctx.saved_tensors
    )
    logit_scale, _, lora_scale, _, backend = ctx.numbers
    need_hidden, *need_head = ctx.needs_input_grad[:5]
    need_weight, need_bias, need_lora = need_head[0], need_head[1], need_head[2] or need_head[3]
    rest = (sequence_ids, ctx.average, *saved)
    grads: list[Tensor | None] = [None] * 17
    if grad is None:
        return tuple(grads)
    if need_hidden:
        assert ctx.keep_context, "keep_context: expected True where hidden requires a gradient"
        grads[0] = hidden_backward(grad, weight, lora_a, lora_b, *rest, context, logit_scale, lora_scale, backend)
    if any(need_head):
        if kept_scale.shape[0]:
            stored = (low_context, kept, kept_scale, need_weight, need_lora, ctx.keep_columns)
            head_grads = kept_backward(
                grad, hidden, weight, lora_a, lora_b, *rest, *stored, logit_scale, lora_scale, backend
            )
        else:
            need = (need_weight, need_bias, need_lora)
            head_grads = head_backward(grad, hidden, weight, bias, lora_a, lora_b, *rest, *need, *ctx.numbers)
        grads[1:5] = [g if needed else None for g, needed in zip(head_grads, need_head, strict=True)]
    return tuple(grads)


_op.register_autograd(_autograd, setup_context=_setup_context)


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
    is two matmuls and backward none. A weight that trains takes one more, LoRA almost nothing, while what forward
    stored is no larger than ``output_head.KEPT_BYTES`` or than the weight's gradient and is kept; else, and for a bias
    that trains, backward computes the logits again. A sequence without a token gets 0.

    ``hidden`` and ``weight`` share a dtype (under autocast they are cast to its dtype); outputs are fp32, fp64 for
    fp64. A and B are cast to that dtype too; LoRA dropout on this branch is not offered. Indices out of range raise
    ValueError on the CPU; on a GPU they stop the device with an assertion, because a ValueError would have to wait for
    it. ``chunk_bytes`` bounds the logits that exist at a time, and those kept (default: ``output_head.default_chunk``).

    >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)  # uniform over 8 tokens
    >>> ids = torch.tensor([0, 0])
    >>> linear_sequence_logps(hidden, weight, torch.tensor([1, 5]), sequence_ids=ids, num_sequences=1).exp() * 64
    tensor([1.])
    """
    _check(hidden, weight, targets, sequence_ids, num_sequences, rows, bias)
    if not 0.0 < abs(logit_scale) < math.inf:  # no math.isfinite: it takes no symbolic number (torch.compile, dynamic)
        raise ValueError(f"logit_scale: expected a finite number other than 0, got {logit_scale}")
    if softcap is not None and not 0.0 < softcap < math.inf:
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
    keep_columns = _kept_columns(hidden, weight, bias, lora_a, lora_b, chunk_bytes)
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
        keep_columns,
        float(logit_scale),
        0.0 if softcap is None else float(softcap),
        float(lora_scale),
        chunk_bytes or 0,
        backend,
    )[0]


def _kept_columns(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    chunk_bytes: int | None,
) -> int:
    """Width of the pieces whose stored numbers forward keeps, which spares backward a matmul and a pass; 0: none.

    Kept is what is no larger than KEPT_BYTES (``chunk_bytes`` where it is given), or than the weight's gradient, for a
    head that trains; not for a bias, whose gradient nothing but the logits' own gives. Kernels cut columns on a CPU
    alone, and the op keeps nothing where one does otherwise.
    """
    trains_weight = weight.requires_grad
    trains_lora = any(x is not None and x.requires_grad for x in (lora_a, lora_b))
    if not torch.is_grad_enabled() or not (trains_weight or trains_lora) or (bias is not None and bias.requires_grad):
        return 0
    (num_rows, width), vocabulary, itemsize = hidden.shape, weight.shape[0], hidden.dtype.itemsize
    most = max(chunk_bytes or default_kept(hidden), vocabulary * width * itemsize if trains_weight else 0)
    if num_rows * vocabulary * itemsize > most:
        return 0
    budget = chunk_bytes or default_chunk(hidden, vocabulary)
    return pieces(hidden, vocabulary, budget, hidden.device.type == "cpu")[1].size


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
