"""The loss of every objective, by one function, and its margins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from napo.objectives import Objective
from napo.trainer.boundary import near_boundary
from napo.trainer.config import NAPOConfig
from napo.trainer.pool import Pool
from napo_kernels import DynamicMargin, PairMargin, napo_loss


def preference_losses(
    objective: Objective,
    chosen: Tensor,  # (B,) log-probabilities, less the reference's where the objective has one
    rejected: Tensor,  # (B', N) likewise, of the pool
    pool: Pool,
    margin: float | Tensor | PairMargin,
    policy: Tensor | None = None,  # (B, 1 + N) the model's own log-probabilities, the chosen answer's first
) -> Tensor:  # (B,)
    """The loss of each user. ``policy``: for objectives with a ``boundary``."""
    if objective.form == "softmax":
        margins = (margin,) if pool.doubled is None else (margin, _twice(pool.doubled))
        return napo_loss(
            chosen,
            rejected,
            share=pool.share,
            margin=margins,
            mask=pool.mask,
            exclude=pool.exclude,
            beta=objective.beta,
            reduction="none",
        )
    users, n = rejected.shape
    count = pool.mask.sum(1).clamp(min=1)  # (B,)
    if objective.boundary:
        assert policy is not None, "the trainer has it"
        scale = near_boundary(policy.detach(), pool.mask).to(chosen.dtype)  # (B, N)
        mean = (scale * torch.where(pool.mask, rejected, 0.0)).sum(1)
        anything = pool.mask.any(1, keepdim=True)
        return napo_loss(
            chosen * scale.sum(1), mean[:, None], margin=margin, mask=anything, beta=objective.beta, reduction="none"
        )
    if objective.form == "mean":
        mean = torch.where(pool.mask, rejected, 0.0).sum(1) / count
        anything = pool.mask.any(1, keepdim=True)
        return napo_loss(chosen, mean[:, None], margin=margin, mask=anything, beta=objective.beta, reduction="none")
    pairs = napo_loss(
        chosen.repeat_interleave(n),
        rejected.reshape(-1, 1),
        margin=margin,
        mask=pool.mask.reshape(-1, 1),
        beta=objective.beta,
        reduction="none",
    )
    return pairs.view(users, n).sum(1) / count


def _twice(doubled: Tensor) -> Tensor:  # (B, B') -> (B, B', 1)
    """The margin that makes an owner's negatives count twice in the sum of exponentials."""
    return (doubled.float() * math.log(2.0))[:, :, None]


def chosen_nll(
    logps: Tensor,  # (S,) sums, or means over the tokens where average is set
    lengths: Tensor,  # (S,)
    chosen: Tensor,  # (B,) the sequences of the chosen answers
    *,
    average: bool,
) -> Tensor:  # (B,)
    """Negative log-likelihood of each chosen answer per token (RPO, arXiv 2404.19733, equation 1)."""
    return -logps[chosen] if average else -logps[chosen] / lengths[chosen]


def margin_module(args: NAPOConfig, objective: Objective) -> AuthorsMargin | DynamicMargin | None:
    if args.authors_compat:
        return AuthorsMargin(objective.gamma, objective.alpha)
    if objective.alpha == 0.0:
        return None
    margin = DynamicMargin(objective.gamma, objective.alpha, args.margin_decay, args.granularity, args.standardize)
    margin.deferred = True  # one update per optimiser step, however many micro-batches it has
    return margin


def pool_margin(
    module: nn.Module | None,
    objective: Objective,
    pool: Pool,
    item_vectors: Tensor | None,  # (items, D)
    item_bias: Tensor | None,  # (items,)
) -> float | Tensor | PairMargin:
    """The margin of the pool's negatives; the margin module's state moves on where it is in training mode."""
    if module is None:
        return objective.gamma
    if isinstance(module, AuthorsMargin):
        assert pool.scores is not None, "rows were checked for rejected_scores"
        return module(pool.scores, share=pool.share, doubled=pool.doubled, mask=pool.scored)
    assert isinstance(module, DynamicMargin)
    if module.granularity != "pair":
        return module(pool.scores, share=pool.share, mask=pool.scored)
    assert item_vectors is not None, "the trainer was checked for item_vectors"
    ids = pool.rejected_ids.clamp(min=0)
    bias = None if item_bias is None else item_bias[ids]
    return module(
        None,
        share=pool.share,
        user_states=pool.states,
        item_vectors=item_vectors[ids],
        item_bias=bias,
        mask=pool.scored,
    )


@contextmanager
def unmoved(module: nn.Module | None) -> Iterator[None]:
    """The margin's running figures are afterwards what they were."""
    figures = {} if module is None else dict(module.named_buffers())
    kept = {name: figure.clone() for name, figure in figures.items()}
    try:
        yield
    finally:
        for name, figure in figures.items():
            figure.copy_(kept[name])


def mean_margin(margin: float | Tensor | PairMargin, pool: Pool) -> Tensor | float:
    """The figure that is logged as gamma: the mean margin over the users' own negatives."""
    if isinstance(margin, PairMargin):
        vectors = margin.item_vectors[pool.own]
        scores = (margin.user_states[:, None] * vectors).sum(-1)
        if margin.item_bias is not None:
            scores = scores + margin.item_bias[pool.own]
        margin = (margin.offset + margin.slope * scores).clamp(min=0.0)
    elif not isinstance(margin, Tensor):
        return margin
    elif margin.ndim == 2:
        margin = margin[pool.own]
    else:
        return margin.sum() / max(margin.numel(), 1)
    return torch.where(pool.own_mask, margin, 0.0).sum() / pool.own_mask.sum().clamp(min=1)


class AuthorsMargin(nn.Module):
    """The margin of the authors' released code: one number per rank and micro-batch,
    gamma = gamma0 - alpha (M - ema) gamma0, M the mean score of all negatives used on the rank. The average starts
    at 0, moves before gamma is computed, in evaluation as in training, and is averaged over the ranks. Not clamped."""

    ema: Tensor

    def __init__(self, gamma: float, alpha: float, decay: float = 0.9) -> None:
        super().__init__()
        self.gamma, self.alpha, self.decay = gamma, alpha, decay
        self.register_buffer("ema", torch.zeros(()))

    @torch.no_grad()
    def forward(
        self,
        scores: Tensor,  # (B', N)
        *,
        share: Tensor,  # (B, B') bool
        doubled: Tensor | None,  # (B, B') bool
        mask: Tensor,  # (B', N) bool
    ) -> Tensor:  # ()
        uses = share.sum(0) if doubled is None else share.sum(0) + doubled.sum(0)  # (B',)
        weights = uses[:, None] * mask
        mean = (weights * torch.where(mask, scores, 0.0)).sum() / weights.sum()
        self.ema.mul_(self.decay).add_((1.0 - self.decay) * mean)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.ema)
            self.ema.div_(dist.get_world_size())
        return self.gamma - self.alpha * (mean - self.ema) * self.gamma
