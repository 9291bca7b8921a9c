"""Ranking the whole catalogue: against scoring every item by itself, resumed, and with what is said of it."""

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

from napo import ranks
from napo.data.prepared import PreparedData
from napo.evaluation import catalogue, metrics
from napo.evaluation.catalogue import CatalogueOptions, check_catalogue, evaluate_catalogue, table_text, undecided
from napo.evaluation.doubts import MARK
from napo.files import read_json, write_json
from napo.language_models.bases import Bases
from napo.recommenders.baselines import Popularity, SequentialRules
from napo.recommenders.language_model import LanguageModel
from napo.recommenders.protocol import ScoringOptions
from napo.recommenders.registry import find
from napo.runs import Run

EVERYTHING = ("popularity", "itemknn", "rules", "sasrec", "base", "sft", "napo", "napo+sasrec")


@pytest.fixture(scope="module")
def data(demo_run: Run) -> PreparedData:
    return PreparedData.load(demo_run.data)


@pytest.fixture(scope="module")
def run(demo_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("catalogue") / "run"
    shutil.copytree(demo_run.path, folder)
    return Run(folder)


@pytest.fixture(scope="module")
def found(run: Run, data: PreparedData) -> dict[str, Any]:
    return evaluate_catalogue(data, run, EVERYTHING, CatalogueOptions(retrieve=15))


@pytest.mark.parametrize("name", ["popularity", "itemknn", "rules", "sasrec", "napo", "base"])
def test_all_scores_are_those_of_each_item(demo_run: Run, data: PreparedData, name: str) -> None:
    ranker = find(demo_run, name).load(demo_run, data, ScoringOptions(tokens_per_batch=700))
    histories = [[int(i) for i in history] for history in data.test["full_history"]][:5]
    expected = ranker.scores(histories, np.tile(np.arange(data.num_items), (5, 1)))
    assert ranker.all_scores(histories) == pytest.approx(expected, abs=2e-4)


def test_all_scores_over_the_whole_vocabulary(run: Run, data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("napo.recommenders.language_model.TITLES_TOGETHER", 17)
    ranker = LanguageModel.load(run, data, "napo")
    object.__setattr__(ranker.settings, "normalise", "vocabulary")
    expected = ranker.scores([[3, 4], [5]], np.tile(np.arange(data.num_items), (2, 1)))
    assert ranker.all_scores([[3, 4], [5]]) == pytest.approx(expected, abs=1e-4)


def test_figures_are_those_of_scoring_and_sorting(run: Run, data: PreparedData, found: dict[str, Any]) -> None:
    records = {(record["model"], record["ranked"]): record for record in found["records"]}
    whole, first = "catalogue", "sasrec's first 15"
    tuned = ("base", "sft", "sft+sasrec", "napo", "napo+sasrec")
    models = ("popularity", "itemknn", "rules", "sasrec", "sasrec+rules", *tuned)
    assert set(records) == {*((name, whole) for name in models), *((name, first) for name in tuned)}
    napo, sasrec = (find(run, name).load(run, data, ScoringOptions()) for name in ("napo", "sasrec"))
    rules = SequentialRules.of(data)
    weights = read_json(run.path / "combinations" / "napo+sasrec.json")["parts"]
    every = np.arange(data.num_items)[None]
    ranks: dict[tuple[str, str], list[int]] = {("napo", whole): [], ("napo", first): [], ("napo+sasrec", whole): []}
    for history, target in zip(data.test["full_history"], data.test["next"], strict=True):
        mine, theirs = (ranker.scores([history], every)[0] for ranker in (napo, sasrec))
        logs = np.log1p(data.training_counts())
        followed = np.log1p(rules.scores([history], every)[0])
        both = sum(
            scores * weights[name]["weight"] / weights[name]["deviation"]
            for name, scores in (("napo", mine), ("sasrec", theirs), ("rules", followed), ("popularity", logs))
        )
        met = set(history.tolist()) - {target}
        open_items = [item for item in range(data.num_items) if item not in met]
        retrieved = sorted(open_items, key=lambda item, s=theirs: -s[item])[:15]
        for key, scores, among in (
            (("napo", whole), mine, open_items),
            (("napo", first), mine, retrieved),
            (("napo+sasrec", whole), both, open_items),
        ):
            as_high = [item for item in among if scores[item] >= scores[target]]
            ranks[key].append(len(as_high) if target in among else 999)
    for key, of_key in ranks.items():
        expected = metrics.cutoff_figures(np.array(of_key), (1, 5, 10, 20))
        assert {name: records[key][name] for name in expected} == pytest.approx(expected), key
    assert records["napo", whole]["n"] == len(data.test)
    buckets = records["napo", whole]["by_popularity"]
    assert sum(bucket["n"] for bucket in buckets.values()) == len(data.test)


def test_a_tie_with_the_right_item_is_a_miss_here_too(
    run: Run, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives all items one score is right about none, whichever order they are listed in."""
    monkeypatch.setattr(Popularity, "all_scores", lambda self, histories: np.ones((len(histories), data.num_items)))
    found = evaluate_catalogue(data, run, ["popularity"], CatalogueOptions(limit=25), overwrite=True)
    record = next(record for record in found["records"] if record["model"] == "popularity")
    assert record["hr@20"] == record["mrr@10"] == 0
    assert record["protocol"]["ties"] == metrics.TIES


def test_popularity_recommends_what_is_popular(found: dict[str, Any]) -> None:
    records = {record["model"]: record for record in found["records"] if record["ranked"] == "catalogue"}
    assert records["popularity"]["arp"] > records["sasrec"]["arp"]
    assert records["popularity"]["coverage"] < records["sasrec"]["coverage"] <= 1
    assert records["popularity"]["gini"] > records["sasrec"]["gini"]


@pytest.mark.usefixtures("found")  # which has figures of all rows with met items excluded
def test_met_items_may_be_ranked(run: Run, data: PreparedData) -> None:
    options = [CatalogueOptions(met_items=met, limit=20) for met in ("exclude", "include")]
    excluded, included = (
        {r["model"]: r for r in evaluate_catalogue(data, run, ["itemknn"], one, overwrite=True)["records"]}["itemknn"]
        for one in options
    )
    assert excluded["n"] == included["n"] == 20 and included["protocol"]["met_items"] == "include"
    assert excluded["hr@20"] >= included["hr@20"] and excluded["rows_sha256"] != included["rows_sha256"]


def test_figures_by_another_rule_are_not_replaced_unasked(run: Run, data: PreparedData, found: dict[str, Any]) -> None:
    include = CatalogueOptions(met_items="include")
    lost = r"would replace figures over the catalogue of rules \(\d+ rows of test with met items excluded\);"
    for call in (check_catalogue, evaluate_catalogue):
        with pytest.raises(ValueError, match=rf"models: \d+ rows of test with met items included {lost}"):
            call(data, run, ["rules"], include)


def test_lists_are_not_judged_where_the_catalogue_may_not_be_ranked(
    napo: Call, run: Run, data: PreparedData, found: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "predictions")
    asked = ("--data", data.path, "--run", tmp_path / "run", "--models", "rules", "--limit", 5)
    code, _, said = napo("evaluate", *asked, "--catalogue")
    assert code != 0 and "would replace figures over the catalogue of rules" in said
    assert not (tmp_path / "run" / "predictions").exists()


def test_goes_on_where_it_was_stopped(
    demo_run: Run, data: PreparedData, found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(demo_run.path, run.path)
    monkeypatch.setattr(catalogue, "BLOCK", 8)
    ranked, calls = catalogue._Ranker.ranked, []

    def stopping(self: Any, histories: Any, targets: Any) -> Any:
        calls.append(len(targets))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ranked(self, histories, targets)

    monkeypatch.setattr(catalogue._Ranker, "ranked", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_catalogue(data, run, ["napo"], CatalogueOptions(retrieve=15))
    again = evaluate_catalogue(data, run, ["napo"], CatalogueOptions(retrieve=15))
    assert calls == [8, 8, 8, 8, 6]  # 30 rows: the first two blocks are kept
    expected = {(r["model"], r["ranked"]): r["ndcg@20"] for r in found["records"]}
    for record in again["records"]:
        assert record["ndcg@20"] == pytest.approx(expected[record["model"], record["ranked"]])


def test_ranks_share_the_blocks_and_a_damaged_one_is_computed_again(
    run: Run, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, here one after the other: the second finds what the first has kept. Neither computes a block twice."""
    monkeypatch.setattr(catalogue, "BLOCK", 8)
    rows, calls = catalogue.Rows.of(data, CatalogueOptions()), []
    ranked = catalogue._Ranker.ranked

    def watched(self: Any, histories: Any, targets: Any) -> Any:
        calls.append(targets.tolist())
        return ranked(self, histories, targets)

    monkeypatch.setattr(catalogue._Ranker, "ranked", watched)
    ranker = catalogue._Ranker(data, run, "itemknn", ["itemknn"], {}, CatalogueOptions(), Bases())
    whole = catalogue._blocks(ranker, rows, tmp_path / "whole")
    assert [len(one) for one in calls] == [8, 8, 8, 6]
    in_order = calls.copy()

    shared: dict[int, Any] = {}

    def gathered(work: Any) -> list[dict[int, Any]]:
        shared.update(work())
        return [shared]

    monkeypatch.setattr(ranks, "told", lambda work: {})
    monkeypatch.setattr(ranks, "gathered", gathered)
    monkeypatch.setattr(ranks, "size", lambda: 2)
    calls.clear()
    for rank in (1, 0):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        if rank == 1:
            with pytest.raises(KeyError):  # the other rank's blocks
                catalogue._blocks(ranker, rows, tmp_path / "shared")
        else:
            blocks = catalogue._blocks(ranker, rows, tmp_path / "shared")
    assert calls == [in_order[1], in_order[3], in_order[0], in_order[2]]
    for one, other in zip(blocks, whole, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in (*one, *other))

    monkeypatch.undo()
    monkeypatch.setattr(catalogue, "BLOCK", 8)
    monkeypatch.setattr(catalogue._Ranker, "ranked", watched)
    kept = sorted((tmp_path / "shared").iterdir())
    assert [file.name for file in kept] == ["0.npz", "16.npz", "24.npz", "8.npz"]
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    kept[1].write_bytes(b"")
    calls.clear()
    again = catalogue._blocks(ranker, rows, tmp_path / "shared")
    assert calls == [in_order[0], in_order[2]]
    for one, other in zip(again, whole, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in (*one, *other))


def test_what_cannot_be_told_apart_is_said(run: Run, found: dict[str, Any]) -> None:
    text = table_text(run, found)
    assert text.startswith("the whole catalogue, met items excluded, test rows:\nmodel ")
    assert "NDCG@10" in text and "sasrec's first 15" in text and "  n" in text
    for pair in found["differences"]:
        low, high = pair["ndcg@10_difference_ci"]
        words = f" and {pair['other']} of {pair['other_ranked']} cannot be told apart ("
        named = any(words in line for line in undecided([pair]))
        assert named == (low <= 0 <= high) and pair["ndcg@10_difference"] >= 0
    frame = pd.read_parquet(run.path / "catalogue" / "napo.parquet")
    assert {"row", "user", "next", "napo of catalogue", "napo+sasrec of sasrec's first 15"} <= set(frame)


def test_lines_of_several_evaluations_say_which(demo_run: Run, data: PreparedData, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(demo_run.path, run.path)
    for name, options in {
        "popularity": CatalogueOptions(),
        "itemknn": CatalogueOptions(met_items="include"),
        "rules": CatalogueOptions(split="val"),
    }.items():
        found = evaluate_catalogue(data, run, [name], options)
    path = run.path / "catalogue" / "rules.json"
    (record,) = read_json(path)
    write_json(path, [record | {"protocol": record["protocol"] | {"data": "not the run's own, but other"}}])
    without_hashes(run)
    found = catalogue.collect(run)
    text = table_text(run, found)
    assert text.startswith("the whole catalogue; lines of other rows or other items do not compare:\n")
    for name, of in {
        "popularity ": "met items excluded, test rows",
        "itemknn ": "met items included, test rows",
        f"rules {MARK}": "met items excluded, val rows",
    }.items():
        assert re.search(rf"^{name} +catalogue +{of} +\d+  ", text, flags=re.M)
    assert f"{MARK} rules: judged on data that is not the run's own, but other" in text


def test_prompts_with_candidates_rank_what_is_retrieved(demo_run: Run, data: PreparedData, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(demo_run.path, run.path, ignore=shutil.ignore_patterns("combinations"))
    path = run.path / "models" / "napo" / "origin.json"
    write_json(path, read_json(path) | {"style": "candidates", "normalise": "vocabulary"})
    without_hashes(run)
    (record,) = evaluate_catalogue(data, run, ["napo"], CatalogueOptions(limit=5), overwrite=True)["records"]
    assert record["ranked"] == "sasrec's first 20" and record["n"] == 5
    shutil.rmtree(run.path / "sasrec")
    with pytest.raises(ValueError, match="the prompts of napo list candidates"):
        evaluate_catalogue(data, run, ["napo"], CatalogueOptions(limit=6), overwrite=True)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="met_items: expected exclude or include; got 'drop'"):
        CatalogueOptions(met_items="drop")
    with pytest.raises(ValueError, match="retrieve: expected at least 1; got 0"):
        CatalogueOptions(retrieve=0)
