"""The backends that a test of an op runs on; among them the CUDA kernels, emulated on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import cuda_emulator
import pytest
import torch

from napo_kernels import backends, dispatch
from napo_kernels.dispatch import compiled, resolve
from napo_kernels.native import calls
from napo_kernels.ops.linear_sequence_logps import pieces

BACKENDS = [name for name in ("reference", "cpu") if backends()[name]["available"]]


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels run with this instruction set; a room with more of them names its own (indirect=True)."""
    module = compiled()
    if module is None:
        pytest.skip("the compiled module is missing")
    before = module.build_config()["cpu_isa"]
    try:
        module.set_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    module.set_cpu_isa(before)


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    reason = cuda_emulator.why_not()
    if reason is not None:
        pytest.skip(f"the CUDA kernels cannot be emulated: {reason}")
    return cuda_emulator.load()


@pytest.fixture
def emulated_cuda(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """The ops take the tensors of the CPU for CUDA's, with NaN in whatever a kernel has not written; the value sets the
    order in which the emulator runs threads and blocks."""

    def on_cuda(op: str, device: torch.device, wanted: str | None = None, dtype: torch.dtype = torch.float32) -> str:
        is_cuda = dtype != torch.float64 and wanted in (None, "cuda")
        return "cuda" if is_cuda else resolve(op, device, wanted, dtype)

    for name in ("napo_loss", "shared_negatives", "linear_sequence_logps", "sequence_logps"):
        kernels = importlib.import_module(f"napo_kernels.native.{name}")
        monkeypatch.setattr(kernels, "_C", emulated_module)
    monkeypatch.setattr(calls, "where", lambda _: (True, 0))
    monkeypatch.setattr(pieces, "cuts_columns", lambda _: False)
    monkeypatch.setattr(dispatch, "resolve", on_cuda)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty() is then filled with NaN
    yield lambda order: monkeypatch.setenv("NAPO_EMULATION_ORDER", order)
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=[*BACKENDS, "cuda, emulated"])
def backend(request: pytest.FixtureRequest) -> Any:
    """The name of a backend that runs here."""
    if request.param != "cuda, emulated":
        return request.param
    request.getfixturevalue("emulated_cuda")
    return "cuda"
