"""The attention masks of a packed batch, in the form that each attention implementation of transformers takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from napo.language_models.fused.attention import PACKED, packed_mask
from napo.scoring.packing import PackedBatch

BLOCK = 128  # FlexAttention's block
IMPLEMENTATIONS = ("sdpa", PACKED, "eager", "flex_attention")  # they take a mask of one's own


def attention_mask(batch: PackedBatch, window: int | None, implementation: str, dtype: torch.dtype) -> Any:
    """The mask that the layers take as `attention_mask`; a token sees `window` positions, its own included."""
    if implementation == "sdpa":
        return visible(batch, window).unsqueeze(1)
    if implementation == PACKED:
        return packed_mask(visible(batch, window).unsqueeze(1))
    if implementation == "eager":
        hidden = ~visible(batch, window).unsqueeze(1)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)
    if implementation == "flex_attention":
        return block_mask(batch, window)
    raise ValueError(
        f"attn_implementation: expected 'sdpa', 'eager' or 'flex_attention', which take a mask of one's own, "
        f"got {implementation!r}; call model.set_attn_implementation('sdpa')"
    )


def visible(batch: PackedBatch, window: int | None) -> Tensor:  # (rows, T, T) bool, [query, key]
    """Column q attends to column k exactly if k <= q < ends[k], and within the window if there is one."""
    columns = torch.arange(batch.ends.shape[1], device=batch.ends.device)
    mask = (columns <= columns[:, None]) & (columns[:, None] < batch.ends[:, None, :])
    if window is not None:
        mask &= batch.position_ids[:, :, None] - batch.position_ids[:, None, :] < window
    return mask


def block_mask(batch: PackedBatch, window: int | None) -> Any:
    """FlexAttention's mask, made block by block from the extremes of `ends` and of the positions: no (T, T) tensor.

    A block that could be seen only in part is listed as partial, where the exact rule decides; so bounds may be loose.
    The lists have a fixed shape and nothing is read back to the host, so a new batch shape is a dynamic shape to the
    compiled kernel, not a new kernel. (On an H200 the third new
    length compiled nothing: studies/first_gpu.md.)
    """
    from torch.nn.attention.flex_attention import BlockMask  # absent from builds without it

    ends, positions = batch.ends, batch.position_ids
    rows, width = ends.shape
    blocks = -(-width // BLOCK)
    padding = blocks * BLOCK - width
    blocked_ends = torch.nn.functional.pad(ends, (0, padding)).view(rows, blocks, BLOCK)  # 0: nobody sees it
    low = torch.nn.functional.pad(positions, (0, padding), value=2**40).view_as(blocked_ends)
    high = torch.nn.functional.pad(positions, (0, padding), value=-1).view_as(blocked_ends)
    block = torch.arange(blocks, device=ends.device)
    first = block * BLOCK  # first column of each query block
    below, same = block < block[:, None], block == block[:, None]
    some = same | (below & (blocked_ends.amax(-1)[:, None, :] > first[:, None]))  # (rows, query block, key block)
    whole = below & (blocked_ends.amin(-1)[:, None, :] >= first[:, None] + BLOCK)
    if window is not None:
        some &= low.amin(-1)[:, :, None] - high.amax(-1)[:, None, :] < window
        whole &= high.amax(-1)[:, :, None] - low.amin(-1)[:, None, :] < window

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < ends[row, key])
        return seen if window is None else seen & (positions[row, query] - positions[row, key] < window)

    partial_counts, partial = _listed(some & ~whole)
    whole_counts, whole_blocks = _listed(some & whole)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial,
        whole_counts,
        whole_blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=rule,
        seq_lengths=(width, width),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:  # (rows, blocks, blocks) -> (rows, 1, blocks) and indices
    counts = chosen.sum(-1, dtype=torch.int32).unsqueeze(1)
    indices = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32).unsqueeze(1)
    return counts, indices.contiguous()
