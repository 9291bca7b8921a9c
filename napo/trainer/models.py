"""The model that a trainer begins with: loaded by name, quantised, with its tokenizer and limits; and its reference."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from napo.data.prompts import encode_prompt
from napo.scoring.scorer import causal_lm_of


def load_model(
    model: Any, options: Any, quantization_config: Any = None, peft_config: Any = None, *, frozen: bool = False
) -> nn.Module:
    """``model`` as it is, or the causal LM of that name, in fp32 where it trains whole and ``options`` name no dtype; a
    quantised one is made ready for an adapter, unless it is ``frozen``."""
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError(
                f"quantization_config: needs the model's name, to load it with, got a {type(model).__name__}; give the "
                "name, or a model that was loaded with it"
            )
        return model
    options = dict(options or {})
    if quantization_config is not None and "quantization_config" in options:
        raise ValueError("quantization_config: given twice, also in model_init_kwargs; leave out one of the two")
    quantization_config = options.pop("quantization_config", quantization_config)
    if quantization_config is None:
        if peft_config is None and not frozen and not {"dtype", "torch_dtype"} & options.keys():
            options["dtype"] = torch.float32  # updates as small as the usual rates make round to nothing in 16 bits
        return AutoModelForCausalLM.from_pretrained(model, **options)
    if peft_config is None and not frozen:
        raise ValueError("quantization_config: quantised weights do not train; give peft_config, an adapter on them")
    method = getattr(quantization_config, "quant_method", None)
    if method == "bitsandbytes" and not importlib.util.find_spec("bitsandbytes"):
        raise ValueError("quantization_config: needs bitsandbytes, which is not installed; pip install bitsandbytes")
    from peft import prepare_model_for_kbit_training

    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=quantization_config, **options)
    return loaded if frozen else prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that lies beside the weights of ``model``: a name, or a model that was loaded by one."""
    name = model if isinstance(model, str) else getattr(causal_lm_of(model).config, "_name_or_path", "")
    if not name:
        raise ValueError(
            "processing_class: expected the model's tokenizer, got None, and the model does not say where it was "
            "loaded from; pass processing_class=AutoTokenizer.from_pretrained(...)"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"processing_class: expected the model's tokenizer, got None, and {name} has none that loads ({reason}); "
            "pass processing_class=AutoTokenizer.from_pretrained(...)"
        ) from None


def load_reference(ref_model: Any, options: Any) -> nn.Module | None:
    """The reference as a model that does not train; None where none was given."""
    if ref_model is None:
        return None
    loaded = load_model(ref_model, options, frozen=True)
    return loaded.eval().requires_grad_(False)


def opening_tokens(tokenizer: Any) -> int:
    """How many tokens the tokenizer puts in front of every prompt."""
    return len(encode_prompt(tokenizer, "a")) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
