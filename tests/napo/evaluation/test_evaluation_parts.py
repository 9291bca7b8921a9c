"""An evaluation in parts: one that was killed computes what is missing, and ends where an unbroken one ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from napo.data.prepared import PreparedData
from napo.evaluation import parts
from napo.evaluation.evaluate import EvaluateOptions, evaluate
from napo.recommenders.language_model import LanguageModel
from napo.recommenders.protocol import ScoringOptions
from napo.recommenders.registry import find
from napo.runs import Run
from napo.signals import Stopped

ROWS, PART = 20, 6


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", PART)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the language model was asked for, and of how many rows; it stops where ``stop_at`` says."""
    seen: list[tuple[str, int]] = []

    def watched(what: str) -> Any:
        own = getattr(LanguageModel, what)

        def call(self: LanguageModel, histories: Any, *others: Any) -> Any:
            if len(histories):
                seen.append((what, len(histories)))
            return own(self, histories, *others)

        return call

    for what in ("scores", "answers", "greedy_items"):
        monkeypatch.setattr(LanguageModel, what, watched(what))
    return seen


def copy(demo_run: Run, folder: Path) -> tuple[Run, PreparedData]:
    shutil.copytree(demo_run.path, folder, ignore=shutil.ignore_patterns("predictions", "evaluate-*"))
    return Run(folder), PreparedData.load(folder / "data")


def judge(run: Run, data: PreparedData) -> dict[str, Any]:
    records = evaluate(data, run, ["sft", "napo", "napo+sasrec"], EvaluateOptions(limit=ROWS, greedy_limit=8))
    return {record["model"]: {**record, "seconds": None} for record in records}


@pytest.mark.parametrize("moment", [1, 3, 5, 7, 10, 13])
def test_a_killed_evaluation_goes_on(
    demo_run: Run, tmp_path: Path, calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    whole, data = copy(demo_run, tmp_path / "whole")
    expected = judge(whole, data)
    needed = list(calls)
    assert [rows for what, rows in needed if what == "scores"] == [6, 6, 6, 2] * 2  # the combination takes napo's
    assert [rows for what, rows in needed if what == "answers"] == [6, 2] * 2

    killed, data = copy(demo_run, tmp_path / "killed")
    calls.clear()
    with monkeypatch.context() as patch:
        replacing = parts.replacing

        def stop(path: Path) -> Any:
            if len(calls) == moment:
                raise Stopped(15)
            return replacing(path)

        patch.setattr(parts, "replacing", stop)
        with pytest.raises(Stopped):
            judge(killed, data)
    assert calls == needed[:moment]
    calls.clear()
    assert judge(killed, data) == expected
    assert calls == needed[moment - 1 :]  # the part that was being written is computed again, and no other
    assert not (killed.path / ".working").exists()
    for name in expected:
        one, other = (pd.read_parquet(run.path / "predictions" / f"{name}.parquet") for run in (whole, killed))
        pd.testing.assert_frame_equal(one, other)


def test_a_damaged_part_is_computed_again(demo_run: Run, tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    data = PreparedData.load(demo_run.data)
    model = parts.in_parts(find(demo_run, "sft").load(demo_run, data, ScoringOptions()), "sft", tmp_path)
    histories, ids = [[1, 2], [3]] * 5, np.tile(np.arange(4), (10, 1))
    first = model.scores(histories, ids)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    kept[1].write_text("[[0.0, 1")
    assert np.array_equal(model.scores(histories, ids), first) and calls == [
        ("scores", 6),
        ("scores", 4),
        ("scores", 4),
    ]
    other = model.scores(histories, ids[:, ::-1])  # another question has parts of its own
    assert np.allclose(other, first[:, ::-1], atol=1e-5) and len(calls) == 5
    assert np.array_equal(model.scores(histories, ids), first) and len(calls) == 5


def test_parts_of_models_of_one_base_share_lower_layers(demo_run: Run, tmp_path: Path) -> None:
    """In one part and in several: batches of the same number are not taken for one another."""
    run, data = copy(demo_run, tmp_path / "run")
    in_small = judge(run, data)
    whole, data = copy(demo_run, tmp_path / "whole")
    parts.PART = 10_000  # the fixture puts it back
    for name, record in judge(whole, data).items():
        one, other = (pd.read_parquet(r.path / "predictions" / f"{name}.parquet") for r in (run, whole))
        assert np.allclose(np.stack(one["scores"]), np.stack(other["scores"]), atol=1e-4)
        assert record["hr@1"] == in_small[name]["hr@1"]


def test_lists_of_several_lengths(tmp_path: Path) -> None:
    """They come as an array of arrays; a stand-in says how long each list is."""
    lists = np.empty(9, object)
    lists[:] = [np.arange(2 + row % 3) for row in range(9)]
    said: list[int] = []

    def answers(histories: Any, items: Any) -> list[str]:
        said.append(len(histories))
        return [str(len(row)) for row in items]

    inner: Any = SimpleNamespace(answers=answers, options=ScoringOptions())
    for _ in range(2):
        assert parts.InParts(inner, "x", tmp_path).answers([[1]] * 9, lists) == [str(2 + row % 3) for row in range(9)]
    assert said == [6, 3]
