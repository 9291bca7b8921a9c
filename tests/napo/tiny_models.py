"""Small random causal LMs of each architecture that the packed way is compared on."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 61
WINDOW = 5  # shorter than every prompt of the tests

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **_NO_DROPOUT}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

_SOFTCAPS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}

ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, **_MIXED}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "gemma2",
        {**_MIXED, "query_pre_attn_scalar": 8, **_SOFTCAPS},
    ),
    "gemma3": ("gemma3_text", {**_MIXED, "query_pre_attn_scalar": 8}),
    "gpt2": ("gpt2", {**_GPT2, "tie_word_embeddings": True}),
    "phi": ("phi", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    # not among the proven: these prove themselves at their first batch
    "granite": ("granite", {"logits_scaling": 3.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    model_type, own = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **own, **changes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # away from the initial values, or logits and norms are all but constant
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def gradients(model, logps):
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(model, logps, truth, tolerance):
    got, expected = gradients(model, logps), gradients(model, truth)
    zero = lambda name: torch.zeros_like(model.get_parameter(name))  # noqa: E731
    for name in got.keys() | expected.keys():
        true = expected.get(name, zero(name))
        worst = (got.get(name, zero(name)) - true).abs().max() / true.abs().max().clamp_min(1)
        assert float(worst) <= tolerance, f"{name}: {worst}"
