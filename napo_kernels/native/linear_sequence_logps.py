"""The row kernel of linear_sequence_logps in the compiled module, for CPU and CUDA; functions as in reference/."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels import _C
from napo_kernels.native import calls
from napo_kernels.rows import Carried, LogitMap, LowRank, RowsProblem, Targets, Upstream

ROUNDS_OPERANDS = True  # matmuls are in the dtype of the hidden states


def target_logits(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    low_rank: LowRank,
    targets: Targets,
    logit_map: LogitMap,
) -> tuple[Tensor, Tensor]:  # (Q,)
    z, slope = torch.zeros((2, len(targets.columns)), dtype=torch.float32, device=hidden.device)
    arguments: _C.TargetLogitsArgs = {
        "hidden": hidden,
        "weight": weight,
        "low_rank": low_rank,
        "targets": targets,
        "logit_map": logit_map,
        "z": z,
        "slope": slope,
    }
    _C.target_logits(arguments, *calls.where(hidden))
    return z, slope


def rows_forward(
    logits: Tensor,  # (C, V)
    out: Tensor | None,  # (C, V)
    first_row: int,
    problem: RowsProblem,
) -> None:
    arguments: _C.ForwardArgs = {"logits": logits, "out": out, "first_row": first_row, "problem": problem}
    _C.softmax_rows_forward(arguments, *calls.where(logits))


def columns_forward(
    logits: Tensor,  # (C, number of columns)
    out: Tensor | None,
    first_row: int,
    first_column: int,
    carried: Carried,
    problem: RowsProblem,
) -> None:
    forward: _C.ForwardArgs = {"logits": logits, "out": out, "first_row": first_row, "problem": problem}
    _C.softmax_columns_forward(
        {"forward": forward, "first_column": first_column, "carried": carried}, *calls.where(logits)
    )


def add_columns(
    total: Tensor,  # (C, H) fp32
    product: Tensor,  # (C, H)
    carried: Carried,
) -> None:
    _C.softmax_columns_add({"total": total, "product": product, "carried": carried}, *calls.where(total))


def rows_gradient(
    logits: Tensor,  # (R, C)
    out: Tensor,  # (R, C)
    first_column: int,
    logit_map: LogitMap,
    upstream: Upstream,
) -> None:
    arguments: _C.GradientArgs = {
        "logits": logits,
        "out": out,
        "first_column": first_column,
        "logit_map": logit_map,
        "upstream": upstream,
    }
    _C.softmax_rows_gradient(arguments, *calls.where(logits))


def hidden_gradient(
    out: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    context: Tensor | None,  # (R, H)
    upstream: Upstream,
    scale: float,
) -> None:
    arguments: _C.HiddenGradientArgs = {
        "out": out,
        "weight": weight,
        "context": context,
        "upstream": upstream,
        "scale": scale,
    }
    _C.hidden_gradient(arguments, *calls.where(out))
