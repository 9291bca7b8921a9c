"""Windows of a user's history with several targets each: one prompt that grows title by title.

Each window tiles a user's sequence (history and next item of a row). In the style "candidates-first" a window has one
list for all of its targets, and what else stands on the list are its negatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from napo.data.prepared import PreparedData
from napo.data.splits import tile


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
    """All that each training user ever met; empty where the source does not tell users."""
    known = data.train["user_id"].dropna().unique()
    log = data.interactions[data.interactions["user_id"].isin(known)]
    return {user: set(items.tolist()) for user, items in log.groupby("user_id")["item_id"]}


def draw_items(rng: np.random.Generator, num_items: int, known: set[int], count: int) -> list[int]:
    """``count`` different items outside ``known``."""
    if num_items - len(known) < count:
        raise ValueError(f"negatives: expected at most {num_items - len(known)}, what one user never met; got {count}")
    drawn: Sequence[int] = []
    while len(drawn) < count:
        more = [item for item in rng.integers(num_items, size=2 * count).tolist() if item not in known]
        drawn = list(dict.fromkeys([*drawn, *more]))[:count]
    return list(drawn)
