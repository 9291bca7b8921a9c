"""Random problems for ``napo_loss`` and the brute-force oracle: fp64, every negative set built item by item."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from napo_kernels import PairMargin

SEPARABLE = ("zero", "number", "scalar", "n", "user", "negative", "owner", "user+negative")
GENERAL = ("pair-tensor", "user-n", "full", "pair", "all")
MARGINS = SEPARABLE + GENERAL


@dataclasses.dataclass
class Case:
    chosen: Tensor  # (B,) fp64
    rejected: Tensor  # (B', N) fp64
    arguments: dict  # of napo_loss
    gamma: Tensor  # (B, B', N) fp64, the margin written out
    keep: Tensor  # (B, B', N) bool, share, mask and exclude written out


def make_case(seed: int, margin: str = "number", *, scale: float = 3.0, shift: float = -20.0) -> Case:
    """Shapes, share, mask, exclude and beta drawn from ``seed``; values rounded to fp32 so that every dtype gets the
    same numbers."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: torch.from_numpy(rng.standard_normal(shape)).float().double()  # noqa: E731
    users, n, d = int(rng.integers(1, 12)), int(rng.choice([1, 2, 3, 5, 8, 17, 20])), 6
    pooled = rng.random() < 0.8
    owners = users + int(rng.choice([0, 0, 1, 7, 30])) if pooled else users
    chosen, rejected = draw(users) * scale + shift, draw(owners, n) * scale + shift
    chosen, rejected = chosen.float().double(), rejected.float().double()

    share = None
    keep = torch.eye(users, owners, dtype=torch.bool)
    if pooled:
        offset = int(rng.integers(0, owners - users + 1))
        share = torch.from_numpy(rng.random((users, owners)) < rng.choice([0.0, 0.3, 0.7, 1.0]))
        share.diagonal(offset).fill_(True)
        keep = share
    keep = keep[:, :, None].expand(users, owners, n).clone()

    arguments: dict = {"share": share, "beta": float(rng.choice([1.0, 0.1, 2.5]))}
    shapes = {"user": (users, 1, 1), "negative": (owners, n), "owner": (owners, 1), "pair-tensor": (users, owners, 1)}
    shapes |= {"user-n": (users, 1, n), "full": (users, owners, n), "scalar": (), "n": (n,)}
    pair = PairMargin(draw(users, d), draw(owners, n, d), draw(owners, n), torch.tensor(-0.3), torch.tensor(0.9))
    parts: list = []
    if margin == "number":
        parts = [0.7]
    elif margin == "pair":
        parts = [pair]
    elif margin == "all":
        parts = [draw(*shape) for shape in shapes.values()] + [pair, 0.4]
    elif margin != "zero":
        parts = [draw(*shapes[name]) for name in margin.split("+")]
    gamma = torch.zeros(users, owners, n, dtype=torch.float64)
    for part in parts:
        if isinstance(part, PairMargin):
            z = torch.einsum("ud,vnd->uvn", part.user_states, part.item_vectors) + part.item_bias
            part = (part.offset.double() + part.slope.double() * z).clamp(min=0.0)
        gamma = gamma + part
    if parts:
        arguments["margin"] = parts[0] if len(parts) == 1 else tuple(parts)

    if rng.random() < 0.5:
        shape = [(owners, n), (n,), (users, 1, 1), (users, owners, 1), (users, owners, n)][int(rng.integers(5))]
        arguments["mask"] = torch.from_numpy(rng.random(shape) < rng.choice([0.0, 0.5, 0.9]))
        keep &= arguments["mask"]
    if rng.random() < 0.6:
        count = int(rng.choice([1, 5, users * owners * n // 3 + 1]))
        triples = np.stack([rng.integers(0, limit, count) for limit in keep.shape], axis=1)
        triples = np.concatenate([triples, triples[: count // 2], np.full((2, 3), -1)])  # some twice, and padding
        arguments["exclude"] = torch.from_numpy(rng.permutation(triples))
        if rng.random() < 0.5:  # what is excluded may tower above all that is kept
            u, v, m = (int(i) for i in triples[0])
            if keep[:, v, m].any():
                rejected[v, m] = rejected.max() + 20.0
        for u, v, m in triples[triples[:, 0] >= 0]:
            keep[u, v, m] = False
    return Case(chosen, rejected, arguments, gamma, keep)


def make_bands(seed: int) -> Case:
    """Owners whose negatives lie tens to thousands of nats apart; users that borrow from the lower ones alone, or have
    the best of theirs excluded."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: torch.from_numpy(rng.standard_normal(shape)).float().double()  # noqa: E731
    levels, n = [0.0, -20.0, -27.0, -31.0, -60.0, -95.0, -3000.0], 3
    users, owners = 3 * len(levels), 7 * len(levels)
    level = torch.tensor(levels).repeat(7)  # of owner v
    rejected = (level[:, None] + draw(owners, n) - 5.0).float().double()
    share = level <= torch.tensor(levels).repeat(3)[:, None]
    share &= torch.from_numpy(rng.random(share.shape) < 0.8)
    share[:, 0] &= torch.from_numpy(rng.random(users) < 0.5)
    triples = torch.from_numpy(np.stack([rng.integers(0, limit, 400) for limit in (users, owners, n)], axis=1))
    best = rejected[:, 0].argsort(descending=True)[:7]  # of some users, the best owners' negatives go altogether
    gone = torch.cartesian_prod(torch.arange(0, users, 2), best, torch.arange(n))
    gamma = draw(owners, n)
    keep = share[:, :, None].expand(users, owners, n).clone()
    arguments = {"share": share, "beta": 1.0, "margin": gamma, "exclude": torch.cat((triples, gone))}
    keep[tuple(arguments["exclude"].T)] = False
    return Case(draw(users) - 8.0, rejected, arguments, gamma.expand(keep.shape), keep)


def oracle(case: Case, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of ``(weights * losses).sum()``."""
    chosen, rejected = case.chosen.clone().requires_grad_(), case.rejected.clone().requires_grad_()
    losses = []
    for u in range(len(chosen)):
        terms = []
        for v in range(rejected.shape[0]):
            for n in range(rejected.shape[1]):
                if case.keep[u, v, n]:
                    terms.append(case.arguments["beta"] * (rejected[v, n] - chosen[u]) + case.gamma[u, v, n])
        losses.append(-logsigmoid(-torch.logsumexp(torch.stack(terms), 0)) if terms else chosen[u] * 0.0)
    result = torch.stack(losses)
    d_chosen, d_rejected = torch.autograd.grad((weights * result).sum(), (chosen, rejected), allow_unused=True)
    return result.detach(), d_chosen, torch.zeros_like(rejected) if d_rejected is None else d_rejected


def cast(value: object, dtype: torch.dtype) -> object:
    """Every float tensor in an argument of ``napo_loss``, in ``dtype``."""
    if isinstance(value, tuple):
        return tuple(cast(part, dtype) for part in value)
    if isinstance(value, PairMargin):
        fields = {f.name: cast(getattr(value, f.name), dtype) for f in dataclasses.fields(value)}
        return PairMargin(**fields)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
