"""body of the compiled module, on the CPU. Tensors are contiguous; those of `rotate` are as `serves_rotation` asks."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels import _C
from napo_kernels.native import calls

ON_CUDA = False


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # (..., H), (H,) -> same, (rows,)
    out, r = torch.empty_like(x), torch.empty(x.numel() // x.shape[-1], dtype=torch.float32)
    norm: _C.RmsNormArgs = {"dtype": x.dtype, "rows": len(r), "width": x.shape[-1], "x": x, "weight": weight}
    _C.rms_norm_forward({"norm": norm, "eps": eps, "out": out, "r": r}, *calls.where(x))
    return out, r


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    norm: _C.RmsNormArgs = {"dtype": x.dtype, "rows": len(r), "width": x.shape[-1], "x": x, "weight": weight}
    _C.rms_norm_backward({"norm": norm, "r": r, "grad": grad, "dx": dx}, *calls.where(x))
    return dx


def silu_product_forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    inputs: _C.SiluProductArgs = {"dtype": gate.dtype, "n": gate.numel(), "gate": gate, "up": up}
    _C.silu_product_forward({"inputs": inputs, "out": out}, *calls.where(gate))
    return out


def silu_product_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    inputs: _C.SiluProductArgs = {"dtype": gate.dtype, "n": gate.numel(), "gate": gate, "up": up}
    _C.silu_product_backward({"inputs": inputs, "grad": grad, "d_gate": d_gate, "d_up": d_up}, *calls.where(gate))
    return d_gate, d_up


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """q (rows, heads, T, d) and k (rows, key heads, T, d) of any strides with dense heads, cos and sin (rows or 1, T,
    d) dense; gives the same shapes with the heads of a token side by side in memory. `back`: the gradient's way."""
    q_out, k_out = (x.new_empty(len(x), x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k))
    arguments: _C.RotationArgs = {
        "query": q,
        "key": k,
        "cos": cos,
        "sin": sin,
        "back": back,
        "query_out": q_out,
        "key_out": k_out,
    }
    _C.rotate(arguments, *calls.where(q))
    return q_out, k_out
