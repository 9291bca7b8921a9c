"""softmax_rows of the compiled module, on the CPU and on CUDA; the functions of reference/softmax_rows.py."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels import _C
from napo_kernels.native import calls
from napo_kernels.rows import Carried, LogitMap, RowStats, Targets

ROUNDS_OPERANDS = True  # matmuls are in the dtype of the hidden states


def target_logits(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    low: Tensor | None,  # (R, r)
    lora_b: Tensor | None,  # (V, r)
    lora_scale: float,
    targets: Targets,
    logit_map: LogitMap,
) -> tuple[Tensor, Tensor]:  # (Q,)
    z, slope = torch.zeros((2, len(targets.columns)), dtype=torch.float32, device=hidden.device)
    arguments: _C.TargetLogitsArgs = {
        "dtype": hidden.dtype,
        "hidden": hidden,
        "hidden_stride": hidden.stride(0),
        "weight": weight,
        "weight_stride": weight.stride(0),
        "rows": len(hidden),
        "width": hidden.shape[1],
        "low": low,
        "lora_b": lora_b,
        "low_stride": 0 if low is None else low.stride(0),
        "lora_b_stride": 0 if lora_b is None else lora_b.stride(0),
        "rank": 0 if low is None else low.shape[1],
        "lora_scale": lora_scale,
        "targets": targets,
        "map": logit_map,
        "z": z,
        "slope": slope,
    }
    _C.target_logits(arguments, *calls.where(hidden))
    return z, slope


def takes_columns(hidden: Tensor) -> bool:
    return not calls.where(hidden)[0]


def rows_forward(
    logits: Tensor,  # (C, V)
    out: Tensor | None,  # (C, V)
    first_row: int,
    targets: Targets,
    logit_map: LogitMap,
    target_z: Tensor,  # (Q,)
    stats: RowStats,
    store_scale: float,
) -> None:
    _C.softmax_rows_forward(
        _forward(logits, out, first_row, targets, logit_map, target_z, stats, store_scale), *calls.where(logits)
    )


def columns_forward(
    logits: Tensor,  # (C, number of columns)
    out: Tensor | None,
    first_row: int,
    columns: slice,
    vocabulary: int,
    carried: Carried,
    targets: Targets,
    logit_map: LogitMap,
    target_z: Tensor,  # (Q,)
    stats: RowStats,
    store_scale: float,
) -> None:
    arguments: _C.ColumnsArgs = {
        "forward": _forward(logits, out, first_row, targets, logit_map, target_z, stats, store_scale),
        "first_column": columns.start,
        "vocabulary": vocabulary,
        "max": carried.row_max,
        "sum": carried.row_sum,
        "keep": carried.keep,
        "gain": carried.gain,
    }
    _C.softmax_columns_forward(arguments, *calls.where(logits))


def _forward(
    logits: Tensor,
    out: Tensor | None,
    first_row: int,
    targets: Targets,
    logit_map: LogitMap,
    target_z: Tensor,
    stats: RowStats,
    store_scale: float,
) -> _C.ForwardArgs:
    return {
        "dtype": logits.dtype,
        "logits": logits,
        "logits_stride": logits.stride(0),
        "out_dtype": logits.dtype if out is None else out.dtype,
        "out": out,
        "out_stride": 0 if out is None else out.stride(0),
        "first_row": first_row,
        "rows": logits.shape[0],
        "columns": logits.shape[1],
        "targets": targets,
        "map": logit_map,
        "target_z": target_z,
        "target_logp": stats.target_logp,
        "row_max": stats.row_max,
        "row_log_sum": stats.row_log_sum,
        "store_rescale": stats.store_rescale,
        "store_scale": store_scale,
    }


def add_columns(
    total: Tensor,  # (C, H) fp32
    product: Tensor,  # (C, H)
    carried: Carried,
) -> None:
    arguments: _C.ColumnsAddArgs = {
        "dtype": product.dtype,
        "total": total,
        "product": product,
        "rows": total.shape[0],
        "width": total.shape[1],
        "keep": carried.keep,
        "gain": carried.gain,
    }
    _C.softmax_columns_add(arguments, *calls.where(total))


def rows_gradient(
    logits: Tensor,  # (R, C)
    out: Tensor,  # (R, C)
    first_column: int,
    targets: Targets,
    logit_map: LogitMap,
    stats: RowStats,
    target_grad: Tensor,  # (Q,)
) -> None:
    bias = logit_map.bias
    arguments: _C.GradientArgs = {
        "dtype": logits.dtype,
        "logits": logits,
        "logits_stride": logits.stride(0),
        "out_dtype": out.dtype,
        "out": out,
        "out_stride": out.stride(0),
        "rows": logits.shape[0],
        "first_column": first_column,
        "columns": logits.shape[1],
        "targets": targets,
        "map": logit_map if bias is None else logit_map._replace(bias=bias[first_column:]),
        "row_max": stats.row_max,
        "row_log_sum": stats.row_log_sum,
        "target_logp": stats.target_logp,
        "target_slope": stats.target_slope,
        "target_grad": target_grad,
    }
    _C.softmax_rows_gradient(arguments, *calls.where(logits))


def hidden_gradient(
    out: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    context: Tensor | None,  # (R, H)
    targets: Targets,
    stats: RowStats,
    target_grad: Tensor,  # (Q,)
    scale: float,
) -> None:
    arguments: _C.HiddenGradientArgs = {
        "dtype": weight.dtype,
        "weight": weight,
        "weight_stride": weight.stride(0),
        "context": context,
        "rows": out.shape[0],
        "width": out.shape[1],
        "targets": targets,
        "store_rescale": stats.store_rescale,
        "target_logp": stats.target_logp,
        "target_slope": stats.target_slope,
        "target_grad": target_grad,
        "scale": scale,
        "out_dtype": out.dtype,
        "out": out,
    }
    _C.hidden_gradient(arguments, *calls.where(out))


def token_forward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (S, T)
    logp, m, log_sum = torch.empty((3, *labels.shape), dtype=torch.float32, device=logits.device)
    _C.token_logps_forward(_tokens(logits, labels, ignore_index, (logp, m, log_sum)), *calls.where(logits))
    return logp, m, log_sum


def token_backward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
    token_stats: tuple[Tensor, Tensor, Tensor],  # (S, T)
    grad: Tensor,  # (S,)
    out: Tensor,  # (S, T, V)
    out_is_zero: bool,
) -> None:
    arguments: _C.TokenBackwardArgs = {
        **_tokens(logits, labels, ignore_index, token_stats),
        "grad": grad,
        "out": out,
        "out_stride_s": out.stride(0),
        "out_stride_t": out.stride(1),
        "out_is_zero": out_is_zero,
    }
    _C.token_logps_backward(arguments, *calls.where(logits))


def _tokens(
    logits: Tensor, labels: Tensor, ignore_index: int, token_stats: tuple[Tensor, Tensor, Tensor]
) -> _C.TokenForwardArgs:
    return {
        "dtype": logits.dtype,
        "logits": logits,
        "stride_s": logits.stride(0),
        "stride_t": logits.stride(1),
        "sequences": logits.shape[0],
        "tokens": logits.shape[1],
        "columns": logits.shape[2],
        "labels": labels,
        "ignore_index": ignore_index,
        "logp": token_stats[0],
        "row_max": token_stats[1],
        "row_log_sum": token_stats[2],
    }
