"""The application: `/recommend`, `/health`, `/metrics`, and the pages of FastAPI (`/docs`, `/openapi.json`)."""

# Annotations are not postponed here: FastAPI reads those of functions inside functions, which it could not look up.
import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException

import napo
from napo.recommend import Asked, Query, Recommendations, Recommender, Unknown
from napo.recommend.catalogue import LONGEST_TITLE
from napo.serve.batching import Batcher, Full, Late
from napo.serve.kept import Kept
from napo.serve.limits import Limits
from napo.serve.metrics import CONTENT_TYPE, Metrics
from napo.serve.middleware import GONE, Bodies, Gone, Measured, as_error, as_json, while_there
from napo.serve.reasons import field_of, reason

logger = logging.getLogger("napo.serve")
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
    error: str = Field(description="What was expected and what was there.")
    field: str | None = Field(None, description="The field of the request at fault, such as k or history.0.")


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

    searcher: Batcher[Query, Asked] = Batcher(  # one at a time: Python computes no two searches at once
        lambda queries: [recommender.resolve(query) for query in queries],
        most=1,
        waiting=limits.max_waiting,
        seconds=limits.max_wait_seconds,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.stopping = asyncio.get_running_loop().create_future()
        batcher.start()
        searcher.start()
        yield
        await searcher.stop()
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
        exact=(bool, Field(False, description="Titles letter by letter; nothing is guessed.")),
        unknown=(Unknown, Field("error", description="Items of the history that are not known: skip leaves them out.")),
    )
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorModel} for status in (400, 408, 413, 422, 503)}

    @app.post("/recommend", response_model=AnswerModel, responses=errors)
    async def recommend(request: body, connection: Request) -> Response:  # type: ignore[valid-type]
        """The items to follow a history, or what a user of the data met; without either, what is popular."""
        found: Any = request
        history, exclude = _plain(found.history), _plain(found.exclude) or ()
        how = {"k": found.k, "exact": found.exact, "unknown": found.unknown}
        query = Query(history=history, user=found.user, exclude=exclude, **how)
        named = () if query.exact else (*(history or ()), *exclude)
        searches = sum(not recommender.catalogue.knows(item) for item in named)
        if searches > limits.max_searches:
            return as_error(
                422,
                f"history: expected at most {limits.max_searches} titles to search for; {searches}, with those of "
                "exclude, are not in the catalogue letter by letter; give ids, or exact",
                field="history",
            )
        try:
            if searches:  # which take a while, and wait for their turn as what is computed does
                asked = await while_there(connection.receive, searcher.ask(query))
            else:
                asked = recommender.resolve(query)
        except ValueError as error:
            return as_error(422, str(error), field=field_of(str(error)))
        key = (tuple(asked.history), asked.k, frozenset(asked.barred))
        answer = kept.get(key)
        if answer is None:
            named_alike = replace(asked, notes=[])  # which are of how this request named its items
            answer = await while_there(connection.receive, batcher.ask(named_alike))
            kept.put(key, answer)
        return as_json(200, replace(answer, notes=[*asked.notes, *answer.notes]).as_dict())

    @app.get("/health")
    async def health() -> Response:
        """200 where requests are answered."""
        return as_json(200, {"status": "ok", "model": recommender.model, "items": len(recommender.catalogue)})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """OpenMetrics text, for Prometheus."""
        text = metrics.text(waiting=batcher.waiting + searcher.waiting, model=recommender.model, kept=kept)
        return Response(text, media_type=CONTENT_TYPE)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        status, why, field = reason(error.errors(), limits)
        return as_error(status, why, field=field)

    @app.exception_handler(Full)
    async def full(request: Request, error: Full) -> Response:
        return as_error(503, f"{limits.max_waiting} requests wait already; try again", {"Retry-After": "1"})

    @app.exception_handler(Late)
    async def late(request: Request, error: Late) -> Response:
        seconds = limits.max_wait_seconds  # those who come behind it wait as long
        return as_error(503, f"its turn has not come in {seconds} s; try again", {"Retry-After": f"{seconds}"})

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return as_error(GONE, "the client has gone")

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if error.detail == UNREAD:
            return as_error(400, "body: not JSON (cannot be read)")
        return as_error(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return as_error(500, f"{type(error).__name__}; the service's log has more")

    app.add_middleware(Bodies, most=limits.max_bytes, seconds=limits.max_read_seconds)
    app.add_middleware(Measured, metrics=metrics)
    return app


def _plain(items: list[Any] | None) -> list[Any] | None:
    """Items by id or by title as the mappings that ``Query`` takes."""
    if items is None:
        return None
    return [item.model_dump() if isinstance(item, BaseModel) else item for item in items]
