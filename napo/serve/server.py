"""The process: uvicorn around the application."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from napo.recommend import Recommender
from napo.serve.app import make_app
from napo.serve.limits import Limits

BODIES = 1.0
"""Seconds: bodies that are on their way at the signal arrive in less."""
TURNS = 10
"""Of the event loop: to accept a connection and to read from it takes fewer."""


class _Server(uvicorn.Server):
    """Says where it listens once it does; with port 0 nobody else knows. Before it stops it takes on what has come."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, what: str) -> None:
        super().__init__(config)
        self.app, self.what = app, what

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"{self.what}: http://{shown}:{port} (/recommend, /docs, /health, /metrics)", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for _ in range(TURNS):  # uvicorn drops connections that it has not read from yet
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(BODIES, self.app.state.stopping.set_result, None)
        await super().shutdown(sockets)


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet. ValueError where it cannot have it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not where one listens, but right after
        listener.bind(address)
    except OSError as error:
        raise ValueError(
            f"port: cannot listen on {host}:{port} ({error.strerror}); give another --port (0: a free one) or --host"
        ) from None
    return listener


def serve(recommender: Recommender, listener: socket.socket, *, limits: Limits | None = None) -> None:
    """Serve until SIGINT or SIGTERM; what is in flight then is finished, for ``Limits.grace_seconds`` at most."""
    limits = limits or Limits()
    settings: dict[str, Any] = {
        "log_level": "warning",
        "access_log": False,
        "timeout_graceful_shutdown": limits.grace_seconds,
    }
    app = make_app(recommender, limits)
    server = _Server(uvicorn.Config(app, **settings), app, f"serving {recommender.model} of {recommender.run.path}")
    server.run(sockets=[listener])
