"""When a piece ran, for how long, and the most memory that the process held meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from napo.files import read_json, write_json
from napo.runs import Run

FOLDER = "measured"


@contextmanager
def measured(run: Run, name: str, stage: str | None = None) -> Iterator[None]:
    """Adds a call to ``RUN/measured/NAME.json`` where the run's ``stage`` (NAME where none is named) has work to do.

    A call without seconds was killed. Its work was taken up by the next one, so that the seconds of all calls count."""
    path = run.path / FOLDER / f"{name}.json"
    calls, before = calls_of(run, name), run.stamp(stage or name)
    call = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seconds": None, "peak_mib": None}
    if before is None:
        with run.writing():  # which makes the folder a run first
            write_json(path, [*calls, call])
    _restart_peak()
    began = time.monotonic()
    try:
        yield
    finally:
        if before is None or run.stamp(stage or name) != before:
            seconds = round(time.monotonic() - began, 1)
            write_json(path, [*calls, {**call, "seconds": seconds, "peak_mib": _peak_mib()}])


def calls_of(run: Run, name: str) -> list[dict[str, Any]]:
    path = run.path / FOLDER / f"{name}.json"
    return read_json(path) if path.is_file() else []


def summary(run: Run, name: str) -> dict[str, Any]:
    """Of all calls: date of the last one, seconds, memory; ``killed`` counts those whose seconds are not known."""
    calls = calls_of(run, name)
    ended = [call for call in calls if call["seconds"] is not None]
    if not ended:
        return {}
    peaks = [call["peak_mib"] for call in ended if call["peak_mib"] is not None]
    return {
        "date": ended[-1]["date"],
        "seconds": round(sum(call["seconds"] for call in ended), 1),
        "peak_mib": max(peaks, default=None),
        "killed": len(calls) - len(ended),
    }


def _restart_peak() -> None:
    """Linux counts the peak anew from here on; elsewhere it is not known."""
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def _peak_mib() -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    return None
