"""One's own data: interactions and items as CSV, TSV, JSON lines (also .gz) or Parquet, as the file's name says."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from napo.progress import progress

from ..lines import BAD_LINE, READ_SIZE, Lines, Tally
from ..log import Log, key

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

    def titled(item: str, title: str) -> None:
        log.titles[item] = title

    _rows(log, interactions, {user_column: key, item_column: key, time_column: seconds}, log.add, max_bad)
    _rows(log, titles, {item_column: key, title_column: key}, titled, max_bad)
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


def _rows(log: Log, path: Path, columns: Columns, take: Callable[..., None], max_bad: float) -> None:
    """``take`` gets the wanted columns of each row, converted; the file's report goes to the log."""
    if path.suffix == ".parquet":
        _parquet_rows(log, path, columns, take, max_bad)
        return
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("csv", "tsv", "jsonl"):
        raise ValueError(f"{path}: expected a file that ends with one of {', '.join(SUFFIXES)}")
    split = _tsv_fields if kind == "tsv" else _csv_fields
    with Lines(path, max_bad=max_bad) as lines:
        header: list[str] = []
        for number, text in lines:
            if kind != "jsonl" and not header:
                header = split(text)
                _check_columns(path, header, columns)
                continue
            try:
                if kind == "jsonl":
                    record = json.loads(text)
                else:
                    fields = split(text)
                    if len(fields) != len(header):
                        raise ValueError(f"expected {len(header)} fields, got {len(fields)}")
                    record = dict(zip(header, fields, strict=True))
                take(*(convert(_given(record[name])) for name, convert in columns.items()))
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())


def _tsv_fields(text: str) -> list[str]:
    return text.split("\t")


def _csv_fields(text: str) -> list[str]:
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise ValueError(f"no line of CSV ({error}): {text[:60]!r}") from None


def _parquet_rows(log: Log, path: Path, columns: Columns, take: Callable[..., None], max_bad: float) -> None:
    tally, size = Tally(path, max_bad, "row"), path.stat().st_size
    try:
        file = pq.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names, columns)
        with progress(f"read {path.name}", size / 2**20, unit="MiB") as bar:
            for batch in file.iter_batches(columns=list(columns)):
                for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    tally.num_lines += 1
                    try:
                        take(*(convert(_given(value)) for convert, value in zip(columns.values(), values, strict=True)))
                    except BAD_LINE as error:
                        tally.bad(tally.num_lines, error)
                bar.advance(size / 2**20 * len(batch) / file.metadata.num_rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cut short or no Parquet file ({str(error).splitlines()[0]})") from None
    tally.settle()
    sha256 = hashlib.sha256()
    with path.open("rb") as raw:
        while block := raw.read(READ_SIZE):
            sha256.update(block)
    log.report["files"].append({"name": path.name, "bytes": size, "sha256": sha256.hexdigest(), **tally.report()})


def _check_columns(path: Path, found: list[str], columns: Columns) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]}; it has {', '.join(found)} (name yours with --set)")


def _given(value: Any) -> Any:
    if value is None or value == "":
        raise ValueError("an empty value")
    return value
