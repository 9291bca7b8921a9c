"""Readers, filters, splits and candidate lists of prepared data sets."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import data_files
import numpy as np
import pandas as pd
import pytest
from data_files import prepare
from hypothesis import given, settings
from hypothesis import strategies as st

from napo.assets import cache_dir
from napo.data.candidates import TrainingLists, seeded_list
from napo.data.prepared import PreparedData
from napo.data.sources.goodreads import seconds
from napo.data.split_kinds import SPLIT_KINDS
from napo.data.splits import Rows, split_by_time, split_by_user, split_leave_last_out
from napo.data.titles import article_first, disambiguate, split_year
from napo.data.windows import met_items

SHARED = Path(os.environ.get("NAPO_SHARED", Path(__file__).parents[4] / "shared")) / "data"
TABLES = ("interactions", "items", "users", "train", "val", "test")


def write(folder: Path, layout: str, rows: data_files.Log | None = None) -> Path:
    folder.mkdir()
    data_files.WRITERS[layout](folder, data_files.log() if rows is None else rows)
    return folder


@pytest.mark.parametrize("layout", data_files.WRITERS)
def test_every_format_tells_the_same_log(layout: str, tmp_path: Path) -> None:
    source = layout.partition("-")[0]
    data = prepare(source, write(tmp_path / "in", layout), tmp_path / "out", min_user=1, min_item=1, history=4)
    expected: dict[str, list[str]] = {}
    for user, item, _ in data_files.log():
        expected.setdefault(str(user), []).append(f"Title {item}")
    names = pd.read_parquet(tmp_path / "out" / "users.parquet")["source_id"]
    got: dict[str, list[str]] = {}
    for user, item in zip(data.interactions["user_id"], data.interactions["item_id"], strict=True):
        got.setdefault(names[user], []).append(data.titles[item])
    assert got == expected
    for row in data.test.itertuples():
        assert list(row.history) == list(row.full_history[-4:])


@pytest.mark.skipif(not (cache_dir() / "ml-100k").is_dir(), reason="MovieLens-100K is not in the asset cache")
@pytest.mark.parametrize("layout", ["u.data", "ratings.dat", "ratings.csv"])
def test_movielens_100k_in_each_layout_of_grouplens(layout: str, tmp_path: Path) -> None:
    source = cache_dir() / "ml-100k"
    ratings = pd.read_csv(source / "ml-100k.inter", sep="\t", names=["user", "item", "rating", "time"], header=0)
    movies = pd.read_csv(
        source / "ml-100k.item", sep="\t", names=["item", "title", "year", "genres"], header=0, dtype=str
    )
    folder = tmp_path / "in"
    folder.mkdir()
    ratings = ratings.astype({"time": int})
    dated = movies["year"].fillna("").str.fullmatch(r"\d{4}")
    named = movies.assign(
        title=movies["title"].where(~dated, movies["title"] + " (" + movies["year"] + ")"), genres="x"
    )
    named = named[["item", "title", "genres"]]
    if layout == "u.data":
        ratings.to_csv(folder / "u.data", sep="\t", header=False, index=False)
        named.to_csv(folder / "u.item", sep="|", header=False, index=False, encoding="latin-1", quoting=3)
    elif layout == "ratings.csv":
        ratings.to_csv(folder / "ratings.csv", index=False, header=["userId", "movieId", "rating", "timestamp"])
        named.to_csv(folder / "movies.csv", index=False, header=["movieId", "title", "genres"])
    else:
        for name, frame in (("ratings.dat", ratings), ("movies.dat", named)):
            lines = ["::".join(map(str, row)) + "\n" for row in frame.itertuples(index=False)]
            (folder / name).write_text("".join(lines), encoding="latin-1")
    data = prepare("movielens", folder, tmp_path / "out")
    atomic = prepare("recbole", source, tmp_path / "atomic")
    pd.testing.assert_frame_equal(data.interactions, atomic.interactions)
    titles = [[split_year(title)[0] for title in each.titles] for each in (data, atomic)]
    assert titles[0] == titles[1] and data.meta["counts"] == atomic.meta["counts"]
    assert data.meta["counts"]["users"] == 943 and data.num_items == 1349


def test_same_input_and_seed_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "in", "csv")
    for name in ("a", "b"):
        prepare("csv", source, tmp_path / name)
    for name in (*(f"{table}.parquet" for table in TABLES), "dataset.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_full_histories_left_out_of_a_file_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", "csv")
    whole = prepare("csv", source, tmp_path / "whole")
    monkeypatch.setattr("napo.data.writing.MOST_FULL_HISTORY", 0)
    monkeypatch.setattr("napo.data.writing.CHUNK_IDS", 300)
    short = prepare("csv", source, tmp_path / "short")
    assert pd.read_parquet(tmp_path / "short" / "train.parquet")["full_history"].isna().all()
    for split in ("train", "val", "test"):
        for column in ("history", "full_history", "candidates"):
            for one, other in zip(getattr(whole, split)[column], getattr(short, split)[column], strict=True):
                assert list(one) == list(other)


def test_core_drops_until_all_have_enough_and_counts_it(tmp_path: Path) -> None:
    rows = data_files.log()
    rows += [(99, item, data_files.START + item) for item in range(3)]
    data = prepare("csv", write(tmp_path / "in", "csv", rows), tmp_path / "out", min_user=5, min_item=8)
    log = data.interactions
    assert log["user_id"].value_counts().min() >= 5
    assert log["item_id"].value_counts().min() >= 8
    steps = data.meta["steps"]
    assert steps[0]["interactions"] == len(rows) and steps[-1]["interactions"] == len(log)
    assert sum(step["dropped"] for step in steps) == len(rows) - len(log)


# --- bad input ---


@pytest.mark.parametrize("share, fails", [(0.002, False), (0.3, True)])
def test_bad_lines_are_counted_up_to_a_share(share: float, fails: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", "movielens-100k")
    lines = (folder / "u.data").read_text().splitlines()
    bad = max(1, int(len(lines) * share))
    lines[:bad] = ["spam"] * bad
    (folder / "u.data").write_text("\n".join(lines) + "\n")
    if fails:
        with pytest.raises(ValueError, match=r"u\.data: 135 of 450 lines are bad.*line 1"):
            prepare("movielens", folder, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp"))
    else:
        report = prepare("movielens", folder, tmp_path / "out").meta["files"][0]
        assert report["bad_lines"] == 1 and report["bad_examples"][0].startswith("line 1:")


def test_a_cut_gz_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", "goodreads")
    file = folder / "goodreads_interactions_x.json.gz"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"goodreads_interactions_x\.json\.gz: the compressed file is cut short"):
        prepare("goodreads", folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_cut_line_nul_bytes_and_mixed_encodings(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", "jsonl")
    with open(folder / "interactions.jsonl", "ab") as file:
        file.write(b'{"user_id": 1, "item\0_id": 3}\n{"user_id": 1, "ite')
    with open(folder / "items.jsonl", "ab") as file:
        file.write('{"item_id": 90, "title": "Café"}\n'.encode())
        file.write('{"item_id": 91, "title": "Café Noir"}\n'.encode("latin-1"))
    rows = [(1, 90, data_files.START), (1, 91, data_files.START + 1)]
    with open(folder / "interactions.jsonl", "ab") as file:
        file.write(("\n" + "".join(f'{{"user_id":{u},"item_id":{i},"timestamp":{t}}}\n' for u, i, t in rows)).encode())
    data = prepare("jsonl", folder, tmp_path / "out", min_user=1, min_item=1)
    log, items = data.meta["files"]
    assert log["bad_lines"] == 2 and items["cp1252_lines"] == 1
    assert {"Café", "Café Noir"} <= set(data.titles)


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("nonsense", {}, "source: expected one of lastfm"),
        ("csv", {"min_users": 3}, "min_users: no option of the source csv"),
        ("csv", {"split": "random"}, "split: expected one of user"),
        ("llara", {"noun": "Films"}, "noun: expected one of Movies"),
        ("csv", {"user_column": "who"}, "no column who"),
        ("csv", {"min_user": 100}, "no interaction of 450 is left"),
        ("csv", {"test_users": 20, "val_users": 20}, "leave none to train on"),
        ("csv", {"test_users": float("inf")}, "^test_users: expected a finite number, got inf$"),
        ("csv", {"val_users": float("nan")}, "^val_users: expected a finite number, got nan$"),
        ("csv", {"val_users": 2.5}, r"^val_users: expected a share .* number of users, got 2\.5"),
        ("csv", {"seed": -1}, r"^seed: expected at least 0, got -1"),
        ("csv", {"candidates": 39}, r"ask for fewer candidates \(at least 2\), or give"),
        ("goodreads", {}, "expected one file like goodreads_interactions"),
        ("lastfm", {}, "expected one file like user_taggedartists-timestamps.dat, found 0"),
    ],
)
def test_errors_say_what_to_do(source: str, options: dict, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", "csv")
    with pytest.raises(ValueError, match=message):
        prepare(source, folder, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_options_that_change_nothing_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "in", "csv")
    prepare("csv", folder, tmp_path / "out", split="leave-last-out", min_user=2, seed=2**70)
    prepare("csv", folder, tmp_path / "out", split="time", test_users=0.2, rows_per_user=2)
    assert "without effect" not in caplog.text
    prepare("csv", folder, tmp_path / "out", split="leave-last-out", test_users=0.2, rows_per_user=2)
    assert "test_users, rows_per_user: without effect with the split leave-last-out" in caplog.text
    record = {"historyList": ["A", "B", "C"], "itemList": ["D", "E"], "trueSelection": "D"}
    for name in ("train", "val", "test"):
        (folder / f"{name}.json").write_text(json.dumps([record]))
    prepare("sdpo-json", folder, tmp_path / "out", min_user=2, split="time", history=4)
    assert "split, min_user: without effect with the source sdpo-json" in caplog.text


def test_a_data_set_of_other_options_is_replaced_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "in", "csv")
    for _ in range(2):
        prepare("csv", folder, tmp_path / "out")
    assert "replaced" not in caplog.text
    prepare("csv", folder, tmp_path / "out", quote='"')  # the default
    assert "replaced" not in caplog.text
    prepare("csv", folder, tmp_path / "out", seed=1)
    assert "out: replaced a data set that was made with other options (seed 0 -> 1)" in caplog.text


def test_a_file_with_a_header_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", "csv")
    header = (folder / "interactions.csv").read_text().splitlines()[0]
    (folder / "interactions.csv").write_text(header + "\n")
    with pytest.raises(ValueError, match=r"no interaction was read \(its file has none\)"):
        prepare("csv", folder, tmp_path / "out")


def test_what_keeps_every_interaction_away_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", next(name for name in data_files.WRITERS if name.startswith("movielens")))
    with pytest.raises(ValueError, match=r"no interaction was read \(rating below 6: \d+\)"):
        prepare("movielens", folder, tmp_path / "out", min_rating=6.0)


def test_an_output_folder_with_other_things_in_it_is_not_touched(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", "csv")
    with pytest.raises(ValueError, match="is no prepared data set"):
        prepare("csv", folder, folder)
    assert (folder / "items.csv").is_file()


# --- titles, dates ---


def test_titles() -> None:
    assert split_year("Heat (1995)") == ("Heat", "1995") and split_year("1984") == ("1984", "")
    assert article_first("Matrix, The") == "The Matrix"
    assert article_first("Seventh Seal, The (Sjunde inseglet, Det)") == "The Seventh Seal (Det Sjunde inseglet)"
    assert article_first("Avventura, L' (Adventure, The)") == "L'Avventura (The Adventure)"
    titles, repeated = disambiguate(["A", "B", "A", "A", "A (2000)"], ["1990", "1991", "2000", "1990", ""])
    assert titles == ["A (1990)", "B", "A (2000) (2)", "A (1990) (2)", "A (2000)"] and repeated == ["A"]


@given(st.datetimes(pd.Timestamp(1905, 1, 1), pd.Timestamp(2100, 1, 1)), st.integers(-12 * 60, 12 * 60))
@settings(max_examples=100, deadline=None)
def test_goodreads_dates(moment: object, zone: int) -> None:
    stamp = pd.Timestamp(moment).floor("s")
    text = f"{stamp:%a %b %d %H:%M:%S} {'-' if zone < 0 else '+'}{abs(zone) // 60:02d}{abs(zone) % 60:02d} {stamp.year}"
    assert seconds(text) == (stamp - pd.Timestamp(0)) // pd.Timedelta(seconds=1) - 60 * zone


# --- candidates, splits ---


@given(st.integers(0, 2**31), st.integers(25, 80), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_candidate_lists(draw: int, num_items: int, seed: int) -> None:
    rng = np.random.default_rng(draw)
    own = rng.permutation(num_items)[: num_items - 20]
    positions = np.arange(len(own))
    # A user who met nearly all, and one who met few items.
    other = own[:4]
    starts = np.array([0, len(own), len(own) + len(other)])
    rows = Rows(np.arange(2), np.zeros(2, np.int64), np.diff(starts))
    both = TrainingLists(np.append(own, other), starts, num_items, 20, seed).draw(rows)
    drawn = both[: len(own)]
    for place, made in enumerate(both[len(own) :].tolist()):
        assert len(set(made)) == 20 and made.count(other[place]) == 1
        assert not set(made) & set(other[:place].tolist())
    for position, made in zip(positions, drawn.tolist(), strict=True):
        past, target = own[:position].tolist(), int(own[position])
        for one in (made, seeded_list(past, target, num_items, seed=seed)):
            assert len(set(one)) == 20 and one.count(target) == 1
            assert not set(one) & set(past) and min(one) >= 0 and max(one) < num_items
        # The rule as the field writes it down.
        pool = [item for item in range(num_items) if item not in past and item != target]
        random.seed(target)
        wanted = [*random.sample(pool, 19), target]
        random.seed(target)
        random.shuffle(wanted)
        assert seeded_list(past, target, num_items) == wanted


@given(st.lists(st.integers(1, 12), min_size=4, max_size=30), st.integers(1, 4), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_splits_do_not_leak(lengths: list[int], min_history: int, per_user: int, seed: int) -> None:
    starts = np.append(0, np.cumsum(lengths))
    rng = np.random.default_rng(seed)
    times = np.concatenate([np.sort(rng.integers(0, 20, length)) for length in lengths])
    made = {"last": split_leave_last_out(starts, min_history=min_history)}
    made["time"] = split_by_time(
        starts, times, min_history=min_history, val_share=0.2, test_share=0.2, rows_per_user=per_user
    )
    if sum(length > min_history for length in lengths) > 3:
        made["user"] = split_by_user(
            starts, min_history=min_history, val_users=1, test_users=1, rows_per_user=per_user, seed=seed
        )
        users = {name: set(rows.user.tolist()) for name, rows in made["user"].items()}
        assert len(users["val"]) == len(users["test"]) == 1
        assert not users["train"] & (users["val"] | users["test"]) and users["val"] != users["test"]
    for kind, split in made.items():
        targets = {name: starts[rows.user] + rows.position for name, rows in split.items()}
        assert len(set(np.concatenate(list(targets.values())))) == sum(map(len, targets.values())), (
            "a target in two splits"
        )
        for rows in split.values():
            assert (rows.position >= min_history).all() and (rows.position < np.diff(starts)[rows.user]).all()
        if kind == "time":
            for early, late in (("train", "val"), ("val", "test"), ("train", "test")):
                if len(targets[early]) and len(targets[late]):
                    assert times[targets[early]].max() < times[targets[late]].min()
        if kind == "last":
            for name, behind in (("val", 2), ("test", 1)):
                assert (np.diff(starts)[split[name].user] - split[name].position == behind).all()


@pytest.mark.parametrize("split", SPLIT_KINDS)
def test_training_sequences_hold_no_later_target(split: str, tmp_path: Path) -> None:
    data = prepare("csv", write(tmp_path / "in", "csv"), tmp_path / "out", split=split, rows_per_user=0)
    known = {user: set() for user in data.interactions["user_id"]}
    for user, past, last in zip(data.train["user_id"], data.train["full_history"], data.train["next"], strict=True):
        known[user] |= {*past, last}
    assert len(data.training_sequences()) == data.train["user_id"].nunique()
    # Negatives are drawn from all other items, those that are held out among them.
    assert met_items(data) == {user: items for user, items in known.items() if items}
    for rows in (data.val, data.test):
        assert len(rows)
        for row in rows.itertuples():
            assert row.next not in known[row.user_id] and row.next not in row.full_history
            assert list(row.candidates).count(row.next) == 1


# --- the paper's files ---


@pytest.mark.skipif(not (SHARED / "lastfm").is_dir(), reason="needs the LastFM files in shared/data (NAPO_SHARED)")
def test_lastfm_of_the_paper(tmp_path: Path) -> None:
    data = prepare("llara", SHARED / "lastfm", tmp_path / "out", noun="Artists")
    titles = data.titles
    wanted = json.loads((SHARED / "lastfm" / "lastfm-val.json").read_text())
    assert len(data.val) == len(wanted) == 2767 and len(data.test) == 2495
    for row, record in zip(data.val.itertuples(), wanted, strict=True):
        assert [titles[item] for item in row.candidates] == record["itemList"]
        assert titles[row.next] == record["trueSelection"]
        assert "::".join(titles[item] for item in row.history) == record["historyList"]
    counts = data.meta["counts"]
    assert counts["rows_read"] == {"train": 50_800, "val": 3133, "test": 2861} and counts["items"] == 4606
    assert counts["users_by_split"] == {"train": 976, "val": 122, "test": 122} and data.has_users


@pytest.mark.skipif(not (SHARED / "steam").is_dir(), reason="needs the Steam files in shared/data (NAPO_SHARED)")
def test_users_that_cannot_be_known_are_null(tmp_path: Path) -> None:
    data = prepare("llara", SHARED / "steam", tmp_path / "out", noun="Games")
    assert not data.has_users and data.train["user_id"].isna().all() and data.meta["has_users"] is False
    assert len(data.training_sequences()) == len(data.train)
    assert len(PreparedData.load(tmp_path / "out").test) == 0


def test_sdpo_json_brings_its_lists(tmp_path: Path) -> None:
    records = [
        {"historyList": "A::B::C", "itemList": ["X", "D", "Y"], "trueSelection": "D"},
        {"historyList": ["B", "C", "X"], "itemList": ["Y", "A", "D"], "trueSelection": "Y"},
    ]
    file = tmp_path / "x-val.json"
    file.write_text(json.dumps(records))
    data = prepare("sdpo-json", file, tmp_path / "out")
    named = [[data.titles[item] for item in row.candidates] for row in data.val.itertuples()]
    assert named == [record["itemList"] for record in records]
    assert [data.titles[item] for item in data.val["history"][0]] == ["A", "B", "C"]


def test_steam_lines_are_literals_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with gzip.open(folder / "steam_reviews.json.gz", "wt") as file:
        for user, item, _ in data_files.log():
            file.write(f"{{u'username': u'{user}', 'product_id': '{item}', 'date': '2017-01-01', 'hours': 1.5}}\n")
        file.write("__import__('os').system('touch /tmp/napo-was-here')\n")
    with gzip.open(folder / "steam_games.json.gz", "wt") as file:
        file.writelines(f"{{u'id': u'{i}', u'app_name': u'Title {i}'}}\n" for i in range(data_files.ITEMS))
    data = prepare("steam", folder, tmp_path / "out", min_user=5, min_item=5)
    assert data.meta["files"][0]["bad_lines"] == 1 and not Path("/tmp/napo-was-here").exists()
    first = data.interactions[data.interactions["user_id"] == 0]["item_id"]
    kept = [f"Title {item}" for user, item, _ in data_files.log() if user == 0 and f"Title {item}" in data.titles]
    assert [data.titles[item] for item in first] == kept  # days tie: the order of the file
