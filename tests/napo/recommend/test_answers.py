"""Recommendations of a run: who asks, what comes back, and that nothing depends on who else asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import napo
from napo.data.prepared import PreparedData
from napo.files import read_json, write_json
from napo.recommend import Query, Recommender, UnknownItem, best_model
from napo.recommenders.language_model import LanguageModel
from napo.runs import Run


@pytest.fixture(scope="module")
def recommender(demo_run: Run) -> Recommender:
    return Recommender.from_run(demo_run.path, model="napo+sasrec", retrieve=20)


def test_ranked_by_likelihood_without_the_history(demo_run: Run) -> None:
    data = PreparedData.load(demo_run.data)
    recommender = napo.Recommender.from_run(demo_run.path, model="napo", retrieve=20)
    history = [data.titles[item] for item in (3, 5, 6)]
    found = recommender.recommend(history, k=8, exclude=[data.titles[9]])
    assert not any("lora" in name for name, _ in recommender.ranker.model.named_parameters())  # merged into the base
    titles = [one.title for one in found.items]
    assert len(titles) == 8 and not set(titles) & {*history, data.titles[9]}
    assert [one.score for one in found.items] == sorted((one.score for one in found.items), reverse=True)
    numbers = [data.titles.index(title) for title in titles]
    scores = LanguageModel.load(demo_run, data, "napo").scores([[3, 5, 6]], np.array([numbers]))[0]
    assert scores.tolist() == pytest.approx([one.score for one in found.items], abs=1e-4)
    ids = data.items["source_id"].tolist()
    assert [one.item for one in found.items] == [ids[number] for number in numbers]
    assert recommender.recommend([ids[item] for item in (3, 5, 6)], k=8, exclude=[ids[9]]).items == found.items
    assert json.loads(json.dumps(found.as_dict()))["items"][0]["title"] == titles[0]


def test_nothing_depends_on_who_else_asks(recommender: Recommender) -> None:
    """To the last bit: lists of all lengths, the same one twice, one the beginning of another, without a history."""
    titles, random = recommender.catalogue.titles, np.random.default_rng(0)
    queries = [Query(history=[titles[i] for i in random.choice(60, n, replace=False)], k=5) for n in range(1, 14)]
    queries += [queries[4], Query(history=queries[4].history[:3]), Query(history=queries[4].history, k=30), Query()]
    alone = [recommender.recommend_many([query])[0] for query in queries]
    assert recommender.recommend_many(queries) == alone
    assert recommender.recommend_many(queries[::-1]) == alone[::-1]
    assert recommender.recommend_many(queries[:7]) == alone[:7]


@pytest.mark.parametrize("model", ["napo", "napo+sasrec"])
def test_the_first_ones_are_the_same_for_any_k(demo_run: Run, model: str) -> None:
    recommender = Recommender.from_run(demo_run.path, model=model, retrieve=12)
    history = recommender.catalogue.titles[3:7]
    most = recommender.recommend(history, k=50)
    for k in (1, 10, 12, 13, 30):
        found = recommender.recommend(history, k=k)
        assert found.items == most.items[:k] and len(found.notes) == (k > 12)
    by_sasrec = Recommender.from_run(demo_run.path, model="sasrec").recommend(history, k=50).items
    assert most.items[12:] == by_sasrec[12:] and {one.item for one in most.items[:12]} == {
        one.item for one in by_sasrec[:12]
    }
    assert [one.score for one in most.items[:12]] == sorted((one.score for one in most.items[:12]), reverse=True)
    assert most.notes == [
        f"places 13 to 50 are in the order of sasrec, with its scores: {model} ranks the first 12 that sasrec proposes"
    ]


def test_a_history_that_the_model_has_no_positions_for(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = recommender.catalogue.titles
    whole = recommender.recommend(titles[:10], k=3)
    assert whole.notes == []
    language_model = next(p for p in recommender.ranker.parts.values() if isinstance(p, LanguageModel))  # type: ignore[attr-defined]
    lengths = [len(language_model.encoder.lines[item]) for item in range(10)]
    monkeypatch.setattr(language_model, "positions", language_model._around + sum(lengths[7:]))
    short = recommender.recommend(titles[:10], k=3)
    (note,) = short.notes
    assert note.startswith("the language model was shown the last 3 of 10 titles: its ")
    assert recommender.recommend(titles[7:10], k=3).notes == []


def test_user_is_their_history(demo_run: Run, recommender: Recommender) -> None:
    data = PreparedData.load(demo_run.data)
    name = pd.read_parquet(data.path / "users.parquet")["source_id"].iloc[4]
    items = data.interactions.query("user_id == 4")["item_id"]
    expected = recommender.recommend([data.titles[item] for item in items], k=3)
    assert recommender.recommend(user=name, k=3) == expected == recommender.recommend(user=int(name), k=3)


def test_nobody_known_gets_what_is_popular(demo_run: Run, recommender: Recommender) -> None:
    data = PreparedData.load(demo_run.data)
    counts = np.bincount(np.concatenate(data.training_sequences()), minlength=data.num_items)
    order = np.argsort(-counts, kind="stable")
    found = recommender.recommend(user="nobody", k=4, exclude=[data.titles[order[0]]])
    assert found.model == "popularity" and len(found.notes) == 1
    assert found.notes[0].startswith("user 'nobody' is not known (not in the data, or left out by napo prepare)")
    assert [one.title for one in found.items] == [data.titles[item] for item in order[1:5]]
    assert [one.score for one in found.items] == counts[order[1:5]].tolist()
    assert recommender.recommend(k=4).items == recommender.recommend([], k=4).items


def test_a_run_needs_no_prepared_data(demo_run: Run, recommender: Recommender, tmp_path: Path) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run", ignore=shutil.ignore_patterns("data", "predictions"))
    moved = Recommender.from_run(tmp_path / "run", model="napo+sasrec", retrieve=20)
    assert moved.recommend(user=1, k=3) == recommender.recommend(user=1, k=3)
    assert moved.recommend(user="x", k=3) == recommender.recommend(user="x", k=3)
    (tmp_path / "run" / "popularity.parquet").unlink()
    with pytest.raises(ValueError, match=r"popularity\.parquet is not what the run was made with .*got none"):
        Recommender.from_run(tmp_path / "run", model="sasrec")
    Run(tmp_path / "run").configure(kept_sha256={})  # as in a run of an older napo
    older = Recommender.from_run(tmp_path / "run", model="sasrec")
    with pytest.raises(ValueError, match="of an older napo, does not know what is popular"):
        older.recommend()
    with pytest.raises(ValueError, match="knows no users"):
        older.recommend(user=1)


def test_a_base_model_in_the_cache_of_another_machine(
    demo_run: Run, recommender: Recommender, small_world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run", ignore=shutil.ignore_patterns("data", "predictions"))
    for path in (tmp_path / "run" / "models").glob("*/origin.json"):
        write_json(path, read_json(path) | {"model": "/elsewhere/model"})
    shutil.rmtree(tmp_path / "run" / "stages")  # which say what the files were
    monkeypatch.setenv("NAPO_CACHE", str(tmp_path / "cache"))
    missing = f"model: no such folder: /elsewhere/model, .* make {tmp_path}/cache/model a copy of it or a link to it"
    with pytest.raises(ValueError, match=missing):
        Recommender.from_run(tmp_path / "run", model="napo")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model").symlink_to(small_world / "model")
    moved = Recommender.from_run(tmp_path / "run", model="napo+sasrec", retrieve=20)
    assert moved.recommend(user=1) == recommender.recommend(user=1)


def test_without_sasrec_the_whole_catalogue_is_ranked(demo_run: Run, tmp_path: Path) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run", ignore=shutil.ignore_patterns("sasrec", "data", "combinations"))
    recommender = Recommender.from_run(tmp_path / "run", model="napo")
    titles = recommender.catalogue.titles
    found = recommender.recommend(titles[3:6], k=57)
    assert sum(np.exp([one.score for one in found.items])) < 1 + 1e-5
    scores = recommender.ranker.scores([[3, 4, 5]], np.arange(60)[None])[0]
    scores[[3, 4, 5]] = -np.inf
    assert [one.title for one in found.items[:9]] == [titles[item] for item in np.argsort(-scores)[:9]]
    both = [Query(history=titles[3:6]), Query(history=titles[3:9])]
    assert recommender.recommend_many(both) == [recommender.recommend_many([query])[0] for query in both]


def test_what_ranked_validation_best_is_the_default(demo_run: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(demo_run.path, run.path, ignore=shutil.ignore_patterns("stages"))

    def measured(name: str, figures: dict[str, float]) -> None:
        path = run.path / "combinations" / f"{name}.json"
        fitted = read_json(path)
        fitted["validation"] = {part: {"hr@1": value, "mrr": value} for part, value in figures.items()}
        write_json(path, fitted)

    measured("sasrec+rules", {"sasrec": 0.5, "sasrec+rules": 0.45})
    measured("sft+sasrec", {"sft": 0.3, "sasrec": 0.5, "sft+sasrec": 0.4})
    measured("napo+sasrec", {"napo": 0.3, "sasrec": 0.5, "napo+sasrec": 0.4})
    assert best_model(run) == "sasrec"  # better than any language model, and than what it was combined to
    measured("napo+sasrec", {"napo": 0.3, "sasrec": 0.5, "napo+sasrec": 0.6})
    assert best_model(run) == "napo+sasrec"
    shutil.rmtree(run.path / "combinations")
    assert best_model(run) == "napo"


def test_bad_input(demo_run: Run, recommender: Recommender) -> None:
    with pytest.raises(ValueError, match=r"model: .* has no 'dpo'; it has sasrec, sft, sft-longer, napo, sasrec"):
        Recommender.from_run(demo_run.path, model="dpo")
    with pytest.raises(ValueError, match="expected a history or a user; got both"):
        recommender.recommend(["Blue Red"], user="1")
    with pytest.raises(ValueError, match="history: expected a list of titles or ids; got 'Blue Red'"):
        recommender.recommend("Blue Red")
    with pytest.raises(ValueError, match="k: expected at least 1"):
        recommender.recommend(["Blue Red"], k=0)
    found = recommender.recommend(["Blue Red"], k=100)
    assert len(found.items) == 59 and found.notes[0] == "59 of 100: there are no more items"


def test_repeats_are_left_out_as_in_the_training(recommender: Recommender) -> None:
    titles, ids = recommender.catalogue.titles, recommender.catalogue.source_ids
    found = recommender.recommend([titles[3], titles[4], ids[3], titles[5], titles[4].upper()], k=4)
    assert found.items == recommender.recommend(titles[3:6], k=4).items
    assert found.notes == ["2 repeats left out of the history"]
    assert recommender.recommend([ids[3], ids[3]], k=4).notes == ["1 repeat left out of the history"]


def test_items_that_are_not_known(recommender: Recommender) -> None:
    titles = recommender.catalogue.titles
    with pytest.raises(UnknownItem, match=r"got 'Alien'; see items\.parquet of the run; nor are these known: '5999'$"):
        recommender.recommend(["Alien", titles[3], 5999])
    found = recommender.recommend(["Alien", titles[3], 5999, titles[4]], k=4, unknown="skip")
    assert found.items == recommender.recommend(titles[3:5], k=4).items
    assert found.notes == ["2 items not known: 'Alien', '5999'"]
    none = recommender.recommend(["Alien", *"bcdefgh"], k=4, unknown="skip")
    assert none.model == "popularity" and none.notes == ["8 items not known: 'Alien', 'b', 'c', 'd', 'e' and 3 more"]
    barred = recommender.recommend(titles[3:5], k=4, exclude=["Alien", titles[9]])
    assert barred.notes == ["exclude: 1 item not known: 'Alien'"]
    assert barred.items == recommender.recommend(titles[3:5], k=4, exclude=[titles[9]]).items
    with pytest.raises(ValueError, match="unknown: expected error or skip; got 'drop'"):
        recommender.recommend(titles[3:5], unknown="drop")  # type: ignore[arg-type]
