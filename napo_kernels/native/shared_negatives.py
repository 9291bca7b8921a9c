"""``shared_negatives`` in the compiled module: on CUDA the selection alone, from blocks of torch's matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels.native import calls

# Similarities in memory at a time on CUDA: large enough for an efficient matmul and to fill a GPU with rows, small
# enough for its second-level cache.
_BLOCK = 1 << 22


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
    tensors = [None if x is None else x.contiguous() for x in (group_ids, pool_group_ids)]
    select = (users, owners, k, pool_offset, *map(calls.address, (*tensors, share)))
    if not where["cuda"]:
        states, pool_states = states.contiguous(), pool_states.contiguous()
        of_states = (states.data_ptr(), pool_states.data_ptr(), states.shape[1])
        calls.module().nearest(*of_states, *select, where["queue"])
        return share
    step = max(1, _BLOCK // max(1, owners))
    score = torch.empty((min(step, users), owners), device=states.device)
    for row in range(0, users, step):
        rows = min(step, users - row)
        torch.mm(states[row : row + rows], pool_states.T, out=score[:rows])
        calls.module().nearest_of_scores(score.data_ptr(), row, rows, *select, where["queue"])
    return share
