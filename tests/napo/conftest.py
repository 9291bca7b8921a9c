"""A small world that the tests of commands and stages share; heavy imports wait until a test asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from command_calls import Call

    from napo.demo import Budget
    from napo.runs import Run


@pytest.fixture(scope="session", autouse=True)
def single_precision() -> Iterator[None]:
    """Models load in fp32 on every machine, here and in commands run from here; bf16 has tests of its own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("NAPO_DTYPE", "fp32")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``files/`` (RecBole atomic files) and ``model/`` (a causal LM with its tokenizer)."""
    import small_world

    folder = tmp_path_factory.mktemp("world")
    small_world.recbole_files(folder / "files")
    small_world.model(folder / "model")
    return folder


@pytest.fixture(scope="session")
def small_budget() -> Budget:
    import small_world

    return small_world.budget()


@pytest.fixture(scope="session")
def demo_run(small_world: Path, small_budget: Budget, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A demo that ran to its end. Tests read it and do not change it."""
    from napo.demo import demo

    folder = tmp_path_factory.mktemp("demo") / "run"
    return demo(folder, model=str(small_world / "model"), source=small_world / "files", budget=small_budget)


@pytest.fixture
def napo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs ``napo ARGUMENTS`` in this process: (exit code, stdout, stderr)."""
    from napo import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["napo", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return call


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in records and replays the body of models on the CPU; it counts its recordings."""
    from recorder_stand_in import StandIn

    from napo.scoring import graphs

    monkeypatch.setattr(graphs, "why_not", lambda *_: None)
    monkeypatch.setattr(graphs, "Recorder", StandIn)
    monkeypatch.setattr(StandIn, "recorded", 0)
    return StandIn


@pytest.fixture
def true_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention takes its softmax in fp32 even in an fp64 model: its rounding would be compared."""
    import torch

    softmax = torch.nn.functional.softmax

    def in_own_dtype(x: torch.Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return softmax(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", in_own_dtype)
