from __future__ import annotations

import pytest

from napo.data.prepared import PreparedData
from napo.recommend import find_titles, recommend
from napo.recommenders.language_model import LanguageModel
from napo.runs import Run

TITLES = ["Toy Story", "Toy Soldiers", "Heat", "heat"]


def test_titles_as_people_type_them() -> None:
    assert find_titles(TITLES, ["toy story", " Heat ", "Toy So"]) == [0, 2, 1]
    with pytest.raises(ValueError, match="did you mean 'Toy Story' or 'Toy Soldiers'"):
        find_titles(TITLES, ["toy"])
    with pytest.raises(ValueError, match="got 'Toy Storry'; did you mean 'Toy Story'"):
        find_titles(TITLES, ["Toy Storry"])


def test_ranked_by_likelihood_without_the_history(demo_run: Run) -> None:
    data = PreparedData.load(demo_run.data)
    history = [data.titles[item] for item in (3, 5, 6)]
    found = recommend(demo_run, history, top=8, model="napo", retrieve=20)
    assert len(found) == 8 and not {entry.title for entry in found} & set(history)
    assert [entry.score for entry in found] == sorted((entry.score for entry in found), reverse=True)
    import numpy as np

    ranker = LanguageModel.load(demo_run, data, "napo")
    scores = ranker.scores([[3, 5, 6]], np.array([[entry.item for entry in found]]))[0]
    assert scores.tolist() == pytest.approx([entry.score for entry in found], abs=1e-4)


def test_sasrec_alone(demo_run: Run) -> None:
    titles = PreparedData.load(demo_run.data).titles
    found = recommend(demo_run, [titles[0]], top=3, model="sasrec")
    assert len(found) == 3 and found[0].score >= found[1].score >= found[2].score


def test_bad_input(demo_run: Run) -> None:
    with pytest.raises(ValueError, match=r"model: .* has no 'dpo'; it has sasrec, sft, sft-longer, napo, sft"):
        recommend(demo_run, ["Blue Red"], model="dpo")
    with pytest.raises(ValueError, match="history: expected at least one title"):
        recommend(demo_run, [])
