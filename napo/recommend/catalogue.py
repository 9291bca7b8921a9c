"""Items as people name them: by title, or by the id of the data's source."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from napo.data.texts import shown

NEAR_ENOUGH, AHEAD = 0.85, 0.05
"""A title that is not in the catalogue is taken for one of at least this likeness, if that one is far enough ahead of
the next."""
LONGEST_TITLE = 300
"""The longest title to look for, in characters; comparing longer ones with a whole catalogue takes too long."""

Item = str | int | Mapping[str, Any]
"""A title or an id of the source, as a caller gives it; ``{"id": ...}`` and ``{"title": ...}`` say which of them it
is."""


class UnknownItem(ValueError):
    """Raised for an item that the catalogue does not have, nor anything much like it."""


class Catalogue:
    """Items by title and by the id of their source."""

    def __init__(self, titles: Sequence[str], source_ids: Sequence[Any]) -> None:
        self.titles = list(titles)
        self.source_ids = [str(source_id) for source_id in source_ids]
        self._by_id = {source_id: item for item, source_id in enumerate(self.source_ids)}
        self._folded = [title.casefold() for title in self.titles]
        self._by_title = {title: item for item, title in reversed(list(enumerate(self._folded)))}
        self._near: dict[str, tuple[int | None, list[str]]] = {}

    def __len__(self) -> int:
        return len(self.titles)

    def knows(self, wanted: Item) -> bool:
        """Whether ``find`` has the answer without a search."""
        value = next(iter(wanted.values()), None) if isinstance(wanted, Mapping) else wanted
        text = str(value).strip()
        return text in self._by_id or text.casefold() in self._by_title

    def find(self, wanted: Item, notes: list[str], *, name: str = "history") -> int:
        """The number of an item. Ids count before titles; case does not matter for titles, and the start of one title,
        or a title with a slip, is enough: ``notes`` then says what was taken."""
        text, kinds = self._text(wanted, name)
        key = text.strip().casefold()
        by_id, by_title = self._by_id.get(text.strip()), self._by_title.get(key)
        if "id" in kinds and by_id is not None:
            if "title" in kinds and by_title not in (None, by_id):
                notes.append(f"{text!r} is an id and a title: taken for the id of {self.titles[by_id]!r}")
            return by_id
        if "title" in kinds and by_title is not None:
            if (second := self._by_title.get(f"{key} (2)")) is not None:  # as `prepare` tells equal titles apart
                ids = [self.source_ids[item] for item in (by_title, second)]
                notes.append(
                    f"{text!r} was taken for the item with id {ids[0]!r}; {ids[1]!r} is {self.titles[second]!r}"
                )
            return by_title
        if "title" not in kinds:
            raise UnknownItem(f"{name}: expected the id of an item of the catalogue; got {shown(repr(text))}")
        item, hints = self._approximate(key)
        if item is None:
            hint = f"did you mean {' or '.join(map(repr, hints))}?" if hints else "see items.parquet of the run"
            raise UnknownItem(f"{name}: expected a title or an id of the catalogue; got {shown(repr(text))}; {hint}")
        notes.append(f"{shown(repr(text))} was taken for {self.titles[item]!r}")
        return item

    def _text(self, wanted: Item, name: str) -> tuple[str, tuple[str, ...]]:
        kinds: tuple[str, ...] = ("id", "title")
        value: Any = wanted
        if isinstance(wanted, Mapping):
            kinds = tuple(wanted)
            if len(kinds) != 1 or kinds[0] not in ("id", "title"):
                raise ValueError(f"{name}: expected an object with id or title; got {shown(dict(wanted))}")
            value = wanted[kinds[0]]
        if isinstance(value, (bool, float)) or not isinstance(value, (str, int, np.integer)):
            raise ValueError(f"{name}: expected titles or ids, text or whole numbers; got {shown(repr(value))}")
        return str(value), kinds

    def _approximate(self, key: str) -> tuple[int | None, list[str]]:
        """The item taken for an unknown title, and others that were near."""
        if not key or len(key) > LONGEST_TITLE:
            return None, []
        if key not in self._near:
            if len(self._near) >= 10_000:
                self._near.clear()
            self._near[key] = self._search(key)
        return self._near[key]

    def _search(self, key: str) -> tuple[int | None, list[str]]:
        starts = [item for item, title in enumerate(self._folded) if title.startswith(key)]
        if len(starts) == 1:
            return starts[0], []
        if starts:
            return None, [self.titles[item] for item in starts[:5]]
        near = difflib.get_close_matches(key, self._by_title, n=3, cutoff=0.6)
        likeness = [difflib.SequenceMatcher(None, title, key).ratio() for title in near]
        clear = bool(near) and likeness[0] >= NEAR_ENOUGH and (len(near) == 1 or likeness[0] - likeness[1] >= AHEAD)
        items = [self._by_title[title] for title in near]
        return (items[0] if clear else None), [self.titles[item] for item in items]
