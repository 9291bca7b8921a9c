"""All rows of a file as what they ask for, before anything is computed."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from napo.data.texts import shown
from napo.progress import progress
from napo.recommend.catalogue import Searches, UnknownItem
from napo.recommend.recommender import Asked, Query, Recommender, Unknown
from napo.recommend.rows import ASKING, USED, Row, query_of, rows_of, user_of
from napo.recommend.writing import User

TOLD, LONGEST_TOLD = 10, 160
"""Rows that an error names, and the characters about each of them where there are several."""
LEAST_FAILED, MOST_FAILED, MOST_COMPARED = 20, 200, 250_000
"""Titles of a file that are compared with the whole catalogue and are like nothing in it: so many comparisons take
about 10 seconds. A file with more of them has titles of something else."""


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

    def count(self, query: Query, asked: Asked) -> None:
        if asked.history:
            return
        if query.user is None:
            self.without_items += 1
            return
        self.unknown_users += 1
        self.first_unknown_user = self.first_unknown_user or str(query.user)


class Resolved(NamedTuple):
    """A row's query in a tenth of the memory."""

    user: User
    history: array[int]
    barred: array[int]
    k: int
    notes: list[str] | None

    def asked(self) -> Asked:
        return Asked(history=list(self.history), k=self.k, barred=set(self.barred), notes=self.notes or [])


def most_failed(items: int) -> int:
    """For a catalogue of so many."""
    return max(LEAST_FAILED, min(MOST_FAILED, MOST_COMPARED // max(items, 1)))


class _Bad:
    """Rows that cannot be answered: how many, and what is said of the first ones."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []
        self.any_unknown = False

    def add(self, row: Row, error: ValueError) -> None:
        self.count += 1
        self.any_unknown |= isinstance(error, UnknownItem)
        if len(self.first) < TOLD:
            self.first.append(f"{row.place}: {error}")

    def told(self, path: Path, rows: int, searches: Searches) -> str:
        """One line about all of them."""
        remedy = "--unknown skip leaves out items that are not known"
        if self.count == 1:
            return f"{path} {self.first[0]}{f'; {remedy}' if self.any_unknown else ''}"
        first = "; ".join(shown(line, LONGEST_TOLD) for line in self.first)
        more = f"; the first {TOLD}" if self.count > TOLD else ""
        remedy = f" ({remedy})" if self.any_unknown else ""
        searched = f"; {_not_searched(searches)}" if searches.refused else ""
        return f"{path}: {self.count} of {rows} rows cannot be answered{remedy}{searched}{more}: {first}"


def read(recommender: Recommender, source: Path, given: Query) -> tuple[list[Resolved], FileReport]:
    """What the rows ask for; ValueError names those that cannot be answered. ``given``: what they do not say."""
    found: list[Resolved] = []
    report, bad, columns = FileReport(), _Bad(), dict[str, None]()
    searches = Searches(most_failed(len(recommender.catalogue)))
    with progress(f"read {shown(source.name)}", unit="rows") as bar:
        for row in rows_of(source):
            columns |= dict.fromkeys(row.values)
            report.rows += 1
            bar.advance()
            try:
                query, asked, user = _resolved(recommender, row, given, searches)
            except ValueError as error:
                bad.add(row, error)
                found.clear()  # which nobody will ask for
                continue
            if not bad.count:
                history, barred = array("i", asked.history), array("i", asked.barred)
                found.append(Resolved(user, history, barred, asked.k, asked.notes or None))
                report.count(query, asked)
    if bad.count:
        raise ValueError(bad.told(source, report.rows, searches))
    report.notes += _said_of(source, list(columns), report, searches, given.unknown)
    return found, report


def _resolved(recommender: Recommender, row: Row, given: Query, searches: Searches) -> tuple[Query, Asked, User]:
    """The history counts before the user, who counts where nothing is left of it."""
    query, user = query_of(row, given, recommender.catalogue), user_of(row)
    asked = recommender.resolve(query, searches)
    if asked.history or user is None or query.user is not None or not recommender.knows_users:
        return query, asked, user
    query = replace(query, history=None, user=user)
    by_user = recommender.resolve(query, searches)
    said = [f"nothing of the history is known: that of user {shown(repr(str(user)))} counts"] if by_user.history else []
    return query, replace(by_user, notes=list(dict.fromkeys([*asked.notes, *said, *by_user.notes]))), user


def _said_of(source: Path, columns: list[str], report: FileReport, searches: Searches, unknown: Unknown) -> list[str]:
    said = []
    if all(name in columns for name in ASKING):
        skipping = " or nothing of it is known" if unknown == "skip" else ""
        said.append(f"{source}: has history and user; the history counts, and the user where it is empty{skipping}")
    if ignored := [name for name in columns if name not in USED]:
        used = ", ".join(name for name in columns if name in USED)
        said.append(f"{source}: columns used: {used}; ignored: {shown(', '.join(ignored))}")
    if searches.refused:
        said.append(f"{source}: {_not_searched(searches)}")
    if report.unknown_users > report.rows / 2:
        first = shown(repr(report.first_unknown_user), 60)
        said.append(
            f"{source}: most users are not known, such as {first}; are these the ids of the data that was prepared?"
        )
    elif report.popular > report.rows / 2:
        said.append(
            f"{source}: {report.popular} of {report.rows} answers are what is popular, the same for everybody; are "
            "these the items and users of the data that was prepared?"
        )
    return said


def _not_searched(searches: Searches) -> str:
    """What became of titles that were not compared with the whole catalogue."""
    return (
        f"{searches.most_failed} titles are like nothing in the catalogue; {searches.refused} others were looked up "
        "only as they are written, in any case, and not guessed"
    )
