"""Ctrl-C and SIGTERM in commands: long work saves first, then the process ends with the code that shells expect."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The process was asked to end. Not an Exception: nothing that handles failures may take it for one."""

    lost: str | None = None
    """What to say where it was not waited until all was saved."""

    def __init__(self, number: int, *, lost: str | None = None) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        self.lost = lost


_waiting: list[Callable[[], str | None]] = []
_asked: int | None = None


def end_at_signals(line: str) -> None:
    """Until ``handle_signals``, while modules are imported and nothing is begun: SIGINT and SIGTERM end the process
    with this line. An exception would be raised in the midst of an import, where others may take it for a failure."""

    def end(number: int, frame: FrameType | None) -> None:
        _say(line)
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def handle_signals() -> None:
    """From here on SIGINT and SIGTERM raise Stopped. Called by the command line; a notebook keeps its own handlers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


@contextmanager
def saving_first(doing: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Inside, a first signal is only noted, for ``stop_asked`` to tell; a second one does not wait. ``doing``: what to
    say at the first one that is done then, if anything."""
    _waiting.append(doing)
    try:
        yield
    finally:
        _waiting.pop()


def stop_asked() -> bool:
    """Whether to save and end now."""
    return _asked is not None


def stop_if_asked() -> None:
    if _asked is not None:
        raise Stopped(_asked)


def _stop(number: int, frame: FrameType | None) -> None:
    global _asked
    if _waiting and _asked is None:
        _asked = number
        if (doing := _waiting[-1]()) is not None:
            again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
            _say(f"{doing}; {again} stops without saving")
        return
    raise Stopped(number, lost="what was done since the last checkpoint is lost" if _waiting else None)


def _say(line: str) -> None:
    """Straight to stderr: Python's stream, and rich's, may be in use where the signal came."""
    with contextlib.suppress(OSError):
        over_a_bar = "\r\x1b[2K" if os.isatty(2) else ""
        os.write(2, f"{over_a_bar}{line}\n".encode(errors="backslashreplace"))
