"""Kernels are launched on the device of their tensors, which need not be the current one."""

from __future__ import annotations

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

from napo_kernels import dispatch, linear_sequence_logps, sequence_logps
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
