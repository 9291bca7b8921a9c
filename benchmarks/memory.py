"""Memory of a process on a CPU: the peak of a run, and what keeps the system's own doings out of its time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt(3)


def keep() -> None:
    """From now on what is freed stays with the process, as with most allocators but glibc's.

    That one gives large blocks back to the system at once, and a run pays for their pages anew: what it only would have
    to write is then free where it asks for zeros, and costs five times as much where the machine gave the pages to its
    host."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)


def as_by_default() -> None:
    """Ends `keep`, and gives back what was kept."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 65536)
    libc.mallopt(TRIM_THRESHOLD, 128 << 10)
    give_back()


def give_back() -> None:
    """All that is free."""
    ctypes.CDLL(None).malloc_trim(0)


def touch(size: int) -> None:
    """Writes to `size` bytes and frees them. A virtual machine may give memory that lies free back to its host, and
    getting it again takes seconds a GiB, which would count as time of the variant that happens to take it first."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.empty(min(size, free * 3 // 4), dtype=torch.uint8).zero_()


def peak_of_process(run: Callable[[], Any]) -> int:
    """Bytes by which the resident memory rose at most while ``run`` ran, over what it was before."""
    give_back()  # freed memory that the process still holds would hide what run() takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM") - before
    del result
    return max(peak, 0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
