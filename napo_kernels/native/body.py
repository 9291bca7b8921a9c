"""body of the compiled module, on the CPU. Tensors are contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels.native import calls


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # (..., H), (H,) -> same, (rows,)
    out, rows = torch.empty_like(x), x.numel() // x.shape[-1]
    r = torch.empty(rows, dtype=torch.float32)
    calls.module().rms_norm_forward(
        calls.DTYPE_CODES[x.dtype],
        rows,
        x.shape[-1],
        x.data_ptr(),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        r.data_ptr(),
        torch.get_num_threads(),
    )
    return out, r


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    calls.module().rms_norm_backward(
        calls.DTYPE_CODES[x.dtype],
        len(r),
        x.shape[-1],
        x.data_ptr(),
        weight.data_ptr(),
        r.data_ptr(),
        grad.data_ptr(),
        dx.data_ptr(),
        torch.get_num_threads(),
    )
    return dx


def silu_product_forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    calls.module().silu_product_forward(
        calls.DTYPE_CODES[gate.dtype],
        gate.numel(),
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def silu_product_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    calls.module().silu_product_backward(
        calls.DTYPE_CODES[gate.dtype],
        gate.numel(),
        gate.data_ptr(),
        up.data_ptr(),
        grad.data_ptr(),
        d_gate.data_ptr(),
        d_up.data_ptr(),
        torch.get_num_threads(),
    )
    return d_gate, d_up
