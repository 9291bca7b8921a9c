"""``shared_negatives`` in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def shared_negatives(
    states: Tensor,  # (B, D)
    pool_states: Tensor,  # (B', D)
    k: int,
    pool_offset: int,
    group_ids: Tensor | None,  # (B,)
    pool_group_ids: Tensor | None,  # (B',)
) -> Tensor:  # (B, B') bool
    score = states @ pool_states.T  # (B, B')
    score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    own = torch.zeros_like(score, dtype=torch.bool)  # (B, B')
    own.diagonal(pool_offset).fill_(True)
    barred = own.clone()
    if group_ids is not None and pool_group_ids is not None:
        barred |= group_ids[:, None] == pool_group_ids[None, :]
    # Eligible columns first, then by similarity; both sorts are stable, so equal scores keep the lower index first.
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, barred.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    nearest = torch.zeros_like(own).scatter_(1, order[:, :k], True)
    return (nearest & ~barred) | own
