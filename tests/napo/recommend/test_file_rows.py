"""The rows of files that are not quite as they should be, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from napo.recommend import Catalogue, FileReport, Recommender, recommend_file
from napo.recommend.reading import most_failed
from napo.runs import Run


@pytest.fixture(scope="module")
def recommender(demo_run: Run) -> Recommender:
    return Recommender.from_run(demo_run.path, model="sasrec")


def answers(recommender: Recommender, folder: Path, text: str, **how: Any) -> tuple[list[dict], FileReport]:
    given, out = folder / "in.csv", folder / "out.jsonl"
    given.write_text(text)
    report = recommend_file(recommender, given, out, k=2, **how)
    return [json.loads(line) for line in out.read_text().splitlines()], report


@pytest.mark.parametrize("kind", [list, "array", "numbers"])
def test_lists_as_pandas_writes_them(recommender: Recommender, tmp_path: Path, kind: Any) -> None:
    lists = pd.Series([recommender.catalogue.titles[3:6], recommender.catalogue.titles[5:8]])
    if kind == "array":
        lists.to_frame("history").to_parquet(tmp_path / "in.parquet")
        lists = pd.read_parquet(tmp_path / "in.parquet")["history"]
    if kind == "numbers":
        lists = pd.Series(["[1 2\n 3]", "[1. nan]"])
    lists.to_frame("history").to_csv(tmp_path / "lists.csv", index=False)
    for unknown in ("error", "skip"):
        with pytest.raises(
            ValueError, match=r"history: expected a list as JSON; got .* as Python and pandas"
        ) as caught:
            answers(recommender, tmp_path, (tmp_path / "lists.csv").read_text(), unknown=unknown)
        assert "2 of 2 rows cannot be answered: row 0" in str(caught.value)


def test_titles_in_brackets_are_titles(recommender: Recommender, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"history: expected a title or an id of the catalogue; got '\[REC\] 4'"):
        answers(recommender, tmp_path, "history\n[REC] 4\n")


@pytest.mark.parametrize(
    "text, popular", [("history\nAlien\nNone of them\n", 2), ("history,k\n,1\n,1\n", 2), ("user\nbob\n1\n", 1)]
)
def test_a_file_that_gets_popular_items_alone_is_said(
    recommender: Recommender, tmp_path: Path, text: str, popular: int
) -> None:
    _, report = answers(recommender, tmp_path, text, unknown="skip")
    said = [note for note in report.notes if "of 2 answers are what is popular, the same for everybody" in note]
    assert report.popular == popular and len(said) == (popular == 2)


def test_a_user_counts_where_nothing_of_the_history_is_known(recommender: Recommender, tmp_path: Path) -> None:
    known = recommender.catalogue.titles[3]
    text = f"user,history\n2,Alien\nbob,Alien\n2,Alien::{known}\n"
    found, report = answers(recommender, tmp_path, text, unknown="skip")
    skipped = "1 item not known: 'Alien'"
    assert found[0]["items"] == recommender.recommend(user=2, k=2).as_dict()["items"]
    assert found[0]["notes"] == [skipped, "nothing of the history is known: that of user '2' counts"]
    assert found[1]["model"] == "popularity" and found[1]["notes"][0] == skipped and len(found[1]["notes"]) == 2
    assert found[2]["items"] == recommender.recommend([known], k=2).as_dict()["items"]
    assert (report.unknown_users, report.without_items) == (1, 0)
    assert report.notes[0].endswith("the user where it is empty or nothing of it is known")
    with pytest.raises(ValueError, match=r"row 0 .*: history: expected a title or an id"):
        answers(recommender, tmp_path, text)


@pytest.mark.parametrize("end", ["", "\n", "\n\n \n", "\r\n\r\n"])
def test_empty_lines_at_the_end_are_no_rows(recommender: Recommender, tmp_path: Path, end: str) -> None:
    found, report = answers(recommender, tmp_path, f"user,k\n1,2\n2,2{end}")
    assert len(found) == report.rows == 2
    with pytest.raises(ValueError, match=r"row 1 \(line 3\): user: expected the id of a user; got none"):
        answers(recommender, tmp_path, f"user\n1\n\n2{end}")
    found, _ = answers(recommender, tmp_path, f"user\thistory\n1\t\n\t{end}".replace("\t", ","))  # a row, of nothing
    assert [one["model"] for one in found] == ["sasrec", "popularity"]


def test_titles_of_something_else_are_not_all_searched_for(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    searched: list[str] = []
    search = Catalogue._search

    def counted(catalogue: Catalogue, folded: str) -> Any:
        searched.append(folded)
        return search(catalogue, folded)

    monkeypatch.setattr(Catalogue, "_search", counted)
    monkeypatch.setattr("napo.recommend.reading.most_failed", lambda items: 5)
    monkeypatch.setattr("napo.progress.LINE_SECONDS", 0.0)
    known = recommender.catalogue.titles[3]
    others = [f"{number} strange words" for number in range(30)]
    text = "history\n" + "::".join(others[:9]) + "\n" + "\n".join([*others[9:], known.upper()]) + "\n"
    found, report = answers(recommender, tmp_path, text, unknown="skip")
    assert len(searched) == 5 and found[-1]["model"] == "sasrec"
    said = "5 titles are like nothing in the catalogue; 25 others were looked up only as they are written"
    assert any(said in note for note in report.notes)
    assert "read in.csv: 23 rows" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"22 of 23 rows cannot be answered \(--unknown skip .*\); 5 titles are like"):
        answers(recommender, tmp_path, text.replace("strange", "odd"))
    assert len(searched) == 10


def test_fewer_titles_are_searched_for_in_a_large_catalogue() -> None:
    assert [most_failed(items) for items in (0, 60, 1_276, 5_000, 100_000)] == [200, 200, 195, 50, 20]
