"""One user and one item in several spellings, and lists with a gap."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from napo.recommend import Recommender, UnknownItem, recommend_file
from napo.runs import Run


@pytest.fixture(scope="module")
def recommender(demo_run: Run) -> Recommender:
    return Recommender.from_run(demo_run.path, model="sasrec")


@pytest.mark.parametrize("user", ["2", 2, 2.0, "2.0", " 2", "2 ", np.int64(2), np.float64(2), np.float32(2)])
def test_a_user_in_any_spelling(recommender: Recommender, user: Any) -> None:
    found = recommender.recommend(user=user, k=3)
    assert found == recommender.recommend(user="2", k=3) and found.model == "sasrec"


@pytest.mark.parametrize(
    "user, reason", [("", "an empty user"), (" ", "an empty user"), (float("nan"), "got nan"), (True, "got bool")]
)
def test_what_cannot_be_a_user(recommender: Recommender, user: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^user: .*{reason}"):
        recommender.recommend(user=user)


def test_whole_numbers_that_became_floats(recommender: Recommender) -> None:
    ids = [int(one) for one in recommender.catalogue.source_ids[3:5]]
    expected = recommender.recommend(ids, k=3)
    for history in ([*map(float, ids)], np.array(ids, float), np.array(ids), [{"id": float(one)} for one in ids]):
        assert recommender.recommend(history, k=3) == expected  # type: ignore[arg-type]
    assert recommender.recommend(pd.Series(ids), k=3, exclude=pd.Series([float(ids[0])])) == expected  # type: ignore
    for wrong in (1.5, 1e300, float("inf")):
        with pytest.raises(ValueError, match=r"^history: expected titles or ids, text or whole numbers; got "):
            recommender.recommend([wrong])


def test_a_gap_in_a_list(recommender: Recommender, tmp_path: Path) -> None:
    known = recommender.catalogue.source_ids[3]
    expected = recommender.recommend([known], k=3).items
    for gap in (None, float("nan"), np.float64("nan"), np.float32("nan"), Decimal("nan"), pd.NA, pd.NaT):
        with pytest.raises(UnknownItem, match=r"^history: expected titles or ids; got null"):
            recommender.recommend([known, gap])
        found = recommender.recommend([known, gap], k=3, unknown="skip")
        assert (found.items, found.notes) == (expected, ["1 item not known: null"])
        assert recommender.recommend([known], exclude=[gap]).notes == ["exclude: 1 item not known: null"]
    given, out = tmp_path / "in.parquet", tmp_path / "out.jsonl"
    pd.DataFrame({"history": [[float(known), None]]}).to_parquet(given)
    with pytest.raises(ValueError, match=r"in\.parquet row 0: history: .*got null.*; --unknown skip leaves out"):
        recommend_file(recommender, given, out)
    recommend_file(recommender, given, out, k=3, unknown="skip")
    assert [one["item"] for one in json.loads(out.read_text())["items"]] == [one.item for one in expected]


@pytest.mark.parametrize("k", [2.5, True, "3", None])
def test_what_cannot_be_a_number_of_items(recommender: Recommender, k: Any) -> None:
    with pytest.raises(ValueError, match=r"^k: expected a whole number of at least 1; got "):
        recommender.recommend(user=2, k=k)


@pytest.mark.parametrize("history", [5, "5", {"id": 5}])
def test_what_is_no_list(recommender: Recommender, history: Any) -> None:
    with pytest.raises(ValueError, match=r"^history: expected a list of titles or ids; got "):
        recommender.recommend(history)
