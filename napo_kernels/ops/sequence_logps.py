"""``sequence_logps``: sequence log-probabilities from logits that are in memory (docs/design.md 4.1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from napo_kernels import dispatch
from napo_kernels.checks import check_flag, check_floats, check_index, check_integer, check_range, check_tensor
from napo_kernels.ops.registration import (
    as_given,
    define,
    differentiate,
    fake,
    fields,
    refuse_double_backward,
    refuse_graph,
    refuse_reshaped,
    shapes_of,
)
from napo_kernels.rows import TokenStats

_OP = dispatch.register("sequence_logps")
_LINE = 64  # bytes, of a CPU's cache


class _Labels(NamedTuple):
    labels: Tensor  # (S, T)
    average: bool
    ignore_index: int


@define(
    "sequence_logps", f"(Tensor logits, {fields(_Labels)}, bool inplace_backward, str? backend) -> (Tensor, Tensor)"
)
def _op(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """-> log-probs (S,) and log p, m, l of every token, (3, S, T)."""
    (labels, average, ignore_index), backend = _Labels(*arguments[:3]), arguments[-1]
    kernels = dispatch.kernels(_OP, logits, backend)
    check_range("labels", labels, logits.shape[2], valid=labels != ignore_index)
    with as_given(logits):
        token_stats = torch.stack(kernels.token_forward(_unit_columns(logits), labels.contiguous(), ignore_index))
    total = token_stats[0].sum(1)
    return total / _lengths(labels, ignore_index, total) if average else total, token_stats


@fake(_op)
def _(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(labels.shape[0], dtype=dtype), logits.new_empty((3, *labels.shape), dtype=dtype)


@define(
    "sequence_logps_backward",
    f"(Tensor grad, Tensor logits, {fields(_Labels)}, Tensor token_stats, str? backend) -> Tensor",
)
def _backward_op(grad: Tensor, logits: Tensor, *arguments: Any) -> Tensor:  # (S,), (S, T, V) -> (S, T, V)
    of_labels, token_stats, backend = _Labels(*arguments[:3]), arguments[3], arguments[4]
    out, out_is_zero = _empty_gradient(logits, of_labels)
    _write_gradient(grad, logits, of_labels, token_stats, backend, out, out_is_zero)
    return out


@fake(_backward_op)
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@define(
    "sequence_logps_backward_",
    f"(Tensor grad, Tensor(a!) logits, {fields(_Labels)}, Tensor token_stats, str? backend) -> ()",
)
def _backward_inplace_op(grad: Tensor, logits: Tensor, *arguments: Any) -> None:
    """Like ``_backward_op``, over the logits themselves."""
    of_labels, token_stats, backend = _Labels(*arguments[:3]), arguments[3], arguments[4]
    _write_gradient(grad, logits, of_labels, token_stats, backend, logits, False)


def _write_gradient(
    grad: Tensor,  # (S,)
    logits: Tensor,  # (S, T, V)
    of_labels: _Labels,
    token_stats: Tensor,  # (3, S, T)
    backend: str | None,
    out: Tensor,  # (S, T, V)
    out_is_zero: bool,
) -> None:
    kernels, (labels, average, ignore_index) = dispatch.kernels(_OP, logits, backend), of_labels
    if average:
        grad = grad / _lengths(labels, ignore_index, grad)
    target = out if out.stride(2) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    stats = TokenStats(*token_stats)
    with as_given(logits):
        arguments = (_unit_columns(logits), labels.contiguous(), ignore_index, stats, grad.contiguous(), target)
        kernels.token_backward(*arguments, out_is_zero=out_is_zero)
    if target is not out:
        out.copy_(target)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, ctx.average, ctx.ignore_index, ctx.inplace_backward, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.spent, ctx.shapes = False, shapes_of((logits,))
    # A copy: the labels that were checked are those that backward finds its way by, whatever becomes of the caller's.
    ctx.save_for_backward(logits, labels.clone(), output[1])


def _autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if ctx.inplace_backward and ctx.spent:
        raise RuntimeError(
            "sequence_logps: a second backward after inplace_backward=True, which has used up the logits"
        )
    logits, labels, token_stats = ctx.saved_tensors
    refuse_reshaped("sequence_logps", ctx.shapes, (logits,))
    arguments = (labels, ctx.average, ctx.ignore_index, token_stats, ctx.backend)
    if ctx.inplace_backward:
        refuse_graph("sequence_logps with inplace_backward")
        ctx.spent = True
        _backward_inplace_op(grad, logits, *arguments)
        return logits.detach(), None, None, None, None, None
    return _backward_op(grad, logits, *arguments), None, None, None, None, None


differentiate(_op, _autograd, _setup_context)
refuse_double_backward(_backward_op)


def sequence_logps(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T) int64
    *,
    shift: bool = False,
    average: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:  # (S,)
    """Sum (``average``: mean) over the tokens of each sequence of the log-probability of its labels.

    Tokens labelled ``ignore_index`` do not count and their logits are not read. ``shift=True`` scores labels[:, t + 1]
    with logits[:, t], as causal language models do. ``inplace_backward=True`` writes the gradient over the logits,
    which saves their size in memory; nothing else may need them then, and a second backward raises. Under
    torch.compile it has no effect, because the compiler decides about memory.

    Outputs are fp32, fp64 for fp64. Labels out of range raise ValueError on the CPU; on a GPU they stop the device
    with an assertion, because a ValueError would have to wait for it. A sequence without a label gets 0.

    Examples:
        >>> sequence_logps(torch.zeros(1, 2, 8), torch.tensor([[3, -100]])).exp() * 8  # uniform over 8 tokens
        tensor([1.])
    """
    check_tensor("logits", logits, 3, "(S, T, V)")
    check_floats("logits", logits)
    if logits.shape[2] == 0:
        raise ValueError(f"logits: expected at least one column, got {tuple(logits.shape)}")
    check_index("labels", labels, 2, "(S, T)", device=logits.device)
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels: expected shape {tuple(logits.shape[:2])} of logits, got {tuple(labels.shape)}")
    check_integer("ignore_index", ignore_index, "an integer of 64 bits", -(2**63))
    for name, flag in (("shift", shift), ("average", average), ("inplace_backward", inplace_backward)):
        check_flag(name, flag)
    dispatch.check_backend(backend)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    if inplace_backward and _may_overlap(logits):
        raise ValueError(
            "inplace_backward: expected logits with memory of their own for every element, got an expanded or "
            f"overlapping view of strides {logits.stride()}; call contiguous() on it"
        )
    if shift:  # the last token predicts nothing
        labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    logps: Tensor = _op(logits, labels, average, ignore_index, inplace_backward, backend)[0]
    return logps


def _may_overlap(logits: Tensor) -> bool:
    """Whether two elements may share memory. They do not if each dimension steps over all that the smaller ones
    span."""
    span = 1
    for step, n in sorted((s, n) for n, s in zip(logits.shape, logits.stride(), strict=True) if n > 1):
        if step < span:
            return True
        span += step * (n - 1)
    return False


def _lengths(labels: Tensor, ignore_index: int, like: Tensor) -> Tensor:
    """Tokens that count in every sequence, at least 1, (S,)."""
    return (labels != ignore_index).sum(1).clamp_(min=1).to(like.dtype)


def _unit_columns(logits: Tensor) -> Tensor:
    """``logits`` with unit stride along the vocabulary: a copy in the unusual case only."""
    return logits if logits.stride(2) == 1 or logits.shape[2] == 1 else logits.contiguous()


def _empty_gradient(logits: Tensor, of_labels: _Labels) -> tuple[Tensor, bool]:
    """Memory for the gradient, and whether it is zero already.

    Large blocks on the CPU are numpy's, which asks for huge pages: with torch's, faults on small ones cost as much as
    everything else. Where most labels are ignored they come from calloc, whose fresh pages are zero: rows that are
    ignored then cost neither a write nor a page. Below glibc's largest threshold for fresh pages, memory is recycled.
    """
    size = logits.numel() * logits.element_size()
    if logits.device.type != "cpu" or size <= 32 << 20:
        return torch.empty_like(logits, memory_format=torch.contiguous_format), False
    few = 2 * int((of_labels.labels != of_labels.ignore_index).sum()) < of_labels.labels.numel()
    memory = (np.zeros if few else np.empty)(size + _LINE, dtype=np.uint8)
    first = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory[first : first + size]).view(logits.dtype).view(logits.shape), few
