"""Clients that go, that wait, and that send nothing or half of a request, over real connections."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi")
from service_calls import as_bytes, call, metrics, recommend, serving, wait_for

from napo.recommend import Recommender
from napo.runs import Run
from napo.serve import Limits


@pytest.fixture(scope="module")
def recommender(demo_run: Run) -> Recommender:
    return Recommender.from_run(demo_run.path, model="sasrec")


@pytest.fixture
def held(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is computed before it is set."""
    event, rank = threading.Event(), recommender._rank

    def late(asked: Any) -> Any:
        event.wait()
        return rank(asked)

    monkeypatch.setattr(recommender, "_rank", late)
    yield event
    event.set()


def test_who_has_gone_is_not_computed_for(recommender: Recommender, held: threading.Event) -> None:
    with serving(recommender, Limits(max_batch=4, max_waiting=10)) as port, ThreadPoolExecutor(2) as pool:
        first = pool.submit(recommend, port, user=1)
        wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 2)
        for clients in range(2):  # as many as may wait: those who have gone make room
            connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
            for user, connection in enumerate(connections):
                connection.sendall(as_bytes(user=user + 2, k=1 + clients))
            wait_for(lambda: metrics(port)["napo_requests_waiting"] == 10)
            for connection in connections:
                connection.close()
            wait_for(lambda: metrics(port)["napo_requests_waiting"] == 0)
        second = pool.submit(recommend, port, user=40)
        wait_for(lambda: metrics(port)["napo_requests_waiting"] == 1)
        held.set()
        assert first.result()[0] == second.result()[0] == 200
        found = metrics(port)
        assert found["napo_batch_size_sum"] == found["napo_batch_size_count"] == 2
        assert found["napo_requests_total/recommend499"] == 20


def test_who_waits_too_long_is_told(recommender: Recommender, held: threading.Event) -> None:
    with serving(recommender, Limits(max_wait_seconds=1)) as port, ThreadPoolExecutor(1) as pool:
        first = pool.submit(recommend, port, user=1)
        wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 2)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(as_bytes(user=2))
            head, _, text = connection.recv(10_000).partition(b"\r\n\r\n")
        assert b" 503 " in head.splitlines()[0] and b"retry-after: 1\r\n" in head.lower() + b"\r\n"
        assert json.loads(text) == {"error": "its turn has not come in 1 s; try again"}
        held.set()  # whose turn had come is answered
        assert first.result()[0] == 200
        assert metrics(port)["napo_batch_size_sum"] == 1


def test_half_of_a_body_is_not_waited_for_without_end(recommender: Recommender) -> None:
    with serving(recommender, Limits(max_read_seconds=1)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(as_bytes(length=100, user=1))
            answer = b"".join(iter(lambda: connection.recv(10_000), b""))  # the service closes the connection
        head, _, text = answer.partition(b"\r\n\r\n")
        assert b" 408 " in head.splitlines()[0] and json.loads(text) == {"error": "body: not here after 1 s"}
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(as_bytes(length=100, user=1))
            wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 2)
        wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 1)
        assert metrics(port)["napo_requests_total/recommend499"] == 1
