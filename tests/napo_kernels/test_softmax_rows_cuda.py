"""The CUDA row kernel without a GPU: emulated on the CPU, against eager PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from logps_cases import LinearCase, assert_rows_close, eager_linear, eager_tokens, linear_case
from torch import Tensor

from napo_kernels import linear_sequence_logps, sequence_logps
from napo_kernels.native import softmax_rows as native
from napo_kernels.ops import linear_sequence_logps as linear_op
from napo_kernels.reference import softmax_rows as reference
from napo_kernels.rows import LogitMap, RowStats, plan_targets

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS: dict[str, dict[str, Any]] = {
    "one target a row": {},
    "several targets a row, duplicates": {"pairs": 40},
    "softcap, bias, scale": {"pairs": 30, "softcap": 4.0, "bias": True, "logit_scale": 0.7},
    "lora, average": {"pairs": 30, "lora": True, "average": True},
    "nearly certain": {"peak": 20.0},
}


def run(case: LinearCase, f: Callable[..., Tensor]) -> list[Tensor]:
    logps = f(case)
    logps.backward(case.upstream.to(logps.dtype))
    return [logps.detach(), *(leaf.grad for leaf in case.leaves().values())]


def ours(case: LinearCase) -> Tensor:
    return linear_sequence_logps(case.hidden, case.weight, case.targets, chunk_bytes=2000, **case.arguments())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_linear(head: str, dtype: torch.dtype, emulated_cuda: Callable[[str], None]) -> None:
    case = linear_case(dtype, shape=(11, 20, 83), **HEADS[head])
    truth, theirs = run(case.to(torch.float64), eager_linear), run(case.to(dtype), eager_linear)
    results = []
    for order in ("up", "down", "mixed"):
        emulated_cuda(order)
        results.append(run(case.to(dtype), ours))
    assert bool((results[0][0] <= 0).all())
    names = ["log-probs", *case.to(dtype).leaves()]
    for name, got, exact, peer, *again in zip(names, results[0], truth, theirs, *results[1:], strict=True):
        assert all(torch.equal(got, other) for other in again), f"{name} depends on the order of the threads"
        assert_rows_close(name, got, exact, peer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [name for name, options in HEADS.items() if "bias" not in options])
def test_head_from_what_was_kept(
    head: str, dtype: torch.dtype, emulated_cuda: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a chunk is some whole rows."""
    case = linear_case(dtype, shape=(11, 20, 83), **HEADS[head])
    truth, theirs = run(case.to(torch.float64), eager_linear), run(case.to(dtype), eager_linear)
    monkeypatch.setattr(linear_op, "_kept_columns", lambda hidden, weight, *_: len(weight))
    monkeypatch.setattr(linear_op, "head_backward", None)
    emulated_cuda("mixed")
    for name, got, exact, peer in zip(
        ["log-probs", *case.leaves()], run(case.to(dtype), ours), truth, theirs, strict=True
    ):
        assert_rows_close(name, got, exact, peer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens(dtype: torch.dtype, emulated_cuda: Callable[[str], None]) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 5, 83, generator=g)).to(dtype)
    labels = torch.randint(83, (3, 5), generator=g).masked_fill(torch.rand(3, 5, generator=g) < 0.4, -100)
    logits[0, 0, labels[0, 0].clamp(min=0)] += 25
    logits = torch.where((labels == -100)[..., None], torch.nan, logits)  # they are not read
    upstream = torch.randn(3, generator=g)
    truth, theirs, mine, inplace = (
        x.clone().requires_grad_() for x in (logits.nan_to_num().double(), logits.nan_to_num(), logits, logits)
    )
    expected, peer, got = eager_tokens(truth, labels), eager_tokens(theirs, labels), sequence_logps(mine, labels)
    for logps in (expected, peer, got):
        logps.backward(upstream.to(logps.dtype))
    emulated_cuda("mixed")
    again = sequence_logps(inplace * 1, labels, inplace_backward=True)
    (gradient,) = torch.autograd.grad(again, inplace, upstream)
    assert torch.equal(again, got) and torch.equal(gradient, mine.grad)
    assert bool((got <= 0).all()) and float(mine.grad[labels == -100].abs().sum()) == 0.0
    assert_rows_close("log-probs", got, expected, peer)
    assert_rows_close("gradient", *(x.grad.flatten(0, 1) for x in (mine, truth, theirs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_longer_than_a_block_written_in_half_the_bytes(
    dtype: torch.dtype, emulated_cuda: Callable[[str], None]
) -> None:
    """fp32 logits of unaligned rows, as a matmul on CUDA leaves them, into another dtype; no and many targets."""
    g = torch.Generator().manual_seed(0)
    rows, vocabulary, pairs = 4, 2051, 80
    targets, of_pair = torch.randint(vocabulary, (pairs,), generator=g), torch.randint(1, rows, (pairs,), generator=g)
    plan, _ = plan_targets(targets, of_pair, rows, vocabulary)
    a = 4 * torch.randn(rows, vocabulary, generator=g)
    logit_map = LogitMap(0.7, torch.randn(vocabulary, generator=g), 9.0)
    used = int(plan.start[-1])
    of_row = torch.repeat_interleave(torch.arange(rows), plan.start.diff())
    z, slope = torch.zeros(2, pairs)
    mapped, slopes = reference.apply_map(a, logit_map)
    z[:used], slope[:used] = mapped[of_row, plan.columns[:used]], slopes[of_row, plan.columns[:used]]
    grad = torch.randn(pairs, generator=g)
    results = []
    for kernel, kind, out_dtype in ((reference, torch.float64, torch.float64), (native, torch.float32, dtype)):
        stats = RowStats(torch.zeros(pairs, dtype=kind), slope.to(kind), *torch.zeros(3, rows, dtype=kind))
        stored, gradient = (torch.full((rows, vocabulary), torch.nan, dtype=out_dtype) for _ in range(2))
        there = logit_map._replace(bias=logit_map.bias.to(kind))
        kernel.rows_forward(a.to(kind), stored, 0, plan, there, z.to(kind), stats, 0.25)
        kernel.rows_gradient(a[:, 5:].to(kind), gradient[:, 5:], 5, plan, there, stats, grad.to(kind))
        results.append([stored, gradient[:, 5:], *stats])
    for result in results:
        make_independent_of_the_shift(result)
    for name, exact, got in zip(("stored", "gradient", *RowStats._fields[:-1]), *results, strict=True):
        # half a step of the dtype, and fp32's own errors, which grow with the size of an exponent
        tolerance = 0.6 * torch.finfo(dtype if name in ("stored", "gradient") else got.dtype).eps + 3e-5
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


# logits are overwritten by numbers of their own dtype alone
@pytest.mark.parametrize(("dtype", "in_place"), [*((dtype, False) for dtype in DTYPES), (torch.float32, True)])
def test_a_row_whose_first_columns_tell_little_of_its_largest_logit(
    dtype: torch.dtype, in_place: bool, emulated_cuda: Callable[[str], None]
) -> None:
    """The largest logit lies in reach of that of the first 2048 columns, or far above it, or those are all -inf."""
    g = torch.Generator().manual_seed(0)
    a = 4 * torch.randn(6, 2051 + 2048, generator=g)
    far = torch.tensor([0.0, 30.0, 100.0, 1000.0, -500.0, 20.0])
    a[:, 2048:] += far[:, None]
    a[4:, :2048] = -torch.inf
    targets, of_pair = torch.tensor([3000, 4, 2060, 2061, 2048, 4098]), torch.arange(6)
    plan, _ = plan_targets(targets, of_pair, *a.shape)
    results = []
    for kernel, kind, out_dtype in ((reference, torch.float64, torch.float64), (native, torch.float32, dtype)):
        logits = a.to(kind)
        stats = RowStats(torch.zeros(6, dtype=kind), torch.ones(6, dtype=kind), *torch.zeros(3, 6, dtype=kind))
        stored = logits if in_place else torch.full(a.shape, torch.nan, dtype=out_dtype)
        z = logits[of_pair, targets].clone()
        kernel.rows_forward(logits, stored, 0, plan, LogitMap(), z, stats, 0.25)
        results.append([stored, *stats])
        make_independent_of_the_shift(results[-1])
    for name, exact, got in zip(("stored", *RowStats._fields[:-1]), *results, strict=True):
        tolerance = 0.6 * torch.finfo(dtype if name == "stored" else got.dtype).eps + 2e-4  # of logits up to 1000
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def make_independent_of_the_shift(result: list[Tensor]) -> None:
    """The numbers stored are relative to one that a kernel chooses near the row's largest logit, and so is their scale
    (the last of the statistics). Their product is not."""
    result[0] = result[0].double() * result.pop().double()[:, None]
