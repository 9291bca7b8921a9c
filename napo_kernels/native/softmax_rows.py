"""softmax_rows of the compiled module, on the CPU and on CUDA; the functions of reference/softmax_rows.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from napo_kernels.native import calls
from napo_kernels.rows import Carried, LogitMap, RowStats, Targets


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
    calls.module().target_logits(
        dtype=calls.DTYPE_CODES[hidden.dtype],
        hidden=hidden.data_ptr(),
        hidden_stride=hidden.stride(0),
        weight=weight.data_ptr(),
        weight_stride=weight.stride(0),
        rows=len(hidden),
        width=hidden.shape[1],
        low=calls.address(low),
        low_stride=0 if low is None else low.stride(0),
        lora_b=calls.address(lora_b),
        lora_b_stride=0 if lora_b is None else lora_b.stride(0),
        rank=0 if low is None else low.shape[1],
        lora_scale=lora_scale,
        start=targets.start.data_ptr(),
        columns=targets.columns.data_ptr(),
        scale=logit_map.scale,
        bias=calls.address(logit_map.bias),
        softcap=logit_map.softcap,
        z=z.data_ptr(),
        slope=slope.data_ptr(),
        **calls.where(hidden),
    )
    return z, slope


def takes_columns(hidden: Tensor) -> bool:
    return not calls.where(hidden)["cuda"]


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
    calls.module().softmax_rows_forward(
        **_forward_arguments(logits, out, first_row, targets, logit_map, target_z, stats, store_scale),
        **calls.where(logits),
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
    calls.module().softmax_columns_forward(
        **_forward_arguments(logits, out, first_row, targets, logit_map, target_z, stats, store_scale),
        first_column=columns.start,
        vocabulary=vocabulary,
        carried_max=carried.row_max.data_ptr(),
        carried_sum=carried.row_sum.data_ptr(),
        keep=carried.keep.data_ptr(),
        gain=carried.gain.data_ptr(),
        threads=torch.get_num_threads(),
    )


def _forward_arguments(
    logits: Tensor,
    out: Tensor | None,
    first_row: int,
    targets: Targets,
    logit_map: LogitMap,
    target_z: Tensor,
    stats: RowStats,
    store_scale: float,
) -> dict[str, Any]:
    return {
        "dtype": calls.DTYPE_CODES[logits.dtype],
        "logits": logits.data_ptr(),
        "logits_stride": logits.stride(0),
        "out": calls.address(out),
        "out_stride": 0 if out is None else out.stride(0),
        "out_dtype": calls.DTYPE_CODES[logits.dtype if out is None else out.dtype],
        "first_row": first_row,
        "rows": logits.shape[0],
        "columns": logits.shape[1],
        "start": targets.start.data_ptr(),
        "target_columns": targets.columns.data_ptr(),
        "scale": logit_map.scale,
        "bias": calls.address(logit_map.bias),
        "softcap": logit_map.softcap,
        "target_z": target_z.data_ptr(),
        "target_logp": stats.target_logp.data_ptr(),
        "row_max": stats.row_max.data_ptr(),
        "row_log_sum": stats.row_log_sum.data_ptr(),
        "store_rescale": stats.store_rescale.data_ptr(),
        "store_scale": store_scale,
    }


def add_columns(
    total: Tensor,  # (C, H) fp32
    product: Tensor,  # (C, H)
    carried: Carried,
) -> None:
    calls.module().softmax_columns_add(
        dtype=calls.DTYPE_CODES[product.dtype],
        total=total.data_ptr(),
        product=product.data_ptr(),
        rows=total.shape[0],
        width=total.shape[1],
        keep=carried.keep.data_ptr(),
        gain=carried.gain.data_ptr(),
        threads=torch.get_num_threads(),
    )


def rows_gradient(
    logits: Tensor,  # (R, C)
    out: Tensor,  # (R, C)
    first_column: int,
    targets: Targets,
    logit_map: LogitMap,
    stats: RowStats,
    target_grad: Tensor,  # (Q,)
) -> None:
    calls.module().softmax_rows_gradient(
        dtype=calls.DTYPE_CODES[logits.dtype],
        logits=logits.data_ptr(),
        logits_stride=logits.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        out_dtype=calls.DTYPE_CODES[out.dtype],
        rows=logits.shape[0],
        first_column=first_column,
        columns=logits.shape[1],
        start=targets.start.data_ptr(),
        target_columns=targets.columns.data_ptr(),
        scale=logit_map.scale,
        bias=0 if logit_map.bias is None else logit_map.bias[first_column:].data_ptr(),
        softcap=logit_map.softcap,
        row_max=stats.row_max.data_ptr(),
        row_log_sum=stats.row_log_sum.data_ptr(),
        target_logp=stats.target_logp.data_ptr(),
        target_slope=stats.target_slope.data_ptr(),
        target_grad=target_grad.data_ptr(),
        **calls.where(logits),
    )


def hidden_gradient(
    out: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    context: Tensor | None,  # (R, H)
    targets: Targets,
    stats: RowStats,
    target_grad: Tensor,  # (Q,)
    scale: float,
) -> None:
    calls.module().hidden_gradient(
        dtype=calls.DTYPE_CODES[weight.dtype],
        weight=weight.data_ptr(),
        weight_stride=weight.stride(0),
        context=calls.address(context),
        rows=out.shape[0],
        width=out.shape[1],
        start=targets.start.data_ptr(),
        columns=targets.columns.data_ptr(),
        store_rescale=stats.store_rescale.data_ptr(),
        target_logp=stats.target_logp.data_ptr(),
        target_slope=stats.target_slope.data_ptr(),
        target_grad=target_grad.data_ptr(),
        scale=scale,
        out_dtype=calls.DTYPE_CODES[out.dtype],
        out=out.data_ptr(),
        **calls.where(out),
    )


def token_forward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (S, T)
    logp, m, log_sum = torch.empty((3, *labels.shape), dtype=torch.float32, device=logits.device)
    calls.module().token_logps_forward(
        **_token_arguments(logits, labels, ignore_index, (logp, m, log_sum)),
        **calls.where(logits),
    )
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
    calls.module().token_logps_backward(
        **_token_arguments(logits, labels, ignore_index, token_stats),
        grad=grad.data_ptr(),
        out=out.data_ptr(),
        out_stride_s=out.stride(0),
        out_stride_t=out.stride(1),
        out_is_zero=out_is_zero,
        **calls.where(logits),
    )


def _token_arguments(
    logits: Tensor, labels: Tensor, ignore_index: int, token_stats: tuple[Tensor, Tensor, Tensor]
) -> dict[str, int]:
    return {
        "dtype": calls.DTYPE_CODES[logits.dtype],
        "logits": logits.data_ptr(),
        "stride_s": logits.stride(0),
        "stride_t": logits.stride(1),
        "sequences": logits.shape[0],
        "tokens": logits.shape[1],
        "columns": logits.shape[2],
        "labels": labels.data_ptr(),
        "ignore_index": ignore_index,
        "logp": token_stats[0].data_ptr(),
        "row_max": token_stats[1].data_ptr(),
        "row_log_sum": token_stats[2].data_ptr(),
    }
