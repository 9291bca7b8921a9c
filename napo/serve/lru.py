"""Answers that are kept: who asks with the same history again is answered from memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

A = TypeVar("A")


class LRUCache(Generic[A]):
    """The ``most`` answers that were used last. Used in the event loop's thread alone."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.hits = self.misses = 0
        self._answers: OrderedDict[Hashable, A] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: Hashable) -> A | None:
        answer = self._answers.get(key)
        if answer is None:
            self.misses += 1
            return None
        self.hits += 1
        self._answers.move_to_end(key)
        return answer

    def put(self, key: Hashable, answer: A) -> None:
        self._answers[key] = answer
        self._answers.move_to_end(key)
        while len(self._answers) > self.most:
            self._answers.popitem(last=False)
