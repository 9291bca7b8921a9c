"""``napo_loss`` on the CPU and on CUDA: the kernels of the compiled module, and torch's matmul for the scores of a pair
margin."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from napo_kernels import _C
from napo_kernels.native import calls
from napo_kernels.problem import LossProblem

# Pair scores in memory at a time on CUDA, or as many as the mask has if that is more: a block has enough rows to fill a
# GPU.
_BLOCK = 1 << 22


def log_sums(p: LossProblem) -> tuple[Tensor, Tensor]:
    """The users' log-sum pairs m and rest, (B,) each; (-inf, -inf) where a set is empty."""
    at = calls.where(p.rejected)
    loss = _loss(p, "user", at)
    if p.share is None:
        return _owner_sums(p, loss, at)
    m, rest = torch.empty_like(p.chosen), torch.empty_like(p.chosen)
    if p.separable:
        owner_m, owner_rest = _owner_sums(p, loss, at)
        arguments: _C.SeparableSumsArgs = {
            "loss": loss,
            "owner_m": owner_m,
            "owner_rest": owner_rest,
            "m": m,
            "rest": rest,
        }
        _C.napo_separable_sums(arguments, *at)
    else:
        for general in _blocks(p, loss):
            _C.napo_general_sums({"general": general, "m": m, "rest": rest}, *at)
    return m, rest


def rejected_gradient(p: LossProblem, g: Tensor, m: Tensor, rest: Tensor) -> Tensor:
    """beta * sum_u g_u exp(beta s_vn + gamma_uvn - lse_u): (B', N). ``g``, ``m`` and ``rest`` are (B,)."""
    at, (users, owners, n) = calls.where(p.rejected), p.shape
    loss = _loss(p, "owner", at)
    g, m, rest = g.contiguous(), m.contiguous(), rest.contiguous()
    d_rejected = torch.zeros(p.rejected.shape, device=p.rejected.device)
    if p.share is None:
        own: _C.OwnerGradientArgs = {
            "loss": loss,
            "owner_m": m,
            "owner_rest": rest,
            "c": g,
            "d_rejected": d_rejected,
        }
        _C.napo_owner_gradient(own, *at)
    elif p.separable:
        owner_m, owner_rest = _owner_sums(p, loss, at)
        of_owners: _C.OwnerGradientArgs = {
            "loss": loss,
            "owner_m": owner_m,
            "owner_rest": owner_rest,
            "c": torch.empty_like(owner_m),
            "d_rejected": d_rejected,
        }
        scratch = _scratch(p, users, owners)
        _C.napo_separable_gradient({**of_owners, "g": g, "m": m, "rest": rest, "scratch": scratch}, *at)
        _C.napo_owner_gradient(of_owners, *at)
    else:
        for general in _blocks(p, loss):
            arguments: _C.GeneralGradientArgs = {
                "general": general,
                "g": g,
                "m": m,
                "rest": rest,
                "scratch": _scratch(p, general["rows"], owners * n),
                "d_rejected": d_rejected,
            }
            _C.napo_general_gradient(arguments, *at)
    return d_rejected


def losses(p: LossProblem, m: Tensor, rest: Tensor) -> Tensor:
    """The same as in the reference, by one call instead of seven ops on B numbers."""
    out = torch.empty_like(m)
    _C.napo_losses({"user": _user(p, m, rest), "losses": out}, *calls.where(m))
    return out


def chosen_gradient(p: LossProblem, grad: Tensor, m: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The same as in the reference."""
    g, d_chosen = torch.empty_like(grad), torch.empty_like(grad)
    arguments: _C.ChosenGradientArgs = {
        "user": _user(p, m, rest),
        "grad": grad.contiguous(),
        "g": g,
        "d_chosen": d_chosen,
    }
    _C.napo_chosen_gradient(arguments, *calls.where(m))
    return g, d_chosen


def _user(p: LossProblem, m: Tensor, rest: Tensor) -> _C.UserArgs:
    return {
        "users": len(m),
        "beta": p.beta,
        "chosen": p.chosen.contiguous(),
        "margin": p.user_margin.contiguous(),
        "m": m.contiguous(),
        "rest": rest.contiguous(),
    }


def _loss(p: LossProblem, excluded_by: str, at: tuple[bool, int]) -> _C.LossArgs:
    """The kernels' problem. On CUDA the excluded triples are sorted by user for sums, by owner for gradients."""
    margin = torch.zeros_like(p.rejected) if p.owner_margin is None else p.owner_margin
    if p.keep is not None:
        margin = torch.where(p.keep, margin, -torch.inf)
    excluded: _C.Excluded = {"bounds": None, "place": None, "key": None}
    if p.exclude is not None and p.share is not None:
        on_cuda, _ = at
        excluded = _sorted_on_device(p.exclude, p.shape, excluded_by) if on_cuda else _by_user(p.exclude, p.shape)
    return {
        "users": len(p.chosen),
        "owners": p.rejected.shape[0],
        "n": p.rejected.shape[1],
        "beta": p.beta,
        "rejected": p.rejected.contiguous(),
        "margin": margin.contiguous(),
        "share": None if p.share is None else p.share.contiguous(),
        "excluded": excluded,
    }


def _owner_sums(p: LossProblem, loss: _C.LossArgs, at: tuple[bool, int]) -> tuple[Tensor, Tensor]:
    m, rest = (torch.empty(len(p.rejected), device=p.rejected.device) for _ in range(2))
    _C.napo_owner_sums({"loss": loss, "m": m, "rest": rest}, *at)
    return m, rest


def _scratch(p: LossProblem, users: int, terms: int) -> Tensor | None:
    return p.rejected.new_empty(_C.gradient_scratch(users, terms)) if calls.where(p.rejected)[0] else None


def _blocks(p: LossProblem, loss: _C.LossArgs) -> Iterator[_C.GeneralArgs]:
    """The general form's blocks of users. The CPU's kernels make the pair scores themselves: torch's matmul would take
    four fifths of the time (csrc/cpu/shared_negatives.cpp)."""
    users, owners, n = p.shape
    states, items, bias, line = (
        None if x is None else x.contiguous() for x in (p.user_states, p.item_vectors, p.item_bias, p.line)
    )
    whole: _C.GeneralArgs = {
        "loss": loss,
        "first_row": 0,
        "rows": users,
        "full_margin": p.full_margin,
        "margin_stride": _strides(p.full_margin),
        "full_keep": p.full_keep,
        "keep_stride": _strides(p.full_keep),
        "score": None,
        "states": states,
        "items": items,
        "width": 0 if states is None else states.shape[1],
        "bias": bias,
        "line": line,
    }
    if p.user_states is None or p.item_vectors is None or not calls.where(p.rejected)[0]:
        yield whole
        return
    places, columns = owners * n, p.item_vectors.flatten(0, 1).T
    step = max(1, max(_BLOCK, users * owners // 4) // max(1, places))
    score = p.rejected.new_empty((min(step, users), places))
    for row in range(0, users, step):
        rows = min(step, users - row)
        torch.mm(p.user_states[row : row + rows], columns, out=score[:rows])
        yield {**whole, "first_row": row, "rows": rows, "score": score}


def _strides(part: Tensor | None) -> tuple[int, int, int]:
    """0 where a dimension is broadcast."""
    if part is None:
        return 0, 0, 0
    user, owner, negative = (0 if n == 1 else step for n, step in zip(part.shape, part.stride(), strict=True))
    return user, owner, negative


def _by_user(exclude: Tensor, shape: tuple[int, int, int]) -> _C.Excluded:
    users, owners, n = shape
    bounds = torch.empty((users, 2), dtype=torch.int64)
    place = torch.empty(len(exclude), dtype=torch.int32)
    arguments: _C.IndexExcludedArgs = {
        "triples": exclude.contiguous(),
        "count": len(exclude),
        "users": users,
        "owners": owners,
        "n": n,
        "bounds": bounds,
        "place": place,
    }
    _C.index_excluded(arguments, *calls.where(exclude))
    return {"bounds": bounds, "place": place, "key": None}


def _sorted_on_device(exclude: Tensor, shape: tuple[int, int, int], by: str) -> _C.Excluded:
    """Nothing waits for the device, so a triple out of range cannot be an error: it goes to the end with the padding,
    behind all bounds."""
    user, owner, negative = exclude.unbind(1)
    users, owners, n = shape
    valid = (user >= 0) & (user < users) & (owner >= 0) & (owner < owners) & (negative >= 0) & (negative < n)
    (group, groups), (other, others) = (user, users), (owner, owners)
    if by == "owner":
        (group, groups), (other, others) = (other, others), (group, groups)
    key = torch.where(valid, (group * others + other) * n + negative, groups * others * n).sort().values
    bounds = torch.searchsorted(key, torch.arange(groups + 1, device=key.device) * (others * n))
    return {"bounds": bounds, "place": None, "key": key}
