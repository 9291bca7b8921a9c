"""Triton would compile a kernel once, however many rows, targets and sets a step has. Nothing is launched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import test_catalogue_sequence_logps as catalogue
import torch
from logps_cases import linear_case

from napo_kernels import allowed, catalogue_sequence_logps, dispatch, linear_sequence_logps, sequence_logps
from napo_kernels.ops import catalogue_sequence_logps as catalogue_op
from napo_kernels.ops.linear_sequence_logps import pieces

triton = pytest.importorskip("triton")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """What Triton keeps a compiled kernel under, of every kernel that is called, for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from napo_kernels.triton import catalogue_sequence_logps as of_catalogue
    from napo_kernels.triton import linear_sequence_logps as of_rows
    from napo_kernels.triton import sequence_logps as of_tokens

    keys: dict[str, set[str]] = defaultdict(set)
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def remember(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialisation, options = bind(*arguments, **named)
        keys[kernel.__name__].add(f"{specialisation} {options}")

    modules = {
        "linear_sequence_logps": of_rows,
        "sequence_logps": of_tokens,
        "catalogue_sequence_logps": of_catalogue,
    }
    monkeypatch.setattr(JITFunction, "run", remember)
    monkeypatch.setattr(dispatch, "kernels", lambda op, *_: modules[op])
    monkeypatch.setattr(pieces, "cuts_columns", lambda _: False)  # as on a GPU, where a piece is whole rows
    monkeypatch.setattr(pieces, "keeps", lambda *_: False)
    monkeypatch.setattr(catalogue_op, "_takes_half", lambda _: True)
    yield keys


def assert_once(keys: dict[str, set[str]], *kernels: str) -> None:
    assert set(keys) == set(kernels)
    many = {kernel: sorted(found) for kernel, found in keys.items() if len(found) > 1}
    assert not many, f"compiled anew: {many}"


def test_rows_and_targets(compiled: dict[str, set[str]]) -> None:
    """Statistics of rows and of targets share a block each, so their addresses follow the numbers of both."""
    for rows in range(16, 22):
        for pairs in range(2 * rows, 2 * rows + 5):
            case = linear_case(torch.bfloat16, shape=(rows, 32, 96), pairs=pairs).to(torch.bfloat16)
            logps = linear_sequence_logps(case.hidden, case.weight, case.targets, **case.arguments())
            logps.backward(case.upstream)
    assert_once(
        compiled, "target_logits_kernel", "rows_forward_kernel", "rows_gradient_kernel", "hidden_gradient_kernel"
    )


def test_tokens(compiled: dict[str, set[str]]) -> None:
    for tokens in (1, 5, 6, 7, 8, 9, 16):
        logits = torch.randn(3, tokens, 96, dtype=torch.bfloat16, requires_grad=True)
        sequence_logps(logits, torch.randint(96, (3, tokens))).sum().backward()
    assert_once(compiled, "token_forward_kernel", "token_backward_kernel")


def test_sets(compiled: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowed, "SHARED", 60)
    for rows in range(33, 39):
        for sizes in ((1, 2, 3, 7, 40), (40, 5, 5, 6), (40, 9, 33, 2, 4, 4)):
            case = catalogue.make(sizes, rows, rows + 20, 32, 96, bias=True).to(torch.bfloat16)
            logps = catalogue_sequence_logps(case.hidden, case.weight, case.allowed(), **case.head())
            logps.sum().backward()
    assert_once(
        compiled,
        "tile_logits_kernel",
        "own_logits_kernel",
        "slot_stats_kernel",
        "sequence_sums_kernel",
        "logits_gradient_kernel",
        "tile_hidden_kernel",
        "own_hidden_kernel",
        "tile_weight_kernel",
        "token_sums_kernel",
    )
