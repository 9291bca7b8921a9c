"""Attention under the mask of a packed batch on CPUs without AMX, brought along by the mask itself.

Attention is the largest part of a packed step after the matmuls of the linear layers. torch's flash kernel computes
every score and then masks half of them. Here queries go in chunks, each against the keys alone that one of them sees,
by fp32 matmuls, which beat bf16 ones at these sizes. For 4 rows of 254 tokens and 9 heads of 64, forward and backward
together take two thirds of the time of the flash kernel in fp32, which itself is no slower than in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CHUNK = 64  # queries: their scores stay in the cache from the first matmul to the last
KEPT = 1.0  # probabilities kept for the backward, per entry of q, k, v and the output together


class PackedMask(Tensor):
    """A boolean mask (rows, 1, T, T) that computes SDPA its own way, in fp32 (fp64 for fp64). Models only hand their
    mask on to SDPA; any other operation on it gives a plain tensor, with which SDPA is torch's own."""

    _chunks: list[Chunk] | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            mask = kwargs.get("attn_mask")
            plain = kwargs.keys() <= {"attn_mask", "scale", "dropout_p", "is_causal"}
            if func is not scaled_dot_product_attention or not plain or len(args) != 3 or not isinstance(mask, cls):
                return func(*args, **kwargs)
            if kwargs.get("dropout_p") or kwargs.get("is_causal"):
                return func(*args, **kwargs)
            query, key, value = args
            scale = kwargs.get("scale")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            dtype = torch.promote_types(query.dtype, torch.float32)
            with torch.autocast(query.device.type, enabled=False):  # it would cast the matmuls
                return _ChunkedAttention.apply(query, key, value, mask._chunked(dtype), scale, dtype)

    def _chunked(self, dtype: torch.dtype) -> list[Chunk]:
        """Made by the first layer, used by all."""
        if getattr(self, "_chunks", None) is None or self._chunks[0][2].dtype != dtype:  # type: ignore[index]
            self._chunks = chunked(self.as_subclass(Tensor), dtype)
        return self._chunks  # type: ignore[return-value]


Chunk = tuple[slice, slice, Tensor]  # queries, keys that one of them sees, (rows, 1, queries, keys) 0 or -inf


def chunked(mask: Tensor, dtype: torch.dtype) -> list[Chunk]:  # (rows, 1, T, T) bool
    chunks = []
    for start in range(0, mask.shape[2], CHUNK):
        queries = slice(start, min(start + CHUNK, mask.shape[2]))
        seen = mask[:, 0, queries].flatten(0, 1).any(0).nonzero()
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        part = mask[:, :, queries, keys]
        chunks.append((queries, keys, torch.zeros(part.shape, dtype=dtype).masked_fill_(~part, -torch.inf)))
    return chunks


class _ChunkedAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v. The probabilities are kept for the backward where they take no more memory than
    the copies of q, k, v and the output that the flash kernel keeps, and computed again where rows are longer."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # (rows, heads, T, d)
        key: Tensor,  # (rows, heads, T, d)
        value: Tensor,  # (rows, heads, T, e)
        chunks: list[Chunk],
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:  # (rows, heads, T, e), of which the heads stand next to one another in memory, as a model wants them
        rows, heads, length, _ = query.shape
        q, k, v = _batched(query, dtype).mul_(scale), _batched(key, dtype), _batched(value, dtype)
        output = value.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        scores = rows * heads * sum(mask.shape[2] * mask.shape[3] for *_, mask in chunks)
        keep = any(ctx.needs_input_grad[:3]) and scores <= KEPT * 2 * (q.numel() + v.numel())
        kept = []
        for queries, keys, mask in chunks:
            p = _probabilities(q[:, queries], k[:, keys], mask)
            output[:, :, queries] = torch.bmm(p, v[:, keys]).view(rows, heads, -1, v.shape[-1])
            if keep:
                kept.append(p)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.chunks, ctx.scale, ctx.dtype = chunks, scale, dtype
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # a backward called under autocast
            return _ChunkedAttention._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        q, k, v = _batched(query, ctx.dtype).mul_(ctx.scale), _batched(key, ctx.dtype), _batched(value, ctx.dtype)
        g = _batched(grad, ctx.dtype)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, (queries, keys, mask) in enumerate(ctx.chunks):
            p = kept[number] if kept else _probabilities(q[:, queries], k[:, keys], mask)
            grad_v[:, keys] += torch.bmm(p.transpose(1, 2), g[:, queries])  # baddbmm_ on a slice goes matrix by matrix
            grad_p = torch.bmm(g[:, queries], v[:, keys].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, ctx.dtype)
            grad_q[:, queries] = torch.bmm(grad_scores, k[:, keys])
            grad_k[:, keys] += torch.bmm(grad_scores.transpose(1, 2), q[:, queries])
        grad_q.mul_(ctx.scale)
        grads = (grad_q.view(query.shape), grad_k.view(key.shape), grad_v.view(value.shape))
        return (*(grad.to(query.dtype) for grad in grads), None, None, None)


def _batched(tensor: Tensor, dtype: torch.dtype) -> Tensor:  # (rows, heads, T, d) -> (rows * heads, T, d), a new tensor
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor).flatten(0, 1)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:  # (rows * heads, queries, keys)
    scores = torch.bmm(q, k.transpose(1, 2))
    scores.view(mask.shape[0], -1, *scores.shape[1:]).add_(mask)
    return torch.softmax(scores, -1)
