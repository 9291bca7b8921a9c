"""Ctrl-C and SIGTERM in commands: long work saves first, then the process ends with the code that shells expect."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The process was asked to end. Not an Exception: nothing that handles failures may take it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


_waiting = 0
_asked: int | None = None


def handle_signals() -> None:
    """From here on SIGINT and SIGTERM raise Stopped. Called by the command line; a notebook keeps its own handlers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


@contextmanager
def saving_first() -> Iterator[None]:
    """Inside, a first signal is only noted, for ``stop_asked`` to tell; a second one does not wait."""
    global _waiting
    _waiting += 1
    try:
        yield
    finally:
        _waiting -= 1


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
        return
    raise Stopped(number)
