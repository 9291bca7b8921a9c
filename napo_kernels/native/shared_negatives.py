"""``shared_negatives`` on the CPU and on CUDA: blocks of similarities from torch's matmul, selection in the compiled
module."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels.native import calls

# Similarities in memory at a time: large enough for an efficient matmul and to fill a GPU with rows, small enough for
# the second-level caches of a CPU and of a GPU.
_BLOCK = {False: 1 << 20, True: 1 << 22}


def shared_negatives(
    states: Tensor,  # (B, D) fp32
    pool_states: Tensor,  # (B', D)
    k: int,
    pool_offset: int,
    group_ids: Tensor | None,  # (B,)
    pool_group_ids: Tensor | None,  # (B',)
) -> Tensor:  # (B, B') bool
    where = calls.where(states)
    users, owners = states.shape[0], pool_states.shape[0]
    share = torch.empty((users, owners), dtype=torch.bool, device=states.device)
    groups = None if group_ids is None else group_ids.contiguous()
    pool_groups = None if pool_group_ids is None else pool_group_ids.contiguous()
    step = max(1, _BLOCK[bool(where["cuda"])] // max(1, owners))
    score = torch.empty((min(step, users), owners), device=states.device)
    for row in range(0, users, step):
        rows = min(step, users - row)
        torch.mm(states[row : row + rows], pool_states.T, out=score[:rows])
        calls.module().select_nearest(
            score.data_ptr(),
            row,
            rows,
            owners,
            k,
            pool_offset,
            calls.address(groups),
            calls.address(pool_groups),
            share.data_ptr(),
            where["cuda"],
            where["queue"],
        )
    return share
