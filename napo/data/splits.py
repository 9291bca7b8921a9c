"""Which interactions are targets of which split. A row is (user, position): the item at ``position`` of the user's
sequence is the target, what lies before it is the history."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass
class Rows:
    """The rows of each owner at positions ``first`` to ``stop``: three numbers per user, however many rows there
    are."""

    owner: np.ndarray  # (u,) int64, ascending
    first: np.ndarray  # (u,) int64, counted from the user's first interaction
    stop: np.ndarray  # (u,) int64

    def __post_init__(self) -> None:
        self.stop = np.maximum(self.stop, self.first)

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def counts(self) -> np.ndarray:
        return self.stop - self.first

    @property
    def user(self) -> np.ndarray:
        """(n,) of every row."""
        return np.repeat(self.owner, self.counts)

    @property
    def position(self) -> np.ndarray:
        """(n,) of every row."""
        counts = self.counts
        return np.arange(len(self)) + np.repeat(self.first - (np.cumsum(counts) - counts), counts)

    def history_sizes(self) -> np.ndarray:
        """(u,): what the histories of an owner's rows have together."""
        return (self.first + self.stop - 1) * self.counts // 2

    def of(self, owners: slice) -> Rows:
        return Rows(self.owner[owners], self.first[owners], self.stop[owners])

    def at_least(self, position: int) -> Rows:
        return Rows(self.owner, np.maximum(self.first, position), self.stop)


def all_rows(starts: np.ndarray, users: np.ndarray, min_history: int) -> Rows:
    """Every interaction of ``users`` that has at least ``min_history`` before it, user by user."""
    lengths = starts[users + 1] - starts[users]
    return Rows(users, np.full(len(users), min_history, np.int64), lengths)


def last_rows(rows: Rows, per_user: int) -> Rows:
    """The last ``per_user`` rows of each user (0: all of them)."""
    if not per_user:
        return rows
    return Rows(rows.owner, np.maximum(rows.first, rows.stop - per_user), rows.stop)


class TooFewUsers(ValueError):
    """No user is left to train on."""

    def __init__(self, message: str, users: int) -> None:
        super().__init__(message)
        self.users = users


def split_by_user(
    starts: np.ndarray, *, min_history: int, val_users: float, test_users: float, rows_per_user: int, seed: int
) -> dict[str, Rows]:
    """Users are held out whole. ``val_users`` and ``test_users``: a share below 1, or a number of users.

    Only users with a row are drawn, so the numbers asked for are the numbers given.
    """
    eligible = np.flatnonzero(np.diff(starts) > min_history)
    val, test = (int(wanted) if wanted >= 1 else round(wanted * len(eligible)) for wanted in (val_users, test_users))
    if val + test >= len(eligible):
        raise TooFewUsers(
            f"val_users and test_users: {val} + {test} users leave none to train on; {len(eligible)} users have "
            f"more than {min_history} interactions",
            len(eligible),
        )
    drawn = np.random.default_rng(seed).permutation(eligible)
    held_out = {"val": np.sort(drawn[test : test + val]), "test": np.sort(drawn[:test])}
    rows = {"train": all_rows(starts, np.sort(drawn[test + val :]), min_history)}
    for split, users in held_out.items():
        rows[split] = last_rows(all_rows(starts, users, min_history), rows_per_user)
    return rows


def split_leave_last_out(starts: np.ndarray, *, min_history: int) -> dict[str, Rows]:
    """The last item of each user is for the test, the one before for validation, all others for training."""
    lengths = np.diff(starts)
    users = np.flatnonzero(lengths >= 3)
    lengths = lengths[users]
    ends = {
        "train": (np.zeros_like(lengths), lengths - 2),
        "val": (lengths - 2, lengths - 1),
        "test": (lengths - 1, lengths),
    }
    return {name: Rows(users, first, stop).at_least(min_history) for name, (first, stop) in ends.items()}


def split_by_time(
    starts: np.ndarray, times: np.ndarray, *, min_history: int, val_share: float, test_share: float, rows_per_user: int
) -> dict[str, Rows]:
    """Two moments cut the whole log: targets before the first train, between them validate, after the second test.

    A moment belongs wholly to the later side, so no training target is younger than a validation target.
    """
    for name, share in (("val_users", val_share), ("test_users", test_share)):
        if not 0 <= share < 1:
            raise ValueError(f"{name}: a split by time takes a share of the interactions below 1, got {share}")
    if val_share + test_share >= 1:
        raise ValueError(f"val_users and test_users: {val_share} + {test_share} leave nothing to train on")
    shares = (1 - val_share - test_share, 1 - test_share)
    cuts = [_nth(times, min(int(len(times) * share), len(times) - 1)) for share in shares]
    lengths = np.diff(starts)
    # Times ascend within a user, so what lies at or after a moment is the end of the sequence.
    late = np.zeros((2, len(lengths)), np.int64)
    known = np.flatnonzero(lengths)
    for row, cut in zip(late, cuts, strict=True):
        row[known] = np.add.reduceat(times >= cut, starts[known], dtype=np.int64)
    test = lengths - late[1] if test_share else lengths
    val = np.minimum(lengths - late[0], test) if val_share else test
    users = np.arange(len(lengths))
    train = Rows(users, np.zeros_like(lengths), val).at_least(min_history)
    return {
        "train": train,
        "val": last_rows(Rows(users, val, test).at_least(min_history), rows_per_user),
        "test": last_rows(Rows(users, test, lengths).at_least(min_history), rows_per_user),
    }


def _nth(times: np.ndarray, place: int) -> int:
    """``np.sort(times)[place]``, without a copy of what may be gigabytes."""
    low, high = int(times.min()), int(times.max())
    while low < high:
        middle = (low + high) // 2
        if np.count_nonzero(times <= middle) > place:
            high = middle
        else:
            low = middle + 1
    return low


def tile(rows: pd.DataFrame) -> np.ndarray:
    """Positions of the rows whose windows (history and next) tile each user's sequence without overlap.

    All of them where no window is full, as in a data set of short sequences.
    """
    window = max(map(len, rows["history"]), default=0) + 1
    length = np.array([len(full) for full in rows["full_history"]], np.int64)
    tiles = np.flatnonzero((length + 1) % window == 0)
    return tiles if len(tiles) else np.arange(len(rows))
