"""A service that is told to stop while it is asked: what it took on is answered, and the process ends as it should."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
from service_calls import answer_on, as_bytes, metrics, port_of, wait_for

from napo.runs import Run

CLIENTS = 8
JSON = {"Content-Type": "application/json"}
LATE = 0.2
"""Seconds before the signal in which a request may have been on its way."""


class Client(threading.Thread):
    """Asks again and again, each time on a connection of its own, until there is none."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__()
        self.port, self.draw = port, random.Random(number)
        self.answered = 0
        self.wrong: list[object] = []
        self.turned_away: float | None = None

    def run(self) -> None:
        while self.turned_away is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            history = [{"id": str(self.draw.randint(1, 60))} for _ in range(self.draw.randint(1, 9))]
            sent: float | None = None
            try:
                connection.request("POST", "/recommend", json.dumps({"history": history, "k": 5}), JSON)
                sent = time.monotonic()
                answer = connection.getresponse()
                text = answer.read()
            except OSError:
                self.turned_away = sent or time.monotonic()
            except http.client.HTTPException as error:  # a part of an answer
                self.wrong.append(error)
                self.turned_away = time.monotonic()
            else:
                self.answered += 1
                if answer.status != 200 or len(json.loads(text)["items"]) != 5:
                    self.wrong.append((answer.status, text))
            connection.close()


@pytest.mark.parametrize("model", ["sasrec", "napo+sasrec"])
@pytest.mark.parametrize("moments", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_sigterm_under_load(demo_run: Run, model: str, moments: int) -> None:
    command = [sys.executable, "-X", "faulthandler", "-m", "napo", "serve", "--run", str(demo_run.path)]
    command += ["--model", model, "--port", "0"]
    for moment in range(moments):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        clients: list[Client] = []
        try:
            port = port_of(process)
            clients = [Client(port, CLIENTS * moment + number) for number in range(CLIENTS)]
            for client in clients:
                client.start()
            time.sleep(random.Random(f"{model} {moment}").uniform(0.2, 1.5))
            told = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
            for client in clients:
                client.join()
        assert process.returncode == 143, (process.returncode, err)
        assert err.count("\n") == 1 and "to continue: " in err and "napo serve" in err, err
        assert [client.wrong for client in clients] == [[]] * CLIENTS
        assert all(client.turned_away is not None and client.turned_away > told - LATE for client in clients)
        assert sum(client.answered for client in clients) > 0


def test_a_stop_while_the_model_loads(demo_run: Run, tmp_path: Path) -> None:
    """Before anything listens: the same line, the same exit code."""
    slowly = (
        "import time; from napo import cli; from napo.recommend import Recommender\n"
        "def load(*_, **__):\n    print('loading', flush=True); time.sleep(60)\n"
        "Recommender.from_run = load; cli.main()"
    )
    command = [sys.executable, "-c", slowly, "serve", "--run", str(demo_run.path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and "to continue: " in err and "napo serve" in err and err.count("\n") == 1, err


SLOW = (
    "import sys, time; from napo import cli; from napo.recommend import Recommender; rank = Recommender._rank\n"
    "def slowly(self, asked):\n    time.sleep(4); return rank(self, asked)\n"
    "Recommender._rank, Recommender.try_out = slowly, lambda self: None; cli.main()"
)


@pytest.mark.parametrize(
    "options, sent, least",
    [
        ([], as_bytes(length=100, user=1), 0.0),  # half of a body is not waited for
        (["--set", "grace_seconds=2"], as_bytes(user=1), 2.0),  # and what is computed only for the time that was given
    ],
)
def test_what_cannot_be_finished_gets_503(demo_run: Run, options: list[str], sent: bytes, least: float) -> None:
    command = [sys.executable, "-c", SLOW, "serve", "--run", str(demo_run.path), "--model", "sasrec", "--port", "0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = port_of(process)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(sent)
            wait_for(lambda: metrics(port)["napo_requests_in_flight"] == 2)
            told = time.monotonic()
            process.send_signal(signal.SIGTERM)
            status, headers, answer = answer_on(connection)
            took = time.monotonic() - told
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (status, headers["retry-after"]) == (503, "1")
    assert answer == {"error": "the service stops; ask another one"}
    assert process.returncode == 143 and least < took < 15 and "Traceback" not in err, (took, err)
    assert err.count("\n") == 1 + bool(options) and "to continue: " in err and "napo serve" in err, err


TWICE = """
import asyncio, contextlib, sys, types
from fastapi import FastAPI
from napo import signals
from napo.serve import server

@contextlib.asynccontextmanager
async def lifespan(app):
    app.state.stopping = asyncio.get_running_loop().create_future()
    yield

app = FastAPI(lifespan=lifespan)

@app.get("/slow")
async def slow():
    print("asked", flush=True)
    await asyncio.sleep(30)

signals.handle_signals()
server.make_app = lambda *given: app
recommender = types.SimpleNamespace(try_out=lambda: None, model="m", run=types.SimpleNamespace(path="r"))
try:
    server.serve(recommender, server.bound("127.0.0.1", 0))
except signals.Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


def test_a_second_signal_ends_it_without_a_traceback() -> None:
    """uvicorn told of what was cancelled, in 30 lines."""
    process = subprocess.Popen([sys.executable, "-c", TWICE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", port_of(process)), timeout=60) as connection:
            connection.sendall(b"GET /slow HTTP/1.1\r\nHost: napo\r\n\r\n")
            assert process.stdout.readline() == "asked\n"
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")
