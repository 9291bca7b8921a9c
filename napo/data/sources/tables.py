"""One's own data: interactions and items as CSV, TSV, JSON lines (also .gz) or Parquet, as the file's name says."""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..lines import Lines
from ..log import NOUNS, Log

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz")


def read(
    path: Path,
    *,
    max_bad: float,
    items: str | None = None,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str = "timestamp",
    title_column: str = "title",
    noun: str = "Items",
) -> Log:
    """``path``: a folder with interactions.* and items.*, or the file of interactions and ``items``, the other.

    Interactions need a user, an item and a time (a number or a date), items an item and a title.
    """
    if noun not in NOUNS:
        raise ValueError(f"noun: expected one of {', '.join(NOUNS)}, got {noun!r}")
    log = Log(noun=noun)
    interactions = path if path.is_file() else _named(path, "interactions")
    folder = interactions.parent
    titles = (
        _named(folder, "items")
        if items is None
        else next((p for p in (folder / items, Path(items)) if p.is_file()), None)
    )
    if titles is None:
        raise ValueError(f"items: no file {items} beside {interactions.name} or here")
    columns: Columns = {user_column: str, item_column: str, time_column: seconds}
    for user, item, time in _rows(log, interactions, columns, max_bad):
        log.add(user, item, time)
    for item, title in _rows(log, titles, {item_column: str, title_column: str}, max_bad):
        log.titles[item] = title
    return log


def seconds(value: Any) -> int:
    """A number stays what it is (the unit is the source's affair); ISO dates and datetimes become seconds since 1970,
    in UTC where they name no zone."""
    if isinstance(value, str):
        try:
            return int(float(value))
        except ValueError:
            value = datetime.datetime.fromisoformat(value)
    if isinstance(value, datetime.date):
        if not isinstance(value, datetime.datetime):
            value = datetime.datetime(value.year, value.month, value.day)
        value = value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)
        return int(value.timestamp())
    return int(value)


def _named(folder: Path, stem: str) -> Path:
    found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()]
    if len(found) != 1:
        raise ValueError(f"{folder}: expected one {stem} file ({', '.join(SUFFIXES)}), found {len(found)}")
    return found[0]


Columns = dict[str, Callable[[Any], Any]]


def _rows(log: Log, path: Path, columns: Columns, max_bad: float) -> Iterator[list[Any]]:
    """The wanted columns of each good row, converted; the file's report goes to the log."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(log, path, columns)
        return
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("csv", "tsv", "jsonl"):
        raise ValueError(f"{path}: expected a file that ends with one of {', '.join(SUFFIXES)}")
    with Lines(path, max_bad=max_bad) as lines:
        header: list[str] = []
        for number, text in lines:
            try:
                if kind == "jsonl":
                    record = json.loads(text)
                else:
                    fields = text.split("\t") if kind == "tsv" else next(csv.reader([text], strict=True))
                    if not header:
                        _check_columns(path, fields, columns)
                        header = fields
                        continue
                    if len(fields) != len(header):
                        raise ValueError(f"expected {len(header)} fields, got {len(fields)}")
                    record = dict(zip(header, fields, strict=True))
                values = [convert(_given(record[name])) for name, convert in columns.items()]
            except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
                if kind != "jsonl" and not header:
                    raise
                lines.bad(number, error)
                continue
            yield values
    log.report["files"].append(lines.report())


def _parquet_rows(log: Log, path: Path, columns: Columns) -> Iterator[list[Any]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: cut short or no Parquet file ({str(error).splitlines()[0]})") from None
    _check_columns(path, file.schema_arrow.names, columns)
    for batch in file.iter_batches(columns=list(columns)):
        for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
            yield [convert(_given(value)) for convert, value in zip(columns.values(), values, strict=True)]
    log.report["files"].append({"name": path.name, "bytes": path.stat().st_size, "rows": file.metadata.num_rows})


def _check_columns(path: Path, found: list[str], columns: Columns) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]}; it has {', '.join(found)} (name yours with --set)")


def _given(value: Any) -> Any:
    if value is None or value == "":
        raise ValueError("an empty value")
    return value
