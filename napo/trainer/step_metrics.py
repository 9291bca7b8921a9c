"""Figures of training steps, summed on the device and read back only when they are logged."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from napo.trainer.pool import Pool

FIGURES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "gamma",
    "pool_size",
    "shared_fraction",
)


COMPARED = frozenset({"rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/rejected"})


class StepMetrics:
    """Sums over users since the last drain, under TRL's names.

    A reward that is compared with several others: ``rewards/rejected`` is the mean over a user's own negatives and
    ``rewards/accuracies`` the share of users whose chosen answer beats all of them. A user whose negatives are all
    false ones has nothing to be compared with, and does not count in the figures of ``COMPARED``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.sums = torch.zeros(len(FIGURES) + 1, dtype=torch.float64 if self.device.type != "mps" else torch.float32)
        self.sums = self.sums.to(self.device)
        self.users, self.tokens, self.started = 0, 0, time.perf_counter()
        self.batches: list[list[int]] = []  # the rows of every batch
        self.first_nonfinite = torch.tensor(-1, device=self.device)  # the first batch with a loss that is not finite

    @torch.no_grad()
    def add(
        self,
        *,
        losses: Tensor,  # (B,)
        chosen: Tensor,  # (B,) log-probabilities, less the reference's
        rejected: Tensor,  # (B, N) likewise, own negatives
        logps: Tensor,  # (B, 1 + N) log-probabilities
        gamma: float | Tensor,
        pool: Pool,
        beta: float,
        rows: Sequence[int],
        tokens: int,
    ) -> None:
        mask, count = pool.own_mask, pool.own_mask.sum(1).clamp(min=1)  # (B, N), (B,)
        compared = mask.any(1)  # (B,)
        rejected_mean = torch.where(mask, rejected, 0.0).sum(1) / count
        best = torch.where(mask, rejected, float("-inf")).amax(1)
        borrowed = chosen.new_zeros(())
        if pool.share is not None:
            held = (pool.share.to(chosen.dtype) @ pool.mask.sum(1).to(chosen.dtype)).clamp(min=1.0)  # (B,)
            borrowed = (1.0 - pool.mask[pool.own].sum(1) / held).sum()
        owners = pool.mask.shape[0] - (pool.users if pool.detached else 0)
        self.sums += torch.stack(
            [
                losses.sum(),
                beta * chosen.sum(),
                beta * rejected_mean.sum(),
                (compared & (chosen > best)).sum(),
                beta * torch.where(compared, chosen - rejected_mean, 0.0).sum(),
                logps[:, 0].sum(),
                (torch.where(mask, logps[:, 1:], 0.0).sum(1) / count).sum(),
                _on_device(gamma, losses) * pool.users,
                _on_device(owners * pool.users, losses),
                borrowed,
                compared.sum(),
            ]
        )
        bad = ~torch.isfinite(losses).all()
        first = (self.first_nonfinite < 0) & bad
        self.first_nonfinite = torch.where(first, len(self.batches), self.first_nonfinite)
        self.batches.append(list(rows))
        self.users += len(rows)
        self.tokens += tokens

    def nonfinite_rows(self) -> tuple[bool, list[int]]:
        """Whether a loss on any rank was not finite since the last drain, and the rows of the first such batch here."""
        first = self.first_nonfinite
        worst = (first >= 0).long()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if not worst.item():
            return False, []
        return True, self.batches[int(first)] if first >= 0 else []

    def drain(self) -> dict[str, float]:
        """The mean figures of all ranks' users since the last drain, and the rate in tokens per second."""
        own = torch.tensor([self.users, self.tokens], dtype=self.sums.dtype, device=self.device)
        totals = torch.cat((self.sums, own))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        *sums, compared, users, tokens = totals.tolist()
        seconds = time.perf_counter() - self.started
        self.restart()
        if users == 0:
            return {}
        counts = {name: max(compared, 1.0) if name in COMPARED else users for name in FIGURES}
        figures = {name: total / counts[name] for name, total in zip(FIGURES, sums, strict=True)}
        return {**figures, "tokens_per_second": tokens / max(seconds, 1e-9)}


def _on_device(value: float | Tensor, like: Tensor) -> Tensor:
    """A number is filled in on the device: a copy from the host would wait for it."""
    return value if isinstance(value, Tensor) else like.new_full((), float(value))
