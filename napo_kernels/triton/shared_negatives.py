"""``shared_negatives`` in Triton: blocks of similarities from torch's matmul, selection by counting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192  # columns of a row that one program holds at a time, in registers
_SCORES = 1 << 22  # similarities in memory at a time: enough rows to fill a GPU at B' 4096

_BARRED = tl.constexpr(-2147483648)  # the key of an owner that is not eligible: below every other


@triton.jit
def _keys(score_ptr, pool_groups_ptr, row, own, group, columns, owners, GROUPS: tl.constexpr):
    """int32 in the order of the floats: -0 as 0, NaN lowest but for owners that are not eligible."""
    inside = columns < owners
    score = tl.load(score_ptr + row * owners + columns, mask=inside, other=0.0) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    keys = tl.where(score != score, _BARRED + 1, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    barred = (columns == own) | (columns >= owners)
    if GROUPS:
        barred = barred | (tl.load(pool_groups_ptr + columns, mask=inside, other=0) == group)
    return tl.where(barred, _BARRED, keys)


@triton.jit
def select_nearest_kernel(
    score_ptr,  # (rows, B')
    groups_ptr,  # (B,)
    pool_groups_ptr,  # (B',)
    share_ptr,  # (B, B') uint8
    first_row,
    owners,
    k,
    pool_offset,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # the row fits: it is read once and its keys stay in registers
):
    row = tl.program_id(0).to(tl.int64)
    user = first_row + row
    own = pool_offset + user
    group = tl.load(groups_ptr + user) if GROUPS else 0
    held = _keys(score_ptr, pool_groups_ptr, row, own, group, tl.arange(0, BLOCK), owners, GROUPS)
    # The largest threshold that at least k keys reach, bit by bit from the highest. Seen as unsigned the bits ascend
    # like the keys once the sign is flipped.
    bits = tl.zeros((), dtype=tl.int32)
    for bit in range(32):
        more = bits | (tl.full((), 1, dtype=tl.int32) << (31 - bit))
        candidate = more ^ _BARRED
        count = tl.sum((held >= candidate).to(tl.int32))
        if not ONE_BLOCK:
            for start in range(BLOCK, owners, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                keys = _keys(score_ptr, pool_groups_ptr, row, own, group, columns, owners, GROUPS)
                count += tl.sum((keys >= candidate).to(tl.int32))
        bits = tl.where(count >= k, more, bits)
    threshold = bits ^ _BARRED
    above = tl.sum((held > threshold).to(tl.int32))
    if not ONE_BLOCK:
        for start in range(BLOCK, owners, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            keys = _keys(score_ptr, pool_groups_ptr, row, own, group, columns, owners, GROUPS)
            above += tl.sum((keys > threshold).to(tl.int32))
    ties = k - above  # of the keys at the threshold only the first so many
    for start in range(0, owners, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keys = held
        if not ONE_BLOCK:
            keys = _keys(score_ptr, pool_groups_ptr, row, own, group, columns, owners, GROUPS)
        tied = ((keys == threshold) & (keys != _BARRED)).to(tl.int32)
        chosen = (keys > threshold) | ((tied == 1) & (tl.cumsum(tied, 0) <= ties)) | (columns == own)
        tl.store(share_ptr + user * owners + columns, chosen.to(tl.uint8), mask=columns < owners)
        ties -= tl.sum(tied)


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
    # Without ids the share takes their place: a kernel needs some pointer.
    mine = share if group_ids is None else group_ids.contiguous()
    theirs = share if pool_group_ids is None else pool_group_ids.contiguous()
    step = max(1, _SCORES // max(1, owners))
    block = min(_BLOCK, triton.next_power_of_2(max(1, owners)))
    for row in range(0, users, step):
        score = states[row : row + step] @ pool_states.T
        select_nearest_kernel[(score.shape[0],)](
            score,
            mine,
            theirs,
            share.view(torch.uint8),
            row,
            owners,
            k,
            pool_offset,
            GROUPS=group_ids is not None,
            BLOCK=block,
            ONE_BLOCK=owners <= block,
            num_warps=min(16, max(1, block // 512)),
        )
    return share
