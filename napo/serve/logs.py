"""A log that clients cannot fill."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Hashable
from dataclasses import dataclass

MOST_KINDS = 1000
"""Kinds of messages that are counted at a time."""


@dataclass
class _Seen:
    since: float
    last: logging.LogRecord
    count: int = 0


class RateLimitFilter(logging.Filter):
    """Lets a message through ``most`` times in ``seconds``, and says afterwards how many more there were: who makes the
    service log shall not fill its disk. ``flush``, called now and then, says it where no other message comes."""

    def __init__(self, most: int = 10, seconds: float = 60.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.most, self.seconds, self.clock = most, seconds, clock
        self._seen: dict[Hashable, _Seen] = {}
        self._lock = threading.RLock()  # what is said of a kind comes here again

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "of_rate_limit", False):
            return True
        with self._lock:
            kind = _kind(record)
            self.flush(everything=kind not in self._seen and len(self._seen) >= MOST_KINDS)
            seen = self._seen.setdefault(kind, _Seen(self.clock(), record))
            seen.count += 1
            seen.last = record
            return seen.count <= self.most

    def flush(self, *, everything: bool = False) -> None:
        """Say of each kind whose time is over how many more there were. ``everything``: of the others too."""
        with self._lock:
            now = self.clock()
            over = [kind for kind, seen in self._seen.items() if everything or now - seen.since >= self.seconds]
            for seen in [self._seen.pop(kind) for kind in over]:
                if seen.count > self.most:
                    more, took = seen.count - self.most, now - seen.since
                    said = f"{seen.last.getMessage().rstrip()} (and {more} more like it in {took:.0f} s)"
                    values = seen.last.__dict__ | {"msg": said, "args": None, "exc_info": None, "exc_text": None}
                    logging.getLogger(seen.last.name).handle(logging.makeLogRecord(values | {"of_rate_limit": True}))


def _kind(record: logging.LogRecord) -> Hashable:
    """Two failures of one message are of two kinds where they come from two places of the code."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return record.name, str(record.msg)
    places = traceback.extract_tb(error.__traceback__)
    return record.name, str(record.msg), type(error), (places[-1].filename, places[-1].lineno) if places else None
