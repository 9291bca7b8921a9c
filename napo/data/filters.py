"""Filters of a log before it is split. Each step counts what it drops, and works part by part, so that memory is
bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import parts as kept_parts
from .parts import Parts

IDS = range(2)


class Filters:
    """``parts``: user, item and the limbs of time of each interaction, in the order of the log. Each step keeps some
    interactions and says how many. Afterwards ``user_counts`` and ``item_counts`` have the number of each user's and
    item's interactions.
    """

    def __init__(self, parts: Parts, num_users: int, num_items: int) -> None:
        self.parts, self.num_users, self.num_items = parts, num_users, num_items
        self.steps: list[dict[str, Any]] = []
        self._count("read", 0)

    @property
    def size(self) -> int:
        return sum(self.parts.sizes)

    def keep(self, step: str, chosen: Callable[[int], np.ndarray]) -> None:
        """``chosen``: of a part, a mask."""
        before = self.size
        for part in range(len(self.parts)):
            mask = chosen(part)
            if not mask.all():
                self.parts.store(part, [column[mask] for column in self.parts.load(part)])
        self._count(step, before - self.size)

    def keep_items(self, step: str, good: np.ndarray) -> None:
        """``good``: (items,) mask."""
        self.keep(step, lambda part: good[self.parts.load(part, IDS)[1]])

    def sort(self) -> None:
        """By user, then time; equal times keep the order of the file. From here on no user is in two parts."""
        if len(self.parts) > 1:
            self._gather_users()
        for part in range(len(self.parts)):
            user, item, *time = self.parts.load(part)
            order = np.lexsort((*time[::-1], user))
            self.parts.store(part, [column[order] for column in (user, item, *time)])

    def first_meetings(self) -> None:
        """A user's later interactions with an item already met are dropped: a target must be new to its user."""

        def first(part: int) -> np.ndarray:
            user, item = self.parts.load(part, IDS)
            mask = np.zeros(len(user), bool)
            if len(mask):
                _, places = np.unique(user.astype(np.int64) * self.num_items + item, return_index=True)
                mask[places] = True
            return mask

        self.keep("later interactions with the same item", first)

    def core(self, min_user: int, min_item: int) -> None:
        """Drop users below ``min_user`` and items below ``min_item`` interactions, until all have enough."""
        alive = [np.ones(size, bool) for size in self.parts.sizes]
        while True:
            users, items = np.zeros(self.num_users, np.int64), np.zeros(self.num_items, np.int64)
            for part, mask in enumerate(alive):
                user, item = self.parts.load(part, IDS)
                users += np.bincount(user[mask], minlength=self.num_users)
                items += np.bincount(item[mask], minlength=self.num_items)
            dropped = 0
            for part, mask in enumerate(alive):
                user, item = self.parts.load(part, IDS)
                good = mask & (users[user] >= min_user) & (items[item] >= min_item)
                dropped += int(np.count_nonzero(mask)) - int(np.count_nonzero(good))
                alive[part] = good
            if not dropped:
                break
        self.keep(f"{min_user}-core of users, {min_item}-core of items", alive.__getitem__)

    def ties(self) -> dict[str, int]:
        """Counts the pairs of neighbours in the users' sequences, and those with equal times. Call it when sorted."""
        neighbours = ties = 0
        for part in range(len(self.parts)):
            user, _, *time = self.parts.load(part)
            same = user[1:] == user[:-1]
            neighbours += int(np.count_nonzero(same))
            for limb in time:
                same &= limb[1:] == limb[:-1]
            ties += int(np.count_nonzero(same))
        return {"neighbours": neighbours, "equal_times": ties}

    def _gather_users(self) -> None:
        """The same interactions in other parts, users ascending, all of a user in one."""
        ends = np.cumsum(self.user_counts)
        part_of_user = np.maximum(ends - 1, 0) // kept_parts.PART
        count = int(part_of_user[-1]) + 1
        pieces = [Parts() for _ in range(count)]
        for part in range(len(self.parts)):
            columns = self.parts.load(part)
            target = part_of_user[columns[0]]
            order = np.argsort(target, kind="stable")
            bounds = np.searchsorted(target[order], np.arange(count + 1))
            for place, piece in enumerate(pieces):
                chosen = order[bounds[place] : bounds[place + 1]]
                if len(chosen):
                    piece.append([column[chosen] for column in columns])
        self.parts.close()
        gathered = Parts()
        for piece in pieces:
            if len(piece):
                loaded = [piece.load(number) for number in range(len(piece))]
                gathered.append([np.concatenate(column) for column in zip(*loaded, strict=True)])
            piece.close()
        self.parts = gathered

    def _count(self, step: str, dropped: int) -> None:
        users, items = np.zeros(self.num_users, np.int64), np.zeros(self.num_items, np.int64)
        for part in range(len(self.parts)):
            user, item = self.parts.load(part, IDS)
            users += np.bincount(user, minlength=self.num_users)
            items += np.bincount(item, minlength=self.num_items)
        self.user_counts, self.item_counts = users, items
        self.steps.append(
            {
                "step": step,
                "dropped": dropped,
                "interactions": self.size,
                "users": int(np.count_nonzero(users)),
                "items": int(np.count_nonzero(items)),
            }
        )
