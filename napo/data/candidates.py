"""Candidate lists: the target among items that the user has not met."""

from __future__ import annotations

import random
from collections.abc import Iterable

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
    # The target's place must say nothing.
    place = generator.integers(0, count, len(positions))
    rows = np.arange(len(positions))
    lists[rows, -1], lists[rows, place] = lists[rows, place], lists[rows, -1].copy()
    return lists


def _check_available(met: int, num_items: int, count: int) -> None:
    if num_items - met < count - 1:
        raise ValueError(
            f"candidates: a user has met {met} of {num_items} items, which leaves {num_items - met} for a list of "
            f"{count}; ask for fewer candidates"
        )
