"""The speed in the log of a training."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import nn

from napo.trainer import throughput
from napo.trainer.throughput import Throughput, matmul_flops, matmul_rate


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", clock)
    monkeypatch.setattr(throughput, "matmul_rate", lambda *_: 1000.0)
    return clock


def test_figures_are_of_the_time_without_pauses(clock: Clock) -> None:
    meter = Throughput(
        nn.Linear(5, 4, bias=False)
    )  # 20 weights that train, behind nothing that does: 80 operations a token
    assert meter.drain() == {}
    meter.add(tokens=10, targets=3)
    clock.now = 4.0
    with meter.pause():
        clock.now = 104.0
    meter.add(tokens=20, targets=3)
    clock.now = 110.0
    assert meter.drain() == {"tokens_per_second": 3.0, "targets_per_second": 0.6, "matmul_share": 0.24}
    meter.add(tokens=8)
    clock.now = 112.0
    assert meter.drain() == {"tokens_per_second": 4.0, "matmul_share": 0.32}


def test_operations_of_a_token() -> None:
    """Two a weight forward, two where a gradient flows on, two where the weight trains; the head is not counted."""
    model = tiny_model("llama").requires_grad_(False)
    linear = [
        sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
        for layer in model.model.layers
    ]
    assert matmul_flops(model) == 2 * sum(linear)
    config = LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[1], layers_pattern="layers")
    adapted = get_peft_model(model, config)  # its matrices are the last ones of the second of three layers
    a, b = (p.numel() for p in adapted.parameters() if p.requires_grad)
    assert matmul_flops(adapted) == 2 * sum(linear) + 2 * linear[2] + 4 * a + 6 * b


def test_a_matmul_has_a_rate() -> None:
    assert 1e9 < matmul_rate(torch.float32, torch.device("cpu")) < 1e15
