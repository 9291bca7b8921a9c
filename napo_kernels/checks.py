"""Checks of the ops' arguments. An error is one line: the argument, what was expected, and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # what the kernels compute with


def check_tensor(name: str, tensor: Any, ndim: int | None, shape: str, *, device: torch.device | None = None) -> None:
    """Check for a dense tensor with ``ndim`` dimensions on ``device``, that of the op's first argument (None for that
    one itself). ``shape`` says what is expected."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor of shape {shape}, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "a nested tensor" if tensor.is_nested else tensor.layout
        raise ValueError(f"{name}: expected a dense tensor of shape {shape}, got {layout}")
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, that of the first argument; got {tensor.device}")


def describe(*values: Any) -> str:
    """Describes an argument for an error: shape, dtype and device of a tensor, else its type."""
    return ", ".join(
        f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__ for x in values
    )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_mask(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.bool:
        raise ValueError(f"{name}: expected bool, got {tensor.dtype}; compare it with something, as in x != 0")


def check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _INTEGERS:
        raise ValueError(f"{name}: expected integers, got {tensor.dtype}")


def check_number(name: str, value: Any, expected: str = "a number") -> None:
    """Check for a Python or numpy number; ``expected`` may ask for "a finite number" or "a positive number", both
    within what float32 holds, because a kernel would read others as 0 or inf."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        got = repr(value) if isinstance(value, (bool, str)) else type(value).__name__
        raise ValueError(f"{name}: expected {expected}, got {got}")
    # no math.isfinite: it takes no symbolic number (torch.compile, dynamic)
    if expected == "a finite number" and not -_MOST <= value <= _MOST:
        raise ValueError(f"{name}: expected {expected} of float32's range, got {value}")
    if expected == "a positive number" and not _LEAST <= value <= _MOST:
        raise ValueError(f"{name}: expected {expected} of float32's range, got {value}")


def check_integer(name: str, value: Any, expected: str, least: int, most: int = 2**63 - 1) -> None:
    """``expected`` tells what ``least`` and ``most`` mean."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


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
