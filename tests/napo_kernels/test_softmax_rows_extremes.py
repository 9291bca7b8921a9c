"""Rows of logits at the ends of a dtype: masked with its lowest number, all at one huge value, or with infinities."""

from __future__ import annotations

import math

import pytest
import torch
from logps_cases import LinearCase, eager_linear
from torch import Tensor

from napo_kernels import linear_sequence_logps, sequence_logps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = ("lowest", "highest", "lowest but two", "label lowest", "highest and lowest", "label highest", "all -1e20 or so")
# Nothing is finite but the label, here with its logit.
ALONE = {"alone at -100": -100.0, "alone at -1000": -1000.0, "alone at 1000": 1000.0}
# Rows of which nothing is left outside the targets, by their bias: columns, targets of each row.
NO_OTHERS = {
    "the others are -inf": ([-math.inf, -100.0, -math.inf, -math.inf], [[1], [1]]),
    "the others are -inf, far": ([-math.inf, -1000.0, -math.inf, -1001.0], [[1, 3], [3, 1]]),
    "the others are -inf, high": ([-math.inf, 1000.0, -math.inf, 1001.0], [[1, 3], [3, 1]]),
    "all are targets": ([-200.0, -201.0, -202.0], [[0, 1, 2], [2, 1, 0]]),
    "all are targets, high": ([200.0, 201.0, 202.0], [[0, 1, 2], [2, 1, 0]]),
    "all are targets, lowest": ([-3e38, -3e38], [[0, 1], [0, 1]]),
    "one column": ([-1000.0], [[0], [0]]),
    "one column, high": ([1000.0], [[0], [0]]),
}


def row_of(name: str, dtype: torch.dtype, columns: int = 45) -> Tensor:
    """One row; its label is column 1."""
    lowest, highest = torch.finfo(dtype).min, torch.finfo(dtype).max
    row = torch.zeros(columns)
    if name in ALONE:
        row.fill_(-torch.inf)[1] = max(ALONE[name], lowest)
    elif name == "lowest but two":
        row.fill_(lowest)[:2] = 0.0
    elif name == "label lowest":
        row[1] = lowest
    elif name == "label highest":
        row[1] = highest / 2
    elif name == "highest and lowest":
        row[::2], row[1::2] = highest / 4, lowest / 4
    else:
        row.fill_({"lowest": lowest, "highest": highest}.get(name, max(-1e20, lowest)))
    return row.to(dtype)


def check(name: str, dtype: torch.dtype, backend: str) -> None:
    row = row_of(name, dtype)
    truth = row.double().requires_grad_()
    expected = torch.log_softmax(truth, 0)[1]
    expected.backward()
    logits = row[None, None].clone().requires_grad_()
    logps = sequence_logps(logits, torch.tensor([[1]]), backend=backend)
    logps.sum().backward()
    assert logits.grad is not None and truth.grad is not None
    torch.testing.assert_close(logps[0].double(), expected, rtol=1e-6, atol=1e-6)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad[0, 0].double(), truth.grad, rtol=tolerance, atol=1e-6 + 1e-3 * tolerance)


def check_no_others(name: str, dtype: torch.dtype, backend: str | None, chunk_bytes: int | None = None) -> None:
    """Values and gradients: from what was kept, from the context, and from logits computed anew. The logits but for the
    bias are whole numbers, which any dtype holds."""
    bias, of_row = NO_OTHERS[name]
    g = torch.Generator().manual_seed(0)
    case = LinearCase(
        hidden=torch.randint(-2, 3, (2, 4), generator=g).to(dtype),
        weight=torch.randint(-1, 2, (len(bias), 4), generator=g).to(dtype),
        targets=torch.tensor([v for row in of_row for v in row]),
        rows=torch.repeat_interleave(torch.arange(2), len(of_row[0])),
        sequence_ids=torch.arange(2 * len(of_row[0])),
        num_sequences=2 * len(of_row[0]),
        bias=torch.tensor(bias),
        logit_scale=1.0,
        softcap=None,
        lora=None,
        average=False,
        upstream=torch.randn(2 * len(of_row[0]), generator=g),
    )
    for frozen in (("bias",), ("bias", "weight"), ()):
        truth, ours = case.to(torch.float64, frozen), case.to(dtype, frozen)
        ours = ours._replace(bias=case.bias.clone().requires_grad_("bias" not in frozen))
        expected = eager_linear(truth)
        expected.backward(case.upstream.double())
        options = {"backend": backend, "chunk_bytes": chunk_bytes}
        got = linear_sequence_logps(ours.hidden, ours.weight, ours.targets, **ours.arguments(), **options)
        got.backward(case.upstream)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
        for (leaf, mine), theirs in zip(ours.leaves().items(), truth.leaves().values(), strict=True):
            if leaf not in frozen:
                step = torch.finfo(dtype).eps
                torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=2 * step, atol=1e-5 + step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", (*ROWS, *ALONE))
def test_tokens(name: str, dtype: torch.dtype, backend: str) -> None:
    check(name, dtype, backend)


@pytest.mark.parametrize("name", (*ROWS, *ALONE))
def test_tokens_in_every_instruction_set(name: str, isa: str) -> None:
    for dtype in DTYPES:
        check(name, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logit", [-100.0, -1000.0, 1000.0])
def test_tokens_of_one_column(logit: float, dtype: torch.dtype, backend: str) -> None:
    logits = torch.full((1, 2, 1), logit, dtype=dtype, requires_grad=True)
    logps = sequence_logps(logits, torch.zeros(1, 2, dtype=torch.int64), backend=backend)
    logps.sum().backward()
    assert logits.grad is not None
    assert not logps.any() and not logits.grad.any()


@pytest.mark.parametrize("chunk_bytes", [None, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NO_OTHERS)
def test_nothing_is_left_outside_the_targets(
    name: str, dtype: torch.dtype, chunk_bytes: int | None, backend: str
) -> None:
    check_no_others(name, dtype, backend, chunk_bytes)


def test_nothing_is_left_outside_the_targets_in_every_instruction_set(isa: str) -> None:
    for name in NO_OTHERS:
        for dtype in DTYPES:
            check_no_others(name, dtype, "cpu")
            check_no_others(name, dtype, "cpu", 8)


@pytest.mark.parametrize("chunk_bytes", [None, 400])
@pytest.mark.parametrize("size", [1e20, -1e20, -3e38, 3e38])
def test_linear_with_a_huge_bias(size: float, chunk_bytes: int | None, backend: str) -> None:
    """Several targets of a row, whole rows and pieces of them. Beside such a bias nothing is left of the matmul."""
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(70, 8, requires_grad=True)
    targets, rows, ids = torch.tensor([1, 5, 1, 69]), torch.tensor([0, 0, 1, 2]), torch.arange(4)
    bias = torch.full((70,), size, requires_grad=True)
    options = {"rows": rows, "sequence_ids": ids, "num_sequences": 4, "backend": backend, "chunk_bytes": chunk_bytes}
    logps = linear_sequence_logps(hidden, weight, targets, bias=bias, **options)
    logps.sum().backward()
    torch.testing.assert_close(logps, torch.full((4,), -math.log(70.0)))
    counts = torch.zeros(70).index_add_(0, targets, torch.ones(4))
    torch.testing.assert_close(bias.grad, counts - 4 / 70)
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("where", [(1,), (7,), (1, 7)])
def test_a_logit_of_infinity_leaves_no_probability(where: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    """The same as torch.log_softmax: NaN, and every gradient is NaN."""
    logits = torch.zeros(1, 1, 45, dtype=dtype)
    logits[..., list(where)] = torch.inf
    logits.requires_grad_()
    chosen = "reference" if dtype == torch.float64 else backend
    logps = sequence_logps(logits, torch.tensor([[1]]), backend=chosen)
    logps.sum().backward()
    assert logits.grad is not None
    assert logps.isnan().all() and logits.grad.isnan().all()


@pytest.mark.parametrize("where", [1, 7])
def test_a_bias_of_infinity_leaves_no_probability(where: int, backend: str) -> None:
    hidden, weight = torch.randn(2, 8, requires_grad=True), torch.randn(45, 8)
    bias = torch.zeros(45)
    bias[where] = torch.inf
    options = {"sequence_ids": torch.tensor([0, 1]), "num_sequences": 2, "backend": backend}
    logps = linear_sequence_logps(hidden, weight, torch.tensor([1, 2]), bias=bias, **options)
    logps.sum().backward()
    assert hidden.grad is not None
    assert logps.isnan().all() and hidden.grad.isnan().all()
