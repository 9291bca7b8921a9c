"""``shared_negatives`` in the compiled module: on CUDA only the selection, from blocks of torch's matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels import _C
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
    users, owners = states.shape[0], pool_states.shape[0]
    share = torch.empty((users, owners), dtype=torch.bool, device=states.device)
    select: _C.SelectArgs = {
        "users": users,
        "owners": owners,
        "k": k,
        "pool_offset": pool_offset,
        "groups": None if group_ids is None else group_ids.contiguous(),
        "pool_groups": None if pool_group_ids is None else pool_group_ids.contiguous(),
        "share": share,
    }
    at = calls.where(states)
    if not at[0]:
        states, pool_states = states.contiguous(), pool_states.contiguous()
        _C.select_nearest({"select": select, "states": states, "pool": pool_states, "width": states.shape[1]}, *at)
        return share
    step = max(1, _BLOCK // max(1, owners))
    score = torch.empty((min(step, users), owners), device=states.device)
    for row in range(0, users, step):
        rows = min(step, users - row)
        torch.mm(states[row : row + rows], pool_states.T, out=score[:rows])
        _C.select_nearest_of_scores({"select": select, "score": score, "first_row": row, "rows": rows}, *at)
    return share
