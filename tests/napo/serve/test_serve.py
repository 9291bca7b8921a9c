"""The service as clients see it, over HTTP; and as a process that is told to stop."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
from service_calls import call, metrics, port_of, recommend, serving, wait_for

from napo import __version__
from napo.recommend import Query, Recommender
from napo.runs import Run
from napo.serve import Limits, server
from napo.serve.listening import reusing
from napo.serve.reasons import FIELDS
from napo.serve.server import bound, serve

LIMITS = Limits(max_history=8, max_k=20, max_bytes=4000, max_batch=16)


@pytest.fixture(scope="module")
def recommender(demo_run: Run) -> Recommender:
    return Recommender.from_run(demo_run.path, model="napo+sasrec", retrieve=20)


def test_an_address_that_cannot_be_had_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^port: cannot listen on 127.0.0.1:{port} \(.*in use\); give another"):
            bound("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"^port: cannot listen on 192\.0\.2\.1:0 .* or --host$"):
        bound("192.0.2.1", 0)  # of no machine


def test_of_two_services_on_one_port_the_second_is_told_before_it_loads() -> None:
    with bound("127.0.0.1", 0) as first:  # which does not listen yet
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^port: cannot listen on 127.0.0.1:{port} \(.*in use\); give another"):
            bound("127.0.0.1", port)


def test_a_service_starts_again_at_once_where_one_has_just_stopped(recommender: Recommender) -> None:
    """Connections that the service closed first keep its address for a minute."""
    with serving(recommender, LIMITS) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while connection.recv(1000):
            pass
    with serving(recommender, LIMITS, bound("127.0.0.1", port)) as again:
        assert again == port and call(port, "GET", "/health")[0] == 200


def test_the_model_is_compared_with_its_own_forward_before_anybody_waits(
    demo_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = Recommender.from_run(demo_run.path, model="sft", retrieve=20)
    compared: list[bool] = []

    class Begun:
        def __init__(self, recommender: Recommender, limits: Limits) -> None:
            compared.append(bool(recommender.ranker._scorers))

        def run(self, sockets: list[socket.socket]) -> None: ...

    monkeypatch.setattr(server, "server_of", Begun)
    with bound("127.0.0.1", 0) as listener:
        serve(language_model, listener)
    assert compared == [True]


def test_an_address_that_is_lost_before_it_is_listened_on(recommender: Recommender) -> None:
    listener = bound("127.0.0.1", 0)
    reusing(listener, True)
    port = listener.getsockname()[1]
    with listener, socket.socket() as other:
        reusing(other, True)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ValueError, match=rf"^port: cannot listen on 127.0.0.1:{port} \(.*in use\); give another"):
            serve(recommender, listener)


@pytest.fixture(scope="module")
def service(recommender: Recommender) -> Iterator[int]:
    """The port of a service in this process."""
    with serving(recommender, LIMITS) as port:
        yield port


def test_answers_are_those_of_the_recommender(service: int, recommender: Recommender) -> None:
    titles, ids = recommender.catalogue.titles, recommender.catalogue.source_ids
    expected = recommender.recommend(titles[3:6], k=4, exclude=[titles[9]]).as_dict()
    assert recommend(service, history=titles[3:6], k=4, exclude=[titles[9]]) == (200, expected)
    history = [{"id": ids[3]}, {"title": titles[4]}, int(ids[5])]
    assert recommend(service, history=history, k=4, exclude=[ids[9]]) == (200, expected)
    assert recommend(service, user=1) == (200, recommender.recommend(user="1").as_dict())
    assert recommend(service) == (200, recommender.recommend().as_dict())
    status, answer = recommend(service, history=[titles[3] + "e"])
    assert status == 200 and answer["notes"] == [f"'{titles[3]}e' was taken for '{titles[3]}'"]
    assert recommend(service, history=[titles[3] + "e"], exact=True)[0] == 422
    status, answer = recommend(service, history=["Alien", titles[3]], unknown="skip", k=4)
    known = recommender.recommend(titles[3:4], k=4).as_dict()
    assert status == 200 and answer == known | {"notes": ["1 item not known: 'Alien'"]}
    assert recommend(service, history=titles[3:4], exclude=["Alien"])[1]["notes"] == [
        "exclude: 1 item not known: 'Alien'"
    ]


def test_a_whole_number_may_be_written_as_a_float(service: int, recommender: Recommender) -> None:
    """JSON has one kind of number; napo recommend takes 2.0 in files too."""
    asked = [({"user": 2.0, "k": 3.0}, {"user": 2, "k": 3}), ({"user": 2.0, "k": 3e0}, {"user": "2", "k": 3})]
    ids = [int(one) for one in recommender.catalogue.source_ids[:3]]
    floats: list[Any] = [float(ids[0]), {"id": float(ids[1])}]
    asked.append(({"history": floats, "exclude": [float(ids[2])]}, {"history": ids[:2], "exclude": ids[2:]}))
    for written, meant in asked:
        found = recommend(service, **written)
        assert found[0] == 200 and found == recommend(service, **meant)


def test_concurrent_requests_are_computed_together_and_are_the_same(service: int, recommender: Recommender) -> None:
    titles = recommender.catalogue.titles
    queries = [{"history": titles[i : i + 1 + i % 7], "k": 3 + i % 5} for i in range(50)]
    alone = [recommender.recommend_many([Query(**query)])[0].as_dict() for query in queries]  # type: ignore[arg-type]
    before = metrics(service)
    with ThreadPoolExecutor(25) as pool:
        together = list(pool.map(lambda query: recommend(service, **query), queries))
    assert together == [(200, answer) for answer in alone]
    after = metrics(service)
    passes = after["napo_batch_size_count"] - before["napo_batch_size_count"]
    assert after["napo_batch_size_sum"] - before["napo_batch_size_sum"] == 50 and passes < 40


LISTED = "expected a list of titles or ids"
ITEM = "expected a title, an id, or an object with id or title"
USER = "expected the id of a user, text or a whole number"
K = "expected a whole number from 1 to 20"


@pytest.mark.parametrize(
    "body, status, reason, field",
    [
        (b"{", 400, "body: not JSON (Expecting ", None),
        (b"\xff\xfe", 400, "body: not JSON (", None),
        (b"[" * 3900, 400, "body: not JSON (cannot be read)", None),
        (b"", 422, 'body: expected a JSON object, such as {"user": 17}; it is empty or null', None),
        (b"null", 422, 'body: expected a JSON object, such as {"user": 17}; it is empty or null', None),
        ([1], 422, 'body: expected a JSON object, such as {"user": 17}; got [1]', None),
        ({"history": "Blue Red"}, 422, f'history: {LISTED}; got "Blue Red"', "history"),
        ({"history": [None]}, 422, f"history.0: {ITEM}; got null", "history.0"),
        ({"history": ["Blue Red", ["a"]]}, 422, f'history.1: {ITEM}; got ["a"]', "history.1"),
        ({"history": [{"id": 1.5}]}, 422, f'history.0: {ITEM}; got {{"id": 1.5}}', "history.0"),
        ({"history": [{}]}, 422, f"history.0: {ITEM}; got {{}}", "history.0"),
        ({"exclude": [{"id": 1, "title": "x"}]}, 422, f'exclude.0: {ITEM}; got {{"id": 1, "title": "x"}}', "exclude.0"),
        ({"exclude": None}, 422, f"exclude: {LISTED}; got null", "exclude"),
        ({"history": ["Blue Red"] * 9}, 422, "history: expected at most 8 items; got 9", "history"),
        ({"history": ["x" * 301]}, 422, "history.0: expected at most 300 characters; got 301", "history.0"),
        ({"history": [{"title": "x" * 301}]}, 422, "history.0: expected at most 300 characters; got 301", "history.0"),
        (
            {"history": ["Alien"]},
            422,
            "history: expected a title or an id of the catalogue; got 'Alien'; see items.parquet of the run",
            "history",
        ),
        (
            {"history": [{"id": "none"}]},
            422,
            "history: expected the id of an item of the catalogue; got 'none'",
            "history",
        ),
        ({"history": ["Blue Red"], "exact": 1}, 422, "exact: expected true or false; got 1", "exact"),
        ({"history": ["Blue Red"], "unknown": "drop"}, 422, 'unknown: expected error or skip; got "drop"', "unknown"),
        ({"history": ["\ud800"]}, 422, f'history.0: {ITEM}; got "\\ud800"', "history.0"),
        ({"history": ["Blue Red"], "user": 1}, 422, "user: expected a history or a user; got both", "user"),
        ({"user": [2]}, 422, f"user: {USER}; got [2]", "user"),
        ({"user": 2.5}, 422, f"user: {USER}; got 2.5", "user"),
        ({"user": 2.0**53}, 422, f"user: {USER}; got 9007199254740992.0", "user"),
        ({"history": [2.5]}, 422, f"history.0: {ITEM}; got 2.5", "history.0"),
        ({"history": ["Blue Red"], "k": 2.5}, 422, f"k: {K}; got 2.5", "k"),
        ({"history": ["Blue Red"], "k": 0.0}, 422, f"k: {K}; got 0", "k"),
        ({"user": True}, 422, f"user: {USER}; got true", "user"),
        ({"user": "x" * 301}, 422, "user: expected at most 300 characters; got 301", "user"),
        ({"history": ["Blue Red"], "k": 21}, 422, f"k: {K}; got 21", "k"),
        ({"history": ["Blue Red"], "k": 0}, 422, f"k: {K}; got 0", "k"),
        ({"history": ["Blue Red"], "k": True}, 422, f"k: {K}; got true", "k"),
        (b'{"k": NaN}', 422, f"k: {K}; got NaN", "k"),
        ({"history": ["Blue Red"], "top": 3}, 422, f"top: not a field; a request has {', '.join(FIELDS)}", "top"),
        (b" " * 4001, 413, "body: expected at most 4000 bytes", None),
    ],
)
def test_what_cannot_be_answered_gets_a_reason(
    service: int, body: Any, status: int, reason: str, field: str | None
) -> None:
    found, answer = call(service, "POST", "/recommend", body)
    assert (found, answer.get("field")) == (status, field)
    # The parser's own words, which depend on the version, are left out.
    assert answer["error"].startswith(reason) and (answer["error"] == reason or "not JSON" in reason)


def test_a_body_that_does_not_say_that_it_is_json(service: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service, timeout=60)
    connection.request("POST", "/recommend", b'{"history": ["Blue Red"]}')
    answer = connection.getresponse()
    text = json.loads(answer.read())["error"]
    connection.close()
    assert (answer.status, text) == (
        422,
        "body: expected a JSON object, with the header Content-Type: application/json",
    )


def test_bodies_that_do_not_say_how_long_they_are(service: int) -> None:
    with socket.create_connection(("127.0.0.1", service)) as connection:
        head = b"POST /recommend HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"".join(b"3e8\r\n" + b" " * 1000 + b"\r\n" for _ in range(5)))
        assert b"413" in connection.recv(1000).splitlines()[0]


def test_other_paths_and_methods_are_json_too(service: int) -> None:
    assert call(service, "GET", "/none") == (404, {"error": "Not Found"})
    assert call(service, "GET", "/recommend") == (405, {"error": "Method Not Allowed"})


def test_a_failure_is_one_answer_and_the_service_goes_on(
    service: int, recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("weights on fire")

    with monkeypatch.context() as patch:
        patch.setattr(recommender, "_rank", broken)
        assert recommend(service, user=2, k=7) == (500, {"error": "RuntimeError; the service's log has more"})
    assert recommend(service, user=2, k=7)[0] == 200  # a failure is not kept


def test_health_metrics_and_pages(service: int, demo_run: Run) -> None:
    status, health = call(service, "GET", "/health")
    started = datetime.fromisoformat(health.pop("started"))
    assert 0 <= time.time() - started.timestamp() < 3600
    assert len(health.pop("weights_sha256")) == len(health["data_sha256"]) == 64
    assert health.pop("data_sha256") == demo_run.config["data_sha256"]
    assert status == 200 and health == {"status": "ok", "model": "napo+sasrec", "items": 60, "version": __version__}
    before = metrics(service)
    recommend(service, user=1)
    recommend(service, user="nobody")
    recommend(service, k=0)
    after = metrics(service)
    assert after["napo_healthy"] == 1 and 0 <= time.time() - after["napo_start_time_seconds"] < 3600
    assert [after[f"napo_answers_total{by}"] - before[f"napo_answers_total{by}"] for by in ("model", "popularity")] == [
        1,
        1,
    ]
    for path in ("/health", "/metrics"):
        assert call(service, "HEAD", path) == (200, "")
    for name, more in (("napo_requests_total/recommend200", 2), ("napo_request_seconds_count", 3)):
        assert after[name] - before.get(name, 0) == more
    assert after["napo_requests_total/recommend422"] > before.get("napo_requests_total/recommend422", 0)
    assert after["napo_model_info"] == 1 and after["napo_requests_in_flight"] == 1
    assert "swagger" in call(service, "GET", "/docs")[1]
    schema = call(service, "GET", "/openapi.json")[1]
    fields = schema["components"]["schemas"]["RecommendRequest"]["properties"]
    assert fields["k"]["maximum"] == 20 and set(fields) == set(FIELDS)


def test_an_answer_is_kept_for_who_asks_the_same(service: int, recommender: Recommender) -> None:
    titles, ids = recommender.catalogue.titles, recommender.catalogue.source_ids
    before = metrics(service)

    def seen(name: str) -> float:
        return metrics(service)[name] - before[name]

    first = recommend(service, history=[titles[20], titles[22]], k=4)
    assert recommend(service, history=[titles[20], titles[22]], k=4) == first and first[0] == 200
    assert recommend(service, history=[{"id": ids[20]}, titles[22]], k=4) == first  # the same items
    _, noted = recommend(service, history=[titles[20] + "e", titles[22]], k=4)
    assert noted["items"] == first[1]["items"] and noted["notes"] and not first[1]["notes"]
    assert seen("napo_lookups_totalyes") == 3 and seen("napo_lookups_totalno") == 1
    for other in (
        {"history": [titles[22], titles[20]], "k": 4},  # another order
        {"history": [titles[20], titles[22]], "k": 5},
        {"history": [titles[20], titles[22]], "k": 4, "exclude": [first[1]["items"][0]["title"]]},
    ):
        assert recommend(service, **other)[1] == recommender.recommend(**other).as_dict()
    assert seen("napo_lookups_totalyes") == 3 and seen("napo_lookups_totalno") == 4
    assert seen("napo_batch_size_sum") == 4


def test_what_was_used_last_is_kept() -> None:
    from napo.serve.lru import LRUCache

    kept: LRUCache[int] = LRUCache(2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.get("a") == 1
    kept.put("c", 3)
    assert (kept.get("b"), kept.get("a"), kept.get("c"), len(kept)) == (None, 1, 3, 2)
    none: LRUCache[int] = LRUCache(0)
    none.put("a", 1)
    assert none.get("a") is None and len(none) == 0
    with pytest.raises(ValueError, match=r"^max_kept: expected at least 0; got -1"):
        Limits(max_kept=-1)


def test_too_many_waiting(recommender: Recommender) -> None:
    import asyncio

    from napo.serve.batching import Batcher, QueueFull

    release = threading.Event()

    def slow(batch: Any) -> list[int]:
        release.wait()
        return [len(batch)] * len(batch)

    async def run() -> list[Any]:
        batcher: Batcher[int, int] = Batcher(slow, most=2, waiting=3)
        batcher.start()
        first = asyncio.create_task(batcher.ask(0))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(batcher.ask(number)) for number in range(4)]
        await asyncio.sleep(0.05)
        others[0].cancel()  # a client that has gone is not computed for
        release.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        await batcher.stop()
        return found

    found = asyncio.run(run())
    assert found[0] == 1 and isinstance(found[1], asyncio.CancelledError) and isinstance(found[4], QueueFull)
    assert found[2:4] == [2, 2]  # the next pass has room for both


def test_a_request_that_fails_is_the_only_one_of_its_pass() -> None:
    import asyncio

    from napo.serve.batching import Batcher

    passes: list[list[int]] = []

    def work(batch: Any) -> list[int]:
        passes.append(list(batch))
        if 5 in batch:
            raise IndexError("of 5")
        if len(batch) > 6:
            raise MemoryError
        return [10 * number for number in batch]

    async def run() -> list[Any]:
        batcher: Batcher[int, int] = Batcher(work, most=16, waiting=16)
        asked = [asyncio.ensure_future(batcher.ask(number)) for number in range(16)]
        await asyncio.sleep(0)
        batcher.start()
        found = await asyncio.gather(*asked, return_exceptions=True)
        await batcher.stop()
        return found

    found = asyncio.run(run())
    assert repr(found[5]) == "IndexError('of 5')"
    assert [answer for number, answer in enumerate(found) if number != 5] == [10 * n for n in range(16) if n != 5]
    assert [*map(len, passes)] == [16, 8, 4, 4, 2, 1, 1, 2, 8, 4, 4]


def test_who_comes_back_is_waited_for_after_a_pass_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from napo.serve import batching

    monkeypatch.setattr(batching, "LINGER", 5.0)
    monkeypatch.setattr(batching, "MOST_LINGER", 0.5)

    def work(batch: Any) -> list[int]:
        time.sleep(0.1)
        return [len(batch)] * len(batch)

    async def run() -> list[Any]:
        batcher: batching.Batcher[int, int] = batching.Batcher(work, most=4, waiting=9)
        batcher.start()
        found = [await batcher.ask(0)]
        for _ in range(2):  # the first pair comes after a pass of one, so that nobody is waited for
            first = asyncio.create_task(batcher.ask(1))
            await asyncio.sleep(0.01)
            found += await asyncio.gather(first, batcher.ask(2), batcher.ask(3))
        await batcher.stop()
        return found

    assert asyncio.run(run()) == [1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_is_in_flight_is_finished(demo_run: Run, number: int, code: int, tmp_path: Path) -> None:
    """The signal comes while a pass is computed; its requests and those that wait get their answers."""
    go = tmp_path / "go"
    slow = (
        "import os, time; from napo import cli; from napo.recommend import Recommender; rank = Recommender._rank\n"
        f"def slowly(self, asked):\n    while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "    return rank(self, asked)\n"
        "Recommender._rank, Recommender.try_out = slowly, lambda self: None; cli.main()"
    )
    command = [sys.executable, "-c", slow, "serve", "--run", str(demo_run.path), "--model", "sasrec", "--port", "0"]
    command += ["--set", "grace_seconds=100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def is_closed() -> bool:
        try:
            call(port, "GET", "/health")
        except (OSError, http.client.HTTPException):
            return True
        return False

    try:
        port = port_of(process)
        with ThreadPoolExecutor(6) as pool:
            waiting = [pool.submit(recommend, port, user=user) for user in range(1, 7)]
            wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 7)
            process.send_signal(number)
            wait_for(is_closed)
            go.touch()
            assert [answer.result()[0] for answer in waiting] == [200] * 6
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code
    assert err.count("\n") == 1 and "to continue: " in err and "napo serve" in err, err
