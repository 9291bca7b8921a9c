"""The gated MLP of Llama and its kin with silu(gate) * up in one pass, keeping only gate and up for the backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from napo.language_models.fused.lora import linear_together
from napo_kernels.ops import body

# Classes of transformers whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)).
GATED_MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})


def fuse_mlps(model: nn.Module) -> int:
    """Give every gated MLP of ``model`` with SiLU its forward; returns how many.

    Where no kernel can run (fp64, a GPU without Triton) they keep their own, decided at each call.
    """
    mlps = [module for module in model.modules() if type(module).__name__ in GATED_MLPS and _has_silu(module)]
    for module in mlps:
        module.forward = _Forward(module)  # type: ignore[method-assign]
    return len(mlps)


def _has_silu(mlp: Any) -> bool:
    return type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


class _Forward:
    """The forward of one MLP: a callable object, so that the model still pickles."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:  # (..., H) -> (..., H)
        mlp = self.mlp
        layers = (mlp.gate_proj, mlp.up_proj)
        gate, up = linear_together(layers, x) or [layer(x) for layer in layers]
        if not body.serves(gate, up):
            return mlp.down_proj(mlp.act_fn(gate) * up)
        return mlp.down_proj(body.silu_product(gate, up))
