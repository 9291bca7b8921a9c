"""LoRA on a linear layer in three matmuls forward and none of the passes between them.

PEFT computes ``base(x) + B(A(x)) * scaling``: beside the matmuls that is a multiplication and an addition over the
whole output, forward and backward, and for fp32 adapters under a bf16 base a copy of every input. On a CPU, where
memory is slow, this is a fifth of a training step. Here the low-rank product is accumulated into the base's output by
the matmul itself, the scaling is folded into B, and the adapters' fp32 master weights are cast, not the activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn


def fuse_lora(model: nn.Module) -> int:
    """Give every LoRA linear of ``model`` that this file can compute the fused forward; returns how many.

    Layers with dropout on the branch, a variant (DoRA, ...), a quantised base, several active adapters, or merged or
    disabled adapters keep PEFT's own forward, decided at each call.
    """
    fused = 0
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.cast_input_dtype_enabled = False  # autocast casts the adapter's small weights instead
            module.forward = _Forward(module)  # type: ignore[method-assign]
            fused += 1
    return fused


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """`disable_adapter` of a PEFT model for a forward without gradient, such as a reference pass.

    PEFT writes a report on every parameter and layer first and sets `requires_grad` twice, which takes the host longer
    than a small model's forward takes a GPU. Here a flag is set on every layer, and nothing else.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    if not layers or not all(map(_is_switched_by_flag, layers)):
        with model.disable_adapter():
            yield
        return
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _is_switched_by_flag(layer: Any) -> bool:
    known = getattr(type(layer), "enable_adapters", None) is BaseTunerLayer.enable_adapters
    return (known or isinstance(layer, ModulesToSaveWrapper)) and layer.disable_adapters == layer._disable_adapters


class _Forward:
    """The forward of one layer: a callable object, so that the model still pickles."""

    def __init__(self, layer: LoraLinear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (..., in) -> (..., out)
        layer = self.layer
        if layer.disable_adapters and not (layer.merged or args or kwargs):
            return layer.base_layer(x)  # as PEFT does, without its checks: a reference pass is short
        if args or kwargs or active_adapter(layer) is None:
            return LoraLinear.forward(layer, x, *args, **kwargs)
        return _together((layer,), x)[0]


def active_adapter(layer: Any) -> str | None:
    """The layer's one active adapter, where the fused forward computes it."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
        return None
    if not _is_frozen(layer.base_layer):  # PEFT trains biases if it is told to
        return None
    name: str = active[0]
    dropped = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    if name in layer.lora_variant or dropped:
        return None
    return name if layer.lora_A[name].bias is None and layer.lora_B[name].bias is None else None


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


Matrices = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # W (out, in), bias (out,), A (r, in), B (out, r)


def _matrices(layer: Any) -> Matrices:
    """The matrices of a plain linear layer, or of one with an adapter."""
    if type(layer) is nn.Linear:
        return layer.weight, layer.bias, None, None
    base = layer.base_layer
    if layer.disable_adapters:
        return base.weight, base.bias, None, None
    (name,) = layer.active_adapters
    return base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight


def _scaling(layer: Any) -> float:
    if type(layer) is nn.Linear or layer.disable_adapters:
        return 1.0
    (name,) = layer.active_adapters
    return float(layer.scaling[name])


def _is_frozen(linear: nn.Linear) -> bool:
    return not (linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad))


def linear_together(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...] | None:
    """The outputs of linear layers, plain or with adapters, on the same input, in few launches: all As share one
    matmul, and each matmul adds to the result of the one before. None where a layer must be called by itself."""
    if not all(map(_goes_together, layers)):
        return None
    return _together(layers, x)


def _together(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
    matrices = itertools.chain(*zip(*map(_matrices, layers), strict=True))  # all weights, all biases, ...
    scalings = [_scaling(layer) for layer in layers]
    outputs: tuple[Tensor, ...] = _LinearTogether.apply(x.to(_compute_dtype(x)), scalings, *matrices)
    return outputs


def _goes_together(layer: Any) -> bool:
    if type(layer) is not nn.Linear and not isinstance(vars(layer).get("forward"), _Forward):
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return False
    if type(layer) is nn.Linear:
        return _is_frozen(layer)
    return (layer.disable_adapters and not layer.merged and _is_frozen(layer.base_layer)) or active_adapter(
        layer
    ) is not None


class _LinearTogether(torch.autograd.Function):
    """y_i = x W_i^T + bias_i + s_i (x A^T)_i B_i^T where A stacks the A_i; some layers have neither A nor B.

    Computed in the dtype of x. Matrices of another one are cast here, and autograd casts their gradients back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: list[float], *matrices: Tensor | None) -> tuple[Tensor, ...]:
        count = len(scalings)
        cast = [None if matrix is None else matrix.to(x.dtype) for matrix in matrices]
        weights, biases, many_a, many_b = (cast[i * count : (i + 1) * count] for i in range(4))
        rows = x.reshape(-1, x.shape[-1])
        ranks = [0 if a is None else len(a) for a in many_a]
        stacked = [a for a in many_a if a is not None]
        a = torch.cat(stacked) if stacked else None
        low = None if a is None else rows @ a.t()  # (n, sum of ranks)
        lows = [None] * count if low is None else low.split(ranks, 1)
        outputs = []
        for weight, bias, part, b, scaling in zip(weights, biases, lows, many_b, scalings, strict=True):
            y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())  # type: ignore[union-attr]
            if b is not None:
                y.addmm_(part, b.t(), alpha=scaling)
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(rows, a, low, *weights, *many_b)
        ctx.shape, ctx.ranks, ctx.scalings = x.shape, ranks, scalings
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, low, *others = ctx.saved_tensors  # read once, as checkpointing asks
        ranks, count = ctx.ranks, len(ctx.ranks)
        weights, many_b = others[:count], others[count:]
        gs = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        d_a: list[Tensor | None] = [None] * count
        d_b: list[Tensor | None] = [None] * count
        if low is not None:
            g_low = torch.empty_like(low)
            for g, b, part, scaling in zip(gs, many_b, g_low.split(ranks, 1), ctx.scalings, strict=True):
                if b is not None:
                    part.addmm_(g, b, beta=0, alpha=scaling)
            if any(ctx.needs_input_grad[2 + 2 * count : 2 + 3 * count]):
                d_a = [None if b is None else d for b, d in zip(many_b, (g_low.t() @ rows).split(ranks), strict=True)]
            for i, (g, part) in enumerate(zip(gs, low.split(ranks, 1), strict=True)):
                if ctx.needs_input_grad[2 + 3 * count + i]:
                    d_b[i] = torch.empty_like(many_b[i]).addmm_(g.t(), part, beta=0, alpha=ctx.scalings[i])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gs[0] @ weights[0]
            for g, weight in zip(gs[1:], weights[1:], strict=True):
                grad_x.addmm_(g, weight)
            if low is not None:
                grad_x.addmm_(g_low, a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, *[None] * (1 + 2 * count), *d_a, *d_b
