"""The output head of a causal LM as numbers: weight, bias, low-rank part, scale and softcap."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from napo.scoring.foreign import BACKWARD_HOOKS, FORWARD_HOOKS, computing_hook

LowRank = tuple[Tensor, Tensor, float]  # A (r, H), B (V, r), scale
ALONE = "packed=False (of CandidateScorer or NAPOConfig)"  # the way out where titles cannot be packed


@dataclasses.dataclass(frozen=True)
class Head:
    """logits = softcap * tanh((scale * h (W + s B A)^T + bias) / softcap)"""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora: LowRank | None
    logit_scale: float
    softcap: float | None


def read_head(model: PreTrainedModel) -> Head:
    """Read anew at each step: adapters are switched, merged and trained between steps."""
    module, lora = _parts(model)
    weight, bias = _whole(module.weight), getattr(module, "bias", None)
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    bias = None if bias is None else _whole(bias)
    return Head(weight, bias, lora, scale, getattr(config, "final_logit_softcapping", None))


def is_plain(model: PreTrainedModel) -> bool:
    """Whether the head is numbers and nothing that is done when it is called."""
    try:
        module, _ = _parts(model)
    except ValueError:
        return False
    return type(module).forward is nn.Linear.forward and not any(map(computing_hook, _layers(model)))


def own_weight(model: PreTrainedModel) -> Any:
    """The head's weight as it stands; None where there is none to read."""
    return getattr(_layers(model)[-1], "weight", None)


def weight_maker(model: PreTrainedModel) -> str | None:
    """A hook that may make the head's weight just before the head is called."""
    hooks = (computing_hook(layer, FORWARD_HOOKS) for layer in _layers(model))
    return next((hook for hook in hooks if hook is not None), None)


def no_hook(hook: str) -> ValueError:
    return ValueError(
        f"model: expected no hook on the output head, which is read and not called, got {hook}; remove it, or set "
        f"{ALONE}"
    )


def _layers(model: PreTrainedModel) -> list[Any]:
    """The head, its copy that is trained, and the layer below an adapter, each where there is one."""
    module: Any = model.get_output_embeddings()
    if module is None:
        raise ValueError(f"model: {type(model).__name__} has no output head; load it with AutoModelForCausalLM")
    copy = _saved_copy(module)
    return [module, copy, *([copy.get_base_layer()] if hasattr(copy, "base_layer") else [])]


def _parts(model: PreTrainedModel) -> tuple[Any, LowRank | None]:
    """The layer that has weight and bias, and the active adapter on it."""
    layers = _layers(model)
    adapted, module = layers[1], layers[-1]
    lora = _low_rank(adapted) if hasattr(adapted, "base_layer") else None
    for layer in layers:  # what a hook around the forward does, the comparison with the model's own forward tells
        hook = computing_hook(layer, BACKWARD_HOOKS)
        if hook is not None:
            raise no_hook(hook)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"model: expected a linear output head, got {type(module).__module__}.{type(module).__name__}; set {ALONE}"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"model: expected an output head in floating point, got {weight.dtype}; "
            "leave it out of the quantisation (llm_int8_skip_modules=['lm_head'])"
        )
    if not weight.numel():
        raise ValueError(
            "model: DeepSpeed ZeRO-3 has sharded the output head, which we cannot gather; use ZeRO-2 or FSDP"
        )
    return module, lora


def _saved_copy(module: Any) -> Any:
    """The copy of the head that PEFT trains, where it does; else the head."""
    wrapper = getattr(module, "modules_to_save", None)
    if not isinstance(wrapper, nn.ModuleDict):
        return module
    active = module.active_adapters[0]
    return module.original_module if module.disable_adapters or active not in wrapper else wrapper[active]


def _low_rank(module: Any) -> LowRank | None:
    """The active adapter of PEFT's wrapper of the head; None where it is switched off or merged into the weight."""
    # AdaLoRA's layer is one of LoRA's, but with bare parameters, and singular values between A and B.
    is_lora = isinstance(module, LoraLayer) and isinstance(module.lora_A, nn.ModuleDict)
    if not is_lora:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise ValueError(f"model: expected LoRA or nothing on the output head, got {kind}; set {ALONE}")
    if module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"model: expected one active adapter on the output head, got {', '.join(active)}; set {ALONE}")
    (name,) = active
    if name in getattr(module, "lora_variant", {}) or module.lora_bias.get(name):
        raise ValueError(
            f"model: expected plain LoRA on the output head, got a variant (DoRA, ALoRA or a bias); set {ALONE}"
        )
    dropout = module.lora_dropout[name]
    if isinstance(dropout, nn.Dropout) and dropout.p and module.training:
        raise ValueError(
            f"model: expected no dropout on the output head's LoRA, got {dropout.p}; set lora_dropout=0, or {ALONE}"
        )
    return module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])


def _whole(tensor: Tensor) -> Tensor:
    """FSDP2 shards a head that is a unit of its own; its full value is gathered, gradients go back to the shards."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
