"""What the service does with a query: searches, passes, answers that are kept, and whether all of that works."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from starlette.types import Receive

import napo
from napo.recommend import Asked, Query, Recommendations, Recommender
from napo.serve.batching import Batcher, QueueTimeout
from napo.serve.limits import Limits
from napo.serve.lru import LRUCache
from napo.serve.metrics import Metrics
from napo.serve.middleware import while_there
from napo.serve.sharing import Sharing


class RefusedQuery(ValueError):
    """What the client asked cannot be answered; the message begins with the field at fault."""


class Service:
    """Used in one event loop, between ``start`` and ``stop``. The recommender resolves and ranks in threads of its
    own, at most one search and one pass at a time: Python computes no two at once."""

    def __init__(self, recommender: Recommender, limits: Limits, metrics: Metrics) -> None:
        self.recommender, self.limits, self.metrics = recommender, limits, metrics
        self.kept = LRUCache[Recommendations](limits.max_kept)
        self.shared = Sharing[Recommendations]()
        self.batcher: Batcher[Asked, Recommendations] = Batcher(
            recommender.answer, most=limits.max_batch, waiting=limits.max_waiting, seen=metrics.computed
        )
        self.searcher: Batcher[Query, Asked] = Batcher(
            lambda queries: [recommender.resolve(query) for query in queries], most=1, waiting=limits.max_waiting
        )
        self.started = time.time()
        weights, data = recommender.fingerprints()
        self.facts: dict[str, str] = {"version": napo.__version__, "weights_sha256": weights, "data_sha256": data}

    def start(self) -> None:
        self.batcher.start()
        self.searcher.start()

    async def stop(self) -> None:
        await self.searcher.stop()
        await self.batcher.stop()

    async def answer(self, query: Query, receive: Receive) -> Recommendations:
        """RefusedQuery where it cannot be answered; ValueError where the model cannot."""
        deadline = asyncio.get_running_loop().time() + self.limits.max_wait_seconds
        searches = self._searches(query)
        try:
            if searches:  # which take a while, and wait for their turn as what is computed does
                asked = await while_there(receive, self.searcher.ask(query, deadline))
            else:
                asked = self.recommender.resolve(query)
        except ValueError as error:
            raise RefusedQuery(str(error)) from None
        key = (tuple(asked.history), asked.k, frozenset(asked.barred))
        found = self.kept.get(key)
        if found is None:
            if not asked.history and self.recommender.popularity is None:
                raise RefusedQuery(self.recommender.why_not_popular)
            alike = replace(asked, notes=[])  # which are of how this request named its items
            found = await while_there(receive, self._computed(key, alike, deadline))
            self.kept.put(key, found)
        self.metrics.recommended(self.recommender.model, found.model)
        return replace(found, notes=[*asked.notes, *found.notes])

    async def _computed(self, key: Any, asked: Asked, deadline: float) -> Recommendations:
        while True:
            try:
                return await self.shared.ask(key, lambda: self.batcher.ask(asked, deadline))
            except QueueTimeout:
                if asyncio.get_running_loop().time() >= deadline:  # else of who asked the same before
                    raise

    def _searches(self, query: Query) -> int:
        """How many titles have to be searched for."""
        if query.exact:
            return 0
        knows, most = self.recommender.catalogue.knows, self.limits.max_searches
        counts = {name: sum(not knows(item) for item in getattr(query, name) or ()) for name in ("history", "exclude")}
        searches = sum(counts.values())
        if searches > most:
            name = "history" if counts["history"] else "exclude"
            more = ", with those of exclude," if counts["history"] and counts["exclude"] else ""
            raise RefusedQuery(
                f"{name}: expected at most {most} titles to search for; {searches}{more} are not in the catalogue "
                "letter by letter; give ids, or exact"
            )
        return searches

    def fault(self) -> str:
        """Why no requests are answered; "" where they are."""
        if not (self.batcher.runs and self.searcher.runs):
            return "requests are not taken on"
        if self.batcher.pass_seconds > self.limits.max_pass_seconds:  # a search is as long as a client makes it
            return f"a pass takes longer than {self.limits.max_pass_seconds} s"
        return ""

    def health(self) -> dict[str, Any]:
        return {
            "status": self.fault() or "ok",
            "model": self.recommender.model,
            "items": len(self.recommender.catalogue),
            **self.facts,
            "started": datetime.fromtimestamp(self.started, timezone.utc).isoformat(timespec="seconds"),
        }

    def metrics_text(self) -> str:
        return self.metrics.text(
            waiting=self.batcher.waiting + self.searcher.waiting,
            kept=self.kept,
            started=self.started,
            healthy=not self.fault(),
            facts={"name": self.recommender.model, **self.facts},
        )
