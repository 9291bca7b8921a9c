from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from napo.data.prepared import PreparedData
from napo.data.prompts import PromptSettings
from napo.files import write_json
from napo.recommend import Recommender
from napo.recommenders.language_model import LanguageModel
from napo.recommenders.protocol import Generator, ScoringOptions
from napo.recommenders.registry import BASELINES, KINDS, available, find
from napo.runs import Origin, Run

COMBINED = ("sasrec+rules", "sft+sasrec", "napo+sasrec")


def test_all_that_a_run_has_score_the_same_lists(demo_run: Run) -> None:
    data = PreparedData.load(demo_run.data)
    histories, lists = list(data.test["full_history"][:3]), np.stack(data.test["candidates"][:3])
    offered = available(demo_run)
    assert list(offered) == ["popularity", "itemknn", "rules", "sasrec", "base", "sft", "sft-longer", "napo", *COMBINED]
    fingerprints = [kind.fingerprint(demo_run) for kind in offered.values()]
    assert len(set(fingerprints)) == len(fingerprints)
    for name, kind in offered.items():
        recommender = kind.load(demo_run, data, ScoringOptions())
        scores = recommender.scores(histories, lists)
        assert scores.shape == lists.shape and scores.dtype == np.float64 and np.isfinite(scores).all()
        assert recommender.protocol["score"]
        assert isinstance(recommender, Generator) == (name not in (*BASELINES, *COMBINED))


def test_a_recommender_that_is_not_there(demo_run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no 'dpo'; it has popularity, itemknn, rules, sasrec, base, sft"):
        find(demo_run, "dpo")
    assert list(available(Run(tmp_path))) == ["popularity", "itemknn", "rules"]
    assert set(BASELINES) < set(KINDS)


@pytest.fixture
def short_run(demo_run: Run, tmp_path: Path) -> Run:
    """The demo's models in a run whose prompts show four titles."""
    run = Run(tmp_path / "run")
    run.configure(**demo_run.config)
    for name in ("sasrec", *demo_run.config["kept_sha256"]):
        (run.path / name).symlink_to(demo_run.path / name)
    for name in demo_run.model_names():
        shutil.copytree(demo_run.path / "models" / name, run.path / "models" / name)
        origin = Origin.read(run.path / "models" / name)
        write_json(run.path / "models" / name / "origin.json", replace(origin, history=4))
    return run


def test_prompts_show_what_the_models_origin_says(demo_run: Run, short_run: Run) -> None:
    assert Origin.read(demo_run.adapter("napo")).history == 10 == PreparedData.load(demo_run.data).history_length
    assert PromptSettings.of({"style": "candidates"}) == PromptSettings(style="candidates", history=10)
    data = PreparedData.load(demo_run.data)
    history = list(range(12))
    for run, shown in ((demo_run, 10), (short_run, 4)):
        model = LanguageModel.load(run, data, "napo")
        assert model.prompt(history, []) == model.encoder.prompt(history[-shown:])
    titles = data.titles
    long, short = ([titles[item] for item in history[-count:]] for count in (12, 4))
    candidates = np.array([[20, 30]])
    model = LanguageModel.load(short_run, data, "napo")
    assert (model.scores([history], candidates) == model.scores([history[-4:]], candidates)).all()
    # SASRec retrieves by the whole history, so only what both retrieve can be compared.
    found = [
        {one.title: one.score for one in Recommender.from_run(short_run.path, model="napo").recommend(past, k=40).items}
        for past in (long, short)
    ]
    both = set(found[0]) & set(found[1])
    assert len(both) > 20
    assert [found[0][title] for title in both] == pytest.approx([found[1][title] for title in both], abs=1e-4)


def test_a_model_of_an_older_napo_with_a_name_that_is_taken_now(demo_run: Run, tmp_path: Path) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run")
    (tmp_path / "run" / "models" / "sft").rename(tmp_path / "run" / "models" / "rules")
    with pytest.raises(ValueError, match="models/rules has the name of a recommender that every run has"):
        available(Run(tmp_path / "run"))
