"""Combinations with SASRec: fitted only on validation rows, kept in the run, used by evaluation and recommendation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_hashes import without_hashes

from napo.data.prepared import PreparedData
from napo.evaluation.combine import ValidationLists, cross_validated, fit_combination, fit_weights
from napo.evaluation.evaluate import EvaluateOptions, evaluate
from napo.files import read_json, write_json
from napo.recommend import Recommender, best_model
from napo.recommenders.baselines import SequentialRules
from napo.recommenders.combination import Fitted
from napo.recommenders.protocol import ScoringOptions
from napo.recommenders.registry import by_default, combinations_of, find
from napo.runs import Run
from napo.stages import combine_stage


@pytest.fixture(scope="module")
def data(demo_run: Run) -> PreparedData:
    return PreparedData.load(demo_run.data)


@pytest.fixture
def run(demo_run: Run, tmp_path: Path) -> Run:
    shutil.copytree(demo_run.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    without_hashes(run)
    return run


def choices(weights: list[float], n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Lists whose right item is drawn from the softmax over weighted scores."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(n, 10, len(weights)))
    noisy = scores @ np.array(weights) + rng.gumbel(size=(n, 10))
    return scores, noisy.argmax(1)


def test_weights_are_those_of_greatest_likelihood() -> None:
    found = fit_weights(*choices([1.5, -0.5, 0.0]))
    assert found == pytest.approx([1.5, -0.5, 0.0], abs=0.1)
    scores, columns = choices([2.0, 1.0], n=50)

    def loss(w: np.ndarray) -> float:
        z = scores @ w
        right = np.take_along_axis(z, columns[:, None], 1)[:, 0]
        return float((np.log(np.exp(z).sum(1)) - right).sum() + w @ w / 2)

    best = fit_weights(scores, columns)
    for step in np.eye(2):
        assert loss(best) < min(loss(best + 1e-3 * step), loss(best - 1e-3 * step))


def test_weights_of_lists_that_they_separate_stay_finite() -> None:
    scores = np.zeros((5, 4, 1))
    scores[:, 2] = 1000.0
    weight = fit_weights(scores, np.full(5, 2))
    assert np.isfinite(weight).all() and weight[0] > 0


def test_a_user_is_never_judged_with_weights_fitted_to_it() -> None:
    scores, columns = choices([1.0, 1.0], n=60)
    users = np.repeat(np.arange(20), 3)
    before = cross_validated(scores, columns, users)
    changed = scores.copy()
    changed[users == 7] *= -50  # this user's own lists
    after = cross_validated(changed, columns, users)
    np.testing.assert_allclose(after[users == 7], -50 * before[users == 7])


def test_only_rows_of_validation_users_are_read(demo_run: Run, data: PreparedData) -> None:
    class NoTest(PreparedData):
        @property
        def test(self) -> pd.DataFrame:  # type: ignore[override]
            raise AssertionError("test rows were read")

    unread = NoTest.load(demo_run.data)
    assert isinstance(unread, NoTest)
    lists = ValidationLists.of(unread)
    log = data.interactions.groupby("user_id")["item_id"].agg(list)
    validation = set(data.val["user_id"])
    assert not validation & (set(data.test["user_id"]) | set(data.train["user_id"]))
    known = {tuple(log[user]) for user in validation}
    for history, items, column in zip(lists.histories, lists.candidates, lists.columns, strict=True):
        whole = next(s for s in known if s[: len(history)] == tuple(history) and s[len(history)] == items[column])
        assert not set(items.tolist()) - {items[column]} & set(whole[: len(history)])
    assert len(lists.columns) == 5 * len(validation)
    prepared = {tuple(items) for items in data.val["candidates"]}
    assert prepared <= set(map(tuple, lists.candidates.tolist()))  # the prepared rows are among them
    fitted = fit_combination(demo_run, unread, "napo")
    assert fitted == Fitted.read(demo_run.path, "napo+sasrec")


def test_scores_are_the_weighted_sum_of_the_parts(demo_run: Run, data: PreparedData) -> None:
    histories, lists = list(data.test["full_history"][:5]), np.stack(data.test["candidates"][:5])
    fitted = Fitted.read(demo_run.path, "napo+sasrec")
    expected = np.zeros(lists.shape)
    for name, part in fitted.parts.items():
        scores = find(demo_run, name).load(demo_run, data, ScoringOptions()).scores(histories, lists)
        scores = np.log1p(scores) if name in ("rules", "popularity") else scores
        expected += part["weight"] * scores / part["deviation"]
    for average in (False, True):  # weights belong to sums
        found = find(demo_run, "napo+sasrec").load(demo_run, data, ScoringOptions(average=average))
        np.testing.assert_allclose(found.scores(histories, lists), expected, rtol=1e-6)
    kept = pd.read_parquet(demo_run.path / "predictions" / "napo+sasrec.parquet")["scores"]
    np.testing.assert_allclose(np.stack(kept[:5].tolist()), expected, rtol=1e-4, atol=1e-4)


def test_rules_are_counted_in_the_sequences_that_the_run_keeps(run: Run, data: PreparedData) -> None:
    """Served without the prepared data, and kept anew by the next stage of a run that has none yet."""
    histories = list(data.test["full_history"][:5])
    found = find(run, "rules").load(run, run.catalogue(), ScoringOptions()).all_scores(histories)
    np.testing.assert_array_equal(found, SequentialRules.of(data).all_scores(histories))
    (run.path / "sequences.parquet").unlink()
    noted = {name: known for name, known in run.config.get("kept_sha256", {}).items() if name != "sequences.parquet"}
    run.configure(kept_sha256=noted)  # as an older napo left it
    older = find(run, "rules").load(run, data, ScoringOptions()).all_scores(histories)
    np.testing.assert_array_equal(found, older)
    with pytest.raises(ValueError, match="of an older napo and keeps no training sequences; run napo combine"):
        find(run, "rules").load(run, run.catalogue(), ScoringOptions())
    (run.path / "combinations" / "sasrec+popularity.json").write_text("{}")  # the control of then
    assert "which makes sasrec+rules in its place" in combinations_of(run)[1]["sasrec+popularity"]
    with pytest.raises(ValueError, match=r"no 'sasrec\+popularity', which is sasrec\+rules in this napo"):
        find(run, "sasrec+popularity")
    combine_stage(run, data, model="sasrec")
    assert not (run.path / "combinations" / "sasrec+popularity.json").exists()
    assert Recommender.from_run(run.path, model="sasrec+rules").recommend([data.titles[3]]).model == "sasrec+rules"
    assert run.kept("sequences.parquet").is_file() and "sequences.parquet" in run.config["kept_sha256"]


def test_what_is_no_model_is_not_combined(run: Run, data: PreparedData) -> None:
    for name in ("rules", "popularity", "itemknn"):
        with pytest.raises(ValueError, match=f"model: '{name}' is a part of every combination or of none; expected"):
            combine_stage(run, data, model=name)


def test_a_model_that_is_not_there_makes_no_control(run: Run, data: PreparedData, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("models", "combinations", "combine-*")
    shutil.copytree(run.path, tmp_path / "bare", ignore=ignored)
    with pytest.raises(ValueError, match="has no 'sft'"):
        combine_stage(Run(tmp_path / "bare"), data, model="sft")
    assert not (tmp_path / "bare" / "combinations").exists()


def test_evaluated_alone_or_after_its_parts_it_is_the_same(run: Run, data: PreparedData) -> None:
    before = pd.read_parquet(run.path / "predictions" / "sft+sasrec.parquet")
    for path in [*(run.path / "predictions").iterdir(), *(run.path / "stages").glob("evaluate-*")]:
        path.unlink()
    records = evaluate(data, run, ["sft+sasrec"], EvaluateOptions())
    assert [record["model"] for record in records] == ["sft+sasrec"]
    after = pd.read_parquet(run.path / "predictions" / "sft+sasrec.parquet")
    np.testing.assert_allclose(np.stack(after["scores"].tolist()), np.stack(before["scores"].tolist()), atol=1e-4)


def validated(run: Run, name: str, hr: float) -> None:
    path = run.path / "combinations" / f"{name}.json"
    record: dict[str, Any] = read_json(path)
    record["validation"] = {part: {"hr@1": 0.3, "mrr": 0.4} for part in record["validation"]}
    record["validation"][name] = {"hr@1": hr, "mrr": 0.4}
    write_json(path, record)


def test_recommend_takes_it_where_it_won(run: Run, data: PreparedData) -> None:
    history = [data.titles[item] for item in (3, 5, 6)]
    for name, hr in (("sft+sasrec", 0.35), ("napo+sasrec", 0.25)):
        validated(run, name, hr)
    assert best_model(run) == "sft+sasrec"
    chosen, named = Recommender.from_run(run.path), Recommender.from_run(run.path, model="sft+sasrec")
    assert chosen.recommend(history, k=3) == named.recommend(history, k=3)
    for path in (run.path / "combinations").iterdir():
        record = read_json(path)
        record["validation"]["sasrec+rules"]["hr@1"] = 0.5  # the language model adds nothing
        write_json(path, record)
    assert best_model(run) == "sasrec+rules"
    assert len(Recommender.from_run(run.path).recommend(history, k=3).items) == 3
    for name in ("sasrec", "sft", "napo"):
        validated(run, f"{name}+sasrec" if name != "sasrec" else "sasrec+rules", 0.2)  # worse than their parts
    assert best_model(run) in ("sasrec", "sft", "napo")


def test_weights_of_a_model_that_changed_are_refused(
    run: Run, data: PreparedData, caplog: pytest.LogCaptureFixture
) -> None:
    validated(run, "napo+sasrec", 0.9)
    assert best_model(run) == "napo+sasrec"
    weights = run.path / "models" / "napo" / "adapter_model.safetensors"
    shutil.copyfile(run.path / "models" / "sft" / "adapter_model.safetensors", weights)
    with pytest.raises(ValueError, match=r"napo is not what the weights of napo\+sasrec were fitted to; run napo comb"):
        find(run, "napo+sasrec").load(run, data, ScoringOptions())
    assert best_model(run) != "napo+sasrec" and "napo+sasrec" in combinations_of(run)[1]
    caplog.clear()
    assert {"napo", "sft+sasrec"} <= {*by_default(run)} and "napo+sasrec" not in by_default(run)
    assert "napo+sasrec is left out (models: napo is not what the weights" in caplog.text
    with pytest.raises(ValueError, match="napo is not what the weights"):  # before the first one is judged
        evaluate(data, run, ["popularity", "napo+sasrec"], folder="before")
    assert not (run.path / "before").exists()


def test_a_damaged_file_is_refused(run: Run) -> None:
    path = run.path / "combinations" / "napo+sasrec.json"
    record = read_json(path)
    record["parts"]["napo"]["weight"] = "much"
    write_json(path, record)
    line = r"napo\+sasrec\.json: not a combination that this napo fitted$"
    with pytest.raises(ValueError, match=line):
        Fitted.read(run.path, "napo+sasrec")
