"""What a service takes on."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Limits:
    """More than this is refused with a reason."""

    max_batch: int = 32
    """Requests that are computed in one pass."""
    max_waiting: int = 1024
    """Requests that wait for their turn: to be computed, and to have titles searched for. Further ones get 503."""
    max_wait_seconds: int = 30
    """For its turns, to have titles searched for and to be computed, both together; then a request gets 503. One whose
    last turn has come is answered however long that takes."""
    max_bytes: int = 1 << 18
    """Of a request's body."""
    max_connections: int = 1000
    """Open at a time; fewer where the process may open fewer files. One that waits for its client makes room."""
    keep_alive_seconds: int = 75
    """That a connection stays open behind an answer. Longer than a proxy keeps its own (60 seconds for many), which
    else sends a request on a connection that has just been closed."""
    max_pass_seconds: int = 120
    """A pass that takes longer makes `/health` answer 503, so that whoever watches the service can start it again."""
    max_read_seconds: int = 10
    """For a request to arrive: for its head, and again for its body."""
    max_history: int = 500
    """Items of a history, and of what is excluded."""
    max_searches: int = 20
    """Titles of a request that are not in the catalogue letter by letter, such as those with a slip. Each is compared
    with the whole catalogue."""
    max_k: int = 100
    """Recommendations that a request may ask for."""
    max_kept: int = 1024
    """Answers that are kept for requests that ask the same again; 0: none."""
    grace_seconds: int = 20
    """After SIGTERM what is in flight has so long to end."""

    def __post_init__(self) -> None:
        for one in fields(self):
            least = 0 if one.name == "max_kept" else 1
            if getattr(self, one.name) < least:
                raise ValueError(f"{one.name}: expected at least {least}; got {getattr(self, one.name)}")
