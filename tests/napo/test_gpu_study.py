"""The study for a GPU, in pieces: what one call left, another takes up from what was packed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from napo.demo import Budget

STUDIES = Path(__file__).parents[2] / "studies"


def test_a_study_goes_on_elsewhere(
    small_world: Path,
    small_budget: Budget,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    study = importlib.import_module("gpu_study")
    monkeypatch.setattr(study, "TUNED", ("sft", "napo"))

    def call(run: str, most: int) -> list[str]:
        begun = iter(range(most))
        world = {"files": small_world / "files", "model": str(small_world / "model"), "size": small_budget}
        has_time = lambda: next(begun, None) is not None  # noqa: E731
        return study.study(tmp_path / run, tmp_path / "packed", has_time=has_time, seed=0, **world)

    assert call("here", 3)[0] == "napo"  # prepared, SASRec, SFT
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {"run.tar.gz", "model-sft.tar.gz"}
    study.unpack(tmp_path / "packed", tmp_path / "there")
    capsys.readouterr()
    assert call("there", 100) == []
    shown = capsys.readouterr().out
    assert all(f"{stage}: finished before" in shown for stage in ("prepare", "sasrec", "sft"))
    records = json.loads((tmp_path / "there" / "metrics.json").read_text())
    assert [record["model"] for record in records] == ["popularity", "itemknn", "sasrec", "sft", "napo"]
    assert (tmp_path / "packed" / "model-napo.tar.gz").is_file()
