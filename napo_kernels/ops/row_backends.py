"""Which implementation of the row kernel serves a backend, and what the two ops on top of it have in common."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from napo_kernels.backends import resolve
from napo_kernels.ops.registration import no_second_derivative

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def row_kernel(op: str, tensor: Tensor, wanted: str | None) -> ModuleType:
    """The module with the functions of reference/softmax_rows.py that runs ``op`` on ``tensor``."""
    if tensor.dtype == torch.float64:
        if wanted not in (None, "reference"):
            raise ValueError(f"backend: {wanted!r} has no float64; leave it None, or use 'reference'")
        wanted = "reference"
    name = resolve(op, tensor.device, wanted)
    if name == "triton":
        from napo_kernels.triton import softmax_rows as triton_rows

        return triton_rows
    if name == "reference":
        from napo_kernels.reference import softmax_rows as reference_rows

        return reference_rows
    from napo_kernels.native import softmax_rows as native_rows

    return native_rows


def refuse_double_backward(op: Any) -> None:
    """Makes the second derivative of ``op``, a backward op made by ``custom_op``, an error that says so."""
    op.register_autograd(no_second_derivative(op._name))


def check_tensor(name: str, tensor: Tensor, ndim: int, shape: str, *, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor of shape {shape}, got {type(tensor).__name__}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, that of the first argument; got {tensor.device}")


def check_index(name: str, tensor: Tensor, ndim: int, shape: str, *, device: torch.device) -> None:
    check_tensor(name, tensor, ndim, shape, device=device)
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, got {tensor.dtype}")
