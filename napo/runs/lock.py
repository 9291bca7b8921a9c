"""One process at a time writes into a run."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from napo.files import check_is_file

_HELD: dict[Path, tuple[int, int, IO[str]]] = {}
"""The runs that this process writes into: process, thread, and the lock."""


@contextmanager
def locked(run: Path, wait: float) -> Iterator[None]:
    """Others are told who writes, after ``wait`` seconds. The lock goes with the process that holds it, however that
    ends."""
    key = run.resolve()
    me = (os.getpid(), threading.get_ident())
    held = _HELD.get(key)
    if held is not None and held[:2] == me:  # a stage within a stage's command
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = _locked(run / ".lock", run, wait)
    except OSError as error:
        raise ValueError(
            f"run: {run} cannot be written into ({error.strerror}); copy it to where you may write, or give another "
            "--run"
        ) from None
    _HELD[key] = (*me, handle)
    try:
        yield
    finally:
        del _HELD[key]
        handle.close()


def _locked(path: Path, run_dir: Path, wait: float) -> IO[str]:
    """The lock of a run, with who holds it written into it."""
    until = time.monotonic() + wait
    check_is_file(path)
    if path.is_symlink():
        raise ValueError(f"{path}: is a link, and what it points to would be overwritten; delete it")
    handle = path.open("a+")
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= until:
                handle.seek(0)
                owner = handle.read(200).strip() or "another process"
                handle.close()
                raise ValueError(
                    f"run: {owner} is writing into {run_dir}; wait until it has ended, or give another --run"
                ) from None
            time.sleep(0.01)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    return handle
