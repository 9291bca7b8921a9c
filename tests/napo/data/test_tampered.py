"""A prepared folder that was changed or damaged: one line that names the file and what is wrong, before it is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import prepare

from napo.data.prepared import PreparedData

ITEMS = 20
OUT_OF_RANGE = rf"expected ids from 0 to {ITEMS - 1}, got"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "in").mkdir()
    rows = [(user, (user + 3 * step) % ITEMS, data_files.START + step) for user in range(12) for step in range(10)]
    data_files.csv(folder / "in", rows)
    prepare("csv", folder / "in", folder / "out", min_user=1, min_item=1, candidates=5)
    return folder / "out"


def load_all(folder: Path) -> None:
    data = PreparedData.load(folder)
    for name in ("items", "interactions", "train", "val", "test"):
        getattr(data, name)


def first(value: Any) -> Callable[[list], list]:
    """A column whose first value is another one; of a list that one is what a function makes of it."""
    return lambda column: [value(column[0]) if callable(value) else value, *column[1:]]


CHANGES: list[tuple[str, str, Callable[[list], list], str]] = [
    ("train", "next", first(ITEMS), OUT_OF_RANGE),
    ("test", "next", first(-1), OUT_OF_RANGE),
    ("val", "next", first(None), "column next: 1 values are missing"),
    ("train", "history", first(lambda items: [2**40, *items[1:]]), OUT_OF_RANGE),
    ("train", "history", first(lambda items: [None, *items[1:]]), "column history: 1 ids are missing"),
    ("train", "history", first(None), "column history: 1 values are missing"),
    ("train", "history", first(lambda items: items[::-1]), "row 0: history is not the end of full_history"),
    ("train", "full_history", first(None), "column full_history: 1 values are missing"),
    ("test", "full_history", first(lambda items: items[:-1]), "row 0: history is not the end of full_history"),
    ("test", "candidates", first(lambda items: [items[0]] * 5), "exactly once among its candidates"),
    ("test", "candidates", first(lambda items: []), "exactly once among its candidates"),
    ("train", "user_id", first(None), "column user_id: 1 values are missing"),
    ("interactions", "user_id", first(-5), "row 0: user_id -5 is out of order"),
    ("interactions", "item_id", first(10**6), OUT_OF_RANGE),
    ("items", "item_id", first(7), "row 0: item_id 7, expected 0"),
    ("items", "title", first(None), "column title: 1 values are missing"),
    ("items", "title", first(""), "row 0: '' is no title of one line"),
    ("items", "title", first(lambda title: f"\x1b[2J{title}"), r"row 0: .* is no title of one line"),
    ("items", "title", first(lambda title: f"{title}\nNext"), r"row 0: .* is no title of one line"),
    ("items", "title", lambda titles: [titles[1], *titles[1:]], "row 1: .* is another item's title too"),
]


def test_what_prepare_wrote_is_taken(prepared: Path) -> None:
    load_all(prepared)


@pytest.mark.parametrize("table, column, change, message", CHANGES)
def test_changed_values(
    table: str, column: str, change: Callable, message: str, prepared: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(prepared, tmp_path / "out")
    path = folder / f"{table}.parquet"
    whole = pq.read_table(path)
    place = whole.column_names.index(column)
    values = pa.array(change(whole.column(column).to_pylist()), whole.column(column).type)
    pq.write_table(whole.set_column(place, column, values), path)
    refused(folder, rf"{table}\.parquet: .*{message}")


@pytest.mark.parametrize(
    "column, kind", [("next", pa.float64()), ("next", pa.int32()), ("user_id", pa.string()), ("next", None)]
)
def test_columns_of_other_types_or_none(column: str, kind: pa.DataType | None, prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "out")
    path = folder / "train.parquet"
    whole = pq.read_table(path)
    place = whole.column_names.index(column)
    changed = whole.drop([column])
    if kind is not None:
        changed = whole.set_column(place, column, whole.column(column).cast(kind))
    pq.write_table(changed, path)
    refused(folder, rf"train\.parquet: .*{f'column {column}: expected' if kind else f'0 columns {column}'}")


@pytest.mark.parametrize("full", [True, False])
def test_positions_that_the_log_does_not_have(
    full: bool, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of which the full histories are left out and looked up in the log."""
    folder = shutil.copytree(prepared, tmp_path / "out")
    path = folder / "train.parquet"
    rows = pq.read_table(path).to_pydict()
    rows["position"] = [len(history) for history in rows["full_history"]]
    rows["full_history"] = [None for _ in rows["next"]]
    schema = pq.read_schema(path).append(pa.field("position", pa.int64()))
    pq.write_table(pa.table(rows, schema=schema), path)
    load_all(folder)
    rows["position"][0], message = (10, "no position 10 of that user") if full else (9, "row 0: history is not the end")
    pq.write_table(pa.table(rows, schema=schema), path)
    refused(folder, rf"train\.parquet: .*{message}")


@pytest.mark.parametrize(
    "change",
    [
        {"noun": 3},
        {"noun": ["Movies"]},
        {"has_users": "yes"},
        {"options": []},
        {"options": {"history": "ten", "seed": 0}},
        {"options": {"history": 0, "seed": 0}},
        {"options": {"history": 10, "seed": None}},
    ],
)
def test_a_changed_dataset_json(change: dict, prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "out")
    meta = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(meta | change))
    refused(folder, r"dataset\.json: .*was changed or damaged; run napo prepare again")


@pytest.mark.parametrize("text", ["", "[" * 10**5, '{"noun": ' + "9" * 10**4 + "}", '{"noun"', "\ud800"])
def test_a_dataset_json_that_is_none(text: str, prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "out")
    (folder / "dataset.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder, r"dataset\.json.*: not JSON")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_all(folder)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
