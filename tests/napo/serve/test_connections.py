"""Clients that go, that wait, and that send nothing or half of a request, over real connections."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

pytest.importorskip("fastapi")
from service_calls import answer_on, as_bytes, call, metrics, recommend, serving, wait_for

from napo.recommend import Catalogue, Recommender
from napo.runs import Run
from napo.serve import Limits


@pytest.fixture(scope="module")
def recommender(demo_run: Run) -> Recommender:
    return Recommender.from_run(demo_run.path, model="sasrec")


@contextmanager
def released(event: threading.Event) -> Iterator[None]:
    """Set in the end, whatever happens: the service and its clients would wait for it."""
    try:
        yield
    finally:
        event.set()


def test_who_has_gone_is_not_computed_for(recommender: Recommender, held: threading.Event) -> None:
    limits = Limits(max_batch=4, max_waiting=10)
    with serving(recommender, limits) as port, ThreadPoolExecutor(2) as pool, released(held):
        first = pool.submit(recommend, port, user=1)
        wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 2)
        for clients in range(2):  # as many as may wait: those who have gone make room
            connections = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(10)]
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
    limits = Limits(max_wait_seconds=1)
    with serving(recommender, limits) as port, ThreadPoolExecutor(1) as pool, released(held):
        first = pool.submit(recommend, port, user=1)
        wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 2)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(as_bytes(user=2))
            status, headers, answer = answer_on(connection)
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer == {"error": "its turn has not come in 1 s; try again"}
        held.set()  # whose turn had come is answered
        assert first.result()[0] == 200
        assert metrics(port)["napo_batch_size_sum"] == 1


def test_searches_for_titles_wait_for_their_turn(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    began, event, search = threading.Event(), threading.Event(), Catalogue._search
    title = recommender.catalogue.titles[5]

    def slow(catalogue: Catalogue, key: str) -> Any:
        began.set()
        event.wait()
        return search(catalogue, key)

    monkeypatch.setattr(Catalogue, "_search", slow)
    limits = Limits(max_waiting=2, max_searches=3, max_wait_seconds=60)
    with serving(recommender, limits) as port, ThreadPoolExecutor(3) as pool, released(event):
        asked = [pool.submit(recommend, port, history=[title + "x"])]
        assert began.wait(20)
        asked += [pool.submit(recommend, port, history=[title + slip]) for slip in "yz"]
        wait_for(lambda: metrics(port)["napo_requests_waiting"] == 2)
        assert recommend(port, history=[title + "w"]) == (503, {"error": "2 requests wait already; try again"})
        assert recommend(port, history=[title])[0] == 200  # which is not searched for
        assert recommend(port, history=[title, *({"id": f"none {one}"} for one in range(4))], unknown="skip")[0] == 200
        assert recommend(port, history=[title, "a1", "b1", "c1", "d1"], unknown="skip", exact=True)[0] == 200
        for history, exclude in ((["aa", "bb", "cc", "dd", title], []), (["aa", "bb"], ["cc", "dd", "ee"])):
            status, answer = recommend(port, history=history, exclude=exclude)
            assert status == 422 and answer["field"] == "history", answer
            assert answer["error"].startswith("history: expected at most 3 titles to search for; ")
        event.set()
        for future, slip in zip(asked, "xyz", strict=True):
            status, answer = future.result()
            assert status == 200 and answer["notes"] == [f"'{title}{slip}' was taken for '{title}'"]


def test_half_of_a_body_is_not_waited_for_without_end(recommender: Recommender) -> None:
    with serving(recommender, Limits(max_read_seconds=1)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(as_bytes(length=100, user=1))
            status, _, answer = answer_on(connection)
            assert (status, answer) == (408, {"error": "body: not here after 1 s"})
            assert connection.recv(1) == b""  # the service closes the connection
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(as_bytes(length=100, user=1))
            wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 2)
        wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 1)
        assert metrics(port)["napo_requests_total/recommend499"] == 1


def test_silent_connections_keep_nobody_out(recommender: Recommender) -> None:
    def silent(port: int, sent: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        connection.sendall(sent)
        return connection

    with serving(recommender, Limits(max_connections=8, max_read_seconds=6)) as port, ExitStack() as kept:
        sent = (b"", b"POST /recommend HTTP/1.1\r\nHost:", as_bytes(length=100, user=1))
        connections = [kept.enter_context(silent(port, sent[number % 3])) for number in range(30)]
        began = time.monotonic()
        assert call(port, "GET", "/health")[0] == 200 and recommend(port, user=1)[0] == 200
        assert time.monotonic() - began < 5
        for connection in connections:  # the last ones are closed too, after a while
            with suppress(ConnectionResetError):
                assert connection.recv(20) in (b"", b"HTTP/1.1 408 Request")
        assert 5 < time.monotonic() - began < 15


def test_busy_connections_are_not_closed_for_others(recommender: Recommender, held: threading.Event) -> None:
    limits = Limits(max_connections=4, max_read_seconds=1, max_batch=1)
    with serving(recommender, limits) as port, ThreadPoolExecutor(8) as pool, released(held):
        asked = [pool.submit(recommend, port, user=user) for user in range(1, 9)]  # four of them wait in the kernel
        time.sleep(2.5)
        held.set()
        assert [answer.result()[0] for answer in asked] == [200] * 8


def test_without_files_the_service_goes_on(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one line about it in the log, and not one for each try."""
    accept, failures = socket.socket.accept, iter(range(50))

    def failing(listener: socket.socket) -> Any:
        if next(failures, None) is None:
            return accept(listener)
        raise OSError(errno.EMFILE, "Too many open files")

    with serving(recommender, Limits()) as port:
        monkeypatch.setattr(socket.socket, "accept", failing)
        assert call(port, "GET", "/health")[0] == 200
    said = [record.getMessage() for record in caplog.records if "cannot take a connection" in record.getMessage()]
    assert next(failures, None) is None and 0 < len(said) <= 11 and "(Too many open files)" in said[0]


def test_as_many_connections_as_there_may_be_files() -> None:
    """The soft limit is raised as far as needed; where the hard one is too low there are fewer, and that is said."""
    code = (
        "import resource, sys; from napo.serve.listening import room_for\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, int(sys.argv[1])))\n"
        "print(room_for(300), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    found = []
    for hard in (2000, 200):
        done = subprocess.run([sys.executable, "-c", code, str(hard)], capture_output=True, text=True, check=True)
        room, soft = map(int, done.stdout.split())
        found.append((room, soft, done.stderr))
    assert found[0][0] == 300 and 300 < found[0][1] < 400 and not found[0][2]
    room, soft, said = found[1]
    assert 100 < room < 170 and soft == 200
    assert said == f"max_connections: {room} in place of 300, as this process may open 200 files\n"
