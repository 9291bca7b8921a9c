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
    gamma = written_out(parts, keep.shape)
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


def written_out(parts: list, shape: torch.Size) -> Tensor:
    """The sum of a loss's margins, (B, B', N) fp64."""
    gamma = torch.zeros(shape, dtype=torch.float64)
    for part in parts:
        if isinstance(part, PairMargin):
            z = torch.einsum("ud,vnd->uvn", part.user_states, part.item_vectors) + part.item_bias
            part = (part.offset.double() + part.slope.double() * z).clamp(min=0.0)
        gamma = gamma + part
    return gamma


SPOILS = ("nan", "left out", "unseen")


def spoil(case: Case, seed: int, how: str) -> Case:
    """``case`` with NaN among its numbers ("nan"), with margins of -inf ("left out"), or with NaN and infinities
    wherever no user looks ("unseen")."""
    rng = torch.Generator().manual_seed(seed)
    pick = lambda shape, share: torch.rand(shape, generator=rng) < share  # noqa: E731
    junk = lambda shape: torch.tensor([torch.nan, torch.inf, -torch.inf]).double()[  # noqa: E731
        torch.randint(0, 3, shape, generator=rng)
    ]

    def spoiled(tensor: Tensor, share: float, *, dims: tuple[int, ...], is_margin: bool = False) -> Tensor:
        """``dims``: of (B, B', N), those that the tensor has."""
        if how == "unseen":
            seen = case.keep
            for d in range(3):
                if d not in dims:
                    seen = seen.any(d, keepdim=True)
            seen = seen.reshape([n for d, n in enumerate(seen.shape) if d in dims])
            if tensor.ndim > len(dims):  # a vector each
                seen = seen[..., None].expand(tensor.shape)
            seen = seen.reshape(tensor.shape)
            return torch.where(seen, tensor, junk(tensor.shape))
        if how == "nan":
            return torch.where(pick(tensor.shape, share), torch.nan, tensor)
        return torch.where(pick(tensor.shape, share), -torch.inf, tensor) if is_margin else tensor

    margin = case.arguments.get("margin", ())
    parts = []
    for part in margin if isinstance(margin, tuple) else (margin,):
        if isinstance(part, PairMargin):
            part = dataclasses.replace(
                part,
                user_states=spoiled(part.user_states, 0.02, dims=(0,)),
                item_vectors=spoiled(part.item_vectors, 0.003, dims=(1, 2)),
                item_bias=spoiled(part.item_bias, 0.02, dims=(1, 2)),
            )
        elif isinstance(part, Tensor):
            sizes = (1,) * (3 - part.ndim) + tuple(part.shape)
            dims = tuple(d for d, n in enumerate(sizes) if n > 1)
            part = spoiled(part.reshape(sizes).squeeze(), 0.02, dims=dims, is_margin=True).reshape(part.shape)
        parts.append(part)
    arguments = case.arguments | ({"margin": parts[0] if len(parts) == 1 else tuple(parts)} if parts else {})
    chosen = torch.where(pick(case.chosen.shape, 0.05), torch.nan, case.chosen) if how == "nan" else case.chosen
    rejected = spoiled(case.rejected, 0.01, dims=(1, 2))
    gamma = written_out(parts, case.keep.shape)
    return Case(chosen, rejected, arguments, gamma, case.keep & ~gamma.isneginf())


NOBODY = ("separable", "exclusions", "general", "pair")


def nobody(form: str) -> Case:
    """A pool of seven owners from which none of zero users borrows."""
    arguments = {
        "separable": {},
        "exclusions": {"exclude": torch.zeros(0, 3, dtype=torch.int64)},
        "general": {"margin": torch.zeros(0, 7, 1)},
        "pair": {"margin": PairMargin(torch.zeros(0, 4), torch.ones(7, 3, 4), torch.ones(7, 3), -0.1, 0.5)},
    }[form]
    rejected = torch.arange(21.0, dtype=torch.float64).view(7, 3)
    nothing = torch.zeros(0, 7, 3)
    share = torch.ones(0, 7, dtype=torch.bool)
    return Case(rejected[:0, 0], rejected, {"share": share, **arguments}, nothing, nothing.bool())


def make_bands(seed: int) -> Case:
    """Owners whose negatives lie tens to thousands of nats apart; users that borrow only from the lower ones, or have
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
        nothing = 0.0 * chosen[u].square()  # of a NaN a NaN, and its gradient too
        losses.append(-logsigmoid(-torch.logsumexp(torch.stack(terms), 0)) if terms else nothing)
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
