"""One entry for all layers that this package computes itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from napo.language_models.fused.lora import fuse_lora
from napo.language_models.fused.mlp import fuse_mlps
from napo.language_models.fused.norms import fuse_norms
from napo.language_models.fused.self_attention import fuse_attentions

FUSIONS = (fuse_lora, fuse_norms, fuse_mlps, fuse_attentions)
CHANGED = ("forward", "cast_input_dtype_enabled")  # attributes of a module that they set
_ABSENT = object()


class Fused:
    """What ``fuse`` changed in a model; ``undo`` gives it back its own forwards."""

    def __init__(self, changed: list[tuple[nn.Module, dict[str, Any]]]) -> None:
        self.changed = changed

    def undo(self) -> None:
        for module, before in self.changed:
            for name, value in before.items():
                if value is not _ABSENT:
                    setattr(module, name, value)
                elif name in vars(module):
                    delattr(module, name)
        self.changed = []


def fuse(model: nn.Module) -> Fused:
    """Give every LoRA linear, RMSNorm, gated MLP and self-attention of ``model`` that this package can compute its
    faster forward."""
    before = {module: _own(module) for module in model.modules()}
    for fusion in FUSIONS:
        fusion(model)
    return Fused([(module, own) for module, own in before.items() if own != _own(module)])


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module).get(name, _ABSENT) for name in CHANGED}
