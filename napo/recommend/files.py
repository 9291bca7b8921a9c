"""Recommendations for a file of users or histories, into a file."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from napo.data.texts import shown
from napo.files import refuse_special, replacing
from napo.progress import progress
from napo.recommend.catalogue import UnknownItem
from napo.recommend.recommender import Asked, Query, Recommender, Unknown
from napo.recommend.rows import ASKING, USED, kind_of, query_of, rows_of, user_of
from napo.recommend.writing import FORMATS, User, writing

TOGETHER = 256
"""Rows that are ranked in one call."""
TOLD, LONGEST_TOLD = 10, 160
"""Rows that an error names, and the characters about each of them where there are several."""


@dataclass(kw_only=True)
class FileReport:
    """What became of the rows of a file."""

    rows: int = 0
    unknown_users: int = 0
    """They got popular items, as did rows without any item that is known."""
    first_unknown_user: str = ""
    without_items: int = 0
    notes: list[str] = field(default_factory=list)
    """Which columns were used, and other things to know."""

    @property
    def popular(self) -> int:
        """Rows that got popular items."""
        return self.unknown_users + self.without_items

    def line(self, model: str) -> str:
        text = f"{self.rows} rows: {self.rows - self.popular} by {model}"
        if not self.popular:
            return text
        such = f", such as {shown(repr(self.first_unknown_user), 60)}" if self.unknown_users else ""
        users = f"{self.unknown_users} unknown user{'' if self.unknown_users == 1 else 's'}{such}"
        histories = f"{self.without_items} without known items"
        return f"{text}, {self.popular} with popular items ({users}; {histories})"


def recommend_file(
    recommender: Recommender,
    source: str | Path,
    out: str | Path,
    *,
    k: int = 10,
    exclude: tuple[str, ...] = (),
    exact: bool = False,
    unknown: Unknown = "error",
) -> FileReport:
    """Write the best ``k`` items for each row of ``source`` to ``out``. ValueError names all rows that cannot be
    answered, before anything is computed.

    ``source`` has a column ``user`` (ids as the data's source has them) or ``history`` (a list of titles or ids, oldest
    first; in CSV a JSON list, or titles with ``::`` between them). With both, the user counts where the history is
    empty. It may have ``exclude``, a list too, and ``k``. Formats: .csv, .tsv, .jsonl, each also with .gz, and
    .parquet. ``out`` (.parquet, .csv, .jsonl) has a row for each recommendation: row (of ``source``, from 0), user,
    place (from 1), item, title, score, model and notes; in .jsonl a line for each row of ``source``.
    """
    source, out = Path(source), Path(out)
    suffix = check_files(source, out)
    given = Query(k=k, exclude=exclude, exact=exact, unknown=unknown)
    with _said_of_out(out), replacing(Path(os.path.realpath(out))) as aside:  # a link stays one
        aside.touch()  # a place that cannot be written is found before anything is computed
        kept, report = _read(recommender, source, given)
        users = [one.user for one in kept]
        with writing(aside, suffix, users) as write, progress("recommend", report.rows, unit="rows") as bar:
            for begin in range(0, len(kept), TOGETHER):
                part = slice(begin, begin + TOGETHER)
                write(users[part], recommender.answer([one.asked() for one in kept[part]]))
                bar.advance(len(users[part]))
    return report


class _Kept(NamedTuple):
    """A row's query in a tenth of the memory."""

    user: User
    history: array[int]
    barred: array[int]
    k: int
    notes: list[str] | None

    def asked(self) -> Asked:
        return Asked(history=list(self.history), k=self.k, barred=set(self.barred), notes=self.notes or [])


def _read(recommender: Recommender, source: Path, given: Query) -> tuple[list[_Kept], FileReport]:
    kept: list[_Kept] = []
    report, bad, columns = FileReport(), list[str](), dict[str, None]()
    any_unknown = False
    for row in rows_of(source):
        columns |= dict.fromkeys(row.values)
        report.rows += 1
        try:
            query = query_of(row, given, recommender.catalogue)
            asked, user = recommender.resolve(query), user_of(row)
        except ValueError as error:
            bad.append(f"{row.place}: {error}")
            any_unknown |= isinstance(error, UnknownItem)
            continue
        kept.append(_Kept(user, array("i", asked.history), array("i", asked.barred), asked.k, asked.notes or None))
        _count(report, query, asked)
    if bad:
        raise ValueError(_told(source, bad, report.rows, any_unknown))
    report.notes += _said_of(source, list(columns), report)
    return kept, report


@contextmanager
def _said_of_out(out: Path) -> Iterator[None]:
    """The file beside it that is written first is nothing that a user knows of."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"out: cannot write {out} ({error.strerror or error}); give another place") from None


def check_files(source: str | Path, out: str | Path) -> str:
    """The format to write; ValueError where the names cannot be right, which is known before a model is loaded."""
    source, out = Path(source), Path(out)
    kind_of(source)
    if not source.exists():
        raise ValueError(f"input: {source}: no such file")
    suffix = out.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"out: expected a name that ends in {', '.join(FORMATS)}; got {out}")
    refuse_special(out)
    if out.is_dir():
        raise ValueError(f"out: expected the name of a file; {out} is a folder")
    if out.exists() and out.samefile(source):
        raise ValueError(f"out: {out} is the input, which would be lost; give another name")
    return suffix


def _count(report: FileReport, query: Query, asked: Asked) -> None:
    if asked.history:
        return
    if query.user is None:
        report.without_items += 1
        return
    report.unknown_users += 1
    report.first_unknown_user = report.first_unknown_user or str(query.user)


def _said_of(source: Path, columns: list[str], report: FileReport) -> list[str]:
    said = []
    if all(name in columns for name in ASKING):
        said.append(f"{source}: has history and user; the history counts, and the user where it is empty")
    if ignored := [name for name in columns if name not in USED]:
        used = ", ".join(name for name in columns if name in USED)
        said.append(f"{source}: columns used: {used}; ignored: {shown(', '.join(ignored))}")
    if report.unknown_users > report.rows / 2:
        first = shown(repr(report.first_unknown_user), 60)
        said.append(
            f"{source}: most users are not known, such as {first}; are these the ids of the data that was prepared?"
        )
    return said


def _told(path: Path, bad: list[str], rows: int, any_unknown: bool) -> str:
    """One line about all rows that cannot be answered."""
    remedy = "--unknown skip leaves out items that are not known"
    if len(bad) == 1:
        return f"{path} {bad[0]}{f'; {remedy}' if any_unknown else ''}"
    first = "; ".join(shown(line, LONGEST_TOLD) for line in bad[:TOLD])
    more = f"; the first {TOLD}" if len(bad) > TOLD else ""
    remedy = f" ({remedy})" if any_unknown else ""
    return f"{path}: {len(bad)} of {rows} rows cannot be answered{remedy}{more}: {first}"
