"""Layers below a model's first adapter compute the same for every model of a run: once is enough.

With adapters on the upper half of the layers (``LoraOptions.top_layers``), the second and third model to be judged on
the same lists cost little more than half of the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from napo.scoring.scorer import causal_lm_of

MOST_BYTES = 2**30


class LowerLayers:
    """What the last layer below the adapters gave for each batch; good for one base model."""

    def __init__(self) -> None:
        self.outputs: dict[
            tuple[int, str, int], Any
        ] = {}  # by the number of layers, the series, and the batch's number
        self.series = ""
        """Which batches are numbered; whoever scores several series names each."""
        self.bytes = 0

    @contextmanager
    def of(self, model: nn.Module, batch: int) -> Iterator[None]:
        """Inside, a forward of ``model`` on batch number ``batch`` takes its lower layers from here, or leaves them
        here."""
        count = layers_below_adapters(model)
        if count == 0:
            yield
            return
        body: Any = causal_lm_of(model).base_model
        layers, key = list(body.layers)[:count], (count, self.series, batch)
        known, last = self.outputs.get(key), layers[-1].forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            output = last(*args, **kwargs)
            self._store(key, output)
            return output

        if known is None:
            layers[-1].forward = keep
        else:
            for layer in layers:  # each hands on the same output, of which the first layer above reads the last
                layer.forward = lambda *args, **kwargs: known
        try:
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def _store(self, key: tuple[int, str, int], output: Any) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        if self.bytes + tensor.nbytes <= MOST_BYTES:
            self.outputs[key] = output
            self.bytes += tensor.nbytes


def layers_below_adapters(model: nn.Module) -> int:
    """How many layers, from the first, hold no adapter; 0 where that cannot be told or where something else does."""
    places = set()
    for name, _ in model.named_parameters():
        if ".lora_" in name:
            place = re.search(r"\.layers\.(\d+)\.", name)
            if place is None:
                return 0
            places.add(int(place.group(1)))
    body: Any = causal_lm_of(model).base_model
    if not places or not isinstance(getattr(body, "layers", None), nn.ModuleList):
        return 0
    return 0 if any("forward" in vars(layer) for layer in body.layers) else min(places)
