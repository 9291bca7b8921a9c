"""Equal questions that are asked at the same time are answered by one computation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

A = TypeVar("A")


@dataclass
class _Work(Generic[A]):
    task: asyncio.Task[A]
    waiting: int = 0


class Sharing(Generic[A]):
    """Used in one event loop."""

    def __init__(self) -> None:
        self._works: dict[Hashable, _Work[A]] = {}

    async def ask(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, A]]) -> A:
        """What ``work`` gives, called unless somebody waits for the answer to ``key`` already. It is cancelled once
        nobody does."""
        one = self._works.get(key)
        if one is None:
            one = self._works[key] = _Work(asyncio.create_task(work()))
        one.waiting += 1
        try:
            return await asyncio.shield(one.task)
        finally:
            one.waiting -= 1
            if one.task.done() or not one.waiting:
                one.task.cancel()
                if self._works.get(key) is one:
                    del self._works[key]
