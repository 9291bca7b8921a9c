"""``shared_negatives`` on the CPU: blocks of similarities from torch's matmul, selection in the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels.backends import compiled

# Similarities in memory at a time: large enough for an efficient matmul, small enough for the second-level caches.
_BLOCK = 1 << 20


def shared_negatives(
    states: Tensor,  # (B, D) fp32
    pool_states: Tensor,  # (B', D)
    k: int,
    pool_offset: int,
    group_ids: Tensor | None,  # (B,)
    pool_group_ids: Tensor | None,  # (B',)
) -> Tensor:  # (B, B') bool
    module = compiled()
    assert module is not None  # resolve() has seen to it
    users, owners = states.shape[0], pool_states.shape[0]
    share = torch.empty((users, owners), dtype=torch.bool)
    groups = None if group_ids is None else group_ids.contiguous()
    pool_groups = None if pool_group_ids is None else pool_group_ids.contiguous()
    step = max(1, _BLOCK // max(1, owners))
    score = torch.empty((min(step, users), owners))
    for row in range(0, users, step):
        rows = min(step, users - row)
        torch.mm(states[row : row + rows], pool_states.T, out=score[:rows])
        module.select_nearest(
            score.data_ptr(),
            row,
            rows,
            owners,
            k,
            pool_offset,
            0 if groups is None else groups.data_ptr(),
            0 if pool_groups is None else pool_groups.data_ptr(),
            share.data_ptr(),
            torch.get_num_threads(),
        )
    return share
