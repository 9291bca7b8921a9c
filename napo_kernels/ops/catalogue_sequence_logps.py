"""``catalogue_sequence_logps``: log-probabilities over the tokens that each row allows (docs/design.md, 4.6)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from napo_kernels import dispatch
from napo_kernels.allowed import AllowedTokens, Gradients, Head, Logits, Plan
from napo_kernels.checks import check_floats, check_number, check_tensor
from napo_kernels.ops.registration import (
    as_given,
    define,
    differentiate,
    fake,
    fields,
    refuse_double_backward,
    refuse_reshaped,
    shapes_of,
    split,
    without_autocast,
)

_OP = dispatch.register("catalogue_sequence_logps")


class _Options(NamedTuple):
    num_sequences: int
    logit_scale: float
    softcap: float  # 0: none
    backend: str | None


class _Kept(NamedTuple):
    """What forward leaves for backward: `Logits`, as an op returns them."""

    z: Tensor  # (places,)
    slope: Tensor  # (places,), empty without a softcap
    stats: Tensor  # (2, slots)

    def logits(self, options: _Options) -> Logits:
        return Logits(self.z, self.slope if options.softcap else None, self.stats)


class _Needed(NamedTuple):
    """Which gradients are."""

    need_hidden: bool
    need_weight: bool
    need_bias: bool


@define(_OP, f"({fields(Head, Plan, _Options)}) -> (Tensor, Tensor, Tensor, Tensor)")
def _op(*arguments: Any) -> tuple[Tensor, ...]:
    """-> log-probabilities (S,), and what `_Kept` has."""
    head, plan, options = split(arguments, Head, Plan, _Options)
    kept = _memory(head, plan, options)
    kernels = dispatch.kernels(_OP, head.hidden, options.backend)
    numbers = {"logit_scale": options.logit_scale, "softcap": options.softcap}
    with as_given(head.hidden):
        given = head if kernels.TAKES_HALF else head.wide()
        logps = kernels.forward(given, plan, kept.logits(options), num_sequences=options.num_sequences, **numbers)
    return logps, *kept


def _memory(head: Head, plan: Plan, options: _Options) -> _Kept:
    new_empty = functools.partial(head.hidden.new_empty, dtype=head.dtype)
    return _Kept(
        new_empty(plan.num_places),
        new_empty(plan.num_places if options.softcap else 0),
        new_empty((2, plan.rows.shape[0])),
    )


@fake(_op)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    head, plan, options = split(arguments, Head, Plan, _Options)
    return head.hidden.new_empty((options.num_sequences,), dtype=head.dtype), *_memory(head, plan, options)


@define(
    f"{_OP}_backward",
    f"(Tensor grad, {fields(Head, Plan, _Options, _Kept, _Needed)}) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """-> gradients of hidden (R, H), weight (U, H) and bias (U,), empty where not needed."""
    head, plan, options, kept, needed = split(arguments, Head, Plan, _Options, _Kept, _Needed)
    kernels = dispatch.kernels(_OP, head.hidden, options.backend)
    with as_given(head.hidden):
        given = head if kernels.TAKES_HALF else head.wide()
        grads = _gradients(given, needed)
        wanted = Gradients(*(g if need else None for g, need in zip(grads, needed, strict=True)))
        logits = kept.logits(options)
        kernels.backward(grad.contiguous(), given, plan, logits, wanted, logit_scale=options.logit_scale)
        return grads[0].to(head.hidden.dtype), grads[1].to(head.weight.dtype), grads[2]


def _gradients(head: Head, needed: _Needed) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = head.hidden, head.weight
    return (
        hidden.new_zeros(hidden.shape if needed.need_hidden else (0, 0)),
        weight.new_zeros(weight.shape if needed.need_weight else (0, 0)),
        weight.new_zeros(weight.shape[0] if needed.need_bias else 0, dtype=head.dtype),
    )


@fake(_backward_op)
def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    head, *_, needed = split(arguments, Head, Plan, _Options, _Kept, _Needed)
    return _gradients(head, needed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, plan, ctx.options = split(inputs, Head, Plan, _Options)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    *tensors, ctx.plan_shapes = plan
    ctx.shapes = shapes_of(head)
    ctx.save_for_backward(*head, *tensors, *output[1:])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * sum(len(group._fields) for group in (Head, Plan, _Options))
    if grad is not None:
        saved = ctx.saved_tensors
        head, tensors, kept = saved[:3], saved[3:-3], saved[-3:]
        refuse_reshaped(_OP, ctx.shapes, head)
        need = ctx.needs_input_grad[:3]
        found = _backward_op(grad, *head, *tensors, ctx.plan_shapes, *ctx.options, *kept, *need)
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
    backend: str | None = None,
) -> Tensor:  # (S,)
    """Log-probabilities of S sequences, where each row of ``hidden`` has a choice among its allowed tokens alone.

    ``linear_sequence_logps`` with the softmax over a row's set in place of the vocabulary: of ``weight`` only the rows
    are read, and only they get a gradient, that some set names. A row whose set has one token contributes 0. Where the
    sets are those of a trie of titles, ``exp`` of all titles' results sums to 1. ``allowed`` tells rows, sets, targets
    and sequences, and lies on the device of ``hidden``; nothing waits for a GPU.

    Computed in fp32 from inputs of any dtype, fp64 for fp64, bitwise the same from run to run: by the compiled module
    on a CPU, by Triton kernels on a GPU, in plain PyTorch (the reference) for fp64. All logits are kept for backward:
    rows times allowed tokens, four bytes each. ``bias``, ``logit_scale``, ``softcap``, ``lora`` and ``backend`` are
    those of ``linear_sequence_logps``. A sequence without a choice gets 0.

    Examples:
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
    halves = _takes_half(hidden.device) and dtype == torch.float32
    with without_autocast(hidden.device):
        small = weight.index_select(0, allowed.used)
        if lora is not None:
            a, b, scale = lora
            small = small.to(dtype) + scale * (b.index_select(0, allowed.used).to(dtype) @ a.to(dtype))
        logps: Tensor = _op(
            hidden if halves else hidden.to(dtype),
            small if halves else small.to(dtype),
            None if bias is None else bias.index_select(0, allowed.used).to(dtype),
            *allowed.plan,
            allowed.num_sequences,
            float(logit_scale),
            0.0 if softcap is None else float(softcap),
            backend,
        )[0]
    return logps


def _takes_half(device: torch.device) -> bool:
    """Whether the kernels that usually run on ``device`` read fp16 and bf16, so that nothing is cast before the op."""
    return device.type == "cuda"


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
