"""The best of a row, where scores are infinite, equal or none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napo.recommend import Recommendation, Recommendations, Recommender
from napo.recommend.writing import _json_line
from napo.recommenders.ranking import best
from napo.runs import Run

SCORES = st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 2.0, np.inf]) | st.floats(allow_nan=False), max_size=12)


@given(scores=SCORES, k=st.integers(0, 14), barred=st.sets(st.integers(0, 11)))
def test_the_best_are_those_of_a_sort(scores: list[float], k: int, barred: set[int]) -> None:
    barred = {item for item in barred if item < len(scores)}
    items, values = best(np.array(scores), k, barred)
    allowed = [item for item in range(len(scores)) if item not in barred]
    assert items.tolist() == sorted(allowed, key=lambda item: -scores[item])[:k]
    assert values.tolist() == [scores[item] for item in items]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(demo_run: Run, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    recommender = Recommender.from_run(demo_run.path, model="sasrec")
    scores = recommender.ranker.all_scores([[3]])  # type: ignore[attr-defined]
    scores[0, 7] = value
    monkeypatch.setattr(recommender.ranker, "all_scores", lambda histories: scores)
    with pytest.raises(ValueError, match=r"^model: sasrec gives 1 of 60 titles a score that is no finite number; "):
        recommender.recommend(recommender.catalogue.source_ids[3:4])


def test_json_has_numbers_alone() -> None:
    line = _json_line(1, Recommendations(items=[Recommendation("1", "Heat", 0.5)], model="m"))
    assert json.loads(line)["items"][0]["score"] == 0.5
    with pytest.raises(ValueError, match="not JSON compliant"):
        _json_line(1, Recommendations(items=[Recommendation("1", "Heat", np.inf)], model="m"))
