"""What the service does with a query, apart from what it answers."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi")
from service_calls import call, metrics, recommend, serving, wait_for

from napo.recommend import Catalogue, Query, Recommender
from napo.runs import Run
from napo.serve import Limits
from napo.serve.batching import Batcher, QueueTimeout
from napo.serve.metrics import Metrics
from napo.serve.middleware import Bodies
from napo.serve.reasons import NO_OBJECT
from napo.serve.service import Service
from napo.serve.sharing import Sharing


@pytest.fixture
def recommender(demo_run: Run) -> Recommender:
    return Recommender.from_run(demo_run.path, model="sasrec")


def test_titles_of_the_catalogue_may_be_long(recommender: Recommender) -> None:
    titles, ids = recommender.catalogue.titles, recommender.catalogue.source_ids
    recommender.catalogue = Catalogue(["x" * 400, *titles[1:]], ids)
    with serving(recommender, Limits()) as port:
        for history in (["x" * 400], [{"title": "X" * 400}]):
            assert recommend(port, history=history)[0] == 200
        for field, body in (("history.0", {"history": ["x" * 401]}), ("user", {"user": "x" * 401})):
            status, answer = recommend(port, **body)
            assert (status, answer["error"]) == (422, f"{field}: expected at most 400 characters; got 401")


def test_the_field_that_has_titles_to_search_for_is_named(recommender: Recommender) -> None:
    with serving(recommender, Limits(max_searches=3)) as port:
        status, answer = recommend(port, exclude=["aa", "bb", "cc", "dd"])
    assert status == 422 and answer == {
        "error": "exclude: expected at most 3 titles to search for; 4 are not in the catalogue letter by letter; give "
        "ids, or exact",
        "field": "exclude",
    }


def test_a_run_that_does_not_know_what_is_popular_says_so(recommender: Recommender) -> None:
    recommender.popularity = None
    with serving(recommender, Limits()) as port:
        status, answer = recommend(port)
        assert (status, answer["field"]) == (422, "history")
        assert answer["error"].startswith("history: expected at least one item; got none, and ")
        assert recommend(port, user=1)[0] == 200


@pytest.mark.parametrize(
    "said, taken",
    [
        (None, False),
        ("text/plain", False),
        ("application/jsonp", False),
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/vnd.api+json", True),
    ],
)
def test_a_body_says_that_it_is_json(said: str | None, taken: bool) -> None:
    """Whatever FastAPI asks for, which depends on its version."""
    reached: list[Any] = []
    sent: list[Any] = []

    class State:
        stopping: Any = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(await receive())

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        State.stopping = asyncio.get_running_loop().create_future()
        headers = [] if said is None else [(b"content-type", said.encode())]
        scope = {"type": "http", "method": "POST", "path": "/recommend", "headers": headers}
        await Bodies(app, 100, 5)(scope | {"app": type("App", (), {"state": State})}, receive, send)

    asyncio.run(run())
    assert len(reached) == taken
    if not taken:
        assert sent[0]["status"] == 422 and json.loads(sent[1]["body"]) == {"error": NO_OBJECT}


def test_equal_requests_at_once_are_one_computation(recommender: Recommender, held: threading.Event) -> None:
    titles = recommender.catalogue.titles
    with serving(recommender, Limits()) as port, ThreadPoolExecutor(8) as pool:
        first = pool.submit(recommend, port, user=1)
        wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 2)
        equal = [pool.submit(recommend, port, history=titles[3:6]) for _ in range(5)]
        wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 7)
        assert metrics(port)["napo_requests_waiting"] == 1
        held.set()
        answers = [one.result() for one in equal]
        assert first.result()[0] == 200 and answers == [answers[0]] * 5 and answers[0][0] == 200
        assert metrics(port)["napo_batch_size_sum"] == 2


def test_who_shares_an_answer_may_go() -> None:
    async def run() -> tuple[list[Any], int]:
        shared, begun = Sharing[int](), 0
        go = asyncio.Event()

        async def work() -> int:
            nonlocal begun
            begun += 1
            await go.wait()
            return begun

        def ask() -> asyncio.Task[int]:
            return asyncio.create_task(shared.ask("key", work))

        one, two = ask(), ask()
        await asyncio.sleep(0)
        one.cancel()  # the first to ask, and the other one still gets its answer
        await asyncio.sleep(0)
        go.set()
        found: list[Any] = [await two]
        go.clear()
        alone = ask()
        await asyncio.sleep(0)
        alone.cancel()  # nobody is left
        await asyncio.sleep(0)
        go.set()
        found.append(await ask())
        return found, len(shared._works)

    assert asyncio.run(run()) == ([1, 3], 0)


def test_a_failure_is_that_of_all_who_share_it() -> None:
    async def run() -> list[Any]:
        shared = Sharing[int]()

        async def work() -> int:
            await asyncio.sleep(0)
            raise IndexError("once")

        asked = [shared.ask("key", work) for _ in range(3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [repr(error) for error in asyncio.run(run())] == ["IndexError('once')"] * 3


def test_one_deadline_for_all_turns(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(recommender, Limits(max_wait_seconds=7), Metrics())
    deadlines: list[float] = []
    ask = Batcher.ask

    async def noted(batcher: Any, question: Any, deadline: float | None = None) -> Any:
        assert deadline is not None
        deadlines.append(deadline)
        return await ask(batcher, question, deadline)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def run() -> float:
        service.start()
        began = asyncio.get_running_loop().time()
        await service.answer(Query(history=[recommender.catalogue.titles[5] + "x"]), receive)
        await service.stop()
        return began

    monkeypatch.setattr(Batcher, "ask", noted)
    began = asyncio.run(run())
    assert len(deadlines) == 2 and deadlines[0] == deadlines[1] and 7 <= deadlines[0] - began < 60


def test_a_deadline_that_is_over_is_told_at_once() -> None:
    release = threading.Event()

    async def run() -> Any:
        batcher: Batcher[int, int] = Batcher(lambda batch: [release.wait(60)] * len(batch), most=1, waiting=3)
        batcher.start()
        first = asyncio.create_task(batcher.ask(0))
        await asyncio.sleep(0.01)
        with pytest.raises(QueueTimeout):
            await batcher.ask(1, asyncio.get_running_loop().time() - 1)
        release.set()
        await first
        await batcher.stop()

    asyncio.run(run())


def test_health_is_of_what_computes(recommender: Recommender, held: threading.Event) -> None:
    with serving(recommender, Limits(max_pass_seconds=1)) as port, ThreadPoolExecutor(1) as pool:
        assert call(port, "GET", "/health")[1]["status"] == "ok"
        asked = pool.submit(recommend, port, user=1)
        wait_for(lambda: call(port, "GET", "/health")[0] == 503)
        assert call(port, "GET", "/health")[1]["status"] == "a pass takes longer than 1 s"
        assert call(port, "HEAD", "/health") == (503, "") and metrics(port)["napo_healthy"] == 0
        held.set()
        assert asked.result()[0] == 200 and call(port, "GET", "/health")[0] == 200
    service = Service(recommender, Limits(), Metrics())
    assert service.health()["status"] == "requests are not taken on"


def test_a_connection_stays_open_behind_an_answer(recommender: Recommender) -> None:
    """Longer than a client may take to send a request."""
    with serving(recommender, Limits(max_read_seconds=1, keep_alive_seconds=30)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        there = connection.sock
        time.sleep(3.5)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200 and connection.sock is there
        connection.close()
