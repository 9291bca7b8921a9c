"""The application: `/recommend`, `/health`, `/metrics`, and the pages of FastAPI (`/docs`, `/openapi.json`)."""

# Annotations are not postponed here: FastAPI reads those of functions inside functions, which it could not look up.
import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import napo
from napo.recommend import Asked, Query, Recommendations, Recommender
from napo.recommend.catalogue import LONGEST_TITLE
from napo.serve.batching import Batcher, Full, Late
from napo.serve.kept import Kept
from napo.serve.limits import Limits
from napo.serve.metrics import CONTENT_TYPE, Metrics

logger = logging.getLogger("napo.serve")
PATHS = ("/recommend", "/health", "/metrics")

GONE = 499
"""The status, in the metrics alone, of a request whose client has gone; nginx counts them by the same number."""
A = TypeVar("A")

UNREAD = "There was an error parsing the body"
"""FastAPI's words for a body that its JSON reader gives up, such as one nested too deep."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Text = Annotated[str, Field(max_length=LONGEST_TITLE)]


class ById(Strict):
    """An item by the id of the data's source."""

    id: Text | int


class ByTitle(Strict):
    """An item by its title."""

    title: Text


AnyItem = Text | int | ById | ByTitle


class RecommendationModel(BaseModel):
    item: str = Field(description="The item's id in the source of the data.")
    title: str
    score: float


class AnswerModel(BaseModel):
    items: list[RecommendationModel] = Field(description="Best first.")
    model: str = Field(description="What ranked; popularity where nothing is known of who asks.")
    notes: list[str] = Field(description="What was taken for what, and why a list is shorter than asked for.")


class ErrorModel(BaseModel):
    error: str
    field: str | None = None


def make_app(recommender: Recommender, limits: Limits | None = None) -> FastAPI:
    """The application that serves a recommender."""
    limits = limits or Limits()
    metrics, kept = Metrics(), Kept[Recommendations](limits.max_kept)
    batcher: Batcher[Asked, Recommendations] = Batcher(
        recommender.answer,
        most=limits.max_batch,
        waiting=limits.max_waiting,
        seconds=limits.max_wait_seconds,
        seen=metrics.computed,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(
        title="napo",
        version=napo.__version__,
        description=f"Recommendations by {recommender.model}.",
        lifespan=lifespan,
    )
    items = Annotated[list[AnyItem], Field(max_length=limits.max_history)]
    body = create_model(
        "RecommendRequest",
        __base__=Strict,
        history=(items | None, Field(None, description="Titles or ids, oldest first.")),
        user=(Text | int | None, Field(None, description="A user id of the data, in place of a history.")),
        k=(int, Field(10, ge=1, le=limits.max_k, description="How many to name.")),
        exclude=(items, Field([], description="Titles or ids that are not wanted.")),
    )
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorModel} for status in (400, 413, 422, 503)}

    @app.post("/recommend", response_model=AnswerModel, responses=errors)
    async def recommend(request: body, connection: Request) -> Response:  # type: ignore[valid-type]
        """The items to follow a history, or what a user of the data met; without either, what is popular."""
        found: Any = request
        query = Query(history=_plain(found.history), user=found.user, k=found.k, exclude=_plain(found.exclude) or ())
        try:
            if all(recommender.catalogue.knows(item) for item in (*(query.history or ()), *query.exclude)):
                asked = recommender.resolve(query)
            else:  # to look for a title that is none takes a while
                asked = await asyncio.to_thread(recommender.resolve, query)
        except ValueError as error:
            return _error(422, str(error))
        key = (tuple(asked.history), asked.k, frozenset(asked.barred))
        answer = kept.get(key)
        if answer is None:
            try:
                named_alike = replace(asked, notes=[])  # which are of how this request named its items
                answer = await _while_there(connection.receive, batcher.ask(named_alike))
            except _Gone:
                return _error(GONE, "the client has gone")
            except Full:
                return _error(503, f"{limits.max_waiting} requests wait already; try again", {"Retry-After": "1"})
            except Late:  # those who come behind it wait as long
                seconds = limits.max_wait_seconds
                return _error(503, f"its turn has not come in {seconds} s; try again", {"Retry-After": f"{seconds}"})
            kept.put(key, answer)
        return _json(200, replace(answer, notes=[*asked.notes, *answer.notes]).as_dict())

    @app.get("/health")
    async def health() -> Response:
        """200 where requests are answered."""
        return _json(200, {"status": "ok", "model": recommender.model, "items": len(recommender.catalogue)})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """OpenMetrics text, for Prometheus."""
        text = metrics.text(waiting=batcher.waiting, model=recommender.model, kept=kept)
        return Response(text, media_type=CONTENT_TYPE)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or None
        if first["type"] == "json_invalid":
            return _error(400, f"body: not JSON ({first.get('ctx', {}).get('error', 'cannot be read')})")
        if place is None and first["type"] == "model_attributes_type":
            return _error(422, "body: expected a JSON object, with the header Content-Type: application/json")
        return _error(422, f"{place or 'body'}: {first['msg']}", field=place)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if error.detail == UNREAD:
            return _error(400, "body: not JSON (cannot be read)")
        return _error(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _error(500, f"{type(error).__name__}; the service's log has more")

    app.add_middleware(_BodyLimit, most=limits.max_bytes)
    app.add_middleware(_Measured, metrics=metrics)  # outermost: it sees what is refused too
    return app


class _Gone(Exception):
    """The client has closed its connection."""


async def _while_there(receive: Receive, work: Coroutine[Any, Any, A]) -> A:
    """What ``work`` gives. It is cancelled once the client has gone, of which the server tells only who listens."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, listening = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        return working.result()
    finally:
        working.cancel()
        listening.cancel()


class _BodyLimit:
    """Answers 413 where a body is longer than ``most``, before anything reads it whole."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        body, more = b"", True
        said = dict(scope["headers"]).get(b"content-length", b"0")
        too_long = said.isdigit() and int(said) > self.most
        while more and not too_long:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the client has gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_long = len(body) > self.most
        if too_long:
            answer = _error(413, f"body: expected at most {self.most} bytes", {"Connection": "close"})
            return await answer(scope, receive, send)
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, again, send)


class _Measured:
    """Counts requests and their time."""

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
        except BaseException:
            status = 500
            raise
        finally:
            self.metrics.in_flight -= 1
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.answered(path, status, time.monotonic() - began)


def _plain(items: list[Any] | None) -> list[Any] | None:
    """Items by id or by title as the mappings that ``Query`` takes."""
    if items is None:
        return None
    return [item.model_dump() if isinstance(item, BaseModel) else item for item in items]


def _json(status: int, content: Any, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(content, ensure_ascii=True)
    return Response(text, status_code=status, headers=headers, media_type="application/json")


def _error(status: int, reason: str, headers: dict[str, str] | None = None, field: str | None = None) -> Response:
    return _json(status, {"error": reason, **({"field": field} if field else {})}, headers)
