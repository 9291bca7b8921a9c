"""`napo serve` under concurrent clients: requests per second of 32 clients against one, and whether all are answered.

    python -m benchmarks run serve --run runs/ml                     # its default model; --model names another
    python -m benchmarks run serve --run runs/ml --seconds 60 --clients 32

The service is a process of its own, and so are the clients (asyncio, one connection each, a new request as soon as the
last one is answered). Histories are random, 5 to 20 items, and no answers are kept, so nothing is answered from memory.
Every fiftieth answer is compared with what one request alone gets: it must be the same to the last bit.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.options import parser_for
from benchmarks.report import Report

COMPARED = 50  # every so many answers
WARM_UP = 3.0  # seconds


def main(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] == "clients":
        numbers = [int(argument) for argument in arguments[2:]]
        print(json.dumps(asyncio.run(clients(source_ids(Path(arguments[1])), *numbers))))
        return
    parser = parser_for(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--model", default=None, help="of the run; default: what napo serve takes")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=60, help="of the many clients; one client gets a third of it")
    parser.add_argument("--threads", type=int, default=None, help="of the service")
    options = parser.parse_args(arguments)
    report = Report("serve", options)
    items = len(source_ids(options.run))
    command = [sys.executable, "-m", "napo.cli", "serve", "--run", str(options.run), "--port", "0"]
    command += ["--set", "max_kept=0"]
    command += ["--model", options.model] if options.model else []
    command += ["--threads", str(options.threads)] if options.threads else []
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert service.stdout is not None
        line = service.stdout.readline()
        if "http://" not in line:
            raise SystemExit("serve: the service did not start")
        model, port = line.split()[1], int(line.split("http://127.0.0.1:")[1].split()[0])
        measured = {}
        for count, seconds in ((1, max(options.seconds // 3, 1)), (options.clients, options.seconds)):
            called = [sys.executable, "-m", "benchmarks", "run", "serve", "clients", str(options.run)]
            numbers = [str(number) for number in (port, count, seconds, count)]
            out = subprocess.run([*called, *numbers], check=True, capture_output=True, text=True)
            found = measured[count] = json.loads(out.stdout.splitlines()[-1])
            per_second = found["answers"] / found["seconds"]
            measured[count]["rate"] = per_second
            report.add(
                f"{model}, {items} items",
                f"{count} client{'s' if count > 1 else ''}",
                requests_per_s=round(per_second, 1),
                ratio=per_second / measured[1]["rate"],
                median_ms=found["median_ms"],
                p95_ms=found["p95_ms"],
                requests_per_pass=found["requests_per_pass"],
                answers=found["answers"],
                errors=found["errors"],
                compared=found["compared"],
                different=found["different"],
            )
            if found["errors"] or found["different"]:
                report.failed.append(f"{count} clients: {found['errors']} errors, {found['different']} other answers")
    finally:
        service.terminate()
        service.wait()
    report.finish()


def passes(port: int) -> tuple[float, float]:
    """The requests that the service has computed so far, and its passes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line.startswith("napo_"))
    return float(lines["napo_batch_size_sum"]), float(lines["napo_batch_size_count"])


def source_ids(run: Path) -> list[str]:
    return [str(one) for one in pd.read_parquet(run / "items.parquet")["source_id"]]


async def clients(ids: list[str], port: int, count: int, seconds: int, seed: int) -> dict[str, Any]:
    """So many clients at once; what they saw."""
    bodies = random_bodies(ids, seed)
    await asyncio.gather(*(client(port, bodies, time.monotonic() + WARM_UP, []) for _ in range(count)))
    before = passes(port)
    began, seen = time.monotonic(), []
    await asyncio.gather(*(client(port, bodies, began + seconds, seen) for _ in range(count)))
    took = time.monotonic() - began
    requests, computed = (now - then for now, then in zip(passes(port), before, strict=True))
    errors = sum(status != 200 for _, status, _, _ in seen)
    again: list[Any] = []
    for body, _, text, _ in seen[::COMPARED]:  # alone: one after the other, with nobody else
        await client(port, iter([body]), float("inf"), again)
        again[-1] = again[-1][2] == text
    times = np.array([elapsed for *_, elapsed in seen]) * 1e3
    return {
        "answers": len(seen),
        "seconds": took,
        "requests_per_pass": round(requests / max(computed, 1), 1),
        "errors": errors,
        "median_ms": round(float(np.median(times)), 1),
        "p95_ms": round(float(np.quantile(times, 0.95)), 1),
        "compared": len(again),
        "different": again.count(False),
    }


def random_bodies(ids: list[str], seed: int) -> Iterator[bytes]:
    """An endless series of requests."""
    random = np.random.default_rng(seed)
    while True:
        chosen = random.choice(len(ids), int(random.integers(5, 21)), replace=False)
        yield json.dumps({"history": [{"id": ids[item]} for item in chosen], "k": 10}).encode()


async def client(port: int, bodies: Iterator[bytes], until: float, seen: list[Any]) -> None:
    """One connection; (body, status, answer, seconds) of each request are appended to `seen`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.monotonic() < until and (body := next(bodies, None)) is not None:
        began = time.monotonic()
        head = f"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(f"{head}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
        text = await reader.readexactly(length)
        seen.append((body, int(lines[0].split()[1]), text, time.monotonic() - began))
    writer.close()
    await writer.wait_closed()
