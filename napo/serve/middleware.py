"""What happens to a request around the application: its body is read, and it is counted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from napo.serve.metrics import Metrics
from napo.serve.reasons import NO_OBJECT

GONE = 499
"""The status, in the metrics alone, of a request whose client has gone; nginx counts them by the same number."""
PATHS = ("/recommend", "/health", "/metrics")
STOPPING = "the service stops; ask another one"
A = TypeVar("A")


class ClientDisconnected(Exception):
    """The client has closed its connection."""


async def while_there(receive: Receive, work: Coroutine[Any, Any, A]) -> A:
    """What ``work`` gives. It is cancelled once the client has gone, of which the server tells only who listens."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, listening = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        working.cancel()
        listening.cancel()


class Bodies:
    """Reads a body whole before the application runs. Answers 413 where it is longer than ``most`` bytes, 408 where it
    is not there after ``seconds``, and 503 where the service stops first: ``app.state.stopping``, a future, tells."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        stopping: asyncio.Future[None] = scope["app"].state.stopping
        reading = asyncio.create_task(self._read(scope, receive))
        try:
            await asyncio.wait((reading, stopping), timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                body = reading.result()
            elif stopping.done():
                return await _closing(503, STOPPING)(scope, receive, send)
            else:
                return await _closing(408, f"body: not here after {self.seconds} s")(scope, receive, send)
        except ClientDisconnected:
            return None
        finally:
            reading.cancel()
        if body is None:
            return await _closing(413, f"body: expected at most {self.most} bytes")(scope, receive, send)
        if body and (scope["method"], scope["path"]) == ("POST", "/recommend") and not _says_json(scope):
            return await as_error(422, NO_OBJECT)(scope, receive, send)
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, again, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None where it is too long, which is seen before it is there."""
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self.most:
            return None
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnected
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most:
                return None
        return body


class Measured:
    """Counts requests and their time. It is the outermost, so that it sees what is refused too, and answers those whose
    computing is broken off when the time to stop is over."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), GONE

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.in_flight += 1
        try:
            return await self.app(scope, receive, noted)
        except asyncio.CancelledError:
            if status != GONE or not scope["app"].state.stopping.done():
                raise
            return await _closing(503, STOPPING)(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            self.metrics.in_flight -= 1
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.answered(path, status, time.monotonic() - began)


def _says_json(scope: Scope) -> bool:
    """FastAPI asks for it, or not, by its version."""
    said = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    return said == "application/json" or (said.startswith("application/") and said.endswith("+json"))


def as_json(status: int, content: Any, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(content, ensure_ascii=True, allow_nan=False)
    return Response(text, status_code=status, headers=headers, media_type="application/json")


def as_error(status: int, reason: str, headers: dict[str, str] | None = None, field: str | None = None) -> Response:
    return as_json(status, {"error": reason, **({"field": field} if field else {})}, headers)


def _closing(status: int, reason: str) -> Response:
    """The rest of the request is not read, so that nothing else can follow on its connection."""
    return as_error(status, reason, {"Connection": "close", **({"Retry-After": "1"} if status == 503 else {})})
