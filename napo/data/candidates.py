"""Candidate lists: the target among items that the user has not met; and the check of lists that come from outside."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .splits import Rows


def seeded_list(seen: Iterable[int], target: int, num_items: int, count: int = 20, seed: int = 0) -> list[int]:
    """The field's rule (LLaRA, S-DPO, NAPO), which seeds with the target; with ``seed=0`` bit for bit.

    random.seed(target), sample the others from the unseen ids in ascending order, append the target, reseed, shuffle.
    """
    met = seen if isinstance(seen, np.ndarray) else np.fromiter(seen, np.int64)
    excluded = np.unique(np.append(met.astype(np.int64, copy=False), target))
    _check_available(len(excluded), num_items, count)
    key = target + seed * num_items
    others = np.array(random.Random(key).sample(range(num_items - len(excluded)), count - 1), np.int64)
    # The k-th unseen id: how many excluded ids lie below it is known without listing the catalogue.
    others += np.searchsorted(excluded - np.arange(len(excluded)), others, side="right")
    result = [*others.tolist(), int(target)]
    random.Random(key).shuffle(result)
    return result


class TrainingLists:
    """Lists for the rows of training users, drawn anew for each row. A list depends on the seed, the user, the position
    and what the user met, not on the rows around it.

    Training rows do not use the field's rule: it would show a target the same 19 others every time. An item that the
    user meets later than the row may be drawn: to leave it out would tell the future.
    """

    ROUNDS = 3
    """A list that holds a repeat or an item already met is drawn again, so many times at most for all users together.
    Each round rejects whole lists, so those that stay are uniform over the valid ones."""

    def __init__(self, log: np.ndarray, starts: np.ndarray, num_items: int, count: int, seed: int) -> None:
        """``log`` (n,) items, user u's from ``starts[u]`` to ``starts[u + 1]``."""
        self.log, self.starts, self.num_items, self.count = log, starts, num_items, count
        self._seed = seed
        self._first = np.full(num_items, np.iinfo(np.int64).max)  # scratch of the draws for one user

    def draw(self, rows: Rows) -> np.ndarray:
        """(rows, count)."""
        user, position = rows.user, rows.position
        owner = np.repeat(np.arange(len(rows.owner)), rows.counts)  # (rows,) the user's place in ``rows``
        met = _FirstMeetings(self.log, self.starts, rows.owner, self.num_items)
        lists = np.empty((len(user), self.count), np.int64)
        keys = _mixed(_mixed(np.uint64(self._seed % 2**64) + user.astype(np.uint64)) + position.astype(np.uint64))
        columns = np.arange(self.count - 1, dtype=np.uint64)
        todo = np.arange(len(user))
        for turn in range(self.ROUNDS):
            bits = _mixed(_mixed(keys[todo] + np.uint64(turn))[:, None] + columns)
            drawn = (bits % np.uint64(self.num_items)).astype(np.int64)
            ordered = np.sort(drawn, axis=1)
            bad = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
            bad |= met.any_before(owner[todo], drawn, position[todo])
            lists[todo[~bad], :-1] = drawn[~bad]
            todo = todo[bad]
        lists[:, -1] = self.log[self.starts[user] + position]
        # The target's place must not give it away.
        place = (_mixed(~keys) % np.uint64(self.count)).astype(np.int64)
        every = np.arange(len(user))
        lists[every, -1], lists[every, place] = lists[every, place], lists[every, -1].copy()

        # What is left has met much of the catalogue: user by user, single items are drawn again.
        ends = np.flatnonzero(np.append(np.diff(user[todo]), 1)) + 1
        for left in np.split(todo, ends[:-1]) if len(todo) else []:
            one = int(user[left[0]])
            own, generator = self.log[self.starts[one] : self.starts[one + 1]], np.random.default_rng([self._seed, one])
            lists[left] = _lists_of_user(own, position[left], self._first, self.count, generator)
        return lists


def _mixed(bits: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), behind its increment: random bits from a counter."""
    bits = bits * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class _FirstMeetings:
    """Which item a user met when, for many users at once."""

    def __init__(self, log: np.ndarray, starts: np.ndarray, users: np.ndarray, num_items: int) -> None:
        every = Rows(users, np.zeros(len(users), np.int64), starts[users + 1] - starts[users])
        place = every.position
        items = log[starts[every.user] + place]
        self._num_items = num_items
        codes = np.repeat(np.arange(len(users)), every.counts) * num_items + items
        self._codes, at = np.unique(codes, return_index=True)  # of equal ones the first
        self._place = place[at]
        # Nearly every item that is drawn was never met. A table of hashes says so without a search.
        self._shift = np.uint64(64 - max(10, len(self._codes).bit_length() + 4))
        self._table = np.zeros(1 << (64 - int(self._shift)), bool)
        self._table[self._hash(self._codes)] = True

    def _hash(self, codes: np.ndarray) -> np.ndarray:
        return (codes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> self._shift

    def any_before(self, owner: np.ndarray, items: np.ndarray, position: np.ndarray) -> np.ndarray:
        """(rows,): whether a row's user, by its place in ``users``, met one of ``items`` (rows, n) by ``position``."""
        codes = owner[:, None] * self._num_items + items
        row, column = np.nonzero(self._table[self._hash(codes)])
        wanted = codes[row, column]
        at = np.minimum(np.searchsorted(self._codes, wanted), len(self._codes) - 1)
        met = (self._codes[at] == wanted) & (self._place[at] <= position[row])
        found = np.zeros(len(items), bool)
        found[row[met]] = True
        return found


def _lists_of_user(
    log: np.ndarray, positions: np.ndarray, first: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Lists for rows of one user: (rows, count). ``log``: the user's items; ``positions``: the targets; ``first``:
    (num_items,) scratch, the largest int64 everywhere, which it is again afterwards."""
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
            f"{count}; ask for fewer candidates (at least 2), or give data with more items"
        )
