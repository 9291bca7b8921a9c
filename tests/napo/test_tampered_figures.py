"""Predictions, ranks and figures of a run that were changed: one line that names the file, and no figure."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from command_calls import Call
from run_hashes import without_hashes
from tampering import changed_json, changed_table, refused

from napo.data.prepared import PreparedData
from napo.evaluation.catalogue import CatalogueOptions, collect, evaluate_catalogue
from napo.evaluation.evaluate import collect as collect_metrics
from napo.evaluation.records import read_predictions
from napo.files import read_json
from napo.runs import Run


@pytest.fixture
def run(demo_run: Run, tmp_path: Path) -> Run:
    shutil.copytree(demo_run.path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture(scope="module")
def ranked(demo_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ranked the catalogue."""
    folder = tmp_path_factory.mktemp("ranked") / "run"
    shutil.copytree(demo_run.path, folder)
    data = PreparedData.load(demo_run.data)
    evaluate_catalogue(data, Run(folder), ["popularity", "itemknn"], CatalogueOptions(limit=20))
    return folder


@pytest.mark.parametrize(
    "change, pattern",
    [
        (lambda f: f.assign(scores=f["scores"].iloc[::-1].to_list()), "do not follow from its candidates and scores"),
        (lambda f: f.assign(candidates=f["candidates"].iloc[::-1].to_list()), "do not follow from its candidates"),
        (lambda f: f.assign(scores=[row[:-1] for row in f["scores"]]), "do not follow from its candidates and scores"),
        (lambda f: f.assign(scores=[["x"] * 20 for _ in range(len(f))]), "do not follow from its candidates"),
        (lambda f: f.assign(rank=f["rank"].where(f["rank"] != 2, 3)), "expected MRR"),
        (lambda f: f.assign(rank=1), "expected HR@1"),
        (lambda f: f.iloc[:-1], "29 rows, expected 30"),
    ],
)
def test_changed_predictions_are_refused(napo: Call, run: Run, change: Any, pattern: str) -> None:
    path = run.path / "predictions" / "napo.parquet"
    changed_table(path, change)
    older = Run(shutil.copytree(run.path, run.path.parent / "older"))
    refused(napo, run, r"predictions/napo\.parquet: was changed after", "report", run.path, "--out", "r.md")
    refused(
        napo,
        run,
        r"napo\.parquet: was changed after",
        "evaluate",
        "--data",
        run.data,
        "--run",
        run.path,
        "--models",
        "sft",
    )
    without_hashes(older)
    refused(napo, older, rf"predictions/napo\.parquet: .*{pattern}.*; delete it", "report", older.path, "--out", "r.md")


def test_figures_that_the_run_did_not_make_are_refused(napo: Call, run: Run) -> None:
    report = ("report", run.path, "--out", "r.md")
    changed_json(run.path / "metrics.json", lambda records: records[-1].update({"mrr": 0.99}))
    refused(
        napo, run, r"metrics\.json is not what .*expected sha256 .*; run napo evaluate again, which writes", *report
    )
    without_hashes(run)
    refused(napo, run, r"metrics\.json: .*: expected what .*json says; run napo evaluate again", *report)


def test_predictions_as_they_were_written_are_taken(run: Run) -> None:
    for record in read_json(run.path / "metrics.json"):
        assert len(read_predictions(run.path, record, 60)) == 30


@pytest.mark.parametrize(
    "change, pattern",
    [
        (lambda records: {"x": 1}, "not the records of napo evaluate --catalogue"),
        (lambda records: records[0].update({"hr@10": "0.5"}), "not the records of"),
        (lambda records: records[0].update(ranked="\x1b]0;owned\x07"), "not the records of"),
        (lambda records: records[0].update(rows_sha256=3), "not the records of"),
        (lambda records: records[0].pop("by_popularity") and None, "not the records of"),
        (lambda records: records[0].update(model="sasrec"), "records of another model"),
        (lambda records: records[0]["protocol"].update(ties="at random"), "expected ranks by the rule that a tie"),
        (lambda records: records[0].update({"ndcg@10": 0.99}), r"popularity\.parquet: expected NDCG@10 0\.99"),
        (lambda records: records[0].update(n=21), r"popularity\.parquet: 20 rows, expected 21"),
        (lambda records: records[0].update(items=5), r"popularity\.parquet: column next: expected 0 to 4"),
    ],
)
def test_changed_records_of_the_catalogue_are_refused(ranked: Path, tmp_path: Path, change: Any, pattern: str) -> None:
    run = Run(shutil.copytree(ranked, tmp_path / "run"))
    changed_json(run.path / "catalogue" / "popularity.json", change)
    with pytest.raises(ValueError, match=r"popularity\.json: was changed after it was finished"):
        collect(run)
    without_hashes(run)
    with pytest.raises(ValueError, match=pattern) as caught:
        collect(run)
    assert "catalogue/popularity." in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [lambda f: f.iloc[::-1], lambda f: f.assign(user=0), lambda f: f.drop(columns="user")]
)
def test_changed_ranks_of_the_catalogue_are_refused(ranked: Path, tmp_path: Path, change: Any) -> None:
    run = Run(shutil.copytree(ranked, tmp_path / "run"))
    without_hashes(run)
    assert len(collect(run)["records"]) == 2
    changed_table(run.path / "catalogue" / "itemknn.parquet", lambda frame: change(frame).reset_index(drop=True))
    with pytest.raises(ValueError, match=r"itemknn.*(expected the same rows|cannot be read)"):
        collect(run)


def test_figures_that_are_gone_are_left_out_with_a_word(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    assert len(collect_metrics(run)) == len(read_json(run.path / "metrics.json")) and not caplog.records
    (run.path / "predictions" / "sft.json").unlink()
    assert "sft" not in {record["model"] for record in collect_metrics(run)}
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(r"predictions/sft\.json is gone and left out; .* or delete .*stages/evaluate-sft\.json too", said)
    (run.path / "stages" / "evaluate-sft.json").unlink()
    collect_metrics(run)
    assert len(caplog.records) == 1


def test_ranks_that_follow_are_those_of_scores() -> None:
    """The check itself, on lists of several lengths with ties and minus infinity."""
    from napo.evaluation.records import _ranks_follow

    frame = pd.DataFrame(
        {
            "next": [4, 7],
            "rank": [2, 1],
            "candidates": [np.array([4, 5, 6]), np.array([9, 7])],
            "scores": [np.array([0.5, 0.5, -np.inf]), np.array([0.1, 0.2])],
        }
    )
    assert _ranks_follow(frame) and not _ranks_follow(frame.assign(rank=[1, 1]))
    assert not _ranks_follow(frame.assign(next=[4, 8])) and _ranks_follow(frame.iloc[:0])
