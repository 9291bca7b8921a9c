"""Progress where stderr is no terminal: plain lines, some time apart."""

from __future__ import annotations

import pytest

from napo import progress as module
from napo.progress import duration, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, as the bar sees them."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_30_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sft", 1000, unit="steps", done=400, may_end_earlier=True) as bar:
        for _ in range(59):
            clock[0] += 1
            bar.note("loss 2.310")
            bar.advance(2)
    out, err = capsys.readouterr()
    assert out == ""  # where results go
    assert err == "sft: 460 of 1,000 steps, loss 2.310, 2.0 steps/s, at most 4 minutes left\n"  # (1000 - 460) / 2 s


def test_what_is_left_ends_with_the_time_that_there_is(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sft", 1000, unit="steps", may_end_earlier=True, most_seconds=90) as bar:
        for _ in range(4):
            clock[0] += 30
            bar.advance(2)
    lefts = [line.rpartition(", ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lefts == ["at most 60 s left", "at most 30 s left", "at most 0 s left", "at most 0 s left"]


def test_slow_steps_and_no_total(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("read", unit="MiB") as bar:
        clock[0] += 60
        bar.advance(3.5)
    assert capsys.readouterr().err == "read: 3.5 MiB, 3.5 MiB/min\n"


def test_other_ranks_are_quiet(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sft", 10, quiet=True) as bar:
        clock[0] += 60
        bar.advance()
        bar.say("something")
    assert capsys.readouterr().err == ""


def test_durations_in_words() -> None:
    assert [duration(s) for s in (5, 89, 90, 3000, 75_600)] == ["5 s", "89 s", "2 minutes", "50 minutes", "21.0 hours"]
