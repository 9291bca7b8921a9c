"""masked_attention of the compiled module, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels import _C
from napo_kernels.native import calls

ON_CUDA = False

MASK_BLOCK = _C.MASK_BLOCK  # the sides of a mask are padded to a multiple of it


def forward(
    query: Tensor,  # (rows, heads, T, d)
    key: Tensor,  # (rows, key heads, T, d)
    value: Tensor,  # (rows, key heads, T, d)
    padded: Tensor,  # (rows, T padded, T padded) uint8
    scale: float,
) -> tuple[Tensor, Tensor]:  # (rows, heads, T, d), (rows, heads, T) log-sums
    out, lse = _token_by_token(query), torch.empty(query.shape[:3], dtype=torch.float32)
    attention: _C.AttentionArgs = {"query": query, "key": key, "value": value, "mask": padded, "scale": scale}
    _C.attention_forward({"attention": attention, "out": out, "lse": lse}, *calls.where(query))
    return out, lse


def backward(
    grad: Tensor,  # (rows, heads, T, d)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padded: Tensor,
    lse: Tensor,  # (rows, heads, T)
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (_token_by_token(x) for x in (query, key, value))
    arguments: _C.AttentionBackwardArgs = {
        "attention": {"query": query, "key": key, "value": value, "mask": padded, "scale": scale},
        "grad": grad,
        "lse": lse,
        "d_query": d_query,
        "d_key": d_key,
        "d_value": d_value,
    }
    _C.attention_backward(arguments, *calls.where(query))
    return d_query, d_key, d_value


def _token_by_token(like: Tensor) -> Tensor:
    """(rows, heads, T, d) with the heads of a token next to one another in memory, as the layers around want it."""
    rows, heads, length, width = like.shape
    return like.new_empty(rows, length, heads, width).transpose(1, 2)
