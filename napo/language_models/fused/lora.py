"""LoRA on a linear layer in three matmuls forward and none of the passes between them.

PEFT computes ``base(x) + B(A(x)) * scaling``: beside the matmuls that is a multiplication and an addition over the
whole output, forward and backward, and for fp32 adapters under a bf16 base a copy of every input. On a CPU, where
memory is slow, this is a fifth of a training step. Here the low-rank product is accumulated into the base's output by
the matmul itself, the scaling is folded into B, and the adapters' fp32 master weights are cast, not the activations.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        active = layer.active_adapters
        plain = len(active) == 1 and active[0] in layer.lora_A and active[0] not in layer.lora_variant
        if layer.disable_adapters and not (layer.merged or args or kwargs):
            return layer.base_layer(x)  # what PEFT's forward comes to, without its checks: a reference pass is short
        if args or kwargs or not plain or layer.disable_adapters or layer.merged:
            return LoraLinear.forward(layer, x, *args, **kwargs)
        name = active[0]
        if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
            return LoraLinear.forward(layer, x)
        base, lora_a, lora_b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
        if lora_a.bias is not None or lora_b.bias is not None:
            return LoraLinear.forward(layer, x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        a, b = lora_a.weight.to(dtype), (lora_b.weight * layer.scaling[name]).to(dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        return _LoraLinear.apply(x.to(dtype), base.weight.to(dtype), bias, a, b)


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + (x A^T) B^T, with gradients for x, A and B; W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in)
        weight: Tensor,  # (out, in)
        bias: Tensor | None,  # (out,)
        a: Tensor,  # (r, in)
        b: Tensor,  # (out, r), scaling folded in
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.t()
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        y.addmm_(low, b.t())
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        g_low = g @ b
        grad_x = (g @ weight).addmm_(g_low, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_a = g_low.t() @ rows if ctx.needs_input_grad[3] else None
        grad_b = g.t() @ low if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_a, grad_b
