"""The fused LoRA linear equals PEFT's own, and steps aside where it cannot serve."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from napo.language_models.fused.lora import fuse_lora, linear_together, without_adapter


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


@pytest.mark.parametrize("to_save", [None, ["second"]])
def test_without_adapter_is_pefts_disable_adapter(to_save: list[str] | None) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["first"], modules_to_save=to_save, init_lora_weights=False)
    model = get_peft_model(Two(True), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    fuse_lora(model)
    x, trained = torch.randn(4, 7), [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        adapted = model(x)
        with model.disable_adapter():
            expected = model(x)
        with without_adapter(model):
            assert torch.equal(model(x), expected)
            with without_adapter(model):  # nothing to switch off, nor on again
                pass
            assert torch.equal(model(x), expected)
        with pytest.raises(KeyError), without_adapter(model):
            raise KeyError
        assert torch.equal(model(x), adapted) and not torch.equal(adapted, expected)
    assert [p.requires_grad for p in model.parameters()] == trained


def test_a_layer_that_a_flag_does_not_switch_off_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = pair()
    monkeypatch.setattr(LoraLinear, "enable_adapters", lambda *_: switched.append(1), raising=False)
    switched: list[int] = []
    with without_adapter(fused):
        assert switched


class Three(nn.Module):
    """Layers on one input; adapters on some of them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 12, bias=bias), nn.Linear(7, 5, bias=bias), nn.Linear(7, 4, bias=bias)
        self.together = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = (self.a, self.b, self.c)
        outputs = linear_together(layers, x) if self.together else [layer(x) for layer in layers]
        assert outputs is not None
        return torch.cat([y * (i + 1) for i, y in enumerate(outputs)], -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", [["a", "b", "c"], ["a", "c"], ["b"]])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (0, 7)])
def test_layers_together_are_the_layers_alone(bias: bool, targets: list[str], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ranks = {"b": 2} if "b" in targets else {}
    config = LoraConfig(r=3, lora_alpha=6, rank_pattern=ranks, target_modules=targets, init_lora_weights=False)
    plain = get_peft_model(Three(bias).double(), config, autocast_adapter_dtype=False)
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    fused.base_model.model.together = True
    x = torch.randn(shape, dtype=torch.float64)
    for ours, theirs in zip(outputs(fused, x), outputs(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with without_adapter(fused), plain.disable_adapter():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


def test_layers_that_must_be_called_alone_are() -> None:
    def first_and_second(**how: float) -> list[nn.Module]:
        return [pair(**how)[1].base_model.model.first] * 2

    x = torch.randn(4, 7, dtype=torch.float64)
    assert linear_together(first_and_second(), x) is not None
    assert linear_together(first_and_second(dropout=0.5), x) is None  # in training mode
    assert linear_together([nn.Linear(7, 2).double()], x) is None  # trained itself
    assert linear_together([pair()[0].base_model.model.first], x) is None  # PEFT's own forward
    hooked = first_and_second()
    hooked[0].register_forward_hook(lambda *_: None)
    assert linear_together(hooked, x) is None
    merged = first_and_second()
    merged[0].merge()
    assert linear_together(merged, x) is None


def test_a_bias_that_is_trained_gets_its_gradient() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["first", "second"], bias="all", init_lora_weights=False)
    plain = get_peft_model(Two(True).double(), config, autocast_adapter_dtype=False)
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    x = torch.randn(4, 7, dtype=torch.float64)
    for ours, theirs in zip(outputs(fused, x), outputs(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)
