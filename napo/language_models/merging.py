"""An adapter added to the weights of its base, for models that only answer: LoRA's small matmuls go.

They are a few per cent of the arithmetic and a tenth to a fifth of the time. The sum is rounded to the base's dtype. In
bf16 this costs no more than computing the two apart, but for one case: changes so small that every weight rounds back
to what it was. So each layer is asked how much of its change is left; where that is not all of it, the layer keeps its
adapter.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from napo.language_models.fused.lora import active_adapter

MOST_LOST = 0.01
"""Of a layer's change, along its own direction. Rounding that is as often up as down loses nothing of it: three
adapters of SmolLM2-135M lost .0002 of a layer at most."""


@torch.no_grad()
def merge_adapter(model: nn.Module) -> tuple[int, int]:
    """Replace the LoRA layers of ``model`` by their base layers with the adapter in the weights. The base is changed
    for good. Returns how many layers were merged, and how many keep their adapter: those where rounding would lose a
    part of it, and those that are more than a base and one low-rank product.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    uses = Counter(map(id, dict(model.named_parameters(remove_duplicate=False)).values()))
    merged = 0
    for name, layer in layers.items():
        if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear or active_adapter(layer) is None:
            continue
        weight = layer.base_layer.weight
        found = None if uses[id(weight)] > 1 else _merged(weight, _change(layer))  # a tied one is read elsewhere too
        if found is None:
            continue
        weight.copy_(found)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
        merged += 1
    return merged, len(layers) - merged


def _change(layer: Any) -> Tensor:  # (out, in) fp32
    (name,) = layer.active_adapters
    change: Tensor = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
    return change * layer.scaling[name]


def _merged(weight: Tensor, change: Tensor) -> Tensor | None:
    """The sum in the weight's dtype, or None where rounding loses a part of the change."""
    wide = weight.float()
    found = (wide + change).to(weight.dtype)
    wanted = change.flatten().double()
    size = wanted.dot(wanted)
    left = (found.float() - wide).flatten().double().dot(wanted)
    if not torch.isfinite(left) or abs(left - size) > MOST_LOST * size:
        return None
    return found
