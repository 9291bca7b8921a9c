"""Candidate lists: the target among items that the user has not met; and the check of lists that come from outside."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def seeded_list(seen: Iterable[int], target: int, num_items: int, count: int = 20, seed: int = 0) -> list[int]:
    """The field's rule (LLaRA, S-DPO, NAPO), which seeds with the target; with ``seed=0`` bit for bit.

    random.seed(target), sample the others from the unseen ids in ascending order, append the target, reseed, shuffle.
    """
    excluded = np.unique(np.append(np.fromiter(seen, np.int64), target))
    _check_available(len(excluded), num_items, count)
    key = target + seed * num_items
    others = np.array(random.Random(key).sample(range(num_items - len(excluded)), count - 1), np.int64)
    # The k-th unseen id: how many excluded ids lie below it is known without listing the catalogue.
    others += np.searchsorted(excluded - np.arange(len(excluded)), others, side="right")
    result = [*others.tolist(), int(target)]
    random.Random(key).shuffle(result)
    return result


def random_lists(
    log: np.ndarray, positions: np.ndarray, first: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Lists for all rows of one training user: (rows, count). ``log``: the user's items; ``positions``: the targets;
    ``first``: (num_items,) scratch, the largest int64 everywhere, which it is again afterwards.

    Training rows do not use the field's rule: it would show a target the same 19 others every time. An item that the
    user meets later than the row may be drawn: to leave it out would tell the future.
    """
    num_items = len(first)
    first[log[::-1]] = np.arange(len(log))[::-1]  # the earliest position is written last and stays
    _check_available(int(np.count_nonzero(first[np.unique(log)] <= positions.max())), num_items, count)
    lists = np.empty((len(positions), count), np.int64)
    todo = np.arange(len(positions))
    draws = 2 * count
    while len(todo):
        drawn = generator.integers(0, num_items, (len(todo), draws))
        bad = first[drawn] <= positions[todo, None]
        # A repeat of an earlier draw of the same row is bad too: equal neighbours once sorted stably.
        order = np.argsort(drawn, axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, order, 1)
        repeat = np.zeros_like(bad)
        np.put_along_axis(repeat, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
        bad |= repeat
        enough = np.count_nonzero(~bad, axis=1) >= count - 1
        keep = np.argsort(bad, axis=1, kind="stable")[enough, : count - 1]
        done = todo[enough]
        lists[done, :-1] = np.take_along_axis(drawn[enough], keep, 1)
        todo = todo[~enough]
        draws *= 2
    first[log] = np.iinfo(np.int64).max
    lists[:, -1] = log[positions]
    # The target's place must not give it away.
    place = generator.integers(0, count, len(positions))
    rows = np.arange(len(positions))
    lists[rows, -1], lists[rows, place] = lists[rows, place], lists[rows, -1].copy()
    return lists


def checked_ids(item_ids: Any, rows: int, num_items: int) -> np.ndarray:
    """The items that a recommender is asked to score, as (rows, n) int64. Raises ValueError for other shapes and other
    ids."""
    ids = np.asarray(item_ids)
    if ids.ndim != 2 or len(ids) != rows:
        raise ValueError(f"item_ids: expected shape ({rows}, n), got {ids.shape}")
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= num_items):
        raise ValueError(f"item_ids: expected item ids from 0 to {num_items - 1}, got others")
    return ids.astype(np.int64)


def known_history(history: Sequence[int] | np.ndarray, num_items: int) -> np.ndarray:
    """A history without its padding (``num_items``), on whichever side. Raises ValueError for other ids."""
    items = np.asarray(history, np.int64)
    items = items[items != num_items]
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        raise ValueError(f"histories: expected item ids from 0 to {num_items - 1}, got others")
    return items


def _check_available(met: int, num_items: int, count: int) -> None:
    if num_items - met < count - 1:
        raise ValueError(
            f"candidates: a user has met {met} of {num_items} items, which leaves {num_items - met} for a list of "
            f"{count}; ask for fewer candidates"
        )
