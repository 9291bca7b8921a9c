"""``linear_sequence_logps``: sequence log-probabilities from hidden states at two matmuls (docs/design.md, 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels import dispatch
from napo_kernels.checks import check_flag, check_floats, check_index, check_integer, check_number, check_tensor
from napo_kernels.ops.linear_sequence_logps.arguments import Head, Options, Tokens
from napo_kernels.ops.linear_sequence_logps.forward import forward_op
from napo_kernels.ops.linear_sequence_logps.pieces import Plan


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
    stored is no larger than ``pieces.KEPT_BYTES`` or than the weight's gradient and is kept; else, and for a bias
    that trains, backward computes the logits again. A sequence without a token gets 0.

    ``hidden`` and ``weight`` share a dtype (under autocast they are cast to its dtype); outputs are fp32, fp64 for
    fp64. A and B are cast to that dtype too; LoRA dropout on this branch is not offered. Indices out of range raise
    ValueError on the CPU; on a GPU they stop the device with an assertion, because a ValueError would have to wait for
    it. ``chunk_bytes`` bounds the logits that exist at a time, and those kept (the defaults are in ``pieces``).

    Examples:
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)  # uniform over 8 tokens
        >>> ids = torch.tensor([0, 0])
        >>> linear_sequence_logps(hidden, weight, torch.tensor([1, 5]), sequence_ids=ids, num_sequences=1).exp() * 64
        tensor([1.])
    """
    _check(hidden, weight, targets, sequence_ids, num_sequences, rows, bias)
    check_number("logit_scale", logit_scale, "a finite number")
    if logit_scale == 0.0:
        raise ValueError(f"logit_scale: expected a finite number other than 0, got {logit_scale}")
    if softcap is not None:
        check_number("softcap", softcap, "a positive number")
    if chunk_bytes is not None:
        check_integer("chunk_bytes", chunk_bytes, "None or a positive integer", 1)
    check_flag("average", average)
    dispatch.check_backend(backend)
    lora_a, lora_b, lora_scale = (None, None, 1.0) if lora is None else _checked_lora(lora, hidden, weight)
    kind = hidden.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta has none
    if autocast and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"weight: expected the dtype of hidden, {hidden.dtype}, got {weight.dtype}; cast one of them")
    if lora_a is not None and lora_b is not None:
        lora_a, lora_b = lora_a.to(hidden.dtype), lora_b.to(hidden.dtype)
    if bias is not None:
        bias = bias.to(torch.promote_types(hidden.dtype, torch.float32))
    keep_context = torch.is_grad_enabled() and hidden.requires_grad
    head = Head(hidden, weight, bias, lora_a, lora_b)
    options = Options(
        num_sequences=num_sequences,
        average=average,
        keep_context=keep_context,
        logit_scale=float(logit_scale),
        softcap=0.0 if softcap is None else float(softcap),
        lora_scale=float(lora_scale),
        backend=backend,
    )
    logps: Tensor = forward_op(*head, *Tokens(targets, rows, sequence_ids), *Plan.of(head, chunk_bytes), *options)[0]
    return logps


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    rows: Tensor | None,
    bias: Tensor | None,
) -> None:
    check_tensor("hidden", hidden, 2, "(R, H)")
    check_tensor("weight", weight, 2, "(V, H)", device=hidden.device)
    check_floats("hidden", hidden)
    check_floats("weight", weight)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected (V, H) with H = {hidden.shape[1]} of hidden, got {tuple(weight.shape)}")
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight: expected at least one row and column, got {tuple(weight.shape)}")
    check_index("targets", targets, 1, "(Q,)", device=hidden.device)
    check_index("sequence_ids", sequence_ids, 1, "(Q,)", device=hidden.device)
    if sequence_ids.shape != targets.shape:
        raise ValueError(f"sequence_ids: expected one for each of {len(targets)} targets, got {len(sequence_ids)}")
    check_integer("num_sequences", num_sequences, "a number of at least 0", 0)
    if rows is None:
        if len(targets) != len(hidden):
            raise ValueError(f"rows: needed unless targets has one entry a row; got {len(targets)} for {len(hidden)}")
    else:
        check_index("rows", rows, 1, "(Q,)", device=hidden.device)
        if rows.shape != targets.shape:
            raise ValueError(f"rows: expected one for each of {len(targets)} targets, got {len(rows)}")
    if bias is not None:
        check_tensor("bias", bias, 1, "(V,)", device=hidden.device)
        check_floats("bias", bias)
        if len(bias) != len(weight):
            raise ValueError(f"bias: expected shape ({len(weight)},), got {tuple(bias.shape)}")


def _checked_lora(lora: tuple[Tensor, Tensor, float], hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise ValueError(f"lora: expected (A (r, H), B (V, r), scale), got {type(lora).__name__}")
    a, b, scale = lora
    check_tensor("lora A", a, 2, "(r, H)", device=hidden.device)
    check_tensor("lora B", b, 2, "(V, r)", device=hidden.device)
    check_floats("lora A", a)
    check_floats("lora B", b)
    check_number("lora scale", scale, "a finite number")
    if a.shape[1] != hidden.shape[1] or b.shape != (len(weight), len(a)) or len(a) == 0:
        raise ValueError(
            f"lora: expected A (r, {hidden.shape[1]}) and B ({len(weight)}, r), got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    return a, b, scale
