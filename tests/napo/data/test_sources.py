"""What a source of data has of its own: the columns of published files, its options, and what they can be."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import data_files
import pandas as pd
import pytest
from table_folder import LOG, Folder, kept, table, titles

from napo.data.prepared import PreparedData


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    "source, name, header",
    [
        ("movielens", "ratings.csv", "userId, movieId, rating, timestamp"),
        ("movielens", "movies.csv", "movieId, title, genres"),
        ("lastfm", "user_taggedartists-timestamps.dat", "userID, artistID, tagID, timestamp"),
        ("lastfm", "artists.dat", "id, name, url, pictureURL"),
    ],
)
def test_a_header_of_a_published_file_is_looked_at(source: str, name: str, header: str, folder: Folder) -> None:
    {"movielens": data_files.movielens_csv, "lastfm": data_files.lastfm}[source](folder.path, data_files.log())
    path = folder.path / name
    head, *rows = lines_of(path)
    path.write_text("".join(["\ufeff", '"' + head.strip() + '"\n' if "," in head else head, *rows]))
    assert kept(folder.prepare(source)) == len(data_files.log())
    path.write_text("".join(rows))
    with pytest.raises(ValueError, match=rf"{name}:1: expected the header {header}; got {rows[0][:1]}"):
        folder.prepare(source)
    first, second, *others = head.strip().replace("\t", ",").split(",")
    path.write_text("".join([",".join([second, first, *others]) + "\n", *rows]))
    with pytest.raises(ValueError, match=r"expected the header .* files of other columns are read as csv"):
        folder.prepare(source)


def test_a_bad_id_of_an_artist_is_a_bad_line(folder: Folder) -> None:
    data_files.lastfm(folder.path, data_files.log())
    with (folder.path / "artists.dat").open("a") as file:
        file.write("\tNobody\tx\tx\n")
    data = folder.prepare("lastfm", max_bad=0.1)
    assert kept(data) == len(data_files.log())
    assert data.meta["files"][1]["bad_examples"] == ["line 42: an empty user or item"]


def test_ratings_of_two_data_sets_are_not_chosen_from(folder: Folder) -> None:
    data_files.movielens_1m(folder.path, data_files.log())
    data_files.movielens_csv(folder.path, data_files.log(seed=1))
    with pytest.raises(ValueError, match=r"expected the ratings of one data set, found ratings.dat, ratings.csv; move"):
        folder.prepare("movielens")
    (folder.path / "ratings.csv").unlink()
    assert kept(folder.prepare("movielens")) == len(data_files.log())


def test_a_rating_that_is_no_number_is_above_no_limit(folder: Folder) -> None:
    data_files.movielens_1m(folder.path, data_files.log())
    path = folder.path / "ratings.dat"
    path.write_text(path.read_text().replace("::3::", "::nan::", 2))
    data = folder.prepare("movielens", min_rating=2)
    assert kept(data) == len(data_files.log()) - 2 and data.meta["files"][0]["bad_lines"] == 2


@pytest.mark.parametrize(
    "source, option", [("movielens", "min_rating"), ("goodreads", "min_rating"), ("steam", "min_hours")]
)
@pytest.mark.parametrize("limit", [math.nan, math.inf, -math.inf])
def test_a_limit_that_is_no_number_is_refused(source: str, option: str, limit: float, folder: Folder) -> None:
    """Nothing is below a NaN, so that nothing was left out."""
    data_files.WRITERS.get(source, data_files.movielens_1m)(folder.path, data_files.log())
    with pytest.raises(ValueError, match=f"^{option}: expected a finite number, got {limit}$"):
        folder.prepare(source, **{option: limit})


@pytest.mark.parametrize(
    "source, name, found, wrong, option",
    [
        ("goodreads", "goodreads_interactions_x.json.gz", '"rating": 3', '"rating": NaN', "min_rating"),
        ("steam", "steam_reviews.json.gz", "u'hours': 1.5", "u'hours': 'nan'", "min_hours"),
    ],
)
def test_what_is_compared_with_a_limit_is_a_number(
    source: str, name: str, found: str, wrong: str, option: str, folder: Folder
) -> None:
    data_files.WRITERS[source](folder.path, data_files.log())
    path = folder.path / name
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(found.encode(), wrong.encode(), 2)))
    data = folder.prepare(source, min_user=1, min_item=1, **{option: 1})
    assert kept(data) == len(data_files.log()) - 2 and data.meta["files"][0]["bad_lines"] == 2


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_titles_may_be_the_ids(kind: str, folder: Folder) -> None:
    log = [(user, f"Film {item}", when) for user, item, when in LOG]
    columns = {"item_id": [f"Film {item}" for item, _ in titles()]}
    if kind == "csv":
        folder.csv(log).write("items.csv", table("item_id", ((name,) for name in columns["item_id"])))
    else:
        rows = [dict(zip(("user_id", "item_id", "timestamp"), row, strict=True)) for row in log]
        folder.jsonl(rows, [{"item_id": name} for name in columns["item_id"]])
        if kind == "parquet":
            (folder.path / "items.jsonl").unlink()
            pd.DataFrame(columns).to_parquet(folder.path / "items.parquet")
    data = folder.prepare(kind, title_column="item_id")
    assert kept(data) == len(LOG) and data.titles[3] == "Film 3"


def test_what_to_do_about_an_encoding_can_be_done(folder: Folder) -> None:
    """The option is that of the file, and where the source has none the file has to be written anew."""
    folder.csv()
    folder.write("items.csv", table("item_id,title", titles()).encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"items\.csv: .* give it with --set items_encoding="):
        folder.prepare()
    assert folder.prepare(items_encoding="utf-16-le").titles[3] == "Title 3"
    with pytest.raises(ValueError, match=r"items\.csv: not utf-16 at line 1 .*BOM.*--set items_encoding="):
        folder.prepare(items_encoding="utf-16")
    folder.write("u.data", table("1", LOG, "\t").encode("utf-16-le"))
    folder.write("u.item", "1|Heat|")
    with pytest.raises(ValueError, match=r"u\.data: .* is the file UTF-16, write it as UTF-8"):
        folder.prepare("movielens")


@pytest.mark.parametrize("encoding", ["base64", "rot13", "hex", "cp037", "undefined", "punycode", "no\x1bsuch"])
def test_an_encoding_that_is_none_of_text_is_refused(encoding: str, folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"^encoding: expected a name like utf-8 or cp1252, got '") as said:
        folder.csv().prepare(encoding=encoding)
    assert "\x1b" not in str(said.value)


RECORD = {"historyList": ["A", "B", "C"], "itemList": ["D", "E", "F"], "trueSelection": "D"}


def test_a_source_without_rows_replaces_nothing(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "val", "test"):
        folder.write(f"{name}.json", json.dumps([RECORD, {**RECORD, "itemList": ["D", "E", "E"]}]))
    assert len(folder.prepare("sdpo-json").train) == 2
    assert "train.json: 1 of 2 itemLists name a title more than once" in caplog.text
    for name in ("train", "val", "test"):
        folder.write(f"{name}.json", json.dumps([{**RECORD, "historyList": []}]))
    with pytest.raises(ValueError, match=r"no row is left: none of its split has 1 items before it \(min_history\)"):
        folder.prepare("sdpo-json")
    folder.write("train.json", "[]")
    with pytest.raises(ValueError, match=r"train\.json: an empty list, expected records"):
        folder.prepare("sdpo-json")
    assert len(PreparedData.load(folder.out).train) == 2
    with pytest.raises(ValueError, match=r"no row to train on: none of its split has 50 items before it"):
        folder.csv().prepare(split="leave-last-out", min_history=50)


def test_two_files_of_items_by_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one beside the interactions was read, whichever was meant."""
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
        data_files.csv(tmp_path / name, data_files.log())
    monkeypatch.chdir(tmp_path / "here")
    there = tmp_path / "there" / "interactions.csv"
    with pytest.raises(ValueError, match=r"items: there are two files items.csv, \S+there\S+ and \S+here\S+; give"):
        data_files.prepare("csv", there, tmp_path / "out", items="items.csv")
    data_files.prepare("csv", there, tmp_path / "out", items=str(tmp_path / "here" / "items.csv"))
    here = Path("interactions.csv").resolve()
    data_files.prepare("csv", here, tmp_path / "out2", items="items.csv")  # one file by two ways
