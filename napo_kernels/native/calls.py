"""What the functions of the compiled module are given: addresses, and where to run."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from napo_kernels.backends import compiled

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common.h


def module() -> ModuleType:
    """The compiled module."""
    built = compiled()
    assert built is not None  # backends.resolve has seen to it
    return built


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def where(tensor: Tensor) -> dict[str, int | bool]:
    """The arguments that say where a kernel on ``tensor`` runs: the number of threads, or the CUDA stream."""
    if tensor.device.type == "cuda":
        return {"cuda": True, "queue": torch.cuda.current_stream(tensor.device).cuda_stream}
    return {"cuda": False, "queue": torch.get_num_threads()}
