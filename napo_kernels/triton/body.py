"""The operations between the matmuls of a transformer's body, in Triton: RMSNorm, silu(gate) * up, rotary positions.
Each takes one launch and one pass over memory in each direction: a training step on a GPU is bound first by launches,
then by memory. All compute in fp32 and round once, at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384  # columns of a row that a program of the norm holds in registers
_BLOCK = 1024  # elements of silu(gate) * up that a program computes


@triton.jit
def rms_norm_forward_kernel(x_ptr, weight_ptr, out_ptr, r_ptr, width, eps, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out = (wide * r).to(x.dtype).to(tl.float32) * weight  # rounded between, as transformers does
    tl.store(out_ptr + row * width + columns, out.to(x.dtype), mask=inside)
    tl.store(r_ptr + row, r)


@triton.jit
def rms_norm_backward_kernel(grad_ptr, x_ptr, weight_ptr, r_ptr, dx_ptr, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    grad *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + row)
    normed = x.to(tl.float32) * r
    dx = r * (grad - normed * (tl.sum(grad * normed) / width))
    tl.store(dx_ptr + row * width + columns, dx.to(x.dtype), mask=inside)


@triton.jit
def silu_product_forward_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    tl.store(out_ptr + at, (wide * tl.sigmoid(wide) * up).to(gate.dtype), mask=inside)


@triton.jit
def silu_product_backward_kernel(grad_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    s = tl.sigmoid(wide)
    d_gate = grad * up * s * (1.0 + wide * (1.0 - s))
    tl.store(d_gate_ptr + at, d_gate.to(gate.dtype), mask=inside)
    tl.store(d_up_ptr + at, (grad * wide * s).to(gate.dtype), mask=inside)


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, stride, out_stride, cos1, cos2, sin1, sin2,
    HEADS: tl.constexpr, HALF: tl.constexpr, H_BLOCK: tl.constexpr, H_HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """All heads of one token. `stride`: from head to head; the elements of a head are neighbours."""
    head = tl.arange(0, H_BLOCK)[:, None]
    column = tl.arange(0, H_HALF)[None, :]
    inside = (head < HEADS) & (column < HALF)
    first = tl.load(x_ptr + head * stride + column, mask=inside, other=0.0)
    second = tl.load(x_ptr + head * stride + HALF + column, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if BACK:
        low, high = a * cos1 + b * sin2, b * cos2 - a * sin1
    else:
        low, high = a * cos1 - b * sin1, b * cos2 + a * sin2
    tl.store(out_ptr + head * out_stride + column, low.to(first.dtype), mask=inside)
    tl.store(out_ptr + head * out_stride + HALF + column, high.to(first.dtype), mask=inside)


@triton.jit
def rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    tokens,
    q_row, q_head, q_token,  # strides
    k_row, k_head, k_token,
    cos_row, cos_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, H_HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One program per token; the outputs are (rows, tokens, heads, d), dense."""
    at = tl.program_id(0).to(tl.int64)
    row, token = at // tokens, at % tokens
    column = tl.arange(0, H_HALF)[None, :]
    inside = column < HALF
    here = row * cos_row + token * cos_token + column
    cos1 = tl.load(cos_ptr + here, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + here + HALF, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + here, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + here + HALF, mask=inside, other=0.0).to(tl.float32)
    _rotate_heads(
        q_ptr + row * q_row + token * q_token, q_out_ptr + at * (Q_HEADS * 2 * HALF), q_head, 2 * HALF,
        cos1, cos2, sin1, sin2, Q_HEADS, HALF, Q_BLOCK, H_HALF, BACK,
    )  # fmt: skip
    _rotate_heads(
        k_ptr + row * k_row + token * k_token, k_out_ptr + at * (K_HEADS * 2 * HALF), k_head, 2 * HALF,
        cos1, cos2, sin1, sin2, K_HEADS, HALF, K_BLOCK, H_HALF, BACK,
    )  # fmt: skip


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # (..., H), (H,) -> same, (rows,)
    width = x.shape[-1]
    out, r = torch.empty_like(x), x.new_empty(x.numel() // width, dtype=torch.float32)
    columns = triton.next_power_of_2(width)
    rms_norm_forward_kernel[(r.numel(),)](x, weight, out, r, width, eps, COLUMNS=columns, num_warps=_warps(columns))
    return out, r


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    dx, width = torch.empty_like(x), x.shape[-1]
    columns = triton.next_power_of_2(width)
    rms_norm_backward_kernel[(r.numel(),)](grad, x, weight, r, dx, width, COLUMNS=columns, num_warps=_warps(columns))
    return dx


def silu_product_forward(gate: Tensor, up: Tensor) -> Tensor:
    out, count = torch.empty_like(gate), gate.numel()
    silu_product_forward_kernel[(triton.cdiv(count, _BLOCK),)](gate, up, out, count, BLOCK=_BLOCK)
    return out


def silu_product_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    silu_product_backward_kernel[(triton.cdiv(count, _BLOCK),)](grad, gate, up, d_gate, d_up, count, BLOCK=_BLOCK)
    return d_gate, d_up


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """q (rows, heads, T, d) and k (rows, key heads, T, d) of any strides with dense heads, cos and sin (rows or 1, T,
    d) dense; gives the same shapes with the heads of a token side by side in memory. `back`: the gradient's way."""
    rows, heads, tokens, d = q.shape
    key_heads = k.shape[1]
    q_out = q.new_empty(rows, tokens, heads, d)
    k_out = k.new_empty(rows, tokens, key_heads, d)
    rotate_kernel[(rows * tokens,)](
        q, k, cos, sin, q_out, k_out,
        tokens,
        q.stride(0), q.stride(1), q.stride(2),
        k.stride(0), k.stride(1), k.stride(2),
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        Q_HEADS=heads, K_HEADS=key_heads, HALF=d // 2,
        Q_BLOCK=triton.next_power_of_2(heads), K_BLOCK=triton.next_power_of_2(key_heads),
        H_HALF=triton.next_power_of_2(d // 2), BACK=back,
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def _warps(columns: int) -> int:
    return min(16, max(1, columns // 512))
