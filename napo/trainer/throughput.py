"""The speed of a training: targets and tokens per second, and the share of the machine's matmul rate that its steps
reach."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SIDE = 2048  # of the matrices whose product tells the machine's rate
TRIES = 4


class Throughput:
    """Counts what training steps compute, and the time they take without evaluations and checkpoints.

    The time of a step holds all of it: batches, forward, backward, optimiser, logging.
    """

    def __init__(self, model: nn.Module) -> None:
        self.flops = matmul_flops(model)
        parameter = next(model.parameters())
        self.rate = matmul_rate(parameter.dtype, parameter.device)
        self.restart()

    def restart(self) -> None:
        self.tokens, self.targets, self.paused, self.started = 0, 0, 0.0, time.perf_counter()

    def add(self, *, tokens: int, targets: int = 0) -> None:
        """``targets``: titles; 0 where a step does not tell them apart."""
        self.tokens += tokens
        self.targets += targets

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside does not count as training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - began

    def drain(self) -> dict[str, float]:
        """The figures since the last drain; none if there was no step."""
        seconds = max(time.perf_counter() - self.started - self.paused, 1e-9)
        tokens, targets = self.tokens, self.targets
        self.restart()
        if not tokens:
            return {}
        figures = {
            "tokens_per_second": tokens / seconds,
            "matmul_share": tokens * self.flops / seconds / self.rate,
        }
        return figures | ({"targets_per_second": targets / seconds} if targets else {})


def matmul_flops(model: nn.Module) -> int:
    """Floating-point operations that a token costs in the weights' matmuls, forward and backward, without the head's
    and attention's: two per weight, two more where a gradient flows through, and two more for a weight that trains."""
    flops, flows, head = 0, False, _head(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            weight = module.weight
            flops += weight.numel() * (2 + 2 * flows + 2 * weight.requires_grad)
        flows = flows or any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return flops


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large matmul on this machine: the best of a few, in some tens of
    milliseconds."""
    x = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    best = float("inf")
    with torch.no_grad():
        for _ in range(TRIES):
            _wait(device)
            began = time.perf_counter()
            x @ x
            _wait(device)
            best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
