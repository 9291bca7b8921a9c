"""Windows of a user's history with several targets each: one prompt that grows title by title.

Windows tile the whole sequences of users, or are prepared rows (history and next item) that do so. In the style
"candidates-first" a window has one list for all of its targets, and what else stands on the list are its negatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from napo.data.prepared import PreparedData
from napo.data.splits import tile


@dataclass(frozen=True)
class Window:
    """The items ``begin`` to ``end - 1`` of a sequence; those from ``target`` on are targets, the others are shown."""

    sequence: int
    begin: int
    target: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How sequences are cut. ``lengths`` (items,) are the tokens of every title, ``header`` those before a window."""

    titles: int  # of a window
    lengths: np.ndarray
    header: int
    max_length: int  # tokens of a window, which ends earlier where its titles are long

    def __post_init__(self) -> None:
        if self.titles < 2:
            raise ValueError(f"window: expected at least 2 titles, one to show and one to predict; got {self.titles}")

    def windows(
        self,
        sequences: Sequence[np.ndarray],
        first_targets: Sequence[int] | None = None,
        rng: np.random.Generator | None = None,
    ) -> list[Window]:
        """Every item with another one before it is a target of one window, and is predicted from those of its window
        before it. A window begins with the last item of the one before. With ``rng`` the first windows are cut short,
        each time elsewhere, so that epochs differ.

        ``first_targets``: the place of each sequence's first target, where what lies before it is only shown.
        """
        found = []
        for number, sequence in enumerate(sequences):
            first = max(first_targets[number], 1) if first_targets is not None else 1
            ends = np.concatenate([[0], np.cumsum(self.lengths[sequence])])
            low, most = first, self.titles - 1
            count = most if rng is None else int(rng.integers(1, most + 1))
            while low < len(sequence):
                high = min(low + count, len(sequence))
                begin = low - 1 if first == 1 else max(high - self.titles, 0)
                fits = int(np.searchsorted(ends, ends[begin] + self.max_length - self.header, "right")) - 1
                high = max(min(high, fits), low + 1)
                found.append(Window(number, begin, low, high))
                low, count = high, most
        return found

    def tokens(self, window: Window, sequence: np.ndarray) -> int:
        """Tokens of header and titles, the last one left out, which is nobody's history."""
        return self.header + int(self.lengths[sequence[window.begin : window.end - 1]].sum())

    def budget(
        self, sequences: Sequence[np.ndarray], rng: np.random.Generator, *, epochs: float, tokens: int | None
    ) -> tuple[list[Window], int]:
        """Windows in random order for so many epochs, or for ``tokens`` in their place; and their tokens."""
        chosen: list[Window] = []
        spent = 0
        for epoch in itertools.count():
            tiles = self.windows(sequences, rng=rng)
            if not tiles:
                break
            share = min(epochs - epoch, 1.0) if tokens is None else 1.0
            for index in rng.permutation(len(tiles))[: max(round(share * len(tiles)), 0)]:
                if tokens is not None and spent >= tokens:
                    break
                chosen.append(tiles[index])
                spent += self.tokens(tiles[index], sequences[tiles[index].sequence])
            if epochs <= epoch + 1 if tokens is None else spent >= tokens:
                break
        return chosen, spent


def window_rows(rows: pd.DataFrame, windows: Sequence[Window]) -> pd.DataFrame:
    """A row for each window, as ``grow`` takes it. ``rows``: those that the sequences of the windows are made from."""
    users, pasts, nexts = (rows[name].to_numpy(object) for name in ("user_id", "full_history", "next"))
    parts: Iterator[tuple[Any, ...]] = (
        (users[w.sequence], np.append(pasts[w.sequence], nexts[w.sequence]).astype(np.int64), w) for w in windows
    )
    return pd.DataFrame(
        [(user, whole[w.begin : w.end - 1], whole[: w.end - 1], int(whole[w.end - 1])) for user, whole, w in parts],
        columns=["user_id", "history", "full_history", "next"],
    )


def draw_windows(rows: pd.DataFrame, limit: int | None, rng: np.random.Generator) -> pd.DataFrame:
    """At most ``limit`` of the windows that tile the users' sequences, in random order."""
    tiles = rows.iloc[tile(rows)] if len(rows) else rows
    return tiles.iloc[rng.permutation(len(tiles))[:limit]]


def add_lists(
    windows: pd.DataFrame, known: Mapping[Any, set[int]], num_items: int, min_history: int, rng: np.random.Generator
) -> pd.DataFrame:
    """The windows with a list of candidates each, as long as that of a row: its targets (the titles behind the first
    ``min_history``) and items that the user never met, shuffled."""
    lists = []
    for row in windows.itertuples(index=False):
        titles = [*row.history, row.next]
        targets = list(dict.fromkeys(int(item) for item in titles[min(min_history, len(titles) - 1) :]))
        met = known.get(row.user_id, set()) | {int(item) for item in row.full_history} | set(targets)
        others = draw_items(rng, num_items, met, max(len(row.candidates) - len(targets), 0))
        lists.append(rng.permutation([*targets, *others]).tolist())
    return windows.assign(candidates=lists)


def grow(windows: pd.DataFrame, min_history: int) -> pd.DataFrame:
    """A row for each title of each window that has ``min_history`` titles of the window before it, with the window's
    list; ``window`` numbers the windows."""
    columns = ["user_id", "history", "full_history", "next", "candidates", "targets", "window"]
    rows = []
    for number, row in enumerate(windows.itertuples(index=False)):
        titles = [*row.history, row.next]
        before = len(row.full_history) - len(row.history)
        places = range(min(min_history, len(titles) - 1), len(titles))
        targets = [int(titles[place]) for place in places]
        rows += [
            (
                row.user_id,
                row.history[:place],
                row.full_history[: before + place],
                titles[place],
                getattr(row, "candidates", None),
                targets,
                number,
            )
            for place in places
        ]
    return pd.DataFrame(rows, columns=columns)


def met_items(data: PreparedData) -> Mapping[Any, set[int]]:
    """All that each training user met in what is trained on; empty where the source does not tell users. An item that
    is held out of a user's sequence is not part of it: never to draw it for this user would tell it."""
    if not data.has_users:
        return {}
    rows = data.longest_training_rows()
    whole = zip(rows["user_id"].tolist(), rows["full_history"], rows["next"].tolist(), strict=True)
    return {user: {*past.tolist(), last} for user, past, last in whole}


def draw_items(rng: np.random.Generator, num_items: int, known: set[int], count: int) -> list[int]:
    """``count`` different items outside ``known``."""
    if num_items - len(known) < count:
        raise ValueError(f"negatives: expected at most {num_items - len(known)}, what one user never met; got {count}")
    drawn: Sequence[int] = []
    while len(drawn) < count:
        more = [item for item in rng.integers(num_items, size=2 * count).tolist() if item not in known]
        drawn = list(dict.fromkeys([*drawn, *more]))[:count]
    return list(drawn)
