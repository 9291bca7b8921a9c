"""A base model that is loaded once for several adapters: scores are those of models that were loaded alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from napo.data.prepared import PreparedData
from napo.evaluation import evaluate as module
from napo.evaluation.evaluate import EvaluateOptions, evaluate
from napo.language_models import bases
from napo.language_models.bases import Bases
from napo.recommenders.language_model import LanguageModel
from napo.recommenders.protocol import ScoringOptions
from napo.runs import Run

HISTORIES = [[3, 4, 6], [10], [20, 22, 25, 27, 28, 1]]
ITEMS = np.tile(np.arange(30), (3, 1))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bases that were read from disk."""
    names: list[str] = []
    own = bases.load_model

    def load_model(name: Any) -> Any:
        names.append(str(name))
        return own(name)

    monkeypatch.setattr(bases, "load_model", load_model)
    return names


def test_adapters_take_turns(demo_run: Run, loads: list[str]) -> None:
    data = PreparedData.load(demo_run.data)
    names = ("sft", "napo", None, "napo", None, "sft")
    alone = {name: LanguageModel.load(demo_run, data, name).scores(HISTORIES, ITEMS) for name in set(names)}
    assert not np.allclose(alone["sft"], alone["napo"]) and not np.allclose(alone["sft"], alone[None])
    loads.clear()
    options, before = ScoringOptions(bases=Bases()), None
    for name in names:
        model = LanguageModel.load(demo_run, data, name, options)
        assert np.array_equal(model.scores(HISTORIES, ITEMS), alone[name])
        for what in ("scores", "answers") if before is not None else ():
            with pytest.raises(RuntimeError, match="was asked after another model had taken its base"):
                getattr(before, what)(HISTORIES, ITEMS)
        before = model
    assert len(loads) == 1


def test_another_base_takes_the_place_of_the_one_before(demo_run: Run, loads: list[str], tmp_path: Path) -> None:
    data, kept = PreparedData.load(demo_run.data), Bases()
    other = shutil.copytree(demo_run.origin("sft").base, tmp_path / "other")
    expected = LanguageModel.load(demo_run, data, "sft").scores(HISTORIES, ITEMS)
    loads.clear()
    for base in (demo_run.origin("sft").base, other):
        kept.load(base, demo_run.adapter("napo"))
    model = LanguageModel.load(demo_run, data, "sft", ScoringOptions(bases=kept))
    assert np.array_equal(model.scores(HISTORIES, ITEMS), expected)
    assert len(loads) == 3


def test_a_merged_model_leaves_the_base_of_others_alone(demo_run: Run, loads: list[str]) -> None:
    data, kept = PreparedData.load(demo_run.data), Bases()
    expected = LanguageModel.load(demo_run, data, "sft").scores(HISTORIES, ITEMS)
    loads.clear()
    sft = LanguageModel.load(demo_run, data, "sft", ScoringOptions(bases=kept))
    merged = LanguageModel.load(demo_run, data, "napo", ScoringOptions(bases=kept, merged=True))
    assert len(loads) == 2 and not np.allclose(merged.scores(HISTORIES, ITEMS), expected)
    assert np.array_equal(sft.scores(HISTORIES, ITEMS), expected)


def test_evaluation_loads_a_base_once(
    demo_run: Run, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ["base", "sft", "napo", "napo+sasrec"]
    frames = []
    for folder in (tmp_path / "once", tmp_path / "each"):
        shutil.copytree(demo_run.path, folder, ignore=shutil.ignore_patterns("predictions", "evaluate-*"))
        loads.clear()
        if folder.name == "each":
            monkeypatch.setattr(module, "ScoringOptions", lambda bases, **others: ScoringOptions(**others))
        evaluate(PreparedData.load(folder / "data"), Run(folder), models, EvaluateOptions(limit=8, greedy_limit=4))
        assert len(loads) == (1 if folder.name == "once" else len(models))
        frames.append([pd.read_parquet(folder / "predictions" / f"{name}.parquet") for name in models])
    for once, each in zip(*frames, strict=True):
        pd.testing.assert_frame_equal(once, each, check_exact=True)
