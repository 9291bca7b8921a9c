"""Files of recommendations, written part by part."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from napo.recommend.recommender import Recommendations

FORMATS = (".parquet", ".csv", ".jsonl")
COLUMNS = ("row", "user", "place", "item", "title", "score", "model", "notes")
ROW_GROUP = 1 << 16
"""Rows of Parquet that are compressed together."""

User = str | int | None
Write = Callable[[Sequence[User], Sequence[Recommendations]], None]


@contextmanager
def writing(path: Path, suffix: str, users: Collection[User]) -> Iterator[Write]:
    """Opens ``path``, and gives what writes the next users and their answers. ``users``: all that will come; the column
    has one type, and is left out if there are none."""
    if suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:

            def write_lines(whose: Sequence[User], answers: Sequence[Recommendations]) -> None:
                file.writelines(map(_json_line, whose, answers))
                file.flush()  # a full disk is found now, and not after the next part is computed

            yield write_lines
        return
    columns = [name for name in COLUMNS if name != "user" or any(user is not None for user in users)]
    entries = _Entries(columns)
    if suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(columns)

            def write_table(whose: Sequence[User], answers: Sequence[Recommendations]) -> None:
                table.writerows(entries.of(whose, answers))
                file.flush()

            yield write_table
        return
    with _parquet(path, columns, users) as write_rows:
        yield lambda whose, answers: write_rows(list(entries.of(whose, answers)))


def _json_line(user: User, answer: Recommendations) -> str:
    whose = {} if user is None else {"user": user}
    return json.dumps({**whose, **answer.as_dict()}, ensure_ascii=False, allow_nan=False) + "\n"


class _Entries:
    """The table's rows of answers, which count on from call to call."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns, self.row = columns, 0

    def of(self, users: Sequence[User], answers: Sequence[Recommendations]) -> Iterator[list[Any]]:
        for user, answer in zip(users, answers, strict=True):
            notes = "; ".join(answer.notes)
            for place, found in enumerate(answer.items, 1):
                values = (self.row, user, place, found.item, found.title, found.score, answer.model, notes)
                yield [value for name, value in zip(COLUMNS, values, strict=True) if name in self.columns]
            self.row += 1


@contextmanager
def _parquet(path: Path, columns: Sequence[str], users: Collection[User]) -> Iterator[Callable[[list[Any]], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = all(user is None or (isinstance(user, int) and abs(user) < 2**63) for user in users)
    types = {"row": pa.int64(), "place": pa.int64(), "score": pa.float64()} | ({"user": pa.int64()} if whole else {})
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
    waiting: list[list[Any]] = []

    def write_group(file: pq.ParquetWriter) -> None:
        found: dict[str, list[Any]] = {name: [row[place] for row in waiting] for place, name in enumerate(columns)}
        if "user" in found and not whole:
            found["user"] = [None if user is None else str(user) for user in found["user"]]
        file.write_table(pa.table(found, schema))
        waiting.clear()

    with pq.ParquetWriter(path, schema) as file:

        def write_rows(rows: list[Any]) -> None:
            waiting.extend(rows)
            if len(waiting) >= ROW_GROUP:
                write_group(file)

        yield write_rows
        write_group(file)
