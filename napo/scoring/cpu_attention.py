"""SDPA in fp32 for 16-bit models on CPUs without AMX, brought along by the mask of a packed batch.

There, torch's flash kernel takes 35 ms a layer forward and backward in bf16 and 19 ms in fp32 (4 rows of 254 tokens,
9 heads of 64, 2 cores), and attention is the largest part of a packed step after the matmuls of the linear layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PackedMask(Tensor):
    """A boolean mask (rows, 1, T, T) under which SDPA computes in fp32. Models only hand their mask on to SDPA; any
    other operation on it gives a plain tensor, with which SDPA computes in the dtype of its inputs."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is not scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            query, key, value = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in args[:3])
            with torch.autocast(query.device.type, enabled=False):  # it would cast back
                return func(query, key, value, *args[3:], **(kwargs or {})).to(args[0].dtype)
