"""The process: uvicorn around the application."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from napo.progress import without_bars
from napo.recommend import Recommender
from napo.serve.app import make_app
from napo.serve.limits import Limits
from napo.serve.listening import Listener, reusing, room_for
from napo.serve.logs import RateLimitFilter

BODIES = 1.0
"""Seconds: bodies that are on their way at the signal arrive in less."""
TURNS = 10
"""Of the event loop: to accept a connection and to read from it takes fewer."""
LOG_FILTER = RateLimitFilter()
FLUSHED = 50
"""Ticks of uvicorn's loop, of 0.1 seconds, until what the log left out is looked at again."""


class Server(uvicorn.Server):
    """Says where it listens once it does; with port 0 nobody else knows. Before it stops it takes on what has come."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, limits: Limits, what: str) -> None:
        super().__init__(config)
        self.app, self.limits, self.what = app, limits, what

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # which has nothing to listen on then
        if not self.started or not sockets:
            return

        def protocol() -> asyncio.Protocol:
            kind: Any = self.config.http_protocol_class
            return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        self.listener = Listener(
            sockets[0],
            protocol,
            self.server_state.connections,
            most=room_for(self.limits.max_connections),
            seconds=self.limits.max_read_seconds,
            idle=self.limits.keep_alive_seconds,
        )
        host, port = sockets[0].getsockname()[:2]
        try:
            self.listener.start(self.config.backlog)
        except OSError as error:
            await self.lifespan.shutdown()
            raise _cannot_listen(host, port, error) from None
        self.servers = [self.listener]  # type: ignore[list-item]
        shown = f"[{host}]" if ":" in host else host
        print(f"{self.what}: http://{shown}:{port} (/recommend, /docs, /health, /metrics)", flush=True)

    async def on_tick(self, counter: int) -> bool:
        if counter % FLUSHED == 0:
            LOG_FILTER.flush()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.listener.accept()
        for _ in range(TURNS):  # uvicorn drops connections that it has not read from yet
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(BODIES, self.app.state.stopping.set_result, None)
        await super().shutdown(sockets)
        LOG_FILTER.flush(everything=True)
        if self.force_exit:  # what is cancelled now would be told as failures, with tracebacks
            for name in ("uvicorn.error", "asyncio"):
                logging.getLogger(name).disabled = True


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet. ValueError where it cannot have it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        reusing(listener, True)
        listener.bind(address)
        reusing(listener, False)  # or another service could bind too, and only one of them could listen in the end
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ValueError:
    return ValueError(
        f"port: cannot listen on {host}:{port} ({error.strerror}); give another --port (0: a free one) or --host"
    )


def server_of(recommender: Recommender, limits: Limits) -> Server:
    """uvicorn with the application. h11 and no WebSockets, whatever else is installed: the limits are tested with it,
    and it bounds a request's head."""
    settings: dict[str, Any] = {
        "http": "h11",
        "ws": "none",
        "log_level": "warning",
        "access_log": False,
        "timeout_keep_alive": limits.keep_alive_seconds,
        "timeout_graceful_shutdown": limits.grace_seconds,
    }
    app = make_app(recommender, limits)
    config = uvicorn.Config(app, **settings)
    for name in ("uvicorn.error", "asyncio", "napo.serve"):
        logging.getLogger(name).addFilter(LOG_FILTER)
    return Server(config, app, limits, f"serving {recommender.model} of {recommender.run.path}")


def serve(recommender: Recommender, listener: socket.socket, *, limits: Limits | None = None) -> None:
    """Serve until SIGINT or SIGTERM; what is in flight then is finished, for ``Limits.grace_seconds`` at most."""
    with without_bars():
        recommender.try_out()  # before anybody waits, and where it fails nothing is served
        server_of(recommender, limits or Limits()).run(sockets=[listener])
