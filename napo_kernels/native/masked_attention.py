"""masked_attention of the compiled module, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels.native import calls


def mask_block() -> int:
    """The sides of a mask are padded to a multiple of this."""
    return calls.module().MASK_BLOCK


def forward(
    query: Tensor,  # (rows, heads, T, d)
    key: Tensor,  # (rows, key heads, T, d)
    value: Tensor,  # (rows, key heads, T, d)
    padded: Tensor,  # (rows, T padded, T padded) uint8
    scale: float,
) -> tuple[Tensor, Tensor]:  # (rows, heads, T, d), (rows, heads, T) log-sums
    out = _token_by_token(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    calls.module().attention_forward(
        *_arguments(query, key, value, padded, scale),
        out=_heads(out),
        lse=lse.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out, lse


def backward(
    grad: Tensor,  # (rows, heads, T, d)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padded: Tensor,
    scale: float,
    lse: Tensor,  # (rows, heads, T)
) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (_token_by_token(x) for x in (query, key, value))
    calls.module().attention_backward(
        *_arguments(query, key, value, padded, scale),
        grad=_heads(grad),
        lse=lse.data_ptr(),
        d_query=_heads(d_query),
        d_key=_heads(d_key),
        d_value=_heads(d_value),
        threads=torch.get_num_threads(),
    )
    return d_query, d_key, d_value


def _arguments(query: Tensor, key: Tensor, value: Tensor, padded: Tensor, scale: float) -> tuple[object, ...]:
    rows, heads, length, width = query.shape
    sizes = (rows, heads, key.shape[1], length, width)
    return (calls.DTYPE_CODES[query.dtype], *sizes, _heads(query), _heads(key), _heads(value), padded.data_ptr(), scale)


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _token_by_token(like: Tensor) -> Tensor:
    """(rows, heads, T, d) with the heads of a token next to one another in memory, as the layers around want it."""
    rows, heads, length, width = like.shape
    return like.new_empty(rows, length, heads, width).transpose(1, 2)
