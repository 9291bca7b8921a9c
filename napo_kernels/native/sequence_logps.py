"""The kernels of sequence_logps in the compiled module, for CPU and CUDA; functions as in reference/."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels import _C
from napo_kernels.native import calls
from napo_kernels.rows import TokenStats


def token_forward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
) -> TokenStats:
    stats = TokenStats(*torch.empty((3, *labels.shape), dtype=torch.float32, device=logits.device))
    _C.token_logps_forward(_forward(logits, labels, ignore_index, stats), *calls.where(logits))
    return stats


def token_backward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
    stats: TokenStats,
    grad: Tensor,  # (S,)
    out: Tensor,  # (S, T, V)
    *,
    out_is_zero: bool,
) -> None:
    forward = _forward(logits, labels, ignore_index, stats)
    arguments: _C.TokenBackwardArgs = {"forward": forward, "grad": grad, "out": out, "out_is_zero": out_is_zero}
    _C.token_logps_backward(arguments, *calls.where(logits))


def _forward(logits: Tensor, labels: Tensor, ignore_index: int, stats: TokenStats) -> _C.TokenForwardArgs:
    return {
        "logits": logits,
        "labels": labels,
        "ignore_index": ignore_index,
        "logp": stats.logp,
        "row_max": stats.row_max,
        "row_log_sum": stats.row_log_sum,
    }
