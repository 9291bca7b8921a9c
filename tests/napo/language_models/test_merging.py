"""Adapters added to the weights of their base: the same outputs, and a layer that cannot hold its adapter keeps it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from tiny_models import tiny_model
from torch import nn

from napo.language_models.fused.fuse import fuse
from napo.language_models.loading import autocast
from napo.language_models.merging import merge_adapter

LINEAR_LAYERS = 3 * 7
IDS = torch.arange(1, 41).view(2, 20)


def adapted(dtype: torch.dtype, *, size: float = 0.1, **changes: object) -> nn.Module:
    """A tiny Llama with an adapter whose B is drawn, with fp32 master weights."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes})
    model = get_peft_model(tiny_model("llama", dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=size)
    model.requires_grad_(False)
    fuse(model)
    return model.eval()


def layers(model: nn.Module) -> int:
    return sum(isinstance(module, LoraLinear) for module in model.modules())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), autocast(model):
        return model(input_ids=IDS).logits.float()


def test_outputs_stay_and_adapters_go() -> None:
    model = adapted(torch.float32)
    with model.disable_adapter():  # type: ignore[operator]
        base = logits(model)
    before = logits(model)
    assert merge_adapter(model) == (LINEAR_LAYERS, 0) and layers(model) == 0
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert (before - base).abs().max() > 0.1  # the adapter says something
    assert merge_adapter(model) == (0, 0)


def test_in_bf16_merged_is_as_near_to_fp32_as_apart() -> None:
    apart = adapted(torch.bfloat16)
    merged, exact = copy.deepcopy(apart), copy.deepcopy(apart).float()
    assert merge_adapter(merged) == (LINEAR_LAYERS, 0)
    truth = logits(exact)
    errors = [(logits(model) - truth).pow(2).mean().sqrt() for model in (merged, apart)]
    assert errors[0] < 1.5 * errors[1]


def test_a_change_that_rounding_would_lose_is_kept_apart() -> None:
    """Weights of about 0.2 in bf16 stand 0.001 apart: what is smaller than half of it is gone."""
    model = adapted(torch.bfloat16, size=1e-4)
    before = logits(model)
    assert merge_adapter(model) == (0, LINEAR_LAYERS)
    assert torch.equal(logits(model), before)
    for name, parameter in model.named_parameters():
        if "layers.1.mlp.up_proj.lora_B" in name:
            parameter.data *= 1000
    before = logits(model)
    assert merge_adapter(model) == (1, LINEAR_LAYERS - 1)
    torch.testing.assert_close(logits(model), before, rtol=0.1, atol=0.1)


def two_adapters(model: nn.Module) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))  # type: ignore[operator]
    model.base_model.set_adapter(["default", "other"])  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("changes", "change"),
    [({"use_dora": True}, None), ({"lora_bias": True}, None), ({}, two_adapters)],
    ids=["DoRA", "bias", "two adapters"],
)
def test_other_adapters_stay(changes: dict[str, object], change: Callable[[nn.Module], None] | None) -> None:
    model = adapted(torch.float32, **changes)
    if change is not None:
        change(model)
    before = logits(model)
    assert merge_adapter(model) == (0, LINEAR_LAYERS)
    assert torch.equal(logits(model), before)


def test_a_tied_head_is_not_changed_beneath_its_embeddings() -> None:
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    model = get_peft_model(tiny_model("llama_tied"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.requires_grad_(False)
    before = logits(model)
    assert merge_adapter(model) == (3, 1)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
