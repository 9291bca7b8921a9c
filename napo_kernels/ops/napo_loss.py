"""``napo_loss``: the preference loss over shared negatives in O(B B') (docs/design.md sections 3 and 4.4)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from napo_kernels import dispatch
from napo_kernels.checks import check_floats, check_index, check_mask, check_number, check_shape, check_tensor
from napo_kernels.ops.dynamic_margin import PairMargin
from napo_kernels.ops.registration import (
    as_given,
    define,
    differentiate,
    fake,
    fields,
    refuse_double_backward,
    refuse_reshaped,
    shapes_of,
)
from napo_kernels.problem import LossProblem

Margin = float | Tensor | PairMargin

_OP = dispatch.register("napo_loss")
_PROBLEM = fields(LossProblem)


def _modules(p: LossProblem, backend: str | None) -> tuple[ModuleType, ModuleType]:
    """Kernels of the backend that serves this problem: those that sum over negatives, and those for each user."""
    chosen = dispatch.resolve(_OP, p.chosen.device, backend, p.chosen.dtype)
    return dispatch.room(chosen, _OP), dispatch.room("reference" if chosen == "triton" else chosen, _OP)


@define("napo_loss", f"({_PROBLEM}, str? backend) -> (Tensor, Tensor)")
def _op(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``LossProblem`` and backend -> losses (B,) and the log-sum pairs of the users' sets (2, B)."""
    p, backend = LossProblem(*arguments[:-1]), arguments[-1]
    over_negatives, of_users = _modules(p, backend)
    # Autocast reaches into an op's body, and bf16 is too coarse for every step of it, as TF32 is for pair scores.
    with as_given(p.chosen, full_precision=True):
        m, rest = over_negatives.log_sums(p)
        return of_users.losses(p, m, rest), torch.stack((m, rest))


@fake(_op)
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    chosen: Tensor = arguments[0]
    return torch.empty_like(chosen), chosen.new_empty((2, chosen.shape[0]))


@define("napo_loss_backward", f"(Tensor grad, {_PROBLEM}, Tensor lse, str? backend) -> (Tensor, Tensor)")
def _backward_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Upstream gradient (B,), ``LossProblem``, log-sum pairs and backend -> gradients (B,) and (B', N)."""
    grad, p, (m, rest), backend = arguments[0], LossProblem(*arguments[1:-2]), arguments[-2], arguments[-1]
    over_negatives, of_users = _modules(p, backend)
    with as_given(p.chosen, full_precision=True):
        g, d_chosen = of_users.chosen_gradient(p, grad, m, rest)
        return d_chosen, over_negatives.rejected_gradient(p, g, m, rest)


@fake(_backward_op)
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(arguments[1]), torch.empty_like(arguments[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.beta, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sums
    ctx.shapes = shapes_of(tensors)
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, lse = ctx.saved_tensors
    if grad is None:  # nothing asks for this loss's gradient
        return (None,) * (len(tensors) + 2)
    refuse_reshaped("napo_loss", ctx.shapes, tensors)
    d_chosen, d_rejected = _backward_op(grad.contiguous(), *tensors, ctx.beta, lse, ctx.backend)
    return d_chosen, d_rejected, *(None for _ in range(len(tensors)))


differentiate(_op, _autograd, _setup_context)
refuse_double_backward(_backward_op)


def napo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B', N)
    *,
    share: Tensor | None = None,  # (B, B') bool
    margin: Margin | tuple[Margin, ...] = 0.0,
    mask: Tensor | None = None,  # bool, broadcastable to (B, B', N), True keeps
    exclude: Tensor | None = None,  # (E, 3) int64
    beta: float = 1.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # (B,), or () for a reduction
    """softplus( logsumexp_{e in E_u} ( beta s_e + gamma_ue ) - beta s_u+ ) over each user's negative set E_u.

    E_u are the negatives of the owners v with ``share[u, v]`` (without ``share``: only of owner u), less those with a
    False ``mask`` and the triples (user, owner, negative) of ``exclude``. A triple with a -1 is padding; one beyond the
    pool is an error on the CPU's kernels and padding elsewhere, because a check would have to wait for the device. A
    user without a negative has loss 0 and gradient 0. A negative that is left out, also by a margin of -inf, may hold
    anything. A NaN in a user's set, and an infinity above 0, makes that user's loss NaN and no other's.

    ``margin`` is a number, a tensor broadcastable to (B, B', N), a ``PairMargin``, or a tuple of these, summed; it gets
    no gradient. As long as every tensor depends only on the user or only on the negative ((B, 1, 1) or (B', N)), an
    owner's negatives are summed once for all borrowers, so the cost hardly grows with N. ``reduction`` is ``"mean"``
    (over the B users), ``"sum"`` or ``"none"``. Outputs are fp32, fp64 where a log-probability is.

    Examples:
        >>> napo_loss(torch.tensor([-2.0]), torch.tensor([[-2.0]])).item()  # one negative, as likely: log 2
        0.6931471824645996
    """
    check_tensor("chosen_logps", chosen_logps, 1, "(B,)")
    check_floats("chosen_logps", chosen_logps)
    check_tensor("rejected_logps", rejected_logps, 2, "(B', N)", device=chosen_logps.device)
    check_floats("rejected_logps", rejected_logps)
    users, owners = chosen_logps.shape[0], rejected_logps.shape[0]
    if share is None and owners != users:
        raise ValueError(f"share: needed where the pool is not the batch; got None with B = {users}, B' = {owners}")
    if share is not None:
        check_tensor("share", share, 2, "(B, B')", device=chosen_logps.device)
        check_mask("share", share)
        check_shape("share", share, (users, owners))
    if exclude is not None:
        check_index("exclude", exclude, 2, "(E, 3)", device=chosen_logps.device)
        check_shape("exclude", exclude, (len(exclude), 3))
    check_number("beta", beta, "a positive number")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    dispatch.check_backend(backend)

    chosen, rejected = chosen_logps, rejected_logps
    if not chosen.dtype == rejected.dtype == torch.float32:
        dtype = torch.promote_types(torch.promote_types(chosen.dtype, rejected.dtype), torch.float32)
        chosen, rejected = chosen.to(dtype), rejected.to(dtype)
    parts: dict[str, Tensor | None] = {"share": share, "exclude": exclude}
    parts |= _margin_parts(margin if isinstance(margin, tuple) else (margin,), chosen, rejected)
    parts |= _mask_parts(mask, share, chosen, rejected)
    if share is None:
        parts = _own_only(parts, rejected)
    losses: Tensor = _op(*LossProblem(chosen, rejected, beta=float(beta), **parts), backend)[0]  # type: ignore[arg-type]
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" and users > 0 else losses.sum()


def _part(name: str, part: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """``part`` as (1 or B, 1 or B', 1 or N); a dimension of size 1 stays unexpanded."""
    check_tensor(name, part, None, "broadcastable to (B, B', N)", device=chosen.device)
    shape = (chosen.shape[0], *rejected.shape)
    sizes = (1,) * (3 - part.ndim) + tuple(part.shape)
    if part.ndim > 3 or any(size not in (1, full) for size, full in zip(sizes, shape, strict=False)):
        raise ValueError(
            f"{name}: expected a shape broadcastable to (B, B', N) = {shape}, got {tuple(part.shape)}"
            " (a value a user is (B, 1, 1))"
        )
    return part.detach().reshape(sizes)


def _margin_parts(margins: tuple[Margin, ...], chosen: Tensor, rejected: Tensor) -> dict[str, Tensor | None]:
    """The summed margins as the fields of ``LossProblem``: what depends only on the user, only on the negative, on
    both, and the pair margin."""
    number, user_margin = 0.0, None
    parts: dict[str, Tensor | None] = dict.fromkeys(
        ("owner_margin", "full_margin", "user_states", "item_vectors", "item_bias", "line")
    )
    for margin in margins:
        if isinstance(margin, PairMargin):
            if parts["line"] is not None:
                raise ValueError("margin: expected at most one PairMargin, got several")
            parts |= _pair_parts(margin, chosen, rejected)
        elif isinstance(margin, Tensor):
            check_floats("margin", margin)
            part = _part("margin", margin, chosen, rejected).to(rejected.dtype)
            if part.shape[1] == 1 and part.shape[2] == 1:
                user_margin = part[:, 0, 0] if user_margin is None else user_margin + part[:, 0, 0]
                continue
            name = "owner_margin" if part.shape[0] == 1 else "full_margin"
            part = part[0].expand(rejected.shape) if name == "owner_margin" else part
            before = parts[name]
            parts[name] = part if before is None else before + part
        else:
            check_number("margin", margin, "a number, a tensor or a PairMargin")
            number += margin
    if user_margin is None:
        return {"user_margin": torch.full_like(chosen, number), **parts}
    if number != 0.0:
        user_margin = user_margin + number
    return {"user_margin": user_margin.expand_as(chosen), **parts}


def _pair_parts(pair: PairMargin, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor | None]:
    check_tensor("margin.user_states", pair.user_states, 2, "(B, D)", device=chosen.device)
    users, (owners, n), d = chosen.shape[0], rejected.shape, pair.user_states.shape[1]
    shapes = {"user_states": (users, d), "item_vectors": (owners, n, d), "item_bias": (owners, n)}
    parts: dict[str, Tensor | None] = {}
    for name, shape in shapes.items():
        tensor: Tensor | None = getattr(pair, name)
        if tensor is None and name == "item_bias":
            parts[name] = None
            continue
        check_tensor(f"margin.{name}", tensor, len(shape), str(shape), device=chosen.device)
        assert tensor is not None
        check_floats(f"margin.{name}", tensor)
        check_shape(f"margin.{name}", tensor, shape)
        parts[name] = tensor.detach().to(rejected.dtype)
    line = [_scalar(f"margin.{name}", getattr(pair, name), rejected) for name in ("slope", "offset")]
    return {**parts, "line": torch.stack(line)}


def _scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:  # ()
    """A number is filled in by the device: a copy of pageable memory would wait for it."""
    if isinstance(value, Tensor):
        check_tensor(name, value, 0, "()", device=like.device)
        check_floats(name, value)
        return value.detach().to(like)
    check_number(name, value)
    return like.new_full((), value)


def _mask_parts(
    mask: Tensor | None, share: Tensor | None, chosen: Tensor, rejected: Tensor
) -> dict[str, Tensor | None]:
    if mask is None:
        return {"keep": None, "full_keep": None}
    part = _part("mask", mask, chosen, rejected)
    check_mask("mask", part)
    if part.shape[0] == 1:
        return {"keep": part[0].expand(rejected.shape), "full_keep": None}
    if part.shape[2] == 1 and share is not None:  # a mask over (user, owner) has the meaning of share
        return {"keep": None, "full_keep": None, "share": share & part[:, :, 0]}
    return {"keep": None, "full_keep": part}


def _own_only(parts: dict[str, Tensor | None], rejected: Tensor) -> dict[str, Tensor | None]:
    """Without sharing only the pairs of user u and owner u matter, so a part that depends on both is one value per
    negative."""
    users, n = rejected.shape
    shape = (users, users, n)
    owner_margin, keep = parts["owner_margin"], parts["keep"]
    full_margin, full_keep, exclude = parts["full_margin"], parts["full_keep"], parts["exclude"]
    states, vectors, line = parts["user_states"], parts["item_vectors"], parts["line"]
    if full_margin is not None:
        own = full_margin.expand(shape).diagonal(dim1=0, dim2=1).T  # (B, N)
        owner_margin = own if owner_margin is None else owner_margin + own
    if states is not None and vectors is not None and line is not None:
        z = (states[:, None] * vectors).sum(-1)  # (B, N)
        z = z if parts["item_bias"] is None else z + parts["item_bias"]
        own = (line[1] + line[0] * z).clamp(min=0.0)
        owner_margin = own if owner_margin is None else owner_margin + own
    if full_keep is not None:
        own = full_keep.expand(shape).diagonal(dim1=0, dim2=1).T
        keep = own if keep is None else keep & own
    if exclude is not None:
        user, owner, negative = exclude.unbind(1)
        ours = (user == owner) & (user >= 0) & (user < users) & (negative >= 0) & (negative < n)
        place = torch.where(ours, user * n + negative, users * n)  # the others go to the spare one at the end
        own = torch.ones(users * n + 1, dtype=torch.bool, device=rejected.device).index_fill(0, place, False)
        own = own[: users * n].view(users, n)
        keep = own if keep is None else keep & own
    unused = dict.fromkeys(("full_margin", "full_keep", "user_states", "item_vectors", "item_bias", "line", "exclude"))
    return {**parts, **unused, "owner_margin": owner_margin, "keep": keep}
