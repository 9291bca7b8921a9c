"""Progress on stderr, with rate and time left: a bar on a terminal, elsewhere a plain line every 30 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO

LINE_SECONDS = 30.0
_unseen = 0
_if_long: ContextVar[str] = ContextVar("_if_long", default="--max-minutes would bound it")


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, in all threads, nothing is shown: the many short passes of a service."""
    global _unseen
    _unseen += 1
    try:
        yield
    finally:
        _unseen -= 1


def if_long() -> str:
    """What to tell whoever would wait long for a training that no time bounds."""
    return _if_long.get()


@contextmanager
def without_max_minutes() -> Iterator[None]:
    """Inside, trainings are those of a command that has no such option."""
    token = _if_long.set("Ctrl-C stops it, and the same command goes on")
    try:
        yield
    finally:
        _if_long.reset(token)


class Bar:
    """The handle that ``progress`` gives. ``advance`` moves the bar, ``note`` shows a few words (say a loss) beside
    it."""

    def advance(self, steps: float = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        """Show a line of its own, at once."""


class _LineBar(Bar):
    """For logs. Work done before this process does not count for the rate."""

    def __init__(
        self,
        description: str,
        total: float | None,
        unit: str,
        done: float,
        may_end_earlier: bool,
        most_seconds: float | None,
    ) -> None:
        self.description, self.total, self.unit, self.may_end_earlier = description, total, unit, may_end_earlier
        self.most_seconds = most_seconds
        self.before = self.done = done
        self.began = self.said = time.monotonic()
        self.text = ""

    def advance(self, steps: float = 1) -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.said >= LINE_SECONDS:
            self.said = now
            self.say(self.line(now - self.began))

    def note(self, text: str) -> None:
        self.text = text

    def say(self, text: str) -> None:
        print(f"{self.description}: {text}", file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        rate = (self.done - self.before) / seconds
        parts = [f"{count(self.done)}{f' of {count(self.total)}' if self.total is not None else ''} {self.unit}"]
        parts += [self.text] if self.text else []
        parts.append(f"{rate:,.1f} {self.unit}/s" if rate >= 1 else f"{60 * rate:,.1f} {self.unit}/min")
        if self.total is not None and rate > 0:
            left = _bounded((self.total - self.done) / rate, self.most_seconds, seconds)
            parts.append(f"{'at most' if self.may_end_earlier else 'about'} {duration(left)} left")
        return ", ".join(parts)


def on_a_terminal(stream: IO[str] | None) -> bool:
    """Python has None in the place of a stream that is closed where the process begins, as with `>&-`."""
    return stream is not None and stream.isatty()


def _bounded(left: float, most_seconds: float | None, elapsed: float) -> float:
    return left if most_seconds is None else min(left, max(most_seconds - elapsed, 0.0))


def count(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """The approximate duration, in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


class _RichBar(Bar):
    def __init__(
        self, description: str, total: float | None, unit: str, done: float, most_seconds: float | None
    ) -> None:
        from rich import progress as rich
        from rich.console import Console
        from rich.text import Text

        class Rate(rich.ProgressColumn):
            def render(self, task: rich.Task) -> str:  # type: ignore[override]
                return f"{task.finished_speed or task.speed or 0.0:,.1f} {unit}/s"

        class Left(rich.TimeRemainingColumn):
            def render(self, task: rich.Task) -> Text:
                if most_seconds is None or task.finished or task.time_remaining is None:
                    return super().render(task)
                minutes, seconds = divmod(int(_bounded(task.time_remaining, most_seconds, task.elapsed or 0.0)), 60)
                hours = f"{minutes // 60}:" if minutes >= 60 else ""
                return Text(f"{hours}{minutes % 60:02d}:{seconds:02d}", style="progress.remaining")

        self.rich = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(bar_width=24),
            rich.MofNCompleteColumn(),
            Rate(),
            rich.TimeElapsedColumn(),
            Left(compact=True),
            rich.TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self.description = description
        self.task = self.rich.add_task(description, total=total, completed=int(done), note="")

    def advance(self, steps: float = 1) -> None:
        self.rich.advance(self.task, steps)

    def note(self, text: str) -> None:
        self.rich.update(self.task, note=text)

    def say(self, text: str) -> None:
        self.rich.console.print(f"{self.description}: {text}", markup=False, highlight=False)


@contextmanager
def progress(
    description: str,
    total: float | None = None,
    *,
    unit: str = "it",
    done: float = 0,
    may_end_earlier: bool = False,
    most_seconds: float | None = None,
    quiet: bool = False,
) -> Iterator[Bar]:
    """A bar for ``total`` steps, of which ``done`` were done before::

    with progress("evaluate", len(rows), unit="users") as bar:
        for row in rows:
            ...
            bar.advance()

    ``most_seconds``: after these it ends, however much is done. ``quiet``: nothing is shown, as on all ranks but the
    first.
    """
    if quiet or _unseen:
        yield Bar()
    elif on_a_terminal(sys.stderr) and (total is None or total >= 1):  # a bar of less shows 0/0
        bar = _RichBar(description, total, unit, done, most_seconds)
        with bar.rich:
            yield bar
    else:
        yield _LineBar(description, total, unit, done, may_end_earlier, most_seconds)
