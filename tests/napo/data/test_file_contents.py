"""What real files hold, and what becomes of it: exact times, one spelling of an id, text that is text, quotes,
encodings, names. Each input is the smallest that once gave a wrong result without a word."""

from __future__ import annotations

import datetime
import gzip
import json
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import prepare
from hypothesis import given
from hypothesis import strategies as st

from napo import cli
from napo.data import lines
from napo.data.interactions import Log, key
from napo.data.prepare import summary
from napo.data.prepared import PreparedData
from napo.data.texts import clean_title, shown
from napo.data.times import LIMB, TimeReader, Times, stamps
from napo.data.titles import disambiguate

ALL = {"min_user": 1, "min_item": 1, "candidates": 2, "min_history": 1}
USERS, LENGTH = 8, 12
ITEMS = USERS + LENGTH - 1
LOG = [(user, item, item) for user in range(USERS) for item in range(user, user + LENGTH)]


def titles(count: int = ITEMS) -> list[tuple[int, str]]:
    return [(item, f"Title {item}") for item in range(count)]


def table(head: str, rows: Any, between: str = ",") -> str:
    return "\n".join([head, *(between.join(map(str, row)) for row in rows)]) + "\n"


class Folder:
    """A folder of two files, and what becomes of it."""

    def __init__(self, path: Path) -> None:
        self.path = path / "in"
        self.out = path / "out"
        self.path.mkdir()

    def csv(self, log: Any = LOG, items: Any = None, *, suffix: str = "csv", between: str = ",") -> Folder:
        head = between.join(("user_id", "item_id", "timestamp"))
        self.write(f"interactions.{suffix}", table(head, log, between))
        self.write(f"items.{suffix}", table(f"item_id{between}title", titles() if items is None else items, between))
        return self

    def jsonl(self, log: Any, items: Any) -> Folder:
        for name, rows in (("interactions", log), ("items", items)):
            self.write(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return self

    def parquet(self, log: dict, items: dict) -> Folder:
        for name, columns in (("interactions", log), ("items", items)):
            pq.write_table(pa.table(columns), self.path / f"{name}.parquet")
        return self

    def recbole(self, log: Any = LOG, items: Any = None, head: str = "item_id:token\ttitle:token_seq") -> Folder:
        self.write("x.inter", table("user_id:token\titem_id:token\ttimestamp:float", log, "\t"))
        self.write("x.item", table(head, titles() if items is None else items, "\t"))
        return self

    def write(self, name: str, text: str | bytes) -> None:
        (self.path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    def prepare(self, source: str = "csv", **options: Any) -> PreparedData:
        return prepare(source, self.path, self.out, **{**ALL, **options})


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def kept(data: PreparedData) -> int:
    return len(data.interactions)


def sequence(data: PreparedData, user: int = 0) -> list[str]:
    log = data.interactions
    return [data.titles[item] for item in log["item_id"][log["user_id"] == user]]


def users(data: PreparedData) -> list[str]:
    return pd.read_parquet(data.path / "users.parquet")["source_id"].tolist()


# --- times ---

RIGHT = [f"Title {item}" for item in range(LENGTH)]
NEWEST_FIRST = [(user, item, item) for user, item, _ in reversed(LOG)][::-1][::-1]
TEXTS: dict[str, Callable[[int], str]] = {
    "fractions": lambda k: f"{1_600_000_000 + k / 100:.2f}",
    "0 to 1": lambda k: repr(k / 997),
    "0 to 1e-9": lambda k: repr(k * 1e-12),
    "nanoseconds": lambda k: str(1_600_000_000_000_000_000 + k),
    "sixteen decimals": lambda k: f"1600000000.{k:016d}",
    "forty decimals": lambda k: f"0.{k:040d}",
    "exponents": lambda k: f"1.6{k:012d}e9",
    "below zero": lambda k: f"-{10 - k / 100:.2f}",
    "ISO with milliseconds": lambda k: f"2020-09-13T12:26:40.{k:03d}",
    "ISO with nanoseconds": lambda k: f"2020-09-13 12:26:40.{k:09d}Z",
    "ISO with a comma": lambda k: f'"2020-09-13T12:26:40,{k:03d}+02:00"',
    "ISO across zones": lambda k: f"2020-09-13T{12 + k % 2}:26:40.{k:03d}+0{k % 2}:00",
    "ISO without seconds": lambda k: f"2020-09-13T12:{k:02d}",
    "days": lambda k: f"2020-09-{k + 1:02d}",
}


def newest_first(when: Callable[[int], Any]) -> list[tuple[int, int, Any]]:
    return [(user, item, when(item)) for user, item, _ in reversed(LOG)]


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("split", ["user", "time"])
def test_the_order_is_that_of_the_exact_times(kind: str, split: str, folder: Folder) -> None:
    data = folder.csv(newest_first(TEXTS[kind])).prepare(split=split)
    for user in range(USERS):
        first = int(users(data)[user])
        assert sequence(data, user) == [f"Title {item}" for item in range(first, first + LENGTH)]
    assert data.interactions["timestamp"].dtype == np.int64
    assert data.meta["ties"] == {"neighbours": USERS * (LENGTH - 1), "equal_times": 0}
    if split == "time":
        when = dict(zip(data.items["title"], range(data.num_items), strict=True))
        assert max(when[data.titles[item]] for item in data.train["next"]) < min(
            when[data.titles[item]] for item in data.test["next"]
        )


def moments(unit: str, step: int) -> pa.Array:
    return pa.array([1_600_000_000 * step + k for *_, k in newest_first(lambda k: k)], pa.timestamp(unit))


ARROW: dict[str, Callable[[list[int]], pa.Array]] = {
    "datetime64[us]": lambda ks: pa.array([1_600_000_000_000_000 + k for k in ks], pa.timestamp("us")),
    "datetime64[ns]": lambda ks: pa.array([1_600_000_000_000_000_000 + k for k in ks], pa.timestamp("ns")),
    "datetime64[ms, Tokyo]": lambda ks: pa.array([1_600_000_000_000 + k for k in ks], pa.timestamp("ms", "Asia/Tokyo")),
    "before 1970": lambda ks: pa.array([k - 1000 for k in ks], pa.timestamp("us")),
    "date32": lambda ks: pa.array([18_000 + k for k in ks], pa.date32()),
    "float64": lambda ks: pa.array([1_600_000_000 + k / 100 for k in ks]),
    "float32": lambda ks: pa.array([k / 100 for k in ks], pa.float32()),
    "decimal": lambda ks: pa.array([Decimal(k).scaleb(-20) for k in ks], pa.decimal128(30, 20)),
    "int8": lambda ks: pa.array(ks, pa.int8()),
    "uint64": lambda ks: pa.array([2**62 + k for k in ks], pa.uint64()),
    "text": lambda ks: pa.array([f"1600000000.{k:03d}" for k in ks]),
    "binary": lambda ks: pa.array([f"1600000000.{k:03d}".encode() for k in ks], pa.binary()),
}


@pytest.mark.parametrize("kind", ARROW)
def test_typed_times_are_exact(kind: str, folder: Folder) -> None:
    user, item, step = zip(*newest_first(lambda k: k), strict=True)
    folder.parquet({"user_id": user, "item_id": item, "timestamp": ARROW[kind](list(step))}, titles_of_arrow())
    data = folder.prepare("parquet")
    assert sequence(data, users(data).index("0")) == RIGHT and not data.meta["ties"]["equal_times"]


def titles_of_arrow() -> dict:
    item, title = zip(*titles(), strict=True)
    return {"item_id": item, "title": title}


def test_json_numbers_keep_all_their_digits(folder: Folder) -> None:
    rows = [f'{{"user_id": {u}, "item_id": {i}, "timestamp": 1600000000.{k:012d}}}\n' for u, i, k in newest_first(int)]
    folder.jsonl([], [{"item_id": item, "title": title} for item, title in titles()])
    folder.write("interactions.jsonl", "".join(rows))
    assert sequence(folder.prepare("jsonl"), USERS - 1) == RIGHT


def test_recbole_times_between_0_and_1(folder: Folder) -> None:
    data = folder.recbole(newest_first(lambda k: k / 100)).prepare("recbole", split="time")
    assert sequence(data, USERS - 1) == RIGHT and data.meta["timestamps"].startswith("in units of 1e-2")
    assert "timestamps: in units of 1e-2 of the source's times, which have decimals" in summary(data.meta)


def test_how_many_ties_decide_nothing_is_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    data = folder.csv([(user, item, item // 3) for user, item, _ in LOG]).prepare()
    pairs = [item // 3 == (item + 1) // 3 for user in range(USERS) for item in range(user, user + LENGTH - 1)]
    assert data.meta["ties"] == {"neighbours": USERS * (LENGTH - 1), "equal_times": sum(pairs)}
    assert any(f"equal times: {sum(pairs)} of {len(pairs)} neighbours" in line for line in summary(data.meta))
    assert not caplog.text
    folder.csv([(user, item, 7) for user, item, _ in LOG]).prepare()
    assert "all times of every user are equal" in caplog.text


def test_numbers_and_dates_in_one_column_are_refused(folder: Folder) -> None:
    folder.csv([(u, i, k if u else f"2020-01-{k + 1:02d}") for u, i, k in LOG])
    with pytest.raises(ValueError, match=r"interactions\.csv: the column timestamp has 84 numbers and 12 dates"):
        folder.prepare()


def test_seconds_and_milliseconds_in_one_column_are_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.csv([(u, i, (1_600_000_000 + k) * (1000 if u else 1)) for u, i, k in LOG]).prepare()
    assert "12 look like seconds and 84 like milliseconds" in caplog.text


def test_a_date_format_is_an_option(folder: Folder) -> None:
    folder.csv(newest_first(lambda k: f"{k + 1:02d}/09/2020 10:00"))
    with pytest.raises(ValueError, match=r"timestamp: expected a number or an ISO date, got '19/09/2020 10:00'"):
        folder.prepare()
    assert sequence(folder.prepare(date_format="%d/%m/%Y %H:%M"), USERS - 1) == RIGHT
    folder.csv(newest_first(lambda k: f"202009{k + 1:02d}"))
    data = folder.prepare(date_format="%Y%m%d")
    assert data.interactions["timestamp"].max() == 1_600_473_600  # 2020-09-19


@pytest.mark.parametrize(
    "text",
    ["", "nan", "inf", "-inf", "1_000", "1,5", "yesterday", "2020-13-01", "2020-01-01T25:00", "0x10", "1e999", "٣"],
)
def test_what_is_no_time_is_a_bad_line(text: str, folder: Folder) -> None:
    folder.csv([*LOG, (0, 19, f'"{text}"')])
    data = folder.prepare(max_bad=0.02)
    assert kept(data) == len(LOG) and data.meta["files"][0]["bad_lines"] == 1


@pytest.mark.parametrize("value", [True, None, float("nan"), [1], {"$date": 1}])
def test_typed_values_that_are_no_time(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        TimeReader()(value)


@given(
    st.lists(
        st.decimals(-(10**18), 10**18, allow_nan=False, places=None).filter(lambda d: d.as_tuple().exponent >= -54)
    )
)
def test_times_sort_as_the_numbers_do(values: list[Decimal]) -> None:
    times = Times()
    for value in values:
        times.append(value if value != int(value) else int(value))
    limbs = times.columns()
    made, _ = stamps(limbs)
    assert [values[n] for n in np.argsort(made, kind="stable")] == sorted(values)
    for number, value in enumerate(values):
        again = sum(Decimal(int(limb[number])) * Decimal(10) ** (-LIMB * place) for place, limb in enumerate(limbs[:2]))
        assert len(limbs) > 2 or again == value or abs(value) > 10**9


# --- text that is not text ---


def test_binary_columns_are_decoded(folder: Folder) -> None:
    user, item, when = zip(*LOG, strict=True)
    log = {
        "user_id": pa.array([f"u{one}".encode() for one in user], pa.binary()),
        "item_id": pa.array([f"{one:03d}".encode() for one in item], pa.binary(3)),
        "timestamp": when,
    }
    names = {
        "item_id": [f"{item:03d}" for item in range(ITEMS)],
        "title": pa.array([f"Café {item}".encode() for item in range(ITEMS)], pa.large_binary()),
    }
    data = folder.parquet(log, names).prepare("parquet")
    assert data.titles[:2] == ["Café 0", "Café 1"] and users(data)[:2] == ["u0", "u1"] and kept(data) == len(LOG)


def test_bytes_that_are_no_text_name_column_and_row(folder: Folder) -> None:
    _, item, when = zip(*LOG, strict=True)
    folder.parquet({"user_id": [b"\xff\xfe"] * len(LOG), "item_id": item, "timestamp": when}, titles_of_arrow())
    with pytest.raises(
        ValueError, match=r"interactions\.parquet: 96 of 96 rows are bad.*row 1: user_id: bytes that are"
    ):
        folder.prepare("parquet")


def test_nan_is_no_user_and_no_title(folder: Folder) -> None:
    nan = float("nan")
    log = [{"user_id": u, "item_id": i, "timestamp": k} for u, i, k in LOG]
    names = [{"item_id": item, "title": nan if item == 3 else None if item == 4 else title} for item, title in titles()]
    names[5].pop("title")
    folder.jsonl([*log, {"user_id": nan, "item_id": 1, "timestamp": 1}], names)
    with pytest.raises(
        ValueError, match=r"interactions\.jsonl: 1 of 97 lines are bad.*line 97: user_id: expected an id"
    ):
        folder.prepare("jsonl")
    data = folder.prepare("jsonl", max_bad=0.02)
    assert not {"nan", "None", "Title 3", "Title 4", "Title 5"} & set(data.titles) and "nan" not in users(data)
    assert data.meta["without_title"] == 3 and data.meta["files"][1]["bad_lines"] == 0
    lost = sum(item in (3, 4, 5) for _, item, _ in LOG)
    assert f"items without a title: {lost} of 96 interactions dropped (15.6%), 81 left" in summary(data.meta)[0]


def test_nan_of_parquet_is_no_user(folder: Folder) -> None:
    user, item, when = zip(*LOG, strict=True)
    ids = pa.array([float(one) for one in user[:-1]] + [float("nan")], pa.float64(), from_pandas=False)
    data = folder.parquet({"user_id": ids, "item_id": item, "timestamp": when}, titles_of_arrow())
    made = data.prepare("parquet", max_bad=0.02)
    assert users(made) == [str(one) for one in range(USERS)] and kept(made) == len(LOG) - 1


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "NULL", "<NA>"])
def test_words_for_nothing_are_no_ids_and_titles_are_asked_about(
    word: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.csv([*LOG, (word, 3, 1)], [*titles(ITEMS - 1), (ITEMS - 1, word)])
    data = folder.prepare(max_bad=0.02)
    assert word not in users(data) and data.meta["files"][0]["bad_lines"] == 1
    assert word in data.titles and f"1 titles read like a value that is not there ({word})" in caplog.text


KEYS = [
    ("12", "12"), (" 12\t", "12"), ("12.0", "12"), ("12.00", "12"), (12.0, "12"), (-0.0, "0"), (0.5, "0.5"),
    ("0012", "0012"),
    (np.float32(3), "3"), (np.float64(3.5), "3.5"), (Decimal("12.00"), "12"), (Decimal("12.50"), "12.5"), (b"x", "x"),
    (2**70, str(2**70)), (Decimal(2**70), str(2**70)), (2.0**53 - 1, str(2**53 - 1)), ("1.10", "1.10"),
    ("12e5", "12e5"), ("1e+05", "100000"), ("-2e+06", "-2000000"), ("1e5", "1e5"),
    ("a.0", "a.0"), (unicodedata.normalize("NFD", "é"), "é"),
]  # fmt: skip


@pytest.mark.parametrize("value, spelled", KEYS)
def test_one_id_has_one_spelling(value: object, spelled: str) -> None:
    assert key(value) == spelled and key(key(value)) == spelled


NO_KEYS = [
    None, True, float("nan"), float("inf"), np.float32("nan"), np.float32(2**24), Decimal("nan"), Decimal("inf"),
    ("a", "b"), ["a"], {1}, {}, bytearray(b"x"), datetime.date(2020, 1, 2), np.datetime64("2020-01-01"), b"\xff", "",
    "  ", "\ud800", 2.0**53, 1e22, Decimal("7.2e17"), Decimal("720575940631797001.0"), "720575940631797001.0",
    "7.20575940631797e+17",
]  # fmt: skip


@pytest.mark.parametrize("value", NO_KEYS)
def test_what_is_nobodys_id(value: object) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        key(value)
    assert str(caught.value).isprintable()


# --- identity ---


def test_ids_that_read_12_0_in_part_of_the_rows(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(f"{u}.0" if k % 4 == 0 else u, f"{i}.0" if k % 3 == 0 else i, k) for u, i, k in LOG]
    data = folder.csv(rows).prepare()
    assert kept(data) == len(LOG) and len(users(data)) == USERS and data.num_items == ITEMS
    assert data.meta["respelled_ids"] == sum((k % 4 == 0) + (k % 3 == 0) for *_, k in LOG)
    assert "ids are spelled anew, as '0.0', which is 0" in caplog.text


def test_leading_zeros_on_one_side_join(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    data = folder.csv(items=[(f"{item:04d}", title) for item, title in titles()]).prepare()
    assert kept(data) == len(LOG) and data.titles[3] == "Title 3" and data.items["source_id"][3] == "3"
    assert "19 items are joined to titles whose ids differ in leading zeros, as 0 and 0000" in caplog.text


def test_leading_zeros_that_tell_items_apart_stay(folder: Folder) -> None:
    names = [*titles(), ("012", "Other"), ("0012", "Third")]
    data = folder.csv([*LOG, (0, "012", 99), (0, "00012", 100)], names).prepare()
    assert sequence(data)[-1] == "Other" and kept(data) == len(LOG) + 1
    assert data.meta["steps"][1]["dropped"] == 1  # which of two 00012 is, nobody can know


@pytest.mark.parametrize("kind, least", [(pa.float64(), 2**53), (pa.float32(), 2**24)])
def test_floats_that_stand_for_several_items_are_refused(kind: pa.DataType, least: int, folder: Folder) -> None:
    user, item, when = zip(*LOG, strict=True)
    ids = pa.array([float(least + one) for one in item]).cast(kind, safe=False)
    log = {"user_id": user, "item_id": ids, "timestamp": when}
    names = {"item_id": [least + item for item in range(ITEMS)], "title": [title for _, title in titles()]}
    folder.parquet(log, names)
    with pytest.raises(
        ValueError, match=r"row 1: item_id: \S+ is a float of 2\*\*\d\d or more, which stands for several"
    ):
        folder.prepare("parquet")
    folder.parquet(log | {"item_id": [least + one for one in item]}, names)
    assert kept(folder.prepare("parquet")) == len(LOG)


def test_interactions_without_a_title_are_an_error_above_a_limit(folder: Folder) -> None:
    folder.csv(items=[(item if item % 2 else f"x{item}", title) for item, title in titles()])
    said = (
        r"48 of 96 interactions \(50\.0%\), of 10 of 19 items, have no title, more than max_untitled 20% allows; "
        r"the first: 0, 2, 4; items with a title: x0, 1, x2"
    )
    with pytest.raises(ValueError, match=said):
        folder.prepare()
    assert kept(folder.prepare(max_untitled=0.6)) == 48


def test_titles_of_two_unicode_forms_are_told_apart(folder: Folder) -> None:
    names = titles()
    for item, form in ((3, "NFC"), (4, "NFD")):
        names[item] = (item, unicodedata.normalize(form, "Amélie"))
    data = folder.csv(items=names).prepare()
    assert data.titles[3:5] == ["Amélie", "Amélie (2)"] and data.meta["repeated_titles"]["count"] == 1


def test_ids_of_two_unicode_forms_join(folder: Folder) -> None:
    name = {"NFC": unicodedata.normalize("NFC", "é"), "NFD": unicodedata.normalize("NFD", "é")}
    data = folder.csv(
        [(u, f"{name['NFD']}{i}", k) for u, i, k in LOG], [(f"{name['NFC']}{i}", title) for i, title in titles()]
    ).prepare()
    assert kept(data) == len(LOG)


def test_a_second_title_of_an_item_is_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    data = folder.csv(items=[*titles(), (3, "Title 3 (cut)"), (4, "Title 4")]).prepare()
    assert data.titles[3] == "Title 3" and data.meta["retitled"]["count"] == 1
    assert "3: 'Title 3', then 'Title 3 (cut)'" in caplog.text


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
    with pytest.raises(ValueError, match=r"lines are bad, .*is the file UTF-16, give it as the option encoding"):
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
    with pytest.raises(ValueError, match=r"interactions\.csv: no column user_id; it has who, what, when"):
        folder.prepare()
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
def test_recbole_columns_of_other_names(inter: str, item: str, options: dict, folder: Folder) -> None:
    recbole_files(folder, inter, item)
    assert kept(folder.prepare("recbole", **options)) == len(LOG)


def test_recbole_columns_that_cannot_be_known_are_asked_for(folder: Folder) -> None:
    recbole_files(folder, "a:token\tb:token\tc:float", "b:token\tcalled:token_seq")
    said = r"x\.item:1: no column movie_title \(nor .*; it has b, called; name yours with --set title_column="
    with pytest.raises(ValueError, match=said):
        folder.prepare("recbole")
    recbole_files(folder, "a:token\tb:token\tc:token", "b:token\ttitle:token_seq")
    with pytest.raises(
        ValueError, match=r"x\.inter:1: no column user_id; it has a, b, c; name yours with --set user_col"
    ):
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


# --- hostile text ---

HOSTILE = {
    "\x1b[31mRed\x1b[0m": "Red",
    "\x1b]0;title\x07Bell": "Bell",
    "\x1b]8;;http://x\x1b\\Link\x1b]8;;\x1b\\": "Link",
    "\x9b2JClear": "Clear",
    "a\x08\x08b\x7f": "ab",
    "\u202egnp.exe": "gnp.exe",
    "zero\u200bwidth\ufeff": "zerowidth",
    "line\u2028end\x85x": "line end x",
    "lone \ud83d surrogate": "lone \ufffd surrogate",
    "family 👨\u200d👩": "family 👨\u200d👩",
}


@pytest.mark.parametrize("title", HOSTILE)
def test_titles_hold_nothing_that_a_terminal_obeys(title: str, folder: Folder) -> None:
    names = [{"item_id": item, "title": title if item == 3 else name} for item, name in titles()]
    data = folder.jsonl([{"user_id": u, "item_id": i, "timestamp": k} for u, i, k in LOG], names).prepare("jsonl")
    assert data.titles[3] == HOSTILE[title] == clean_title(HOSTILE[title])
    assert data.meta.get("mended_titles", 0) == (HOSTILE[title] != " ".join(title.split()))


def test_messages_and_the_report_hold_nothing_that_a_terminal_obeys(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    bad = "\x1b[2J\u202e\ud800"
    folder.jsonl([{"user_id": bad, "item_id": 1, "timestamp": bad}], [{"item_id": 1, "title": "x"}])
    with pytest.raises(ValueError) as caught:
        folder.prepare("jsonl")
    assert str(caught.value).isprintable()
    log = [{"user_id": u, "item_id": i, "timestamp": k} for u, i, k in LOG]
    folder.jsonl(
        [*log, {"user_id": 1, "item_id": 1, "timestamp": bad}], [{"item_id": i, "title": t} for i, t in titles()]
    )
    folder.prepare("jsonl", max_bad=0.05)
    assert caplog.text.strip().isprintable() and "\x1b" not in (folder.out / "dataset.json").read_text()
    assert shown("a" * 300, 10) == "aaaaaaaaaa..." and shown("\x1b[m\n\ud800") == "\\x1b[m\\n\\ud800"


def test_a_lone_surrogate_in_an_id_is_a_bad_line(folder: Folder) -> None:
    log = [{"user_id": u, "item_id": i, "timestamp": k} for u, i, k in LOG]
    folder.jsonl(
        [*log, {"user_id": "\ud800", "item_id": 1, "timestamp": 1}], [{"item_id": i, "title": t} for i, t in titles()]
    )
    data = folder.prepare("jsonl", max_bad=0.05)
    assert data.meta["files"][0]["bad_examples"] == ["line 97: an id with a lone surrogate, which is no character"]


def test_equal_titles_take_linear_time() -> None:
    began = time.monotonic()
    made, repeated = disambiguate(["Same"] * 200_000, [""] * 200_000)
    assert time.monotonic() - began < 10
    assert made[:2] == ["Same", "Same (2)"] and made[-1] == "Same (200000)" and repeated == ["Same"]
    made, _ = disambiguate(["A", "A", "A", "A (2)", "B", "B"], ["", "", "", "", "1990", "1991"])
    assert made == ["A", "A (3)", "A (4)", "A (2)", "B (1990)", "B (1991)"]


def test_a_file_of_bad_lines_is_refused_early(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "STOP_FROM", 1000)
    folder.csv()
    with gzip.open(folder.path / "interactions.csv.gz", "wb", 1) as file:
        file.write(b"user_id,item_id,timestamp\n")
        for at in range(40):
            file.write(b"".join(b"%d spam %d\n" % (at * k, k) for k in range(50_000)))
    (folder.path / "interactions.csv").unlink()
    with pytest.raises(ValueError, match=r"(\d+) of (\d+) lines read before stopping are bad") as caught:
        folder.prepare()
    assert int(str(caught.value).split(" of ")[1].split()[0]) < 1_000_000


def test_bad_lines_at_the_head_of_a_good_file_do_not_stop_it(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "STOP_FROM", 100)
    monkeypatch.setattr(lines, "READ_SIZE", 1 << 12)
    folder.csv([*[("spam",)] * 300, *LOG * 400])
    assert folder.prepare().meta["files"][0]["bad_lines"] == 300


def test_ids_of_a_log_stay_those_of_the_file() -> None:
    log = Log()
    for user in ("12", "12.0", " 12", "012"):
        log.add(user, "x", 1)
    assert log.user_ids == {"12": 0, "012": 1}


# --- the command line ---


def test_the_terminal_says_what_is_lost_and_obeys_no_file(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def napo(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["napo", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    options = [word for name, value in ALL.items() for word in ("--set", f"{name}={value}")]
    folder.csv([(u, i, k // 2) for u, i, k in LOG], titles()[:-1])
    code, out, _ = napo("prepare", "csv", folder.path, "--out", folder.out, *options)
    assert code == 0 and "items without a title: 1 of 96 interactions dropped (1.0%), 95 left" in out
    assert "equal times: " in out
    hostile = folder.path / "\x1b[2J\u202e"
    code, _, err = napo("prepare", "csv", hostile, "--out", folder.out, *options)
    assert code == 1 and err.strip().isprintable() and "\\x1b[2J" in err


def test_a_delimiter_is_an_option_of_the_command(folder: Folder) -> None:
    folder.csv(between=";")
    command = [sys.executable, "-m", "napo.cli", "prepare", "csv", str(folder.path), "--out", str(folder.out)]
    for name, value in (ALL | {"delimiter": ";"}).items():
        command += ["--set", f"{name}={value}"]
    assert subprocess.run(command, capture_output=True).returncode == 0
