"""The fused LoRA linear equals PEFT's own, and steps aside where it cannot serve."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from napo.language_models.fused.lora import fuse_lora


class Two(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 12, bias=bias), nn.Linear(12, 5, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(*, bias: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and the same fused, B drawn instead of zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["first", "second"])
    plain = get_peft_model(Two(bias).to(dtype), config, autocast_adapter_dtype=False)
    for name, parameter in plain.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused) == 2
    return plain, fused


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (1, 7), (0, 7)])
def test_equals_peft_in_output_and_every_gradient(bias: bool, shape: tuple[int, ...]) -> None:
    plain, fused = pair(bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    for ours, theirs in zip(outputs(fused, x), outputs(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_fp32_master_weights_under_autocast() -> None:
    _, fused = pair(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs(fused, torch.randn(4, 7))
    assert got[0].dtype == torch.bfloat16
    assert {p.grad.dtype for p in fused.parameters() if p.requires_grad} == {torch.float32}
    assert all(torch.isfinite(g).all() for g in got)


def test_disabled_adapters_and_dropout_are_pefts() -> None:
    plain, fused = pair()
    x = torch.randn(4, 7, dtype=torch.float64)
    with plain.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)
    plain, fused = pair(dropout=0.5)
    for model in (plain, fused):
        model.train()
        torch.manual_seed(3)
        model.seen = model(x)
    torch.testing.assert_close(fused.seen, plain.seen, rtol=0, atol=0)
