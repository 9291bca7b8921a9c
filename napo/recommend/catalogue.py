"""Items as people name them: by title, or by the id of the data's source."""

from __future__ import annotations

import contextlib
import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from napo.data.interactions import key as spelled_id
from napo.data.missing import is_missing
from napo.data.texts import one_line, shown

NEAR_ENOUGH, AHEAD = 0.85, 0.05
"""A title that is not in the catalogue is taken for one of at least this likeness, if that one is far enough ahead of
the next."""
SHORTEST_START = 4
"""Letters. Fewer begin a title by accident."""
LONGEST_TITLE = 300
"""The longest title to look for, in characters; comparing longer ones with a whole catalogue takes too long."""
_NUMBERS = re.compile(r"[0-9]+")

Item = str | int | float | Mapping[str, Any] | None
"""A title or an id of the source, as a caller gives it; ``{"id": ...}`` and ``{"title": ...}`` say which of them it
is. A number is an id, and 4.0 is 4."""


class UnknownItem(ValueError):
    """Raised for an item that the catalogue does not have, nor anything much like it."""


class Searches:
    """How many searches may still find nothing, of those that are done for one file. After these a title is only looked
    up as it is written, in any case."""

    def __init__(self, most_failed: int) -> None:
        self.most_failed = self.left = most_failed
        self.refused = 0
        """Titles that were not searched for."""


class Catalogue:
    """Items by title and by the id of their source.

    ``knows``, ``has`` and ``find`` may run in several threads at once: what they read does not change, but for the
    searches that are remembered, which are looked up and stored in one step each."""

    def __init__(self, titles: Sequence[str], source_ids: Sequence[Any]) -> None:
        self.titles = list(titles)
        self.source_ids = [str(source_id) for source_id in source_ids]
        self._by_id = {source_id: item for item, source_id in enumerate(self.source_ids)}
        lines = [one_line(title) for title in self.titles]
        self._folded = [_folded(line) for line in lines]
        self._by_title = {line: item for item, line in reversed(list(enumerate(lines)))}
        self._by_folded: dict[str, list[int]] = {}
        for item, folded in enumerate(self._folded):
            self._by_folded.setdefault(folded, []).append(item)
        self._near: dict[str, tuple[int | None, list[str]]] = {}

    def __len__(self) -> int:
        return len(self.titles)

    def knows(self, wanted: Item) -> bool:
        """Whether ``find`` has the answer without a search. Folding makes letters of some signs, so this looks at the
        folded text, as ``find`` does."""
        kind, value = next(iter(wanted.items()), ("", None)) if isinstance(wanted, Mapping) else ("", wanted)
        if kind == "id" or not isinstance(value, str):  # an id is there or not
            return True
        folded = _folded(one_line(value))
        there = folded in self._by_folded or (kind != "title" and self._id(value) is not None)
        return there or not _may_be_guessed(folded)

    def has(self, text: str) -> bool:
        """Whether this is an id or a title, in any case."""
        return self._id(text) is not None or _folded(one_line(text)) in self._by_folded

    def find(
        self,
        wanted: Item,
        notes: list[str],
        *,
        name: str = "history",
        exact: bool = False,
        searches: Searches | None = None,
    ) -> int:
        """The number of an item. Ids count before titles, and a title as it is written before one in other case. The
        start of one title, or a title with a slip, is enough: ``notes`` then says what was taken. Numbers, and text
        without a letter, are not guessed at. ``exact``: nothing is, and case counts. ``searches``: how many more
        may be done; None for any number."""
        text, kinds = self._text(wanted, name)
        line = one_line(text)
        by_id = self._id(text) if "id" in kinds else None
        by_title = self._by_title.get(line) if "title" in kinds else None
        if by_id is not None and (by_title is None or text.strip() in self._by_id):
            if by_title not in (None, by_id):
                notes.append(f"{shown(repr(text))} is an id and a title: taken for the id of {self.titles[by_id]!r}")
            return by_id
        if by_title is not None:
            self._note_others(text, by_title, [self._by_title.get(f"{line} (2)")], notes)
            return by_title
        if "title" not in kinds:
            is_title = line in self._by_title and not isinstance(wanted, Mapping)
            hint = "; it is a title: write it as text, in quotes" if is_title else ""
            raise UnknownItem(f"{name}: expected the id of an item of the catalogue; got {shown(repr(text))}{hint}")
        folded = _folded(line)
        alike = self._by_folded.get(folded, [])
        if alike and not exact:
            self._note_others(text, alike[0], [*alike[1:], *self._by_folded.get(f"{folded} (2)", [])], notes)
            return alike[0]
        item, hints = (None, [self.titles[one] for one in alike]) if exact else self._approximate(folded, searches)
        if item is None:
            hint = f"did you mean {' or '.join(map(repr, hints))}?" if hints else "see items.parquet of the run"
            raise UnknownItem(f"{name}: expected a title or an id of the catalogue; got {shown(repr(text))}; {hint}")
        notes.append(f"{shown(repr(text))} was taken for {self.titles[item]!r}")
        return item

    def _id(self, text: str) -> int | None:
        """The item of an id. One that is not there as it is written may be there as ``napo prepare`` spells it: 4.0
        is 4."""
        found = self._by_id.get(text.strip())
        if found is None:
            try:
                found = self._by_id.get(spelled_id(text))
            except ValueError:  # no id at all
                return None
        return found

    def _note_others(self, text: str, taken: int, others: Sequence[int | None], notes: list[str]) -> None:
        """Tells of other items that could be meant: by titles in other case, or by equal titles, which `prepare` tells
        apart by a number."""
        told = [f"{self.source_ids[item]!r} is {self.titles[item]!r}" for item in others if item is not None][:5]
        if told:
            notes.append(
                f"{shown(repr(text))} was taken for the item with id {self.source_ids[taken]!r}; {', '.join(told)}"
            )

    def _text(self, wanted: Item, name: str) -> tuple[str, tuple[str, ...]]:
        value: Any = wanted
        kinds: tuple[str, ...] = ("id", "title") if isinstance(wanted, str) else ("id",)
        if isinstance(wanted, Mapping):
            kinds = tuple(wanted)
            if len(kinds) != 1 or kinds[0] not in ("id", "title"):
                raise ValueError(f"{name}: expected an object with id or title; got {shown(dict(wanted))}")
            value = wanted[kinds[0]]
        if is_missing(value):
            raise UnknownItem(f"{name}: expected titles or ids; got null, which is nothing")
        if isinstance(value, str):
            return value, kinds
        # Tables hold whole numbers as floats where a list has a gap.
        if isinstance(value, (int, np.integer)) or (isinstance(value, (float, np.floating)) and value == value // 1):
            with contextlib.suppress(ValueError, TypeError):
                return spelled_id(value), kinds
        raise ValueError(f"{name}: expected titles or ids, text or whole numbers; got {shown(repr(value))}")

    def _approximate(self, folded: str, searches: Searches | None) -> tuple[int | None, list[str]]:
        """The item taken for an unknown title, and others that were near."""
        if not _may_be_guessed(folded):
            return None, []
        found = self._near.get(folded)
        if found is None:
            if searches is not None and searches.left <= 0:
                searches.refused += 1
                return None, []
            found = self._search(folded)
            if searches is not None and found[0] is None:
                searches.left -= 1
            if len(self._near) >= 10_000:
                self._near.clear()  # of another thread's too, which has its answer in hand
            self._near[folded] = found
        return found

    def _search(self, folded: str) -> tuple[int | None, list[str]]:
        starts = [item for item, title in enumerate(self._folded) if title.startswith(folded)]
        if len(starts) == 1 and sum(map(str.isalpha, folded)) >= SHORTEST_START:
            return starts[0], []
        if starts:
            return None, [self.titles[item] for item in starts[:5]]
        near = difflib.get_close_matches(folded, self._by_folded, n=3, cutoff=0.6)
        likeness = [difflib.SequenceMatcher(None, title, folded).ratio() for title in near]
        clear = bool(near) and likeness[0] >= NEAR_ENOUGH and (len(near) == 1 or likeness[0] - likeness[1] >= AHEAD)
        # "Rocky 3" is no slip of "Rocky 4".
        clear = clear and len(self._by_folded[near[0]]) == 1 and _NUMBERS.findall(near[0]) == _NUMBERS.findall(folded)
        items = [item for title in near for item in self._by_folded[title]]
        return (items[0] if clear else None), [self.titles[item] for item in items]


def _folded(line: str) -> str:
    """Without case. NFC again, as folding takes some letters apart."""
    return unicodedata.normalize("NFC", line.casefold())


def _may_be_guessed(folded: str) -> bool:
    """Text without a letter is the number of something, and a number nearby is of something else."""
    return len(folded) <= LONGEST_TITLE and any(map(str.isalpha, folded))
