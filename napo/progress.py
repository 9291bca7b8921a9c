"""Progress bars: one helper, with rate and time left; silent where stdout is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Bar:
    """What ``progress`` hands out. ``advance`` moves the bar, ``note`` shows a few words (say a loss) beside it."""

    def advance(self, steps: float = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _RichBar(Bar):
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        from rich import progress as rich

        class Rate(rich.ProgressColumn):
            def render(self, task: rich.Task) -> str:  # type: ignore[override]
                return f"{task.finished_speed or task.speed or 0.0:,.1f} {unit}/s"

        self.rich = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(bar_width=24),
            rich.MofNCompleteColumn(),
            Rate(),
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(compact=True),
            rich.TextColumn("{task.fields[note]}"),
        )
        self.task = self.rich.add_task(description, total=total, note="")

    def advance(self, steps: float = 1) -> None:
        self.rich.advance(self.task, steps)

    def note(self, text: str) -> None:
        self.rich.update(self.task, note=text)


@contextmanager
def progress(description: str, total: float | None = None, *, unit: str = "it") -> Iterator[Bar]:
    """A bar for ``total`` steps::

    with progress("evaluate", len(rows), unit="users") as bar:
        for row in rows:
            ...
            bar.advance()
    """
    if not sys.stdout.isatty():
        yield Bar()
        return
    bar = _RichBar(description, total, unit)
    with bar.rich:
        yield bar
