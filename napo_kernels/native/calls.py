"""Where a kernel of the compiled module runs."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the kernels' DType


def where(tensor: Tensor) -> tuple[bool, int]:
    """The last two arguments of every kernel, for one on ``tensor``: whether it runs on CUDA, and the number of threads
    or the address of the stream."""
    if tensor.device.type == "cuda":
        return True, torch.cuda.current_stream(tensor.device).cuda_stream
    return False, torch.get_num_threads()
