"""Formats of real files: quotes, delimiters, encodings, columns and file names.

Each input is the smallest that once gave a wrong result without a word.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from data_files import prepare
from table_folder import ALL, ITEMS, LOG, RIGHT, Folder, kept, sequence, table, titles

from napo.data.prepared import PreparedData

# --- quoting, delimiters, encodings, columns ---

QUOTED = {
    3: '"Weird Al" Yankovic',
    4: 'The "Burbs',
    5: "Tab\tbed",
    6: "Two\nlines",
    7: 'He said: ""',
    8: "a,b;c|d",
    9: "'Til Tuesday",
    10: '"',
    11: 'ends with a "',
    12: "three\n\nlines\r\nof it",
    13: '"Heroes"',
}


def as_pandas_writes(path: Path, sep: str, heads: tuple[list[str], list[str]], **more: Any) -> None:
    names = [QUOTED.get(item, title) for item, title in titles()]
    pd.DataFrame(LOG, columns=heads[0]).to_csv(path.parent / path.name, sep=sep, index=False)
    frame = pd.DataFrame({heads[1][0]: range(ITEMS), heads[1][1]: names, "year": 1990})
    target = {"interactions.csv": "items.csv", "interactions.tsv": "items.tsv", "x.inter": "x.item"}[path.name]
    frame.to_csv(path.parent / target, sep=sep, index=False, **more)


@pytest.mark.parametrize("name, source, sep", [("interactions.csv", "csv", ","), ("interactions.csv", "csv", ";"),
    ("interactions.csv", "csv", "|"), ("interactions.csv", "csv", "\t"), ("interactions.tsv", "csv", "\t"),
    ("x.inter", "recbole", "\t")])  # fmt: skip
@pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
def test_titles_as_pandas_writes_them(name: str, source: str, sep: str, lineterminator: str, folder: Folder) -> None:
    heads = (["user_id", "item_id", "timestamp"], ["item_id", "title"])
    if source == "recbole":
        heads = (["user_id:token", "item_id:token", "timestamp:float"], ["item_id:token", "title:token_seq"])
    as_pandas_writes(folder.path / name, sep, heads, lineterminator=lineterminator)
    data = folder.prepare(source)
    got = dict(zip(data.items["source_id"].astype(int), data.titles, strict=True))
    assert {item: got[item] for item in QUOTED} == {item: " ".join(title.split()) for item, title in QUOTED.items()}
    assert [file["bad_lines"] for file in data.meta["files"]] == [0, 0]
    assert data.meta["files"][1]["delimiter"] == sep and data.meta["files"][1]["joined_lines"] > 0


def test_titles_that_were_written_without_quoting(folder: Folder) -> None:
    raw = {3: '"Weird Al" Yankovic', 4: 'The "Burbs', 5: '"Open', 6: 'a 12" record', 7: '"', 8: 'x "y" z', 9: '""'}
    data = folder.csv(items=[(i, raw.get(i, t)) for i, t in titles()], suffix="tsv", between="\t").prepare()
    assert data.titles[:3] == ["Title 0", "Title 1", "Title 2"] and data.num_items == ITEMS - 1  # "" is no title
    assert {i: data.titles[i] for i in range(3, 9)} == {i: raw[i] for i in range(3, 9)}
    assert data.titles[9:11] == ["Title 10", "Title 11"]
    bare = folder.prepare(quote="none")
    assert bare.titles[9] == '""'


def test_titles_with_quotes_behind_a_backslash(folder: Folder) -> None:
    """As Spark writes them."""
    raw = {3: '"The \\"Burbs\\", again"', 4: '"\\"Heroes\\""', 5: '"C:\\\\ and \\"D\\""', 6: '"in \\ out"'}
    data = folder.csv(items=[(item, raw.get(item, title)) for item, title in titles()]).prepare()
    assert data.titles[3:7] == ['The "Burbs", again', '"Heroes"', 'C:\\ and "D"', "in \\ out"]
    assert data.num_items == ITEMS


def test_utf_16_without_a_mark_is_named(folder: Folder) -> None:
    folder.csv()
    path = folder.path / "interactions.csv"
    path.write_bytes(path.read_text().encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"lines are bad, .*is the file UTF-16, give it with --set encoding="):
        folder.prepare()


def test_a_quote_without_an_end_swallows_no_lines(folder: Folder) -> None:
    rows = [(item, f'"{title}' if item == 3 else title) for item, title in titles()]
    data = folder.csv(items=rows).prepare()
    assert data.num_items == ITEMS and data.titles[3] == '"Title 3' and data.titles[4] == "Title 4"


def test_many_quotes_without_an_end_take_linear_time(folder: Folder) -> None:
    folder.csv()
    folder.write("items.csv", "item_id,title\n" + "".join(f'"{n} {"x" * 600}\n' for n in range(40_000)))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"items\.csv: \d+ of \d+ lines are bad"):
        folder.prepare()
    assert time.monotonic() - began < 20


def test_columns_and_formats_of_each_file_on_its_own(folder: Folder) -> None:
    folder.write("interactions.csv", table("who;what;when", LOG, ";"))
    folder.write("items.csv", table("id|called", titles(), "|").encode("utf-16"))
    named = {"user_column": "who", "item_column": "what", "time_column": "when"}
    data = folder.prepare(**named, items_item_column="id", title_column="called")
    assert kept(data) == len(LOG) and data.titles[3] == "Title 3"
    said = r"interactions\.csv: no column user_id, item_id, timestamp; it has who, what, when; name yours with "
    said += r"--set user_column=\.\.\. --set item_column=\.\.\. --set time_column=\.\.\.$"
    with pytest.raises(ValueError, match=said):
        folder.prepare()
    said = r"items\.csv: no column what, title; it has id, called; .* --set items_item_column=... --set title_column"
    with pytest.raises(ValueError, match=said):
        folder.prepare(**named)
    with pytest.raises(ValueError, match=r"user_colum: no option of the source csv.*; did you mean user_column\?$"):
        folder.prepare(user_colum="who")
    with pytest.raises(ValueError, match=r"date_format: expected codes of strptime, .* got 'DD/MM/YYYY'"):
        folder.prepare(**named, date_format="DD/MM/YYYY")
    with pytest.raises(ValueError, match="delimiter: expected a character or two"):
        folder.prepare(**named, delimiter="comma")
    with pytest.raises(ValueError, match="encoding: expected a name like utf-8"):
        folder.prepare(**named, encoding="utf-nine")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_columns_twice_are_refused(suffix: str, folder: Folder) -> None:
    folder.csv()
    folder.write("items.csv", table("item_id,title,title", [(*row, "other") for row in titles()]))
    with pytest.raises(ValueError, match=r"items\.csv: 2 columns title; it has item_id, title, title"):
        folder.prepare()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "shift_jis"])
def test_encodings_by_mark_or_by_name(encoding: str, folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    names = [(item, f"東京 {item}") for item, _ in titles()]
    folder.csv()
    folder.write("items.csv", table("item_id,title", names).encode(encoding))
    option = {} if encoding in ("utf-8", "utf-8-sig", "utf-16") else {"items_encoding": encoding}
    data = folder.prepare(**option)
    assert data.titles[3] == "東京 3" and not caplog.text


def test_windows_text_is_cp1252_and_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    names = titles()
    names[3], names[4] = (3, "“Café” ‰ €5"), (4, "Ünïcode")
    folder.csv()
    text = table("item_id,title", names).encode("cp1252")
    folder.write("items.csv", text.replace("Ünïcode".encode("cp1252"), "Ünïcode".encode()))
    data = folder.prepare()
    assert data.titles[3:5] == ["“Café” ‰ €5", "Ünïcode"] and data.meta["files"][1]["cp1252_lines"] == 1
    assert "items.csv: 1 of 20 lines are not UTF-8 and were read as cp1252" in caplog.text
    strict = folder.prepare(items_encoding="utf-8", max_bad=0.1)
    assert strict.meta["files"][1]["bad_lines"] == 1


def test_lines_that_end_as_on_an_old_mac_are_said(folder: Folder) -> None:
    folder.csv()
    folder.write("items.csv", table("item_id,title", titles(200)).replace("\n", "\r"))
    with pytest.raises(ValueError, match=r"items\.csv: lines end with CR alone"):
        folder.prepare()


# --- names as meanings ---


def sdpo(folder: Folder, name: str, rows: int, history: Any = None) -> None:
    records = [
        {
            "historyList": history(at) if history else [f"Title {at + k}" for k in range(4)],
            "itemList": [f"Title {at + k}" for k in range(4, 9)],
            "trueSelection": f"Title {at + 6}",
        }
        for at in range(rows)
    ]
    folder.write(name, json.dumps(records))


@pytest.mark.parametrize(
    "names",
    [
        ("retrieval-train.json", "retrieval-val.json", "retrieval-test.json"),
        ("x_train.json", "x_valid.json", "x_test.json"),
        ("latestTrain.json", "latestVal.json", "latestTest.json"),
        ("training2.json", "validation2.json", "testing2.json"),
    ],
)
def test_a_split_is_a_whole_word_of_the_name(names: tuple, folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    for name, rows in zip(names, (20, 5, 7), strict=True):
        sdpo(folder, name, rows)
    sdpo(folder, "trainer.json", 3)
    data = folder.prepare("sdpo-json")
    assert data.meta["counts"]["rows"] == {"train": 20, "val": 5, "test": 7}
    assert "left out, as no split is in their names: trainer.json" in caplog.text


def test_a_name_with_two_splits_is_refused(folder: Folder) -> None:
    sdpo(folder, "train-and-test.json", 3)
    with pytest.raises(ValueError, match=r"expected one of train, val and test in its name, found test, train"):
        folder.prepare("sdpo-json")


def test_titles_that_hold_what_joins_a_history(folder: Folder) -> None:
    knossos = "Depths of Fear :: Knossos"
    records = [
        {
            "historyList": f"Game {at}::{knossos}::A::B::Game {at + 1}",
            "itemList": [knossos, "A::B", f"Game {at + 2}"],
            "trueSelection": f"Game {at + 2}",
        }
        for at in range(20)
    ]
    for split in ("train", "val", "test"):
        folder.write(f"x-{split}.json", json.dumps(records))
    data = folder.prepare("sdpo-json")
    assert [data.titles[item] for item in data.train["history"][0]] == ["Game 0", knossos, "A::B", "Game 1"]
    assert "Depths of Fear" not in data.titles and "A" not in data.titles


def test_html_entities_are_what_they_stand_for(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    names = titles()
    names[3], names[4], names[5] = (3, "Mount &amp; Blade"), (4, "AT&T; R&D &copy"), (5, "Caf&#233; &#x263A;")
    data = folder.csv(items=names).prepare()
    assert data.titles[3:6] == ["Mount & Blade", "AT&T; R&D &copy", "Café ☺"]
    assert data.meta["mended_titles"] == 2 and "2 titles are composed anew" in caplog.text


def recbole_files(folder: Folder, inter: str, item: str, names: tuple = ("x.inter", "x.item")) -> None:
    folder.write(names[0], table(inter, LOG, "\t"))
    folder.write(names[1], table(item, titles(), "\t"))


@pytest.mark.parametrize(
    "inter, item, options",
    [
        ("user_id:token\tproduct_id:token\ttimestamp:float", "product_id:token\tapp_name:token", {}),
        ("customer_id:token\tarticle_id:token\tt_dat:float", "article_id:token\tprod_name:token_seq", {}),
        (
            "user_id:token\tproduct_id:token\ttimestamp:float",
            "product_id:token\tcalled:token_seq",
            {"item_column": "product_id", "title_column": "called"},
        ),
    ],
)
def test_recbole_columns_of_other_names(
    inter: str, item: str, options: dict, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    recbole_files(folder, inter, item)
    assert kept(folder.prepare("recbole", **options)) == len(LOG)
    user, chosen, when = (name.partition(":")[0] for name in inter.split("\t"))
    told = f"x.inter: taken by their types: {user} as user, {chosen} as item, {when} as time;"
    assert (told in caplog.text) == (not options)


def test_a_rating_of_recbole_is_no_time(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    recbole_files(folder, "user_id:token\titem_id:token\trating:float", "item_id:token\ttitle:token_seq")
    with pytest.raises(ValueError, match=r"x\.inter:1: no column timestamp; it has user_id, item_id, rating;"):
        folder.prepare("recbole")
    assert kept(folder.prepare("recbole", time_column="rating")) == len(LOG)
    folder.recbole().prepare("recbole")
    assert "by their types" not in caplog.text


def test_recbole_columns_that_cannot_be_known_are_asked_for(folder: Folder) -> None:
    recbole_files(folder, "a:token\tb:token\tc:float", "b:token\tcalled:token_seq")
    said = r"x\.item:1: no column movie_title \(nor .*; it has b, called; name yours with --set title_column="
    with pytest.raises(ValueError, match=said):
        folder.prepare("recbole")
    recbole_files(folder, "a:token\tb:token\tc:token", "b:token\ttitle:token_seq")
    said = (
        r"x\.inter:1: no column user_id, timestamp; it has a, b, c; name yours with "
        r"--set user_column=\.\.\. --set time_column=\.\.\.$"
    )
    with pytest.raises(ValueError, match=said):
        folder.prepare("recbole")


def test_recbole_files_that_come_split(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    head = "user_id:token\titem_id:token\ttimestamp:float"
    for part, rows in (("train", LOG[:60]), ("valid", LOG[60:80]), ("test", LOG[80:])):
        folder.write(f"ml.{part}.inter", table(head, rows, "\t"))
    folder.write("ml.item", table("item_id:token\tmovie_title:token_seq", titles(), "\t"))
    assert kept(folder.prepare("recbole")) == len(LOG)
    assert "ml.train.inter, ml.valid.inter, ml.test.inter are read as one log" in caplog.text
    one = prepare("recbole", folder.path / "ml.train.inter", folder.out, **ALL)
    assert kept(one) == 60
    assert "left out" not in caplog.text
    folder.write("ml.train.item", table("item_id:token\tmovie_title:token_seq", titles(), "\t"))
    folder.prepare("recbole")
    assert "titles are read from ml.train.item, and ml.item beside it is left out; if that is wrong, move" in (
        caplog.text
    )


def test_a_whole_recbole_file_is_read_and_its_parts_are_not(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.recbole()
    head = "user_id:token\titem_id:token\ttimestamp:float"
    for part, rows in (("train", LOG[:60]), ("test", LOG[60:80])):
        folder.write(f"x.{part}.inter", table(head, rows, "\t"))
    assert kept(folder.prepare("recbole")) == len(LOG)
    assert "x.inter is read, and x.train.inter, x.test.inter beside it are left out, as parts of the same log;" in (
        caplog.text
    )
    caplog.clear()
    assert kept(prepare("recbole", folder.path / "x.inter", folder.out, **ALL)) == len(LOG)
    assert "left out" not in caplog.text  # it was named


@pytest.mark.parametrize("other", ["y.inter", "y.train.inter", "x.part1.inter"])
def test_recbole_files_of_several_data_sets_are_not_chosen_from(other: str, folder: Folder) -> None:
    folder.recbole().write(other, table("user_id:token\titem_id:token\ttimestamp:float", LOG, "\t"))
    found = re.escape(", ".join(sorted(("x.inter", other))))
    with pytest.raises(ValueError, match=rf"expected the \.inter files of one data set, found {found}; give the file"):
        folder.prepare("recbole")


def test_parquet_as_a_folder_of_parts(folder: Folder) -> None:
    rows = pd.DataFrame([(u, i, 0) for u, i, _ in LOG], columns=["user_id", "item_id", "timestamp"])
    (folder.path / "interactions.parquet" / "day=1").mkdir(parents=True)
    (folder.path / "items.parquet").mkdir()
    for name, part in (("part-00001", rows[50:]), ("day=1/part-00000", rows[:50])):
        part.to_parquet(folder.path / "interactions.parquet" / f"{name}.parquet")
    folder.write("interactions.parquet/_SUCCESS", "")
    folder.write("interactions.parquet/.part.parquet", "no part")
    (folder.path / "interactions.parquet" / "_temporary").mkdir()
    folder.write("interactions.parquet/_temporary/part-00002.parquet", "what an unfinished job of Spark leaves")
    pd.DataFrame(titles(), columns=["item_id", "title"]).to_parquet(folder.path / "items.parquet" / "0.parquet")
    data = folder.prepare("parquet")
    assert sequence(data) == RIGHT and [file["rows"] for file in data.meta["files"]] == [50, 46, 19]
    (folder.path / "items.parquet" / "0.parquet").unlink()
    with pytest.raises(ValueError, match=r"items\.parquet: a folder without \.parquet files"):
        folder.prepare("parquet")


# --- what is no file ---

PIPES = [
    ("csv", "interactions.csv", ""),
    ("csv", "items.csv", ""),
    ("csv", "one.csv", "one.csv"),
    ("parquet", "interactions.parquet/part.parquet", ""),
    ("recbole", "x.inter", ""),
    ("recbole", "x.item", "x.inter"),
    ("recbole", "x.inter", "x.inter"),
    ("movielens", "ratings.csv", ""),
    ("lastfm", "user_taggedartists-timestamps.dat", ""),
    ("goodreads", "goodreads_interactions_x.json", ""),
    ("llara", "train_data.df", ""),
    ("sdpo-json", "x-train.json", ""),
    ("sdpo-json", "x-train.json", "x-train.json"),
]


@pytest.mark.parametrize("source, name, given", PIPES)
def test_a_pipe_is_named_and_not_waited_for(source: str, name: str, given: str, folder: Folder) -> None:
    """Readers said that another file was missing, or waited for ever."""
    folder.csv().recbole()
    if source == "parquet":
        (folder.path / "interactions.csv").unlink()
    path = folder.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: a pipe, socket or device; expected a file"):
        prepare(source, folder.path / given, folder.out, **ALL)


def test_a_pipe_of_items_is_named(folder: Folder) -> None:
    os.mkfifo(folder.csv().path / "names.csv")
    with pytest.raises(ValueError, match=r"names\.csv: a pipe"):
        prepare("csv", folder.path / "interactions.csv", folder.out, **ALL, items="names.csv")


@pytest.mark.parametrize("name", ["dataset.json", "items.parquet"])
def test_a_pipe_in_a_prepared_folder_is_named(name: str, folder: Folder) -> None:
    data = folder.csv().prepare()
    (data.path / name).unlink()
    os.mkfifo(data.path / name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: a pipe"):
        print(PreparedData.load(data.path).titles)


def test_rows_without_any_text_are_empty_lines(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    """Spreadsheets write one for each row that once held something."""
    folder.csv()
    for name, empty in (("interactions.csv", ",,\r\n , ,\r\n"), ("items.csv", ',\n"",\n  \n')):
        text = (folder.path / name).read_text()
        folder.write(name, text + empty)
    data = folder.prepare()
    assert data.titles == [title for _, title in titles()] and not caplog.text
    assert [file["bad_lines"] for file in data.meta["files"]] == [0, 0]


@pytest.mark.parametrize("told", ["sep=;", "\ufeffsep=;", '"SEP=;"'])
def test_a_line_that_tells_spreadsheets_the_delimiter(told: str, folder: Folder) -> None:
    folder.csv().write(
        "items.csv", f"{told}\r\nitem_id;title\r\n" + "".join(f"{i};{title}\r\n" for i, title in titles())
    )
    assert folder.prepare().titles == [title for _, title in titles()]


def test_a_json_array_in_place_of_lines_is_told_how_lines_are(folder: Folder) -> None:
    folder.jsonl([], []).write("interactions.jsonl", '[{"user_id": 1, "item_id": 2, "timestamp": 3}]\n')
    with pytest.raises(ValueError, match="line 1: expected one object a line, got list"):
        folder.prepare("jsonl")
