from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_calls import Call
from run_hashes import without_hashes

from napo.data.prepared import PreparedData
from napo.evaluation import metrics
from napo.evaluation.evaluate import EvaluateOptions, Lists, compare_all, evaluate
from napo.files import read_json, write_json
from napo.recommenders.language_model import LanguageModel, judge
from napo.recommenders.protocol import ScoringOptions
from napo.recommenders.registry import BASELINES, find
from napo.recommenders.sasrec import SASRec
from napo.runs import Run


@pytest.fixture(scope="module")
def data(demo_run: Run) -> PreparedData:
    return PreparedData.load(demo_run.data)


@pytest.fixture(scope="module")
def ranker(demo_run: Run, data: PreparedData) -> LanguageModel:
    return LanguageModel.load(demo_run, data, "napo", ScoringOptions(tokens_per_batch=300))


@pytest.fixture(scope="module")
def lists(data: PreparedData) -> Lists:
    return Lists.of(data, EvaluateOptions(limit=12))


def alone(ranker: LanguageModel, ids: list[int]) -> torch.Tensor:
    """(T, V) log-probabilities of one unpadded sequence."""
    with torch.no_grad():
        return ranker.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def test_scores_are_those_of_each_title_alone(
    ranker: LanguageModel, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruned and packed equals the definition: at each token a softmax over what goes on with a title."""
    assert ranker.by_catalogue
    scores = ranker.scores(lists.histories, lists.candidates)
    monkeypatch.setattr(ranker.options, "average", True)
    averages = ranker.scores(lists.histories, lists.candidates)
    answers = ranker.encoder.answers
    for row in range(len(lists.rows)):
        prompt = ranker.prompt(lists.histories[row], lists.candidates[row])
        for column in (0, 7, 19):
            title = ranker.encoder.title(int(lists.candidates[row, column]))
            logps = alone(ranker, [*prompt, *title])[len(prompt) - 1 : -1]
            expected = 0.0
            for place, token in enumerate(title):
                going_on = sorted({other[place] for other in answers if other[:place] == title[:place]})
                expected += (logps[place, token] - logps[place, going_on].logsumexp(0)).item()
            assert scores[row, column] == pytest.approx(expected, abs=1e-4)
            assert averages[row, column] == pytest.approx(expected / len(title), abs=1e-4)


def test_probabilities_of_the_catalogue_sum_to_1(ranker: LanguageModel, lists: Lists, data: PreparedData) -> None:
    everything = np.tile(np.arange(data.num_items), (4, 1))
    total = np.exp(ranker.scores(lists.histories[:4], everything)).sum(1)
    assert np.abs(total - 1).max() < 1e-5


def test_scores_over_the_whole_vocabulary(demo_run: Run, data: PreparedData, lists: Lists, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(demo_run.path, run.path)
    path = run.path / "models" / "napo" / "origin.json"
    write_json(path, read_json(path) | {"normalise": "vocabulary"})
    without_hashes(run)
    ranker = LanguageModel.load(run, data, "napo")
    scores = ranker.scores(lists.histories[:3], lists.candidates[:3])
    for row, column in ((0, 0), (1, 7), (2, 19)):
        prompt = ranker.prompt(lists.histories[row], lists.candidates[row])
        title = ranker.encoder.title(int(lists.candidates[row, column]))
        logps = alone(ranker, [*prompt, *title])[len(prompt) - 1 : -1]
        assert scores[row, column] == pytest.approx(logps[torch.arange(len(title)), title].sum().item(), abs=1e-4)


def test_greedy_under_the_trie_names_an_item(ranker: LanguageModel, lists: Lists) -> None:
    items = ranker.greedy_items(lists.histories)
    assert items is not None
    answers = ranker.encoder.answers
    for row in range(4):
        said: list[int] = []
        prompt = ranker.prompt(lists.histories[row], ())
        while said not in answers:
            logps = alone(ranker, [*prompt, *said])[-1]
            going_on = sorted({a[len(said)] for a in answers if a[: len(said)] == said and len(a) > len(said)})
            said.append(max(going_on, key=lambda token: float(logps[token])))
        assert answers[items[row]] == said


def test_lower_layers_are_computed_once_for_all_models(
    demo_run: Run, data: PreparedData, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.modules.module import register_module_forward_hook

    from napo.recommenders.lower_layers import LowerLayers, layers_below_adapters

    lower = LowerLayers()
    for name in ("sft", "napo"):  # the small world's budget puts adapters on the upper of two layers
        ranker = LanguageModel.load(demo_run, data, name, ScoringOptions(tokens_per_batch=300))
        assert layers_below_adapters(ranker.model) == 1
        alone = ranker.scores(lists.histories, lists.candidates)
        calls: list[int] = []
        mlp = ranker.model.get_base_model().model.layers[0].mlp
        # One of all modules: the layer's own would make it a model that is compared with its own forward first.
        hook = register_module_forward_hook(lambda m, *_, mlp=mlp, calls=calls: calls.append(1) if m is mlp else None)
        ranker.options.lower = lower
        shared = ranker.scores(lists.histories, lists.candidates)
        ranker.options.lower = None
        hook.remove()
        assert (shared == alone).all()
        assert (len(calls) == 0) == (name == "napo")
    assert ranker.scores(lists.histories[:2], lists.candidates[:2]).shape == (2, 20)  # nothing stays patched


def test_answers_are_greedy(ranker: LanguageModel, lists: Lists) -> None:
    answers = ranker.answers(lists.histories, lists.candidates)
    end = ranker.encoder.title(0)[-1]
    longest = max(map(len, ranker.encoder.answers))
    for row in range(4):
        prompt = ranker.prompt(lists.histories[row], lists.candidates[row])
        ids = list(prompt)
        while len(ids) < len(prompt) + longest and ids[len(prompt) :][-1:] != [end]:
            ids.append(int(alone(ranker, ids)[-1].argmax()))
        assert answers[row] == ranker.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_valid_means_exactly_one_candidate() -> None:
    titles = ["Alien", "Aliens", "Heat", "Fargo"]
    lists = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 2, 3]])
    items, _ = judge(["Aliens", "I say Heat!", "Fargo", "Alien"], lists, titles, "candidates")
    assert items.tolist() == [-1, 2, -1, 0]  # "Aliens" holds "Alien" too; Fargo is not on its list
    items, rule = judge(["Aliens", "Heat!", "Fargo", ""], lists, titles, "history")
    assert items.tolist() == [1, -1, 3, -1] and "whole catalogue" in rule


def test_records_follow_from_predictions(demo_run: Run) -> None:
    for record in read_json(demo_run.path / "metrics.json"):
        frame = pd.read_parquet(demo_run.path / "predictions" / f"{record['model']}.parquet")
        scores = np.stack(frame["scores"].tolist())
        candidates = np.stack(frame["candidates"].tolist())
        own = scores[candidates == frame["next"].to_numpy()[:, None]]
        assert (frame["rank"] == (scores >= own[:, None]).sum(1)).all()  # the item itself, and ties as misses
        assert ((frame["recommended"] == frame["next"]) == (frame["rank"] == 1)).all()
        assert record["hr@1"] == (frame["rank"] == 1).mean()
        assert record["mrr"] == pytest.approx((1 / frame["rank"]).mean())
        if "hr@1_greedy" in record:
            assert record["n_greedy"] == len(frame)
            assert record["hr@1_greedy"] == (frame["answer_item"] == frame["next"]).mean()
            assert record["valid_ratio"] == (frame["answer_item"] >= 0).mean()


def test_paired_differences(demo_run: Run) -> None:
    records = read_json(demo_run.path / "metrics.json")
    names = [record["model"] for record in records]
    frames = [pd.read_parquet(demo_run.path / "predictions" / f"{name}.parquet") for name in names]
    found = {(pair["model"], pair["other"]): pair for pair in compare_all(demo_run.path, records)}
    assert found.keys() == {
        (name, other) for place, name in enumerate(names) for other in names[:place] if name not in BASELINES
    }
    for (name, other), pair in found.items():
        ranks = [frames[names.index(one)]["rank"].to_numpy() for one in (name, other)]
        for key, values in (("hr@1", [(r == 1).astype(float) for r in ranks]), ("mrr", [1 / r for r in ranks])):
            assert pair[f"{key}_difference"] == pytest.approx((values[0] - values[1]).mean())
            expected = metrics.interval(values[0] - values[1], frames[0]["user"].to_numpy())
            assert pair[f"{key}_difference_ci"] == pytest.approx(expected)


def test_limit_draws_the_same_rows_always(data: PreparedData) -> None:
    few, again = (Lists.of(data, EvaluateOptions(limit=12)) for _ in range(2))
    everything = Lists.of(data, EvaluateOptions())
    assert few.sha256 == again.sha256 != everything.sha256
    assert len(few.rows) == 12 and len(everything.rows) == 30
    assert (everything.candidates[few.rows] == few.candidates).all()


def test_greedy_for_some_rows(small_world: Path, demo_run: Run, data: PreparedData, tmp_path: Path) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run")
    records = evaluate(data, Run(tmp_path / "run"), ["sft"], EvaluateOptions(greedy_limit=7), overwrite=True)
    record = next(record for record in records if record["model"] == "sft")
    assert record["n_greedy"] == 7 and record["n"] == 30
    answers = pd.read_parquet(tmp_path / "run" / "predictions" / "sft.parquet")["answer"]
    assert answers[:7].notna().all() and answers[7:].isna().all()


def test_validation_and_test_rows_stand_side_by_side(
    demo_run: Run, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run")
    run, before = Run(tmp_path / "run"), read_json(demo_run.path / "metrics.json")
    names, options = ["popularity", "sft"], EvaluateOptions(split="val", limit=8, greedy=False)
    records = evaluate(data, run, names, options, folder="validation")
    assert [(record["model"], record["n"]) for record in records] == [("popularity", 8), ("sft", 8)]
    assert read_json(run.path / "validation" / "metrics.json") == records
    (pair,) = read_json(run.path / "validation" / "comparisons.json")
    assert (pair["model"], pair["other"], pair["n"]) == ("sft", "popularity", 8)
    assert read_json(run.path / "metrics.json") == before
    capsys.readouterr()
    evaluate(data, run, names, options, folder="validation")
    assert "evaluate-sft@validation: finished before" in capsys.readouterr().out


def test_figures_of_more_rows_are_not_replaced_unasked(demo_run: Run, data: PreparedData, tmp_path: Path) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run")
    run, before = Run(tmp_path / "run"), read_json(demo_run.path / "metrics.json")
    said = r"models: 8 rows of test would replace figures of popularity \(30 rows of test\); pass --overwrite for"
    with pytest.raises(ValueError, match=said):
        evaluate(data, run, ["popularity"], EvaluateOptions(limit=8))
    with pytest.raises(ValueError, match=r"10 rows of val would replace figures of popularity \(30 rows of test\)"):
        evaluate(data, run, ["popularity"], EvaluateOptions(split="val", limit=30))
    assert read_json(run.path / "metrics.json") == before
    for limit in (8, 30):  # more rows are nothing lost
        records = evaluate(data, run, ["popularity"], EvaluateOptions(limit=limit), overwrite=limit == 8)
        assert [record["n"] for record in records if record["model"] == "popularity"] == [limit]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"score": "average"}, r"30 rows of test by average would replace figures of sft \(30 rows of test by sum\);"),
        ({"greedy": False}, r"of sft \(30 rows of test, 30 of them with generated answers\); pass --overwrite"),
        (
            {"greedy_limit": 7},
            r"of sft \(30 rows of test, 30 of them with generated answers\); pass --overwrite",
        ),
    ],
)
def test_figures_of_another_kind_are_not_replaced_unasked(
    changed: dict[str, Any], said: str, demo_run: Run, data: PreparedData, tmp_path: Path
) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run")
    run, before = Run(tmp_path / "run"), read_json(demo_run.path / "metrics.json")
    with pytest.raises(ValueError, match=said):
        evaluate(data, run, ["popularity", "sft"], EvaluateOptions(**changed))
    assert read_json(run.path / "metrics.json") == before


def test_figures_of_weights_that_are_no_more_may_be_replaced(demo_run: Run, data: PreparedData, tmp_path: Path) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run")
    run, options = Run(tmp_path / "run"), EvaluateOptions(limit=6, greedy=False)
    path = run.path / "predictions" / "sft.json"
    write_json(path, {**read_json(path), "weights_sha256": "0" * 64})
    (record,) = (record for record in evaluate(data, run, ["sft"], options) if record["model"] == "sft")
    assert record["n"] == 6


def test_bad_input(demo_run: Run, data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="has no 'sdpo'; it has popularity, itemknn, rules, sasrec, base, sft, sft-longer, napo, sasrec",
    ):
        evaluate(data, demo_run, ["popularity", "sdpo"])
    with pytest.raises(ValueError, match="split: expected val or test"):
        EvaluateOptions(split="train")
    with pytest.raises(ValueError, match="score: expected sum or average"):
        EvaluateOptions(score="mean")
    broken = data.test.copy()
    broken.at[broken.index[3], "next"] = next(i for i in range(60) if i not in broken["candidates"].iloc[3])
    folder = tmp_path / "broken"
    shutil.copytree(data.path, folder)
    broken.to_parquet(folder / "test.parquet")
    with pytest.raises(ValueError, match=r"test\.parquet: row 3: expected next, 0, exactly once"):
        Lists.of(PreparedData.load(folder), EvaluateOptions())


def test_run_that_was_moved_finds_its_data(demo_run: Run, tmp_path: Path) -> None:
    shutil.copytree(demo_run.path, tmp_path / "moved")
    assert Run(tmp_path / "moved").data.resolve() == (tmp_path / "moved" / "data").resolve()


def test_candidate_lists_of_any_length(
    demo_run: Run, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each list by itself gives the same ranks; the others of a list need not be as many as those of the next one."""
    shutil.copytree(data.path, tmp_path / "data")
    frame = pd.read_parquet(tmp_path / "data" / "test.parquet")
    cut = [
        [item for place, item in enumerate(row) if place <= 3 + number % 5 or item == target]
        for number, (row, target) in enumerate(zip(frame["candidates"], frame["next"], strict=True))
    ]
    frame["candidates"] = cut
    frame.to_parquet(tmp_path / "data" / "test.parquet")
    shutil.copytree(demo_run.path, tmp_path / "run")
    ragged, run = PreparedData.load(tmp_path / "data"), Run(tmp_path / "run")
    names = ["popularity", "sasrec", "sft", "napo", "napo+sasrec"]
    scored, widths = SASRec.scores, []
    monkeypatch.setattr(
        SASRec, "scores", lambda self, h, items: (widths.append(np.shape(items)[1]), scored(self, h, items))[1]
    )
    records = evaluate(ragged, run, names, EvaluateOptions(limit=12), foreign_data=True, overwrite=True)
    assert len(widths) == len(set(widths)) > 2  # once for each length, also as a part of the combination
    monkeypatch.undo()
    rows = Lists.of(ragged, EvaluateOptions(limit=12)).rows
    assert {len(cut[row]) for row in rows} >= {5, 6, 7}
    for name in ("sasrec", "napo", "napo+sasrec"):
        ranker = find(run, name).load(run, data, ScoringOptions())
        found = pd.read_parquet(run.path / "predictions" / f"{name}.parquet")
        for row, rank in zip(rows, found["rank"], strict=True):
            scores = ranker.scores([data.test["full_history"].iloc[row].tolist()], np.array([cut[row]]))[0]
            own = scores[cut[row].index(int(data.test["next"].iloc[row]))]
            assert rank == 1 + (scores > own + 1e-5).sum()
    (record,) = [record for record in records if record["model"] == "napo"]
    assert record["n"] == 12 and re.fullmatch(r"of \d to \d candidates", record["protocol"]["lists"])


def test_models_that_the_lists_do_not_tell_apart_are_named_once(napo: Call, demo_run: Run, tmp_path: Path) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run")
    code, out, _ = napo("evaluate", "--data", demo_run.data, "--run", tmp_path / "run", "--models", "popularity")
    assert code == 0
    frames = {path.stem: pd.read_parquet(path) for path in (tmp_path / "run" / "predictions").glob("*.parquet")}
    hits = {name: (frame["rank"] == 1).to_numpy(dtype=float) for name, frame in frames.items()}
    (best,) = re.findall(r"^(\S+) (?:is best|has the highest HR@1)", out, flags=re.M)
    for name in hits.keys() - {best}:
        low, high = metrics.interval(hits[best] - hits[name], frames[best]["user"].to_numpy())
        named = re.compile(rf"(?<![+\w-]){re.escape(name)} \(\+")
        said = [line for line in out.splitlines() if "told apart" in line and named.search(line)]
        assert len(said) == (low <= 0 <= high), name
