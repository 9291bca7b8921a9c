"""The public operations at sizes of a few milliseconds, for watching them while working on one (pytest-benchmark).

    pytest benchmarks --benchmark-only
    pytest benchmarks --benchmark-only --benchmark-autosave        # then --benchmark-compare tells what has changed

Forward and backward on the CPU. Each result is compared with the reference backend before it is timed. Comparisons
with other libraries are made by `python -m benchmarks run`; no test of `make test` is here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from napo_kernels import DynamicMargin, linear_sequence_logps, napo_loss, sequence_logps, shared_negatives
from napo_kernels.dispatch import backends

pytest.importorskip("pytest_benchmark", reason="pip install '.[dev]' brings pytest-benchmark")
Benchmark = Callable[[Callable[[], tuple[Tensor, ...]]], object]
B, N, D, K = 512, 8, 64, 358


@pytest.fixture(autouse=True)
def compiled_kernels() -> None:
    torch.manual_seed(0)
    if not backends()["cpu"]["available"]:
        pytest.skip("the compiled module is missing: pip install .")


def timed(benchmark: Benchmark, run: Callable[[str], tuple[Tensor, ...]], tolerance: float) -> None:
    for got, expected in zip(run("cpu"), run("reference"), strict=True):
        assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()
    benchmark(lambda: run("cpu"))


@pytest.mark.parametrize("head", ["frozen", "trainable"])
def test_linear_sequence_logps(benchmark: Benchmark, head: str) -> None:
    rows, h, v, tokens = 56, 256, 8192, 7
    hidden = torch.randn(rows, h).bfloat16().requires_grad_()
    weight = torch.randn(v, h).mul(h**-0.5).bfloat16().requires_grad_(head == "trainable")
    targets, ids = torch.randint(v, (rows,)), torch.arange(rows) // tokens
    leaves = (hidden, weight) if head == "trainable" else (hidden,)

    def run(backend: str) -> tuple[Tensor, ...]:
        logps = linear_sequence_logps(
            hidden, weight, targets, sequence_ids=ids, num_sequences=rows // tokens, backend=backend
        )
        return logps, *torch.autograd.grad(logps.sum(), leaves)

    timed(benchmark, run, 2e-2)


def test_sequence_logps(benchmark: Benchmark) -> None:
    logits = torch.randn(8, 16, 32768).bfloat16().requires_grad_()
    labels = torch.randint(32768, (8, 16)).masked_fill(torch.arange(16) % 2 == 0, -100)

    def run(backend: str) -> tuple[Tensor, ...]:
        logps = sequence_logps(logits, labels, backend=backend)
        return logps, *torch.autograd.grad(logps.sum(), logits)

    timed(benchmark, run, 2e-2)


def test_shared_negatives(benchmark: Benchmark) -> None:
    states = torch.randn(B, D)
    timed(benchmark, lambda backend: (shared_negatives(states, K, backend=backend),), 1e-2)


@pytest.mark.parametrize("margin", ["none", "of a negative", "of a pair"])
def test_napo_loss(benchmark: Benchmark, margin: str) -> None:
    states, items, bias = torch.randn(B, D), torch.randn(B, N, D), torch.randn(B, N)
    chosen, rejected = (x.requires_grad_() for x in (torch.randn(B) - 20, torch.randn(B, N) - 25))
    share = shared_negatives(states, K)
    gamma: object = 0.0
    if margin == "of a negative":
        gamma = torch.rand(B, N)
    elif margin == "of a pair":
        dynamic = DynamicMargin(granularity="pair")
        gamma = dynamic(torch.randn(B, N), share=share, user_states=states, item_vectors=items, item_bias=bias)

    def run(backend: str) -> tuple[Tensor, ...]:
        loss = napo_loss(chosen, rejected, share=share, margin=gamma, backend=backend)
        return loss, *torch.autograd.grad(loss, (chosen, rejected))

    timed(benchmark, run, 1e-3)


@pytest.mark.parametrize("granularity", ["negative", "pair"])
def test_dynamic_margin(benchmark: Benchmark, granularity: str) -> None:
    """There is only one way, in PyTorch: nothing to compare with."""
    margin = DynamicMargin(granularity=granularity)
    scores, states, items = torch.randn(B, N), torch.randn(B, D), torch.randn(B, N, D)
    share = shared_negatives(states, K)
    benchmark(lambda: margin(scores, share=share, user_states=states, item_vectors=items, item_bias=scores))
