"""The output head of a causal LM as numbers: weight, bias, low-rank part, scale and softcap."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Head:
    """logits = softcap * tanh((scale * h (W + s B A)^T + bias) / softcap)"""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora: tuple[Tensor, Tensor, float] | None  # A (r, H), B (V, r), scale
    logit_scale: float
    softcap: float | None


def read_head(model: PreTrainedModel) -> Head:
    """Read anew at each step: adapters are switched, merged and trained between steps."""
    module: Any = model.get_output_embeddings()
    if module is None:
        raise ValueError(f"model: {type(model).__name__} has no output head; load it with AutoModelForCausalLM")
    wrapper = getattr(module, "modules_to_save", None)
    if isinstance(wrapper, nn.ModuleDict):  # PEFT trains a copy of the head
        active = module.active_adapters[0]
        module = module.original_module if module.disable_adapters or active not in wrapper else wrapper[active]
    lora = None
    if hasattr(module, "base_layer"):
        lora = _low_rank(module)
        module = module.get_base_layer()
    weight, bias = _whole(module.weight), getattr(module, "bias", None)
    if not weight.is_floating_point():
        raise ValueError(
            f"model: expected an output head in floating point, got {weight.dtype}; "
            "leave it out of the quantisation (llm_int8_skip_modules=['lm_head'])"
        )
    if not weight.numel():
        raise ValueError(
            "model: DeepSpeed ZeRO-3 has sharded the output head, which we cannot gather; use ZeRO-2 or FSDP"
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    bias = None if bias is None else _whole(bias)
    return Head(weight, bias, lora, scale, getattr(config, "final_logit_softcapping", None))


def _low_rank(module: Any) -> tuple[Tensor, Tensor, float] | None:
    """The active adapter of PEFT's wrapper of the head; None where it is switched off or merged into the weight."""
    # AdaLoRA's layer is one of LoRA's, but with bare parameters, and singular values between A and B.
    is_lora = isinstance(module, LoraLayer) and isinstance(module.lora_A, nn.ModuleDict)
    if not is_lora:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise ValueError(f"model: expected LoRA or nothing on the output head, got {kind}")
    if module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"model: expected one active adapter on the output head, got {', '.join(active)}")
    (name,) = active
    if name in getattr(module, "lora_variant", {}) or module.lora_bias.get(name):
        raise ValueError("model: expected plain LoRA on the output head, got a variant (DoRA, ALoRA or a bias)")
    dropout = module.lora_dropout[name]
    if isinstance(dropout, nn.Dropout) and dropout.p and module.training:
        raise ValueError(f"model: expected no dropout on the output head's LoRA, got {dropout.p}; set lora_dropout=0")
    return module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])


def _whole(tensor: Tensor) -> Tensor:
    """FSDP2 shards a head that is a unit of its own; its full value is gathered, gradients go back to the shards."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
