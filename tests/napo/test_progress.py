"""Progress where stderr is no terminal: plain lines, some time apart."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from napo import progress as module
from napo.demo import demo
from napo.finetuning.callbacks import BarCallback
from napo.progress import duration, progress
from napo.recommenders import sasrec_training
from napo.recommenders.options import SASRecOptions


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


def test_a_long_training_names_an_option_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ "--max-minutes bounds it" was said where nothing was bounded, and of the demo, which has no such option."""

    def estimates(*_: Any) -> None:
        print(BarCallback("sft")._estimate(100, 40.0))
        with progress("sasrec", 40, unit="epochs") as bar:
            sasrec_training._say_how_long(bar, SASRecOptions(max_epochs=40), 1, 60.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimates()
    out, err = capsys.readouterr()
    assert out == "100 steps of 40 s to go, about 67 minutes without validation; --max-minutes would bound it\n"
    assert "39 minutes; --max-minutes would bound it" in err
    monkeypatch.setattr("napo.demo.require_compiled", estimates)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path)
    out, err = capsys.readouterr()
    assert "max-minutes" not in out + err
    assert all(text.endswith("; Ctrl-C stops it, and the same command goes on\n") for text in (out, err))


def drawn(monkeypatch: pytest.MonkeyPatch, total: float | None) -> bool:
    """Whether a terminal would have a bar."""
    made: list[float | None] = []

    class Drawn(module._RichBar):
        def __init__(self, description: str, total: float | None, *rest: Any) -> None:
            super().__init__(description, total, *rest)
            made.append(total)

    monkeypatch.setattr(module, "_RichBar", Drawn)
    monkeypatch.setattr(module, "on_a_terminal", lambda stream: True)
    with progress("rank", total) as bar:
        bar.advance(total or 1)
    return bool(made)


def test_a_bar_of_nothing_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "decode 0/0", and "read rb.item 0/0 0.0 MiB/s" of a small file."""
    assert [drawn(monkeypatch, total) for total in (0, 0.3, 1, 2.5, None)] == [False, False, True, True, True]


def test_a_service_draws_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each request it drew "rank 1/1", in the threads that compute."""
    seen: list[bool] = []

    class Server:
        def run(self, sockets: list[Any]) -> None:
            thread = threading.Thread(target=lambda: seen.append(drawn(monkeypatch, 1)))
            thread.start()
            thread.join()

    server = pytest.importorskip("napo.serve.server")
    monkeypatch.setattr(server, "server_of", lambda *given: Server())
    server.serve(SimpleNamespace(try_out=lambda: seen.append(drawn(monkeypatch, 1))), None)
    assert seen == [False, False]
    assert drawn(monkeypatch, 1)
