"""Recommendations for a file of users or histories, into a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from napo.data.texts import shown
from napo.files import replacing
from napo.recommend.recommender import Asked, Query, Recommendations, Recommender, Unknown

FORMATS = (".parquet", ".csv", ".jsonl")
SEPARATOR = "::"
"""Separates the titles or ids of a history in a CSV file; a JSON list works as well."""
TOGETHER = 256
"""Rows that are ranked in one call."""
TOLD, LONGEST_TOLD = 10, 160
"""Rows that an error names, and the characters about each of them where there are several."""


def recommend_file(
    recommender: Recommender,
    source: str | Path,
    out: str | Path,
    *,
    k: int = 10,
    exclude: tuple[str, ...] = (),
    exact: bool = False,
    unknown: Unknown = "error",
) -> tuple[int, int]:
    """Write the best ``k`` items for each row of ``source`` to ``out``. Returns the number of rows, and how many of
    them got popular items. ValueError names all rows that cannot be answered, before anything is computed.

    ``source`` has a column ``user`` (ids as the data's source has them) or ``history`` (a list of titles or ids, oldest
    first; in CSV a JSON list, or titles with ``::`` between them). Formats: .parquet, .csv, .jsonl.
    ``out`` has a row for each recommendation: row (of ``source``, from 0), user, place (from 1), item, title, score,
    model and notes; in .jsonl a line for each row of ``source``.
    """
    source, out = Path(source), Path(out)
    for name, path in (("input", source), ("out", out)):
        if path.suffix not in FORMATS:
            raise ValueError(f"{name}: expected a name that ends in {', '.join(FORMATS)}; got {path}")
    frame = _read(source)
    asked = next((column for column in ("history", "user") if column in frame.columns), None)
    if asked is None:
        have = ", ".join(map(str, frame.columns)) or "none"
        raise ValueError(f"{source}: expected a column user or history; got {shown(have)}")
    given = Query(k=k, exclude=exclude, exact=exact, unknown=unknown)
    resolved: list[Asked] = []
    bad: list[str] = []
    for row, value in enumerate(frame[asked].tolist()):
        try:
            resolved.append(recommender.resolve(_query(given, source, asked, value)))
        except ValueError as error:
            bad.append(f"row {row}: {error}")
    if bad:
        raise ValueError(_told(source, bad, len(frame)))
    answers: list[Recommendations] = []
    for begin in range(0, len(resolved), TOGETHER):
        answers += recommender.answer(resolved[begin : begin + TOGETHER])
    users = frame["user"].tolist() if "user" in frame.columns else [None] * len(frame)
    with replacing(out) as aside:
        _write(aside, out.suffix, users, answers)
    return len(frame), sum(answer.model == "popularity" for answer in answers)


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise ValueError(f"input: {path}: no such file")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=str, keep_default_na=False)
        with path.open(encoding="utf-8") as lines:
            return pd.DataFrame([json.loads(line) for line in lines if line.strip()])
    except (OSError, ValueError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({shown(reason)})") from None


def _told(path: Path, bad: list[str], rows: int) -> str:
    """One line about all rows that cannot be answered."""
    if len(bad) == 1:
        return f"{path} {bad[0]}"
    first = "; ".join(shown(line, LONGEST_TOLD) for line in bad[:TOLD])
    more = f"; the first {TOLD}" if len(bad) > TOLD else ""
    return f"{path}: {len(bad)} of {rows} rows cannot be answered{more}: {first}"


def _query(given: Query, path: Path, name: str, value: Any) -> Query:
    """The query of a row, whose other fields are those of ``given``."""
    if name == "user":
        user = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(user, float) or user is None:
            raise ValueError(f"expected the id of a user; got {shown(repr(value))}")
        return replace(given, user=user)
    return replace(given, history=_history(path, value))


def _history(path: Path, value: Any) -> list[Any]:
    if isinstance(value, str) and path.suffix == ".csv":
        try:
            value = json.loads(value) if value.startswith("[") else [part for part in value.split(SEPARATOR) if part]
        except json.JSONDecodeError as error:
            raise ValueError(f"history is not a JSON list ({error.msg})") from None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise ValueError(f"expected a list of titles or ids; got {shown(repr(value))}")
    return value


def _write(path: Path, suffix: str, users: list[Any], answers: list[Recommendations]) -> None:
    if suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as lines:
            for user, answer in zip(users, answers, strict=True):
                whose = {} if user is None else {"user": user}
                lines.write(json.dumps({**whose, **answer.as_dict()}, ensure_ascii=False, default=str) + "\n")
        return
    rows = [
        (row, user, place, found.item, found.title, found.score, answer.model, "; ".join(answer.notes))
        for row, (user, answer) in enumerate(zip(users, answers, strict=True))
        for place, found in enumerate(answer.items, 1)
    ]
    columns = ["row", "user", "place", "item", "title", "score", "model", "notes"]
    table = pd.DataFrame(rows, columns=columns)
    if all(user is None for user in users):
        table = table.drop(columns="user")
    table.to_parquet(path) if suffix == ".parquet" else table.to_csv(path, index=False)
