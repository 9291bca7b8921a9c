"""A service in this process, and requests to it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from napo.recommend import Recommender
from napo.serve import Limits
from napo.serve.server import bound, server_of


@contextmanager
def serving(recommender: Recommender, limits: Limits, listener: socket.socket | None = None) -> Iterator[int]:
    """The port of a service."""
    server, listener = server_of(recommender, limits), listener or bound("127.0.0.1", 0)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            server.run(sockets=[listener])
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: bool(getattr(server, "servers", None)) or not thread.is_alive())
        assert thread.is_alive(), f"the service has not started: {failed}"
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
    assert not thread.is_alive() and not failed, f"the service has not stopped as it should: {failed}"


def port_of(process: subprocess.Popen[str]) -> int:
    """Where a service that is a process listens. One that does not say so within a minute is killed."""
    late = threading.Timer(60, process.kill)
    late.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
    finally:
        late.cancel()
    found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
    assert found is not None, f"the service has not started: {line!r}"
    return int(found[1])


def call(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {} if data is None else {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    is_json = answer.headers.get_content_type() == "application/json"
    return answer.status, json.loads(text) if is_json and text else text


def recommend(port: int, **body: Any) -> tuple[int, Any]:
    return call(port, "POST", "/recommend", body)


def as_bytes(length: int | None = None, **body: Any) -> bytes:
    """A request for recommendations as it goes over the wire; ``length``: what it says of its body's."""
    data = json.dumps(body).encode()
    head = "POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{length or len(data)}\r\n\r\n".encode() + data


def answer_on(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of the next answer on a connection."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, dict(answer.headers), json.loads(answer.read())


def metrics(port: int) -> dict[str, float]:
    status, text = call(port, "GET", "/metrics")
    assert status == 200
    families = text_string_to_metric_families(text)
    return {
        sample.name + "".join(sample.labels.get(label, "") for label in ("path", "status", "kept", "by")): sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels
    }


def wait_for(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not in {seconds} s"
        time.sleep(0.01)
