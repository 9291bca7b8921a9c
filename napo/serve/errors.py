"""What becomes of an exception: a status, the reason as JSON, and the field at fault."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from napo.serve.batching import QueueFull, QueueTimeout
from napo.serve.limits import Limits
from napo.serve.middleware import GONE, ClientDisconnected, as_error
from napo.serve.reasons import field_of, reason
from napo.serve.service import RefusedQuery

logger = logging.getLogger("napo.serve")
UNREAD = "There was an error parsing the body"
"""FastAPI's words for a body that its JSON reader gives up, such as one nested too deep."""


def add_handlers(app: FastAPI, limits: Limits, longest: int) -> None:
    """``longest``: characters of a title or an id."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        status, why, field = reason(error.errors(), limits, longest)
        return as_error(status, why, field=field)

    @app.exception_handler(RefusedQuery)
    async def refused_query(request: Request, error: RefusedQuery) -> Response:
        return as_error(422, str(error), field=field_of(str(error)))

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> Response:
        return as_error(503, f"{limits.max_waiting} requests wait already; try again", {"Retry-After": "1"})

    @app.exception_handler(QueueTimeout)
    async def late(request: Request, error: QueueTimeout) -> Response:
        seconds = limits.max_wait_seconds  # those who come behind it wait as long
        return as_error(503, f"its turn has not come in {seconds} s; try again", {"Retry-After": f"{seconds}"})

    @app.exception_handler(ClientDisconnected)
    async def gone(request: Request, error: ClientDisconnected) -> Response:
        return as_error(GONE, "the client has gone")

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if error.detail == UNREAD:
            return as_error(400, "body: not JSON (cannot be read)")
        return as_error(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return as_error(500, f"{type(error).__name__}; the service's log has more")
