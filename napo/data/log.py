"""What a reader makes of its files: a log of interactions with small integers for users and items, and the titles."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NOUNS = {
    "Movies": "watched",
    "Artists": "listened to",
    "Books": "read",
    "Games": "played",
    "Items": "chosen",
}


def key(value: Any) -> str:
    """A user or an item as text. Raises TypeError for what is nobody's id, such as null, which would become one."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, list, dict)):
        raise TypeError(f"expected an id, got {value!r}")
    # Integers with a gap among them are floats in many a table.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


@dataclass
class Log:
    """Interactions in file order. 16 bytes each, so that the biggest public sets fit into memory.

    ``add`` is called once a line; users and items are numbered as they come, which makes the numbers deterministic.
    """

    noun: str = "Items"
    user_ids: dict[str, int] = field(default_factory=dict)
    item_ids: dict[str, int] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    years: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=lambda: {"files": []})

    def __post_init__(self) -> None:
        self._user = array("i")
        self._item = array("i")
        self._time = array("q")

    def add(self, user: str, item: str, time: int) -> None:
        if not user or not item:
            raise ValueError("an empty user or item")
        # The time first: one out of range raises OverflowError, and the columns must stay of one length.
        self._time.append(time)
        self._user.append(self.user_ids.setdefault(user, len(self.user_ids)))
        self._item.append(self.item_ids.setdefault(item, len(self.item_ids)))

    def drop(self, reason: str) -> None:
        """Count a good line that the options leave out."""
        dropped = self.report.setdefault("left_out", {})
        dropped[reason] = dropped.get(reason, 0) + 1

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """user (int32), item (int32) and time (int64) of each interaction, in file order."""
        return (
            np.frombuffer(self._user, np.int32) if self._user else np.empty(0, np.int32),
            np.frombuffer(self._item, np.int32) if self._item else np.empty(0, np.int32),
            np.frombuffer(self._time, np.int64) if self._time else np.empty(0, np.int64),
        )


@dataclass
class Preset:
    """What a reader makes of a source with a split of its own: rows (history, next), oldest first, items from 0."""

    noun: str = "Items"
    titles: list[str] = field(default_factory=list)
    source_ids: list[str] = field(default_factory=list)
    rows: dict[str, list[tuple[list[int], int]]] = field(default_factory=dict)
    lists: dict[str, list[list[int]]] = field(default_factory=dict)
    """Candidate lists, where the source brings them too."""
    report: dict[str, Any] = field(default_factory=lambda: {"files": []})

    def rebuilt_users(self) -> dict[str, list[list[int]]] | None:
        """By split, each user's whole sequence; None where the rows do not tell.

        They tell where each row is either the start of a user (empty history) or goes on with the row before.
        """
        users: dict[str, list[list[int]]] = {}
        for split, rows in self.rows.items():
            users[split] = []
            for history, target in rows:
                if not history:
                    users[split].append([target])
                elif users[split] and users[split][-1][-len(history) :] == history:
                    users[split][-1].append(target)
                else:
                    return None
        return users
