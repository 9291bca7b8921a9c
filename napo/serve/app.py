"""The application: `/recommend`, `/health`, `/metrics`, and the pages of FastAPI (`/docs`, `/openapi.json`)."""

# Annotations are not postponed here: FastAPI reads those of functions inside functions, which it could not look up.
import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

import napo
from napo.recommend import Recommender
from napo.serve.errors import add_handlers
from napo.serve.limits import Limits
from napo.serve.metrics import CONTENT_TYPE, Metrics
from napo.serve.middleware import Bodies, Measured, as_json
from napo.serve.requests import AnswerModel, ErrorModel, query_of, request_model
from napo.serve.service import Service


def make_app(recommender: Recommender, limits: Limits | None = None) -> FastAPI:
    """The application that serves a recommender."""
    limits = limits or Limits()
    metrics = Metrics()
    service = Service(recommender, limits, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.stopping = asyncio.get_running_loop().create_future()
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="napo",
        version=napo.__version__,
        description=f"Recommendations by {recommender.model}.",
        lifespan=lifespan,
    )
    app.state.service = service
    _add_recommend(app, service)
    _add_pages(app, service)
    add_handlers(app, limits, recommender.longest_name)
    app.add_middleware(Bodies, most=limits.max_bytes, seconds=limits.max_read_seconds)
    app.add_middleware(Measured, metrics=metrics)
    return app


def _add_recommend(app: FastAPI, service: Service) -> None:
    body = request_model(service.limits, service.recommender.longest_name)
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorModel} for status in (400, 408, 413, 422, 503)}

    @app.post("/recommend", response_model=AnswerModel, responses=errors)
    async def recommend(request: body, connection: Request) -> Response:  # type: ignore[valid-type]
        """The items to follow a history, or what a user of the data met; without either, what is popular."""
        answer = await service.answer(query_of(request), connection.receive)
        return as_json(200, answer.as_dict())


def _add_pages(app: FastAPI, service: Service) -> None:
    """With HEAD too, which is what some watchers ask."""

    async def health() -> Response:
        """200 where requests are answered, 503 where they are not."""
        found = service.health()
        return as_json(200 if found["status"] == "ok" else 503, found)

    async def show_metrics() -> Response:
        """OpenMetrics text, for Prometheus."""
        return Response(service.metrics_text(), media_type=CONTENT_TYPE)

    for path, page in (("/health", health), ("/metrics", show_metrics)):
        app.add_api_route(path, page, methods=["GET"])
        app.add_api_route(path, page, methods=["HEAD"], include_in_schema=False)
