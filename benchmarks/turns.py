"""How a benchmark lets others go on: it stops itself, and by_turns.py continues it when its turn comes."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime, timezone

BY_TURNS = "NAPO_BENCH_BY_TURNS"  # set by by_turns.py: when it began


def day() -> str:
    """Of the results: that on which the benchmark began, or all that take turns, which may go on past midnight."""
    return os.environ.get(BY_TURNS, "")[:10] or f"{datetime.now(timezone.utc):%Y-%m-%d}"


def give_way() -> float:
    """Seconds until it was our turn again; 0 for a benchmark that runs alone."""
    if not os.environ.get(BY_TURNS):
        return 0.0
    stopped = time.perf_counter()
    os.kill(os.getpid(), signal.SIGSTOP)
    return time.perf_counter() - stopped
