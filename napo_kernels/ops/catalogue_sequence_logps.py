"""``catalogue_sequence_logps``: sequence log-probabilities over the tokens that each row allows (DESIGN.md 4.6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from napo_kernels.allowed import AllowedTokens
from napo_kernels.checks import check_floats, check_number, check_tensor
from napo_kernels.ops.registration import as_given, define, differentiate, fake, refuse_double_backward
from napo_kernels.reference import catalogue_sequence_logps as reference

_PLAN = (
    "Tensor rows, Tensor sizes, Tensor columns, Tensor pair_places, Tensor pair_slots, Tensor sequence_ids, "
    "int[] blocks"
)


@define(
    "catalogue_sequence_logps",
    f"(Tensor hidden, Tensor weight, Tensor? bias, {_PLAN}, int num_sequences, float logit_scale, "
    "float softcap) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _op(
    hidden: Tensor,  # (R, H) fp32 or fp64, as are all floats
    weight: Tensor,  # (U, H)
    bias: Tensor | None,  # (U,)
    rows: Tensor,  # what AllowedTokens holds
    sizes: Tensor,
    columns: Tensor,
    pair_places: Tensor,
    pair_slots: Tensor,
    sequence_ids: Tensor,
    blocks: list[int],
    num_sequences: int,
    logit_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> log-probs (S,), and what backward needs: logits, their slopes (empty without a softcap), statistics."""
    z, slope, stats = _memory(hidden, rows, blocks, softcap)
    with as_given(hidden):
        parts = list(reference.blocks(rows, sizes, columns, blocks))
        reference.forward(hidden, weight, bias, parts, logit_scale, softcap, z, slope if softcap else None, stats)
        logps = reference.sequence_sums(z, stats, pair_places, pair_slots, sequence_ids, num_sequences)
    return logps, z, slope, stats


def _memory(hidden: Tensor, rows: Tensor, blocks: list[int], softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    places = sum(n * w for n, w in zip(blocks[::3], blocks[1::3], strict=True))
    return (
        hidden.new_empty(places),
        hidden.new_empty(places if softcap else 0),
        hidden.new_empty((2, rows.shape[0])),
    )


@fake(_op)
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows, blocks, num_sequences, softcap = (rest[i] for i in (2, 8, 9, 11))
    return hidden.new_empty((num_sequences,)), *_memory(hidden, rows, blocks, softcap)


@define(
    "catalogue_sequence_logps_backward",
    f"(Tensor grad, Tensor hidden, Tensor weight, {_PLAN}, float logit_scale, Tensor z, Tensor slope, "
    "Tensor stats, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(
    grad: Tensor,  # (S,)
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (U, H)
    rows: Tensor,
    sizes: Tensor,
    columns: Tensor,
    pair_places: Tensor,
    pair_slots: Tensor,
    sequence_ids: Tensor,
    blocks: list[int],
    logit_scale: float,
    z: Tensor,
    slope: Tensor,
    stats: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of hidden (R, H), weight (U, H) and bias (U,), empty where not needed."""
    grads = _gradients(hidden, weight, need_hidden, need_weight, need_bias)
    with as_given(hidden):
        parts = list(reference.blocks(rows, sizes, columns, blocks))
        needed = (need_hidden, need_weight, need_bias)
        reference.backward(
            grad,
            hidden,
            weight,
            parts,
            pair_places,
            pair_slots,
            sequence_ids,
            logit_scale,
            z,
            slope if slope.numel() else None,
            stats,
            *(g if wanted else None for g, wanted in zip(grads, needed, strict=True)),
        )
    return grads


def _gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_zeros(hidden.shape if need_hidden else (0, 0)),
        weight.new_zeros(weight.shape if need_weight else (0, 0)),
        weight.new_zeros(weight.shape[0] if need_bias else 0),
    )


@fake(_backward_op)
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients(hidden, weight, *rest[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, *plan, ctx.blocks, _, ctx.logit_scale, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, *plan, *output[1:])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 13
    if grad is not None:
        hidden, weight, *plan, z, slope, stats = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        found = _backward_op(grad, hidden, weight, *plan, ctx.blocks, ctx.logit_scale, z, slope, stats, *need)
        grads[:3] = [g if needed else None for g, needed in zip(found, need, strict=True)]
    return tuple(grads)


differentiate(_op, _autograd, _setup_context)
refuse_double_backward(_backward_op)


def catalogue_sequence_logps(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    allowed: AllowedTokens,
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,  # A (r, H), B (V, r), scale
) -> Tensor:  # (S,)
    """Log-probabilities of S sequences, where each row of ``hidden`` has a choice among its allowed tokens alone.

    ``linear_sequence_logps`` with the softmax over a row's set in place of the vocabulary: of ``weight`` only the rows
    are read, and only they get a gradient, that some set names. A row whose set has one token contributes 0. Where the
    sets are those of a trie of titles, ``exp`` of all titles' results sums to 1. ``allowed`` tells rows, sets, targets
    and sequences, and lies on the device of ``hidden``; nothing waits for a GPU.

    Computed in fp32 from inputs of any dtype, fp64 for fp64, in plain PyTorch on every device, bitwise the same from
    run to run. All logits are kept for backward: rows times allowed tokens, four bytes each. ``bias``,
    ``logit_scale``, ``softcap`` and ``lora`` are those of ``linear_sequence_logps``. A sequence without a choice
    gets 0.

    >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> sets = torch.tensor([0, 3, 5]), torch.tensor([1, 4, 6, 0, 7])  # {1, 4, 6} and {0, 7}
    >>> row_sets, targets, one = torch.tensor([0, 1]), torch.tensor([6, 0]), torch.tensor([0, 0])
    >>> allowed = AllowedTokens.of(row_sets, sets, targets, sequence_ids=one, num_sequences=1)
    >>> (catalogue_sequence_logps(hidden, weight, allowed).exp() * 6).round(decimals=4)
    tensor([1.])
    """
    _check(hidden, weight, allowed, bias, lora)
    check_number("logit_scale", logit_scale, "a finite number")
    if logit_scale == 0:
        raise ValueError(f"logit_scale: expected a finite number other than 0, got {logit_scale}")
    if softcap is not None:
        check_number("softcap", softcap, "a positive number")
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        small = weight.index_select(0, allowed.used).to(dtype)
        if lora is not None:
            a, b, scale = lora
            small = small + scale * (b.index_select(0, allowed.used).to(dtype) @ a.to(dtype))
        logps: Tensor = _op(
            hidden.to(dtype),
            small,
            None if bias is None else bias.index_select(0, allowed.used).to(dtype),
            allowed.rows,
            allowed.sizes,
            allowed.columns,
            allowed.pair_places,
            allowed.pair_slots,
            allowed.sequence_ids,
            list(allowed.blocks),
            allowed.num_sequences,
            float(logit_scale),
            0.0 if softcap is None else float(softcap),
        )[0]
    return logps


def _check(
    hidden: Tensor,
    weight: Tensor,
    allowed: AllowedTokens,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
) -> None:
    for name, tensor, shape in (("hidden", hidden, "(R, H)"), ("weight", weight, "(V, H)")):
        check_tensor(name, tensor, 2, shape, device=hidden.device)
        check_floats(name, tensor)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected (V, H) with H = {hidden.shape[1]} of hidden, got {tuple(weight.shape)}")
    if not isinstance(allowed, AllowedTokens):
        raise ValueError(f"allowed: expected AllowedTokens, made by AllowedTokens.of, got {type(allowed).__name__}")
    if allowed.num_rows != len(hidden):
        raise ValueError(f"allowed: expected row_sets for each of {len(hidden)} rows of hidden, got {allowed.num_rows}")
    if allowed.vocabulary > len(weight):
        raise ValueError(f"allowed: expected tokens below {len(weight)}, weight's rows; got {allowed.vocabulary - 1}")
    if allowed.rows.device != hidden.device:
        raise ValueError(f"allowed: expected device {hidden.device} of hidden, got {allowed.rows.device}; call .to()")
    if bias is not None:
        check_tensor("bias", bias, 1, "(V,)", device=hidden.device)
        check_floats("bias", bias)
        if len(bias) != len(weight):
            raise ValueError(f"bias: expected shape ({len(weight)},), got {tuple(bias.shape)}")
    if lora is not None:
        if not isinstance(lora, tuple) or len(lora) != 3:
            raise ValueError(f"lora: expected (A (r, H), B (V, r), scale), got {type(lora).__name__}")
        a, b, scale = lora
        for name, tensor, shape in (("lora A", a, "(r, H)"), ("lora B", b, "(V, r)")):
            check_tensor(name, tensor, 2, shape, device=hidden.device)
            check_floats(name, tensor)
        check_number("lora scale", scale, "a finite number")
        if a.shape[1] != hidden.shape[1] or b.shape != (len(weight), len(a)):
            raise ValueError(
                f"lora: expected A (r, {hidden.shape[1]}) and B ({len(weight)}, r), got {tuple(a.shape)}, "
                f"{tuple(b.shape)}"
            )
