"""Recommendations of a run: who asks, what comes back, and that nothing depends on who else asks."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import napo
from napo.data.prepared import PreparedData
from napo.files import read_json, write_json
from napo.recommend import (
    Asked,
    Catalogue,
    Query,
    Recommendations,
    Recommender,
    UnknownItem,
    best_model,
    recommend_file,
)
from napo.recommenders.language_model import LanguageModel
from napo.runs import Run

TITLES = ["Toy Story", "Toy Soldiers", "Heat", "heat"]


@pytest.fixture(scope="module")
def recommender(demo_run: Run) -> Recommender:
    return Recommender.from_run(demo_run.path, model="napo+sasrec", retrieve=20)


def test_titles_as_people_type_them() -> None:
    catalogue, notes = Catalogue(TITLES, ["7", "8", "9", "10"]), []
    found = [catalogue.find(text, notes) for text in ("toy story", " Heat ", "Toy So", "Toy Storry", 10, "8")]
    assert found == [0, 2, 1, 0, 3, 1]
    assert notes == ["'Toy So' was taken for 'Toy Soldiers'", "'Toy Storry' was taken for 'Toy Story'"]
    with pytest.raises(UnknownItem, match="did you mean 'Toy Story' or 'Toy Soldiers'"):
        catalogue.find("toy", notes)
    with pytest.raises(UnknownItem, match=r"got 'Alien'; see items\.parquet"):
        catalogue.find("Alien", notes)
    with pytest.raises(UnknownItem, match="expected the id of an item"):
        catalogue.find({"id": "Heat"}, notes)
    assert len(notes) == 2


def test_a_title_of_several_items_is_the_first_one_with_a_note() -> None:
    catalogue, notes = Catalogue(["Thing", "Heat", "Thing (2)"], ["7", "8", "9"]), []
    assert catalogue.find("thing", notes) == 0 and catalogue.find("Thing (2)", notes) == 2
    assert notes == ["'thing' was taken for the item with id '7'; '9' is 'Thing (2)'"]
    assert catalogue.find("Thing", notes) == 0 and notes[1:] == [notes[0].replace("thing", "Thing")]


def test_titles_that_differ_in_case_alone() -> None:
    """Steam has FORTIFY and Fortify."""
    catalogue, notes = Catalogue(["Thing", "Thing (2)", "thing", "FORTIFY", "Fortify"], [1, 2, 3, 4, 5]), []
    assert [catalogue.find(title, notes) for title in ("thing", "FORTIFY", "Fortify")] == [2, 3, 4]
    assert notes == []
    assert catalogue.find("THING", notes) == 0 and catalogue.find("fortify", notes) == 3
    assert notes == [
        "'THING' was taken for the item with id '1'; '3' is 'thing', '2' is 'Thing (2)'",
        "'fortify' was taken for the item with id '4'; '5' is 'Fortify'",
    ]
    with pytest.raises(UnknownItem, match="did you mean 'FORTIFY' or 'Fortify'"):
        catalogue.find("Fortifyy", notes)


def test_numbers_are_ids_and_are_not_guessed() -> None:
    catalogue, notes = Catalogue(["50 Cent", "311", "Rocky 3", "Heat"], [1, 2, 3, 4]), []
    assert catalogue.find(2, notes) == catalogue.find("311", notes) == catalogue.find(" 2.0 ", notes) == 1
    for number in (5, "5", "50", "1311", "3110", "3 11"):
        with pytest.raises(UnknownItem, match=rf"got '{number}'; see items|expected the id of an item.*'{number}'$"):
            catalogue.find(number, notes)
        assert catalogue.knows(number)
    with pytest.raises(UnknownItem, match=r"got '311'; it is a title: write it as text, in quotes"):
        catalogue.find(311, notes)
    with pytest.raises(UnknownItem, match="did you mean 'Rocky 3'"):
        catalogue.find("Rocky 4", notes)
    with pytest.raises(UnknownItem, match="did you mean 'Heat'"):
        catalogue.find("Hea", notes)  # too short a start
    assert notes == []


def test_what_is_searched_for() -> None:
    catalogue = Catalogue(["50 Cent", "Heat"], ["sku-1", "sku-2"])
    known = ("heat", "sku-1", "no. 5" * 100, 7, {"id": "sku-3"}, {"title": "50 CENT"})
    assert [catalogue.knows(item) for item in known] == [True] * 6
    assert not any(catalogue.knows(item) for item in ("Heats", "sku-3", {"title": "sku-1"}))


def test_letters_may_be_composed_or_not() -> None:
    catalogue, notes = Catalogue(["Sigur R\u00f3s", "M\u00fcnchen double space"], [1, 2]), []
    assert catalogue.find("Sigur Ro\u0301s", notes) == 0 and catalogue.find("sigur ro\u0301s", notes) == 0
    assert catalogue.find("Mu\u0308nchen  double\tspace", notes) == 1 and notes == []
    assert Catalogue(["Sigur Ro\u0301s"], [1]).find("SIGUR R\u00d3S", notes) == 0


def test_exact_titles_alone() -> None:
    catalogue, notes = Catalogue(TITLES, ["7", "8", "9", "10"]), []
    assert [catalogue.find(text, notes, exact=True) for text in ("Toy Story", " heat ", 8)] == [0, 3, 1]
    for wrong in ("toy story", "Toy So", "Toy Storry"):
        with pytest.raises(UnknownItem, match=f"expected a title or an id of the catalogue; got '{wrong}'"):
            catalogue.find(wrong, notes, exact=True)
    assert notes == []


def test_ids_that_are_titles_too() -> None:
    catalogue, notes = Catalogue(["10", "Heat"], ["1", "10"]), []
    assert catalogue.find("10", notes) == 1 and "an id and a title" in notes[0]
    assert catalogue.find({"title": "10"}, notes) == 0 and catalogue.find({"id": 10}, notes) == 1
    for wrong in (True, 1.5, None, {"name": "Heat"}, {}):
        with pytest.raises(ValueError, match="history: expected"):
            catalogue.find(wrong, notes)  # type: ignore[arg-type]


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
    with pytest.raises(ValueError, match="model: no such folder: /elsewhere/model"):
        Recommender.from_run(tmp_path / "run", model="napo")
    shutil.copytree(small_world / "model", tmp_path / "cache" / "model")
    monkeypatch.setenv("NAPO_CACHE", str(tmp_path / "cache"))
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


@pytest.mark.parametrize("source, out", [("csv", "jsonl"), ("parquet", "csv"), ("jsonl", "parquet")])
def test_files_of_users_and_histories(recommender: Recommender, tmp_path: Path, source: str, out: str) -> None:
    titles = recommender.catalogue.titles
    users = pd.DataFrame({"user": ["1", "2", "nobody"]})
    histories = pd.DataFrame({"history": [titles[:3], [titles[7]], []]})
    for frame in (users, histories):
        given, written = tmp_path / f"in.{source}", tmp_path / f"out.{out}"
        if source == "csv":
            as_text = frame.map(lambda value: "::".join(value) if isinstance(value, list) else value)
            as_text.to_csv(given, index=False)
        elif source == "parquet":
            frame.to_parquet(given)
        else:
            frame.to_json(given, orient="records", lines=True)
        report = recommend_file(recommender, given, written, k=4)
        assert (report.rows, report.popular, report.notes) == (3, 1, [])
        if out == "jsonl":
            rows = [json.loads(line) for line in written.read_text().splitlines()]
            best = [row["items"][0]["title"] for row in rows]
        else:
            table = pd.read_csv(written) if out == "csv" else pd.read_parquet(written)
            assert table["row"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and ("user" in table) == (frame is users)
            best = table.query("place == 1")["title"].tolist()
        name = frame.columns[0]
        expected = [recommender.recommend(**{name: value}, k=4) for value in frame[name].tolist()]
        assert best == [answer.items[0].title for answer in expected]


def test_all_rows_that_cannot_be_answered_are_named_at_once(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles, given, out = recommender.catalogue.titles, tmp_path / "in.csv", tmp_path / "o.csv"
    rows = [titles[0], f"{titles[1]}::Alien", *titles[2:5], "Alien"]
    given.write_text("\n".join(["history", *rows]) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(recommender, "answer", None)  # nothing is computed
        with pytest.raises(
            ValueError,
            match=r"in\.csv: 2 of 6 rows cannot be answered \(--unknown skip .*\): row 1.*'Alien'.*; row 5.*'Alien'",
        ):
            recommend_file(recommender, given, out)
        given.write_text("history\n" + "Alien\n" * 30)
        with pytest.raises(ValueError, match=r"30 of 30 rows cannot be answered.*; the first 10: ") as caught:
            recommend_file(recommender, given, out)
        assert str(caught.value).count("row ") == 10 and not out.exists()
        given.write_text(f"history\n{titles[0]}\nAlien\n")
        with pytest.raises(
            ValueError, match=r"in\.csv row 1.*: history: expected a title or an id .*'Alien'.*; --unknown skip leaves"
        ):
            recommend_file(recommender, given, out)
    recommend_file(recommender, given, out, k=2, unknown="skip")
    assert pd.read_csv(out)["notes"].fillna("").tolist() == ["", "", *2 * ["1 item not known: 'Alien'"]]


def test_files_that_cannot_be(recommender: Recommender, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("customer\n1\n")
    (tmp_path / "b.jsonl").write_text('{"history": "Blue Red"}\n')
    with pytest.raises(ValueError, match=r"a\.csv: expected a column user or history; got customer"):
        recommend_file(recommender, tmp_path / "a.csv", tmp_path / "o.csv")
    with pytest.raises(ValueError, match=r"b\.jsonl row 0 \(line 1\): history: expected a list of titles .*'Blue Red'"):
        recommend_file(recommender, tmp_path / "b.jsonl", tmp_path / "o.csv")
    with pytest.raises(ValueError, match=r"out: expected a name that ends in \.parquet, \.csv, \.jsonl"):
        recommend_file(recommender, tmp_path / "a.csv", tmp_path / "o.xlsx")
    assert not (tmp_path / "o.csv").exists()


def answers_to(recommender: Recommender, folder: Path, text: str | bytes, name: str = "in.csv") -> list[dict]:
    """A file's answers, line by line."""
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    recommend_file(recommender, folder / name, folder / "out.jsonl", k=2)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_the_input_and_links_stay(recommender: Recommender, tmp_path: Path) -> None:
    given, link, target = tmp_path / "self.csv", tmp_path / "link.csv", tmp_path / "far" / "target.csv"
    given.write_text("user\n1\n")
    other = tmp_path / "other.csv"
    other.symlink_to(given)
    for out in (given, other):
        with pytest.raises(ValueError, match=r"^out: .* is the input, which would be lost; give another name"):
            recommend_file(recommender, given, out)
    assert given.read_text() == "user\n1\n"
    target.parent.mkdir()
    link.symlink_to(target)
    for _ in range(2):  # to a file that is not there yet, and to one that is
        recommend_file(recommender, given, link, k=1)
        assert link.is_symlink() and target.read_text().startswith("row,user,place")
    with pytest.raises(ValueError, match="out: expected the name of a file"):
        (tmp_path / "folder.csv").mkdir()
        recommend_file(recommender, given, tmp_path / "folder.csv")


def test_empty_lines_are_rows(recommender: Recommender, tmp_path: Path) -> None:
    titles = recommender.catalogue.titles
    found = answers_to(recommender, tmp_path, f"history\n{titles[0]}\n\n{titles[1]}\n")
    assert [one["model"] for one in found] == ["napo+sasrec", "popularity", "napo+sasrec"]
    with pytest.raises(ValueError, match=r"in\.csv row 1 \(line 3\): user: expected the id of a user; got none"):
        answers_to(recommender, tmp_path, "user\n1\n\n2\n")


def test_histories_as_text(tmp_path: Path, demo_run: Run) -> None:
    recommender = Recommender.from_run(demo_run.path, model="sasrec")
    titles = [
        ":wumpscut:",
        "[REC]",
        "Depths of Fear :: Knossos",
        "2nd::part",
        '["x"]',
        *recommender.catalogue.titles[5:],
    ]
    recommender.catalogue = Catalogue(titles, recommender.catalogue.source_ids)
    last, number = titles[-1], recommender.catalogue.source_ids[8]
    cells = {
        f"[REC]::{last}": [1, 59],
        f"{last}:::wumpscut:": [59, 0],
        f":wumpscut:::{last}::::[rec]": [0, 59, 1],
        ":wumpscut:": [0],
        "depths of fear :: knossos": [2],
        f"{last}::2nd::part::{titles[7]}e": [59, 3, 7],
        '["x"]': [4],
        f'["{last}", {number}, {{"title": "[REC]"}}]': [59, 8, 1],
        f"{number}::{last}": [8, 59],
        "": [],
    }
    lines = "".join('"' + cell.replace('"', '""') + '"\n' for cell in cells)
    asked = []
    recommender.answer = lambda some: asked.extend(some) or Recommender.answer(recommender, some)  # type: ignore
    answers_to(recommender, tmp_path, "history\n" + lines)
    assert [one.history for one in asked] == list(cells.values())
    many = "::".join([*["2nd::part", last] * 500, "none of them", ":wumpscut:"])
    with pytest.raises(ValueError, match="got 'none of them'; see") as caught:
        answers_to(recommender, tmp_path, f"history\n{many}\n")
    assert "nor are" not in str(caught.value)


def test_ids_of_users_in_any_spelling(recommender: Recommender, tmp_path: Path) -> None:
    known = [recommender.recommend(user=user, k=2).as_dict()["items"] for user in (4, 2)]
    for name, text in (
        ("a.csv", "user\n4.0\n 2\n"),
        ("b.tsv", "user\tx\n4 \t1\n2\t1\n"),
        ("c.jsonl", '\ufeff{"user": 4.0}\n\n{"user": "2 "}\n'),
        ("D.CSV", "name;user\na;4\nb;2\n".encode("utf-16")),
    ):
        found = answers_to(recommender, tmp_path, text, name)
        assert [one["items"] for one in found] == known, name
        assert [int(one["user"]) for one in found] == [4, 2]
    for kind in ("float64", "Int64", "string"):
        pd.DataFrame({"user": pd.array([4, 2], dtype=kind if kind != "string" else "Int64").astype(kind)}).to_parquet(
            tmp_path / "users.parquet"
        )
        recommend_file(recommender, tmp_path / "users.parquet", tmp_path / "o.csv", k=1)
        assert pd.read_csv(tmp_path / "o.csv", dtype=str)["user"].tolist() == ["4", "2"]
    pd.DataFrame({"user": pd.array([4, None], dtype="Int64")}).to_parquet(tmp_path / "users.parquet")
    with pytest.raises(ValueError, match=r"users\.parquet row 1: user: expected the id of a user; got none"):
        recommend_file(recommender, tmp_path / "users.parquet", tmp_path / "o.csv")
    with pytest.raises(ValueError, match=r"n\.jsonl row 0 \(line 1\): user: expected the id of a user; got none"):
        answers_to(recommender, tmp_path, '{"user": NaN}\n', "n.jsonl")
    with gzip.open(tmp_path / "u.csv.gz", "wt") as file:
        file.write("user\n4\n")
    assert recommend_file(recommender, tmp_path / "u.csv.gz", tmp_path / "o.csv").popular == 0


def test_rows_with_a_user_and_a_history(recommender: Recommender, tmp_path: Path) -> None:
    titles = recommender.catalogue.titles
    given, out = tmp_path / "in.csv", tmp_path / "o.jsonl"
    given.write_text(
        f"user,history,exclude,k,name\n1,{titles[0]},,3,x\n2,,{titles[9]}::{titles[8]},,y\n,,,,z\nbob,,,,\n"
    )
    report = recommend_file(recommender, given, out, k=2)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found[0]["items"] == recommender.recommend(titles[:1], k=3).as_dict()["items"]
    assert found[1]["items"] == recommender.recommend(user=2, k=2, exclude=titles[8:10]).as_dict()["items"]
    assert [one["model"] for one in found[2:]] == ["popularity"] * 2
    assert [one.get("user") for one in found] == ["1", "2", None, "bob"]
    assert report.notes == [
        f"{given}: has history and user; the history counts, and the user where it is empty",
        f"{given}: columns used: user, history, exclude, k; ignored: name",
    ]
    line = "4 rows: 2 by napo, 2 with popular items (1 unknown user, such as 'bob'; 1 without known items)"
    assert report.line("napo") == line
    given.write_text("user,k\nbob,\n1,0\n")
    with pytest.raises(ValueError, match=r"row 1 \(line 3\): k: expected a whole number of at least 1; got '0'"):
        recommend_file(recommender, given, out)
    given.write_text("user\nalice@x\nbob\n1\n")
    assert "most users are not known, such as 'alice@x'" in recommend_file(recommender, given, out).notes[0]


def test_json_lines_of_all_kinds(recommender: Recommender, tmp_path: Path) -> None:
    title = recommender.catalogue.titles[0]
    text = f'{{"history": ["{title}"], "user": 5}}\n\n{{"history": ["{title}"]}}\n{{"user": "a"}}\n'
    found = answers_to(recommender, tmp_path, text, "a.jsonl")
    assert [one.get("user", "none") for one in found] == [5, "none", "a"]
    bad = '{"user": 1}\n\n{"user": \n[1]\n{"name": 1}\n'
    reasons = r"row 1 \(line 3\): not JSON .*row 2 \(line 4\): expected an object .*got list.*row 3 .*got name"
    with pytest.raises(ValueError, match=reasons):
        answers_to(recommender, tmp_path, bad, "b.jsonl")
    for out in ("o.csv", "o.parquet"):
        recommend_file(recommender, tmp_path / "a.jsonl", tmp_path / out, k=1)
    assert (tmp_path / "o.csv").read_text().splitlines()[1].startswith("0,5,1,")
    assert pd.read_parquet(tmp_path / "o.parquet")["user"].fillna("").tolist() == ["5", "", "a"]


def test_tables_that_are_not_as_their_header_says(
    recommender: Recommender, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for text, reason in (
        (
            "user,name\n1,a\n2,b,c\n",
            r"row 1 \(line 3\): expected 2 cells; got 3; write a cell that holds ',' in quotes",
        ),
        ("user,user\n1,2\n", "expected one column user; got 2"),
        ("", "empty; expected a line with the names"),
        (b"user\n\x001\n", r"line 2: holds a NUL byte; is the file UTF-16, write it as UTF-8"),
    ):
        with pytest.raises(ValueError, match=reason):
            answers_to(recommender, tmp_path, text)
    (tmp_path / "latin.csv").write_bytes("history\nBlue R\u00e9d\n".encode("cp1252"))
    assert recommend_file(recommender, tmp_path / "latin.csv", tmp_path / "o.csv", k=1).popular == 0
    assert "read as cp1252" in caplog.text and "is it another encoding, write it as UTF-8" in caplog.text
    (tmp_path / "no.parquet").write_text("user")
    with pytest.raises(ValueError, match=r"no\.parquet: cut short or no Parquet file"):
        recommend_file(recommender, tmp_path / "no.parquet", tmp_path / "o.csv")


def test_a_place_that_cannot_be_written_is_said_first(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.csv").write_text("user\n1\n")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(recommender, "answer", None)
    for place in ("/proc/x.csv", tmp_path / "file" / "x.csv"):
        with pytest.raises(ValueError, match=rf"^out: cannot write {place} \([^/]*\); give another place$"):
            recommend_file(recommender, tmp_path / "in.csv", place)
    with pytest.raises(ValueError, match=r"^input: .*none\.csv: no such file"):
        recommend_file(recommender, tmp_path / "none.csv", tmp_path / "x.csv")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_answers_are_written_as_they_come(
    recommender: Recommender,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
) -> None:
    (tmp_path / "in.csv").write_text("user\n" + "".join(f"{user}\n" for user in range(1, 8)))
    whole, parts = tmp_path / f"whole.{suffix}", tmp_path / f"parts.{suffix}"
    recommend_file(recommender, tmp_path / "in.csv", whole, k=2)
    seen: list[tuple[int, int]] = []

    def answer(asked: list[Asked]) -> list[Recommendations]:
        (aside,) = (path for path in tmp_path.iterdir() if path.name.startswith(".parts"))
        seen.append((len(asked), aside.stat().st_size))
        return Recommender.answer(recommender, asked)

    monkeypatch.setattr(recommender, "answer", answer)
    monkeypatch.setattr("napo.recommend.files.TOGETHER", 3)
    monkeypatch.setattr("napo.recommend.writing.ROW_GROUP", 3)
    monkeypatch.setattr("napo.progress.LINE_SECONDS", 0.0)
    recommend_file(recommender, tmp_path / "in.csv", parts, k=2)
    assert [size for size, _ in seen] == [3, 3, 1]
    assert seen[0][1] < seen[1][1] < seen[2][1]
    assert "recommend: 6 of 7 rows" in capsys.readouterr().err
    if suffix == "parquet":
        pd.testing.assert_frame_equal(pd.read_parquet(parts), pd.read_parquet(whole))
    else:
        assert parts.read_text() == whole.read_text()


def test_stopped_is_stopped_and_nothing_is_kept(demo_run: Run, tmp_path: Path) -> None:
    slow = (
        "import time; from napo import cli; from napo.recommend import Recommender\n"
        "def slowly(self, asked):\n    print('begun', flush=True); time.sleep(60)\n"
        "Recommender.answer = slowly; cli.main()"
    )
    (tmp_path / "in.csv").write_text("user\n1\n")
    options = ["--run", demo_run.path, "--model", "sasrec", "--input", "in.csv", "--out", "out.csv"]
    command = [sys.executable, "-c", slow, "recommend", *map(str, options)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143
    assert err.startswith("napo: stopped; nothing is kept; to begin again: napo recommend --run"), err
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]
