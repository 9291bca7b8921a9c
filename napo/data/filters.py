"""What is dropped from a log before it is split, step by step and counted."""

from __future__ import annotations

from typing import Any

import numpy as np


class Filters:
    """user, item: (n,) columns in the order of the log, time: limbs of the same length; each step keeps some
    interactions and says how many."""

    def __init__(self, user: np.ndarray, item: np.ndarray, time: list[np.ndarray]) -> None:
        self.user, self.item, self.time = user, item, time
        self.steps: list[dict[str, Any]] = []
        self._count("read", 0)

    def keep(self, step: str, mask: np.ndarray) -> None:
        before = len(self.user)
        if not mask.all():
            self._select(mask)
        self._count(step, before - len(self.user))

    def sort(self) -> None:
        """By user, then time; equal times keep the order of the file."""
        self._select(np.lexsort((*self.time[::-1], self.user)))

    def first_meetings(self) -> None:
        """A user's later interactions with an item already met are dropped: a target must be new to its user."""
        mask = np.zeros(len(self.user), bool)
        if len(mask):
            _, first = np.unique(self.user.astype(np.int64) * (int(self.item.max()) + 1) + self.item, return_index=True)
            mask[first] = True
        self.keep("later interactions with the same item", mask)

    def core(self, min_user: int, min_item: int) -> None:
        """Drop users below ``min_user`` and items below ``min_item`` interactions, until all have enough."""
        user, item = self.user, self.item
        alive = np.arange(len(user))
        while len(alive):
            good = np.bincount(user[alive])[user[alive]] >= min_user
            good &= np.bincount(item[alive])[item[alive]] >= min_item
            if good.all():
                break
            alive = alive[good]
        mask = np.zeros(len(user), bool)
        mask[alive] = True
        self.keep(f"{min_user}-core of users, {min_item}-core of items", mask)

    def ties(self) -> dict[str, int]:
        """Of the pairs of neighbours in the users' sequences, how many have equal times. Call it when sorted."""
        same = self.user[1:] == self.user[:-1]
        equal = same.copy()
        for limb in self.time:
            equal &= limb[1:] == limb[:-1]
        return {"neighbours": int(np.count_nonzero(same)), "equal_times": int(np.count_nonzero(equal))}

    def _select(self, kept: np.ndarray) -> None:
        self.user, self.item = self.user[kept], self.item[kept]
        self.time = [limb[kept] for limb in self.time]

    def _count(self, step: str, dropped: int) -> None:
        self.steps.append(
            {
                "step": step,
                "dropped": dropped,
                "interactions": len(self.user),
                "users": len(np.unique(self.user)),
                "items": len(np.unique(self.item)),
            }
        )
