"""NAPO exactly as its authors' released code computes it, quirks included, so that results can be compared."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from napo_kernels.distributed import gather_pool, pool_layout
from napo_kernels.ops.napo_loss import napo_loss
from napo_kernels.ops.shared_negatives import shared_negatives


class AuthorsCompat(nn.Module):
    """The released NAPO loss (trainer/softmax_dpo_trainer.py of acoding-xuan/NAPO), for one rank's batch.

    What differs from ``napo_loss`` with ``DynamicMargin``, all of it on purpose:

    - The pool is gathered without gradient and own negatives are read from the gathered copy: the chosen
      log-probabilities alone get a gradient.
    - Own negatives are read at the local index of the pool, so on ranks above 0 they are rank 0's. The rank's real own
      ones have the same dataset id and are excluded; rank 0's may be borrowed as well, and then count twice.
    - K = int(rho * (B' - 1)), with the rounding of binary floats.
    - One margin a rank and batch: gamma0 - alpha * (M - Mbar) * gamma0, never clamped, M the mean raw score of all the
      rank's negatives. Mbar starts at 0, is updated BEFORE it is used, in evaluation too, and is averaged over ranks.

    The rewards are sums of token log-probabilities (not averages) without a reference model: the caller's part. Only
    their log-sum-exp is written differently here: the released one overflows.
    """

    mean: Tensor

    def __init__(self, gamma: float = 1.0, alpha: float = 0.3, rho: float = 0.7, beta: float = 1.0, decay: float = 0.9):
        super().__init__()
        self.gamma, self.alpha, self.rho, self.beta, self.decay = gamma, alpha, rho, beta, decay
        self.process_group: Any = None
        self.register_buffer("mean", torch.zeros(()))

    def forward(
        self,
        chosen_logps: Tensor,  # (B,)
        rejected_logps: Tensor,  # (B, N)
        *,
        states: Tensor,  # (B, D)
        scores: Tensor,  # (B, N) raw recommender scores of the negatives
        ids: Tensor,  # (B,) dataset ids
        reduction: str = "mean",
        backend: str | None = None,
    ) -> Tensor:  # (B,), or () for a reduction
        users = chosen_logps.shape[0]
        with torch.no_grad():
            layout = pool_layout(users, group=self.process_group)
            if len(set(layout.sizes)) > 1:
                raise ValueError(
                    f"chosen_logps: the released code wants equal batches on all ranks, got {layout.sizes}"
                )
            pool_logps, pool_scores, pool_states, pool_ids = (
                gather_pool(rows.detach(), layout, group=self.process_group)
                for rows in (rejected_logps, scores, states, ids)
            )
            k = int(self.rho * (pool_states.shape[0] - 1))
            borrowed = shared_negatives(
                states,
                k,
                pool_states=pool_states,
                pool_offset=layout.offset,
                group_ids=ids,
                pool_group_ids=pool_ids,
                backend=backend,
            )
            borrowed.diagonal(layout.offset).fill_(False)
            # "Own" negatives as owners of their own behind the pool, so that one that is borrowed as well counts twice.
            own = torch.eye(users, dtype=torch.bool, device=borrowed.device)
            share = torch.cat((borrowed, own), 1)  # (B, B' + B)
            logps = torch.cat((pool_logps, pool_logps[:users]))  # (B' + B, N)
            margin = self._margin(torch.cat((pool_scores, pool_scores[:users])), share)
        return napo_loss(
            chosen_logps, logps, share=share, margin=margin, beta=self.beta, reduction=reduction, backend=backend
        )

    def _margin(self, scores: Tensor, share: Tensor) -> Tensor:
        """Updates the running mean and returns the rank's gamma."""
        borrowers = share.sum(0).to(scores.dtype)  # (B' + B,)
        mean = (scores.sum(1) @ borrowers) / (borrowers.sum() * scores.shape[1])
        updated = self.decay * self.mean + (1.0 - self.decay) * mean.to(self.mean)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(updated, group=self.process_group)
            updated /= dist.get_world_size(self.process_group)
        self.mean.copy_(updated)
        return self.gamma - self.alpha * (mean - self.mean) * self.gamma
