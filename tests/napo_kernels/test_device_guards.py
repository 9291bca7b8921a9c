"""Kernels are launched on the device of their tensors, which need not be the current one."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from logps_cases import linear_case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from napo_kernels import PairMargin, dispatch, linear_sequence_logps, napo_loss, sequence_logps, shared_negatives
from napo_kernels.ops.registration import as_given
from napo_kernels.reference import linear_sequence_logps as rows
from napo_kernels.reference import sequence_logps as tokens

LAUNCHES = (
    "target_logits",
    "rows_forward",
    "columns_forward",
    "add_columns",
    "rows_gradient",
    "hidden_gradient",
    "token_forward",
    "token_backward",
)


def test_as_given_makes_the_tensors_device_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.get_device())
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with FakeTensorMode():
        tensor = torch.empty(1, device="cuda:1")
    with as_given(tensor):
        assert current[-1] == 1
    assert current == [0]


@pytest.fixture
def fp32_precision() -> Iterator[Any]:
    """torch's settings, put back afterwards."""
    yield torch.backends
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def tensor_of_cuda() -> Tensor:
    with FakeTensorMode():
        return torch.empty(1, device="cuda:0")


def test_full_precision_leaves_the_settings_as_they_were(fp32_precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    tensor, matmul = tensor_of_cuda(), fp32_precision.cuda.matmul
    with as_given(tensor, full_precision=True):
        assert matmul.fp32_precision == "none", "nothing to change"
    torch.set_float32_matmul_precision("high")
    with as_given(tensor, full_precision=True):
        with as_given(tensor, full_precision=True):
            pass
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32" and torch.get_float32_matmul_precision() == "high"
    with as_given(tensor):
        assert matmul.fp32_precision == "tf32"
    with as_given(torch.empty(1), full_precision=True):
        assert matmul.fp32_precision == "tf32"
    with pytest.raises(ZeroDivisionError), as_given(tensor, full_precision=True):
        _ = 1 / 0
    assert matmul.fp32_precision == "tf32"
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision, fp32_precision.fp32_precision = "none", "tf32"
    with as_given(tensor, full_precision=True):
        assert matmul.fp32_precision == "ieee"
    fp32_precision.fp32_precision = "ieee"
    assert matmul.fp32_precision == "ieee", "it still follows the common setting"


def test_full_precision_of_several_threads(fp32_precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that leaves earlier takes nothing from one that is still at work."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    torch.set_float32_matmul_precision("high")
    first, second = (as_given(tensor_of_cuda(), full_precision=True) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert fp32_precision.cuda.matmul.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert fp32_precision.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("op", ["shared_negatives", "napo_loss"])
def test_selection_and_pair_scores_have_full_precision(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def guard(tensor: Tensor, *, full_precision: bool = False) -> contextlib.AbstractContextManager[None]:
        asked.append(full_precision)
        return contextlib.nullcontext()

    monkeypatch.setattr(importlib.import_module(f"napo_kernels.ops.{op}"), "as_given", guard)
    states, items = torch.randn(3, 2), torch.randn(3, 4, 2)
    if op == "shared_negatives":
        shared_negatives(states, 1)
    else:
        chosen = torch.zeros(3, requires_grad=True)
        share = torch.ones(3, 3, dtype=torch.bool)
        napo_loss(chosen, torch.zeros(3, 4), share=share, margin=PairMargin(states, items, None, 1.0)).backward()
    assert asked == [True] * (1 if op == "shared_negatives" else 2)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that ran; one that runs outside of a guard fails."""
    inside: list[Tensor] = []
    names: set[str] = set()

    @contextmanager
    def guard(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    def guarded(name: str) -> Callable[..., Any]:
        def launch(*arguments: Any, **options: Any) -> Any:
            assert inside, f"{name} is launched on whatever device is the current one"
            names.add(name)
            return reference[name](*arguments, **options)

        return launch

    reference = vars(rows) | vars(tokens)
    kernels = types.SimpleNamespace(**(reference | {name: guarded(name) for name in LAUNCHES}))
    monkeypatch.setattr(dispatch, "kernels", lambda *_: kernels)
    for op in ("linear_sequence_logps.forward", "linear_sequence_logps.backward", "sequence_logps"):
        monkeypatch.setattr(importlib.import_module(f"napo_kernels.ops.{op}"), "as_given", guard)
    return names


@pytest.mark.parametrize("frozen", [("weight",), ()], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("options", [{}, {"lora": True}, {"bias": True}], ids=str)
def test_of_the_output_head(frozen: tuple[str, ...], options: dict[str, bool], launched: set[str]) -> None:
    for chunk_bytes in (None, 20000):  # all at once, and in pieces
        case = linear_case(torch.float32, **options).to(torch.float32, frozen)
        leaves, arguments = (case.hidden, case.weight, case.targets), case.arguments()
        linear_sequence_logps(*leaves, chunk_bytes=chunk_bytes, **arguments).sum().backward()
    assert launched >= {"target_logits", "rows_forward", "hidden_gradient"}
    assert "rows_gradient" in launched or options != {"bias": True}


@pytest.mark.parametrize("inplace", [False, True])
def test_of_logits(inplace: bool, launched: set[str]) -> None:
    logits = torch.randn(2, 3, 11, requires_grad=True)
    logps = sequence_logps(1 * logits, torch.randint(11, (2, 3)), inplace_backward=inplace)
    logps.sum().backward()
    assert launched == {"token_forward", "token_backward"}
