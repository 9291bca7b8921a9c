"""catalogue_sequence_logps of the compiled module, on the CPU, in fp32. Rows that share a set are matmuls of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels import _C
from napo_kernels.allowed import Block, Gradients, Head, Logits, Plan, add_weight_gradient, sequence_sums, sums_of_pairs
from napo_kernels.native import calls
from napo_kernels.rows import add_at

ON_CUDA = False
TAKES_HALF = False  # all inputs are fp32


def forward(
    head: Head, plan: Plan, logits: Logits, *, num_sequences: int, logit_scale: float, softcap: float
) -> Tensor:  # (S,)
    """Fills ``logits``; a softcap of 0 stands for none."""
    hidden, weight, (z, slope, stats) = head.hidden.contiguous(), head.weight.contiguous(), logits
    bias = None if head.bias is None else head.bias.contiguous()
    for part in plan.parts:
        if part.counts is None:
            torch.mm(hidden[part.rows], weight[part.columns].t(), out=z[part.places].view(part.shape))
        arguments: _C.AllowedForwardArgs = {
            "block": _block(part, hidden, weight, logit_scale),
            "bias": bias,
            "softcap": softcap,
            "z": z[part.places],
            "slope": None if slope is None else slope[part.places],
            "row_max": stats[0, part.slots],
            "log_sum": stats[1, part.slots],
        }
        _C.allowed_forward(arguments, *calls.where(hidden))
    return sequence_sums(logits, plan.pairs, num_sequences)


def backward(
    grad: Tensor,  # (S,)
    head: Head,
    plan: Plan,
    logits: Logits,
    grads: Gradients,
    *,
    logit_scale: float,
) -> None:
    hidden, weight, (z, slope, stats) = head.hidden.contiguous(), head.weight.contiguous(), logits
    hidden_grad, weight_grad, bias_grad = grads
    of_place, of_slot = sums_of_pairs(grad, plan.pairs, logits)
    for part in plan.parts:
        own = part.counts is not None
        dz = torch.empty(part.shape)
        arguments: _C.AllowedBackwardArgs = {
            "block": _block(part, hidden, weight, logit_scale),
            "z": z[part.places],
            "slope": None if slope is None else slope[part.places],
            "row_max": stats[0, part.slots],
            "log_sum": stats[1, part.slots],
            "place_grad": of_place[part.places],
            "row_grad": of_slot[part.slots],
            "dz": dz,
            "hidden_grad": hidden_grad if own else None,
        }
        _C.allowed_backward(arguments, *calls.where(hidden))
        if bias_grad is not None:
            of_column = dz if own else dz.sum(0)
            bias_grad += add_at(len(bias_grad), part.columns.flatten(), of_column.flatten())
        dz *= logit_scale
        if hidden_grad is not None and not own:
            hidden_grad[part.rows] = dz @ weight[part.columns]
        if weight_grad is not None:
            add_weight_gradient(part, dz, hidden, weight_grad)


def _block(part: Block, hidden: Tensor, weight: Tensor, logit_scale: float) -> _C.AllowedBlockArgs:
    count, width = part.shape
    return {
        "count": count,
        "width": width,
        "hidden_width": hidden.shape[1],
        "hidden": hidden,
        "weight": weight,
        "rows": part.rows,
        "columns": part.columns,
        "sizes": part.counts,
        "logit_scale": logit_scale,
    }
