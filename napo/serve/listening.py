"""Connections: how many there are, and how long a client may say nothing. uvicorn takes any number of them, and one
that sends no request stays as long as its client likes.

When there are as many as there may be, the one that has waited for its client longest makes room for the next. So
clients that only hold connections keep nobody out. Where all connections wait for the service, further ones wait in the
kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

logger = logging.getLogger("napo.serve")

PAUSE = 0.02
"""Seconds until one looks again whether there is room."""
MOST_AT_ONCE = 64
"""Connections that make room in one go. Nobody tells how many come: it is one at first, and twice as many each time
that those were too few."""
LEAST = 0.25
"""Seconds that a client has in any case: what it sends may be on its way."""
SWEEP = 1.0
"""Seconds between two looks at who has been silent for too long."""
OTHER_FILES = 32
"""That may be opened while connections are."""


class Listener:
    """Takes connections from a socket, in place of the servers of asyncio that uvicorn would have. ``connections``:
    those that uvicorn has. ``most`` are open at a time, and a client may take ``seconds`` when it is its turn: to send
    a request's head, then its body, and to read the answer; ``idle`` seconds behind an answer, for the next request."""

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        connections: set[Any],
        *,
        most: int,
        seconds: float,
        idle: float,
    ) -> None:
        self.sockets: Sequence[socket.socket] = (listener,)
        self._socket, self._protocol, self._connections = listener, protocol, connections
        self._most, self._seconds, self._idle = most, seconds, max(seconds, idle)
        self._coming: set[asyncio.Task[None]] = set()
        self._silent: dict[Any, tuple[Any, float]] = {}  # {connection: (its last request, since when)}
        self._at_once = 1
        self._closed = False
        self._loop = asyncio.get_running_loop()

    def start(self, backlog: int) -> None:
        reusing(self._socket, True)  # whose connections take it over, and would keep the next service out for a minute
        self._socket.listen(backlog)
        self._socket.setblocking(False)
        self._resume()
        self._sweep()

    def close(self) -> None:
        """As uvicorn calls it. Connections stay."""
        self._closed = True
        self._loop.remove_reader(self._socket)

    async def wait_closed(self) -> None:
        """As uvicorn calls it."""

    def accept(self) -> None:
        """Take all that have come, as far as there is room."""
        while len(self._connections) + len(self._coming) < self._most:
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                self._at_once = 1
                return
            except OSError as error:  # no file, or no memory
                logger.warning("cannot take a connection (%s)", error.strerror)
                break
            coming = self._loop.create_task(self._take(connection))
            self._coming.add(coming)
            coming.add_done_callback(self._coming.discard)
        recently = time.monotonic() - LEAST
        silent = [(since, connection) for connection, (_, since) in self._silent_ones().items() if since < recently]
        for _, connection in sorted(silent, key=itemgetter(0))[: self._at_once]:
            connection.transport.abort()
        self._at_once = min(2 * self._at_once, MOST_AT_ONCE)
        self._loop.remove_reader(self._socket)  # it would call at once again
        self._loop.call_later(PAUSE, self._resume)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._socket, self.accept)

    async def _take(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has gone already
            _, protocol = await self._loop.connect_accepted_socket(self._protocol, connection)
            self._silent[protocol] = None, time.monotonic()

    def _silent_ones(self) -> dict[Any, tuple[Any, float]]:
        """The connections that wait for their clients, each with its last request and the time since when it waits."""
        now, silent = time.monotonic(), {}
        for connection in self._connections:
            last = connection.cycle
            if last is None or last.response_complete or last.more_body or connection.flow.write_paused:
                before, since = self._silent.get(connection, (last, now))
                silent[connection] = last, since if before is last else now
        self._silent = silent
        return silent

    def _sweep(self) -> None:
        for connection, (last, since) in self._silent_ones().items():
            answered = last is not None and last.response_complete and not connection.flow.write_paused
            if time.monotonic() - since >= (self._idle if answered else self._seconds):
                connection.transport.abort()  # without what it has not read yet
        if not self._closed:
            self._loop.call_later(SWEEP, self._sweep)


def reusing(listener: socket.socket, on: bool) -> None:
    """Whether an address may be had that only closed connections still have, as right after a service has stopped. One
    that another socket listens on may never be."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(on))


def room_for(connections: int) -> int:
    """As many of so many connections as the process may have open files for; the soft limit is raised where it can be.
    A warning says where it cannot."""
    taken = len(os.listdir("/proc/self/fd")) + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < taken + connections:
        soft = taken + connections if hard == resource.RLIM_INFINITY else min(hard, taken + connections)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= taken + connections:
        return connections
    room = max(1, soft - taken)
    logger.warning("max_connections: %d in place of %d, as this process may open %d files", room, connections, soft)
    return room
