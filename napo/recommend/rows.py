"""The rows of a file that asks for recommendations: users or histories in CSV, TSV, JSON lines (also .gz) or
Parquet."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from napo.data.fields import Fields
from napo.data.interactions import key
from napo.data.lines import Lines
from napo.data.missing import MISSING, is_missing
from napo.data.texts import shown
from napo.files import refuse_special
from napo.recommend.catalogue import LONGEST_TITLE, Catalogue
from napo.recommend.recommender import Query

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")
DELIMITERS = (",", ";", "\t", "|")
ASKING = ("history", "user")
USED = (*ASKING, "exclude", "k")
SEPARATOR = "::"
"""Between the titles or ids of a list in a CSV file; a JSON list works as well."""
_NUMBERS_OF_PYTHON = re.compile(r"(?:[-+.,\d\s]|nan|None|<NA>)*")
BATCH = 4096
"""Rows of Parquet that are read at once."""


class Row(NamedTuple):
    place: str
    """For messages: "row 3 (line 5)", rows from 0 behind the header, lines from 1."""
    values: dict[str, Any]
    """By column."""
    problem: str = ""
    """Why it cannot be read."""
    is_text: bool = False
    """Of a CSV file, where a list is text too."""


def kind_of(path: Path) -> str:
    """csv, tsv, jsonl or parquet."""
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise ValueError(f"input: expected a name that ends in {', '.join(SUFFIXES)}; got {path}")
    return name.removesuffix(".gz").rpartition(".")[2]


def rows_of(path: Path) -> Iterator[Row]:
    """All rows, those too that cannot be read; ValueError where the file cannot be. Whoever looks the rows up shows how
    far that is, as it takes longer than to read them."""
    kind = kind_of(path)
    refuse_special(path)
    if not path.is_file():
        raise ValueError(f"input: {path}: no such file")
    try:
        if kind == "parquet":
            yield from _parquet(path)
            return
        with Lines(path, max_bad=0, quiet=True) as lines:
            yield from _json(lines) if kind == "jsonl" else _delimited(lines, "\t" if kind == "tsv" else None)
            if lines.num_bad:
                raise ValueError(f"{path} {lines.examples[0]}")
    except OSError as error:
        raise ValueError(f"input: cannot read {path} ({error.strerror or error})") from None


def _delimited(lines: Lines, delimiter: str | None) -> Iterator[Row]:
    entries = _with_empty_lines(lines)
    header = next((text for _, text in entries if text.strip()), None)
    if header is None:
        raise ValueError(f"{lines.path}: empty; expected a line with the names of the columns")
    fields = Fields(delimiter or _delimiter(header))
    names = [name.strip() for name in fields.split(header)]
    _check_columns(lines.path, names)
    for row, (line, values) in enumerate(fields.records(lines, entries, len(names))):
        values = [""] * len(names) if values == [""] else values
        problem = "" if len(values) == len(names) else _of_width(len(names), len(values), fields.delimiter)
        yield Row(f"row {row} (line {line})", dict(zip(names, values, strict=False)), problem, is_text=True)


def _with_empty_lines(lines: Lines) -> Iterator[tuple[int, str]]:
    """An empty line is a row too, of an empty cell: without it the numbers of the rows behind it would shift. Those
    behind the last row are none, as editors and programs leave them there."""
    empty: list[tuple[int, str]] = []
    last = 0
    for number, text in lines:
        empty += ((between, "") for between in range(last + 1, number))
        if not text.strip(" "):
            empty.append((number, text))
        else:
            yield from empty
            empty.clear()
            yield number, text
        last = number


def _delimiter(header: str) -> str:
    """The first under which the header has a column that asks for something."""
    for delimiter in DELIMITERS:
        if any(name.strip() in ASKING for name in Fields(delimiter).split(header)):
            return delimiter
    return max(DELIMITERS, key=header.count)


def _of_width(width: int, found: int, delimiter: str) -> str:
    remedy = f'; write a cell that holds {delimiter!r} in quotes ("...")' if found > width else ""
    return f"expected {width} cell{'s' if width > 1 else ''}; got {found}{remedy}"


def _json(lines: Lines) -> Iterator[Row]:
    entries = ((line, text) for line, text in lines if text.strip())
    for row, (line, text) in enumerate(entries):
        values: dict[str, Any] = {}
        problem = ""
        try:
            found = json.loads(text)
            if isinstance(found, dict):
                values = found
            else:
                problem = f"expected an object with user or history; got {type(found).__name__}"
        except json.JSONDecodeError as error:
            problem = f"not JSON ({error.msg})"
        except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
            problem = "not JSON"
        if not problem and not any(name in values for name in ASKING):
            problem = f"expected user or history; got {shown(', '.join(values)) or 'nothing'}"
        yield Row(f"row {row} (line {line})", values, problem)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        _check_columns(path, names)
        row = itertools.count()
        for batch in file.iter_batches(BATCH, columns=[name for name in names if name in USED]):
            columns = [batch.column(name).to_pylist() for name in batch.schema.names]
            for values in zip(*columns, strict=True):
                found = dict.fromkeys(names) | dict(zip(batch.schema.names, values, strict=True))
                yield Row(f"row {next(row)}", found)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cut short or no Parquet file ({shown(str(error).splitlines()[0])})") from None


def _check_columns(path: Path, names: list[str]) -> None:
    twice = next((name for name in USED if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: expected one column {twice}; got {names.count(twice)}")
    if not any(name in names for name in ASKING):
        raise ValueError(f"{path}: expected a column user or history; got {shown(', '.join(names)) or 'none'}")


def query_of(row: Row, given: Query, catalogue: Catalogue) -> Query:
    """What a row asks for. What it does not say is as in ``given``. Its history counts before its user."""
    if row.problem:
        raise ValueError(row.problem)
    exclude = _items(row, "exclude", catalogue)
    query = replace(given, k=_number(row.values.get("k"), given.k), exclude=[*given.exclude, *exclude])
    history = _items(row, "history", catalogue)
    user = user_of(row)
    if user is not None and not history:
        return replace(query, user=user)
    if user is None and "history" not in row.values and given.unknown == "error":
        raise ValueError("user: expected the id of a user; got none; give one, or --unknown skip for popular items")
    return replace(query, history=history)


def user_of(row: Row) -> str | int | None:
    """The user's id as the data's source has it: an id that has become a float, or has blanks around it, is the same
    one. None where there is none."""
    value = row.values.get("user")
    if _is_nothing(value):
        return None
    try:
        user = key(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"user: {error}") from None
    return int(user) if isinstance(value, (int, float, Decimal)) and user.lstrip("-").isdecimal() else user


def _is_nothing(value: Any) -> bool:
    """Also words that programs write for what is not there; `napo prepare` takes none of them for an id."""
    if isinstance(value, str):
        return not value.strip() or value.strip() in MISSING
    return is_missing(value)


def _number(value: Any, otherwise: int) -> int:
    if _is_nothing(value):
        return otherwise
    try:
        number = int(key(value))
    except (ValueError, TypeError):
        number = 0
    if number < 1:
        raise ValueError(f"k: expected a whole number of at least 1; got {shown(repr(value))}")
    return number


def _items(row: Row, name: str, catalogue: Catalogue) -> list[Any]:
    value = row.values.get(name)
    if isinstance(value, str) and row.is_text:
        return _listed(value.strip(), name, catalogue)
    if is_missing(value):
        return []
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list of titles or ids; got {shown(repr(value))}")
    return value


def _listed(text: str, name: str, catalogue: Catalogue) -> list[Any]:
    """The items of a cell: one title, a JSON list, or titles and ids with ``::`` between them."""
    if not text or catalogue.has(text):
        return [text] if text else []
    if text.startswith("["):
        try:
            found = json.loads(text)
            if isinstance(found, list):
                return found
        except (ValueError, RecursionError):  # a title may begin with a bracket
            pass
    pieces = text.split(SEPARATOR)
    if not all(not piece.strip() or catalogue.has(piece) for piece in pieces):
        if _as_python_writes(text):
            raise ValueError(
                f"{name}: expected a list as JSON; got {shown(text, 60)}, as Python and pandas write lists; write "
                'lists as JSON, with double quotes and commas, as in ["A", "B"], or with :: between the items'
            )
        pieces = _cut(text, catalogue)
    return [piece for piece in pieces if piece.strip()]


def _as_python_writes(text: str) -> bool:
    """Whether it is a list or an array of text or numbers, and no JSON."""
    inner = text[1:-1].strip()
    whole = text.startswith("[") and text.endswith("]")
    return whole and (inner.startswith(("'", '"')) or _NUMBERS_OF_PYTHON.fullmatch(inner) is not None)


def _cut(text: str, catalogue: Catalogue) -> list[str]:
    """``text`` cut at some of its ``::``, so that as few pieces as can be are unknown: a title may hold one, or
    begin or end with a colon."""
    places = [place for place in range(len(text)) if text.startswith(SEPARATOR, place)]
    ends = [*places, len(text)]
    # By where a piece begins: pieces that are unknown from there on, number of pieces, where the first one ends.
    best: dict[int, tuple[int, int, int]] = {len(text) + len(SEPARATOR): (0, 0, 0)}
    for begin in reversed([0, *(place + len(SEPARATOR) for place in places)]):
        first = bisect.bisect_left(ends, begin)
        choices = []
        for number in range(first, len(ends)):
            piece, behind = text[begin : ends[number]], best[ends[number] + len(SEPARATOR)]
            known = not piece.strip() or catalogue.has(piece)
            if known or number == first:
                choices.append((behind[0] + (not known), behind[1] + 1, ends[number]))
            if len(piece) > LONGEST_TITLE:
                break
        best[begin] = min(choices)
    pieces, begin = [], 0
    while begin <= len(text):
        end = best[begin][2]
        pieces.append(text[begin:end])
        begin = end + len(SEPARATOR)
    return pieces
