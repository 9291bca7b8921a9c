"""``DynamicMargin``: the margin that grows with the confidence that a negative is one (docs/design.md section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from napo_kernels.checks import check_floats, check_mask, check_number, check_shape, check_tensor

GRANULARITIES = ("batch", "user", "negative", "pair")

# Elements of a (rows, B') or (rows, B', N) float block, so that a (B, B') mask is never converted as a whole.
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class PairMargin:
    """gamma_ue = max(0, offset + slope * z_ue), z_ue = user_states_u . item_vectors_e + item_bias_e, computed in blocks
    by the loss and never stored as (B, B', N). Slope and offset may be numbers or 0-d tensors."""

    user_states: Tensor  # (B, D)
    item_vectors: Tensor  # (B', N, D)
    item_bias: Tensor | None = None  # (B', N)
    slope: Tensor | float = 0.0
    offset: Tensor | float = 0.0


class DynamicMargin(nn.Module):
    """gamma = gamma0 * (1 - alpha * (m - m_ema)), clamped at 0, from the recommender's scores z of the negatives.

    ``granularity`` says what m is: ``"batch"`` the mean of z over the negative sets of the pool, ``"user"`` over one
    user's set, ``"negative"`` the owner's score of its negative, ``"pair"`` the borrower's score of it. m_ema is the
    moving average of the pool's mean, started by the first batch, agreed across ranks, and used before this step's
    update. With ``standardize`` z is first shifted and scaled by the running mean and deviation (and m_ema is 0);
    while no batch has had a deviation, gamma is gamma0. A NaN among the scores, or an infinity in a mean, shows in the
    margins that it reaches, and its batch makes no update. The running figures stay float32 when the module is cast.

    A forward in training mode updates the state once. Where several forwards make one optimiser step, set ``deferred``
    and call ``commit()`` after the last of them: it makes one update from all of them, ``discard()`` none. No update in
    evaluation mode.
    The result carries no gradient. ``process_group`` is the group of ranks that agree (None: all).
    """

    mean: Tensor
    variance: Tensor
    initialized: Tensor
    pending: Tensor

    def __init__(
        self,
        gamma: float = 1.0,
        alpha: float = 0.3,
        decay: float = 0.9,
        granularity: str = "negative",
        standardize: bool = False,
    ) -> None:
        super().__init__()
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}; got {granularity!r}")
        for name, value in (("gamma", gamma), ("alpha", alpha), ("decay", decay)):
            check_number(name, value, "a finite number")
        if gamma < 0.0:
            raise ValueError(f"gamma: expected 0 or more, got {gamma}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected 0 <= decay < 1, got {decay}")
        self.gamma, self.alpha, self.decay = gamma, alpha, decay
        self.granularity, self.standardize = granularity, standardize
        self.deferred = False
        self.process_group: Any = None
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.register_buffer("pending", torch.zeros(3), persistent=False)  # count, mean, variance

    def extra_repr(self) -> str:
        return (
            f"gamma={self.gamma}, alpha={self.alpha}, decay={self.decay}, granularity={self.granularity!r}, "
            f"standardize={self.standardize}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """half() and the like are for a model's weights; they would leave three digits of the running figures."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after: Tensor = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    @torch.no_grad()
    def forward(
        self,
        scores: Tensor | None,  # (B', N); unused and may be None for "pair"
        *,
        share: Tensor | None = None,  # (B, B') bool; None: own negatives only
        user_states: Tensor | None = None,  # (B, D), "pair"
        item_vectors: Tensor | None = None,  # (B', N, D), "pair"
        item_bias: Tensor | None = None,  # (B', N), "pair"
        mask: Tensor | None = None,  # (B', N) bool, False for the padding of ragged N
    ) -> Tensor | PairMargin:
        """The ``margin`` for ``napo_loss``: a scalar, (B, 1, 1), (B', N) or a ``PairMargin``."""
        if self.granularity == "pair":
            if user_states is None or item_vectors is None:
                raise ValueError("user_states, item_vectors: granularity 'pair' needs both, got None")
            check_tensor("user_states", user_states, 2, "(B, D)")
            check_floats("user_states", user_states)
            check_tensor("item_vectors", item_vectors, 3, "(B', N, D)", device=user_states.device)
            check_floats("item_vectors", item_vectors)
            owners, n, _ = item_vectors.shape
            check_shape("item_vectors", item_vectors, (owners, n, user_states.shape[1]))
            if item_bias is not None:
                check_tensor("item_bias", item_bias, 2, "(B', N)", device=user_states.device)
                check_floats("item_bias", item_bias)
                check_shape("item_bias", item_bias, (owners, n))
            users = len(user_states) if share is not None else owners
            if len(user_states) != users:
                raise ValueError(f"share: needed where the pool is not the batch; got None with B' = {owners}")
            _check_masks(share, mask, users, owners, n, user_states.device)
            moments = _pair_moments(user_states, item_vectors, item_bias, share, mask, self.standardize)
        else:
            check_tensor("scores", scores, 2, "(B', N)")
            assert scores is not None
            check_floats("scores", scores)
            _check_masks(share, mask, None, scores.shape[0], scores.shape[1], scores.device)
            moments = _moments(scores, share, mask)
        if moments.is_meta != self.mean.is_meta:
            raise ValueError(f"scores: expected numbers for a module on {self.mean.device}, got {moments.device}")
        moments = self._agree(moments)
        mean, deviation = self._center(moments)
        slope = -self.gamma * self.alpha / deviation
        offset = self.gamma - slope * mean
        if self.training:
            self.pending.copy_(_merged(self.pending, _figures(moments).to(self.pending)))
            if not self.deferred:
                self.commit()

        if self.granularity == "pair":
            assert user_states is not None and item_vectors is not None
            return PairMargin(user_states, item_vectors, item_bias, slope, offset)
        assert scores is not None
        if self.granularity == "batch":
            m = _mean(moments)
        elif self.granularity == "user":
            m = _user_mean(scores, share, mask)[:, None, None]
        else:
            m = scores
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return (offset + slope * m).clamp(min=0.0).to(dtype)

    @torch.no_grad()
    def commit(self) -> None:
        """One update of the running figures from all forwards since the last one; does nothing without one."""
        count, mean, variance = self.pending
        seen = count > 0
        decay = self.decay * self.initialized  # the first batch replaces what is there
        self.mean.copy_(torch.where(seen, decay * self.mean + (1.0 - decay) * mean, self.mean))
        decay = decay * (self.variance > 0.0)  # and so does the first with a variance
        self.variance.copy_(torch.where(seen, decay * self.variance + (1.0 - decay) * variance, self.variance))
        self.initialized.logical_or_(seen)
        self.pending.zero_()

    def discard(self) -> None:
        """Forget the forwards since the last update, of a step that is not taken."""
        self.pending.zero_()

    def _agree(self, moments: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(moments, group=self.process_group)
        return moments

    def _center(self, moments: Tensor) -> tuple[Tensor, Tensor | float]:
        """The mean that scores are measured from and the deviation they are measured in, before this step's update."""
        first, spread = _mean(moments), _figures(moments)[2]
        mean = torch.where(self.initialized, self.mean.to(first), first)
        if not self.standardize:
            return mean, 1.0
        variance = torch.where(self.initialized & (self.variance > 0.0), self.variance.to(first), spread)
        return mean, torch.where(variance > 0.0, variance.sqrt(), torch.inf)


def _accumulator(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64


def _check_masks(
    share: Tensor | None, mask: Tensor | None, users: int | None, owners: int, n: int, device: torch.device
) -> None:
    if share is not None:
        check_tensor("share", share, 2, "(B, B')", device=device)
        check_mask("share", share)
        check_shape("share", share, (len(share) if users is None else users, owners))
    if mask is not None:
        check_tensor("mask", mask, 2, "(B', N)", device=device)
        check_mask("mask", mask)
        check_shape("mask", mask, (owners, n))


def _mean(moments: Tensor) -> Tensor:
    """NaN where a score is no number."""
    return torch.where(moments[1].isfinite(), moments[1] / moments[0].clamp(min=1.0), torch.nan)


def _figures(moments: Tensor) -> Tensor:
    """Count, mean and variance from count, sum and sum of squares; count 0 if these are not finite. A variance that may
    be mere rounding error is 0."""
    numbers = moments.isfinite().all()
    count, total, squares = torch.where(numbers, moments, 0.0)
    mean, square = total / count.clamp(min=1.0), squares / count.clamp(min=1.0)
    variance = square - mean.square()
    noise = 64 * torch.finfo(moments.dtype).eps * square
    return torch.stack((count, mean, torch.where(variance > noise, variance, 0.0)))


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """The figures of both together, without sums, in which float32 would lose the variance."""
    count = a[0] + b[0]
    part, step = b[0] / count.clamp(min=1.0), b[1] - a[1]
    variance = (1.0 - part) * a[2] + part * b[2] + part * (1.0 - part) * step.square()
    return torch.stack((count, a[1] + part * step, variance))


def _weights(like: Tensor, mask: Tensor | None) -> Tensor:
    """(B', N): 1 for a negative that is there, 0 for padding."""
    return torch.ones_like(like) if mask is None else mask.to(like.dtype)


def _moments(scores: Tensor, share: Tensor | None, mask: Tensor | None) -> Tensor:
    """Count, sum and sum of squares of z over all negative sets of these users: owner v counts once per borrower."""
    z = scores.to(_accumulator(scores))
    there = _weights(z, mask)
    z = torch.where(there > 0, z, 0.0)
    sums = torch.stack((there.sum(1), z.sum(1), z.square().sum(1)))  # (3, B')
    if share is None:
        return sums.sum(1)
    borrowers = share.sum(0).to(sums.dtype)  # (B',)
    return torch.where(borrowers > 0, sums, 0.0) @ borrowers


def _user_mean(scores: Tensor, share: Tensor | None, mask: Tensor | None) -> Tensor:
    """Mean of z over each user's negative set: (B,)."""
    z = scores.to(_accumulator(scores))
    there = _weights(z, mask)
    count, total = there.sum(1), torch.where(there > 0, z, 0.0).sum(1)  # (B',)
    wrong = ~total.isfinite()
    sums = torch.stack((count, torch.where(wrong, 0.0, total), wrong.to(z.dtype)), 1)  # a product with 0 keeps a NaN
    if share is not None:
        sums = torch.cat([share[rows].to(sums.dtype) @ sums for rows in _row_blocks(share, 1)] or [sums[:0]])
    return torch.where(sums[:, 2] > 0, torch.nan, sums[:, 1] / sums[:, 0].clamp(min=1.0))


def _pair_moments(
    user_states: Tensor,  # (B, D)
    item_vectors: Tensor,  # (B', N, D)
    item_bias: Tensor | None,  # (B', N)
    share: Tensor | None,  # (B, B') bool
    mask: Tensor | None,  # (B', N) bool
    squares: bool,
) -> Tensor:
    """``_moments`` of z_ue = x_u . i_e + bias_e. The sum needs only each owner's summed vectors, N times fewer; the
    squares need every score, in blocks."""
    dtype = _accumulator(user_states)
    there = _weights(item_vectors[..., 0], mask)  # (B', N)
    items = torch.where(there[..., None] > 0, item_vectors, 0.0)
    bias = there.new_zeros(there.shape) if item_bias is None else torch.where(there > 0, item_bias, 0.0)
    if share is None:
        z = (user_states[:, None] * items).sum(-1) + bias  # (B, N)
        return torch.stack((there.sum(dtype=dtype), z.sum(dtype=dtype), z.square().sum(dtype=dtype)))
    owner_vector, owner_bias, owner_count = items.sum(1), bias.sum(1), there.sum(1)  # (B', D), (B',), (B',)
    total = torch.zeros(3, dtype=dtype, device=user_states.device)
    n, d = items.shape[1], items.shape[2]
    for rows in _row_blocks(share, n if squares else 1):
        shared = share[rows]  # (b, B')
        first = torch.where(shared, user_states[rows] @ owner_vector.T + owner_bias, 0.0)
        second = first.new_zeros(())
        if squares:
            z = (user_states[rows] @ items.reshape(-1, d).T).view(-1, *there.shape) + bias  # (b, B', N)
            second = torch.where(shared, z.square().sum(-1), 0.0)
        count = shared.sum(0).to(dtype) @ owner_count.to(dtype)
        total += torch.stack((count, first.sum(dtype=dtype), second.sum(dtype=dtype)))
    return total


def _row_blocks(share: Tensor, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, share.shape[1] * width))
    return (slice(start, start + step) for start in range(0, share.shape[0], step))
