"""Requests that come while a pass is computed wait, and are the next pass together.

A request that comes alone is computed at once. Under load passes fill by themselves, but for one thing: those who just
got their answers ask again one after the other, and the first of them would be computed alone. So after a pass of
several the next one waits for company, for a small share of the time that the last one took.

A pass that fails is cut in two, down to the request that is at fault: the others get their answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

LINGER, MOST_LINGER = 0.01, 0.01
"""The share of a pass' time, and the most seconds, that the next one waits for company."""

Q = TypeVar("Q")
A = TypeVar("A")


class QueueFull(Exception):
    """So many wait already that one more is refused."""


class QueueTimeout(Exception):
    """Its turn has not come in the time that anybody may wait."""


class Batcher(Generic[Q, A]):
    """Calls ``work`` in one thread of its own, with at most ``most`` of what ``ask`` was given. Of those who ask,
    ``waiting`` may wait for their turn, for ``seconds`` each or until their own deadline."""

    def __init__(
        self,
        work: Callable[[Sequence[Q]], Sequence[A]],
        *,
        most: int,
        waiting: int,
        seconds: float = 3600.0,
        seen: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._work, self._most, self._room, self._seconds, self._seen = work, most, waiting, seconds, seen
        self._waiting: dict[asyncio.Future[A], Q] = {}  # the first to come is the first
        self._some = asyncio.Event()
        self._stopped = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="napo-batch")
        self._task: asyncio.Task[None] | None = None
        self._linger = 0.0
        self._pass_began: float | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def runs(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def pass_seconds(self) -> float:
        """How long the present pass takes already; 0 where there is none."""
        return 0.0 if self._pass_began is None else time.monotonic() - self._pass_began

    def start(self) -> None:
        """Called in the event loop that ``ask`` is awaited in."""
        self._task = asyncio.create_task(self._run())

    async def ask(self, question: Q, deadline: float | None = None) -> A:
        """Whoever does not want the answer any more cancels this, and makes room for another one. ``deadline``: until
        when its turn has to come, by the event loop's clock."""
        if len(self._waiting) >= self._room:
            raise QueueFull
        loop = asyncio.get_running_loop()
        future: asyncio.Future[A] = loop.create_future()
        self._waiting[future] = question
        self._some.set()
        late = loop.call_at(loop.time() + self._seconds if deadline is None else deadline, self._give_up, future)
        try:
            return await future
        finally:
            late.cancel()
            self._waiting.pop(future, None)

    def _give_up(self, future: asyncio.Future[A]) -> None:
        if self._waiting.pop(future, None) is not None and not future.done():  # else it is being computed
            future.set_exception(QueueTimeout())

    async def stop(self) -> None:
        """What waits is still answered."""
        self._stopped = True
        self._some.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            if self._linger and len(self._waiting) < self._most:
                await asyncio.sleep(self._linger)
            batch = [(question, future) for future, question in islice(self._waiting.items(), self._most)]
            for _, future in batch:
                del self._waiting[future]
            await self._answer(batch)
            if not self._waiting:
                if self._stopped:
                    return
                self._some.clear()

    async def _answer(self, batch: list[tuple[Q, asyncio.Future[A]]]) -> None:
        batch = [(question, future) for question, future in batch if not future.done()]  # else the client has gone
        if not batch:
            return
        began = self._pass_began = time.monotonic()
        answers: Sequence[A] | None = None
        try:
            answers = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._work, [question for question, _ in batch]
            )
        except Exception as error:
            if len(batch) == 1:
                if not batch[0][1].done():
                    batch[0][1].set_exception(error)
                return
        finally:
            self._pass_began = None
        if answers is None:  # here and not above: the error holds what its frames held, and memory may be what lacked
            middle = len(batch) // 2
            await self._answer(batch[:middle])
            await self._answer(batch[middle:])
            return
        took = time.monotonic() - began
        self._linger = min(LINGER * took, MOST_LINGER) if len(batch) > 1 else 0.0
        self._seen(len(batch), took)
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
