"""Arguments of the kernels of ``napo_loss``: the loss of docs/design.md, section 3, in one form for all backends.

Also the sums over small tensors that several backends take with torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossProblem(NamedTuple):
    """One loss over B users and a pool of B' owners with N negatives each; all floats in one dtype (fp32 or fp64).

    The margin of negative n of owner v for user u is the sum of every part that is there. A part with (1 or B, 1 or B',
    1 or N) is broadcast by the kernel: it is never expanded in memory.
    """

    chosen: Tensor  # (B,) log-probability of the chosen item
    rejected: Tensor  # (B', N)
    share: Tensor | None  # (B, B') bool; None: user u has only the negatives of owner u, B' = B
    user_margin: Tensor  # (B,)
    owner_margin: Tensor | None  # (B', N)
    keep: Tensor | None  # (B', N) bool, False leaves the negative out for everybody
    full_margin: Tensor | None  # (1 or B, 1 or B', 1 or N)
    full_keep: Tensor | None  # (1 or B, 1 or B', 1 or N) bool
    user_states: Tensor | None  # (B, D); the pair margin is max(0, offset + slope * (user_state . item_vector + bias))
    item_vectors: Tensor | None  # (B', N, D)
    item_bias: Tensor | None  # (B', N)
    line: Tensor | None  # (2,) slope and offset of the pair margin
    exclude: Tensor | None  # (E, 3) int64 triples (user, owner, negative); -1 is padding
    beta: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, B' and N."""
        return self.chosen.shape[0], self.rejected.shape[0], self.rejected.shape[1]

    @property
    def separable(self) -> bool:
        """Whether the margin is a per-user plus a per-negative part, so that an owner's sum is the same for every user
        (but for the excluded triples)."""
        return self.full_margin is None and self.full_keep is None and self.user_states is None


def log_sum(s: Tensor, margin: Tensor, keep: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log sum exp(beta * s + margin) over the kept elements of the last dimension, as a pair: (-inf, -inf) if nothing
    is kept, (-inf, 0) if nothing kept has any probability. A NaN or +inf among the kept gives NaN."""
    s = torch.where(keep, s, -torch.inf)
    m = s.amax(-1) if s.shape[-1] else s.sum(-1) - torch.inf
    origin = torch.where(m.isneginf(), 0.0, m)
    terms = torch.where(keep, beta * (s - origin[..., None]) + margin, -torch.inf)
    rest = torch.logsumexp(terms, -1)
    rest = torch.where(rest.isposinf(), torch.nan, rest)
    return m, torch.where(rest.isneginf() & keep.any(-1), 0.0, rest)


def weigh(g: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """g * exp(x) of the kept elements; 0 elsewhere, whatever x is there; 0 where g is 0, whatever x is."""
    return torch.where(keep & (g != 0.0), g * x.exp(), 0.0)
