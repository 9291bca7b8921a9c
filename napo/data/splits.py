"""Which interactions are targets of which split. A row is (user, position): the item at ``position`` of the user's
sequence is the target, what lies before it is the history."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass
class Rows:
    user: np.ndarray  # (n,) int64
    position: np.ndarray  # (n,) int64, counted from the user's first interaction

    def __len__(self) -> int:
        return len(self.user)

    def select(self, keep: np.ndarray) -> Rows:
        return Rows(self.user[keep], self.position[keep])


def all_rows(starts: np.ndarray, users: np.ndarray, min_history: int) -> Rows:
    """Every interaction of ``users`` that has at least ``min_history`` before it, user by user."""
    lengths = starts[users + 1] - starts[users]
    counts = np.maximum(lengths - min_history, 0)
    user = np.repeat(users, counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return Rows(user, np.arange(len(user)) - first + min_history)


def last_rows(rows: Rows, per_user: int) -> Rows:
    """The last ``per_user`` rows of each user (0: all of them). Rows must be sorted by user."""
    if not per_user or not len(rows):
        return rows
    end = np.searchsorted(rows.user, rows.user, side="right")
    return rows.select(np.arange(len(rows)) >= end - per_user)


def split_by_user(
    starts: np.ndarray, *, min_history: int, val_users: float, test_users: float, rows_per_user: int, seed: int
) -> dict[str, Rows]:
    """Users are held out whole. ``val_users`` and ``test_users``: a share below 1, or a number of users.

    Only users with a row are drawn, so the numbers asked for are the numbers given.
    """
    eligible = np.flatnonzero(np.diff(starts) > min_history)
    val, test = _count("val_users", val_users, len(eligible)), _count("test_users", test_users, len(eligible))
    if val + test >= len(eligible):
        raise ValueError(
            f"val_users and test_users: {val} + {test} users leave none to train on; {len(eligible)} users have "
            f"more than {min_history} interactions"
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
    rows = all_rows(starts, users, min_history)
    behind = lengths[rows.user] - rows.position
    return {"train": rows.select(behind > 2), "val": rows.select(behind == 2), "test": rows.select(behind == 1)}


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
    ordered = np.sort(times)
    shares = (1 - val_share - test_share, 1 - test_share)
    cut_val, cut_test = (ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in shares)
    rows = all_rows(starts, np.arange(len(starts) - 1), min_history)
    when = times[starts[rows.user] + rows.position]
    test = when >= cut_test if test_share else np.zeros(len(when), bool)
    val = (when >= cut_val) & ~test if val_share else np.zeros(len(when), bool)
    return {
        "train": rows.select(~(val | test)),
        "val": last_rows(rows.select(val), rows_per_user),
        "test": last_rows(rows.select(test), rows_per_user),
    }


def _count(name: str, wanted: float, available: int) -> int:
    if wanted < 0 or (wanted >= 1 and wanted != int(wanted)):
        raise ValueError(f"{name}: expected a share below 1 or a whole number of users, got {wanted}")
    return int(wanted) if wanted >= 1 else round(wanted * available)


def tile(rows: pd.DataFrame) -> np.ndarray:
    """Positions of the rows whose windows (history and next) tile each user's sequence without overlap.

    All of them where no window is full, as in a data set of short sequences.
    """
    window = max(map(len, rows["history"]), default=0) + 1
    length = np.array([len(full) for full in rows["full_history"]], np.int64)
    tiles = np.flatnonzero((length + 1) % window == 0)
    return tiles if len(tiles) else np.arange(len(rows))
