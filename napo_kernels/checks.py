"""Checks of the ops' arguments. An error is one line: the argument, what was expected, and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensor(name: str, tensor: Tensor, ndim: int, shape: str, *, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor of shape {shape}, got {type(tensor).__name__}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, that of the first argument; got {tensor.device}")


def check_floats(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected bfloat16, float16, float32 or float64, got {tensor.dtype}")


def check_index(name: str, tensor: Tensor, ndim: int, shape: str, *, device: torch.device) -> None:
    check_tensor(name, tensor, ndim, shape, device=device)
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, got {tensor.dtype}")


def check_range(name: str, values: Tensor, end: int, *, valid: Tensor | None = None) -> None:
    """ValueError where a value lies outside [0, end). On a GPU the check runs asynchronously and stops the device
    with an assertion, as torch's own losses do, because asking for the answer would wait for the device."""
    wrong = (values < 0) | (values >= end)
    if valid is not None:
        wrong &= valid
    if values.device.type == "cpu":
        if bool(wrong.any()):
            position = int(wrong.reshape(-1).nonzero()[0])
            value = int(values.reshape(-1)[position])
            raise ValueError(f"{name}: expected values in [0, {end}), got {value} at position {position}")
    elif values.device.type == "cuda":
        torch._assert_async(~wrong.any(), f"{name}: expected values in [0, {end})")
