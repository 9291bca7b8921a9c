"""Attention of packed rows on CPUs without AMX: `masked_attention` of the kernels, brought along by the mask.

transformers gets an attention function under a name of our own, `PACKED`, which knows a `PackedMask` and hands
everything else on to SDPA. A model takes the name when it is first given such a mask, and keeps it, because gradient
checkpointing runs layers again long after the scorer has returned. `model.set_attn_implementation("sdpa")` takes it
away again. No saved config names an attention implementation, so none names this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from napo_kernels.ops.masked_attention import masked_attention, pad_mask, serves

PACKED = "napo_packed"
# Arguments of an attention function that masked_attention does not take into account.
BEYOND = ("softcap", "position_bias", "s_aux", "cache", "output_attentions")


class PackedMask(Tensor):
    """A boolean mask (rows, 1, T, T) that carries the form that the kernel takes. Operations give plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    padded: Tensor  # of pad_mask


@torch.compiler.disable  # addresses have no trace
def packed_mask(mask: Tensor) -> Tensor:  # (rows, 1, T, T) bool
    """`mask` for the layers: a `PackedMask` where the kernel can run, and where torch's has no AMX to multiply with."""
    padded = None if torch.cpu._is_amx_tile_supported() else pad_mask(mask.squeeze(1))
    if padded is None:
        return mask
    packed = mask.as_subclass(PackedMask)
    packed.padded = padded
    return packed


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (rows, heads, T, d)
    key: Tensor,  # (rows, key heads, T, d)
    value: Tensor,  # (rows, key heads, T, d)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:  # (rows, T, heads, d)
    """An attention function of transformers: the kernel under a `PackedMask`, SDPA under any other."""
    if isinstance(attention_mask, PackedMask):
        q, k, v = (_autocast(x) for x in (query, key, value))
        if not dropout and not any(others.get(name) for name in BEYOND) and serves(q, k, v):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return masked_attention(q, k, v, attention_mask.padded, scale).transpose(1, 2), None
        attention_mask = attention_mask.as_subclass(Tensor)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # of every forward that brings no mask of its own


def _autocast(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype, as SDPA takes it."""
    narrow = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype("cpu")) if narrow else x
