"""The verdict's words, from hits whose differences are known."""

from __future__ import annotations

import numpy as np
import pytest

from napo.evaluation import metrics
from napo.evaluation.differences import Judged, pairs
from napo.evaluation.report.verdict import sentences

BASELINES = ("popularity", "itemknn", "sasrec")


def judged(rates: dict[str, float], *, runs: int = 1, rows: int = 1000, seed: int = 0) -> Judged:
    """Of each model exactly its share of hits, on rows of its own."""
    random = np.random.default_rng(seed)
    places = random.permuted(np.tile(np.arange(rows), (runs, len(rates), 1)), axis=2)
    hits = places < rows * np.array(list(rates.values()))[None, :, None]
    return Judged(list(rates), hits.astype(float), np.arange(rows) // 2)


def told(one: Judged, **parents: str) -> str:
    return " ".join(sentences(one, pairs(one), baselines=BASELINES, parents=parents))


def test_a_clear_winner_is_best_by_so_much() -> None:
    one = judged({"sasrec": 0.3, "napo": 0.6})
    difference = one.means[1] - one.means[0]
    low, high = metrics.interval(one.values[0, 1] - one.values[0, 0], one.users)
    assert sentences(one, pairs(one)) == [
        f"napo is best: HR@1 {one.means[1]:.3f}, {difference:.3f} above sasrec "
        f"(95% interval {low:+.3f} to {high:+.3f}; 1000 rows of 500 users)."
    ]


def test_models_that_are_alike_are_not_told_apart() -> None:
    words = told(judged({"popularity": 0.1, "sft": 0.40, "napo": 0.41}))
    assert "napo has the highest HR@1" in words and "cannot be told apart from sft (" in words
    assert "is best" not in words
    words = told(judged({"popularity": 0.1, "sft": 0.40, "napo": 0.41, "sasrec": 0.8}))
    assert "sasrec is best" in words and "napo and sft cannot be told apart (" in words


def test_the_same_hits_are_not_told_apart() -> None:
    hits = np.tile(np.arange(100) % 2, (1, 2, 1)).astype(float)
    assert "cannot be told apart" in told(Judged(["a", "b"], hits, np.arange(100)))


def test_what_training_changed_is_said_of_the_model_it_began_from() -> None:
    words = told(judged({"sasrec": 0.9, "sft": 0.3, "napo": 0.5, "worse": 0.1}), napo="sft", worse="sft")
    assert "above sft, which it was trained from" in words and "worse is 0." in words
    assert "below sft, which it was trained from" in words


def test_below_popularity_is_said() -> None:
    words = told(judged({"popularity": 0.4, "sasrec": 0.2, "sft": 0.1, "napo": 0.8}))
    assert "Below popularity, and so no recommender yet: sft." in words


def test_several_runs_must_agree() -> None:
    """Far apart in one run, the other way round in the other: the mean difference alone would look certain."""
    hits = np.stack([judged({"a": 0.3, "b": 0.9}).values[0], judged({"a": 0.5, "b": 0.4}, seed=1).values[0]])
    one = Judged(["a", "b"], hits, np.arange(1000))
    (pair,) = pairs(one)
    assert pair.low > 0 and not pair.apart
    assert "cannot be told apart" in told(one)
    assert "b is best" in told(judged({"a": 0.3, "b": 0.9}, runs=3)) and "above a in every run" in told(
        judged({"a": 0.3, "b": 0.9}, runs=3)
    )


def test_one_model_alone_is_not_best() -> None:
    assert "nothing to compare it with" in told(judged({"napo": 0.5}))


def test_many_comparisons_are_counted() -> None:
    assert "There are 6:" in told(judged({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}))


def test_intervals_of_columns_are_those_of_each() -> None:
    random = np.random.default_rng(3)
    values, users = random.normal(size=(90, 3)), np.arange(90) // 3
    together = metrics.intervals(values, users)
    for column, (low, high) in zip(values.T, together, strict=True):
        assert metrics.interval(column, users) == pytest.approx((low, high), abs=1e-12)
