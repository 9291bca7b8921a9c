"""Memory of a process on a CPU: the peak of a run, and what keeps the system's own doings out of its time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt(3)
BLOCKS = (4 << 20, 64 << 10)  # bytes
_ready: int | None = None  # bytes that `keep` has touched; None: nothing is kept


class _Mallinfo2(ctypes.Structure):
    """mallinfo(3), glibc 2.33"""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def keep(ready: int) -> None:
    """From now on freed memory stays with the process, as with most allocators other than glibc's.

    That one gives large blocks back to the system at once, and a run pays for their pages anew: memory that it would
    only have to write is then free if it asks for zeros, and costs five times as much if the machine gave the pages to
    its host. The pages of `ready` bytes, and of all holes, are there then."""
    global _ready
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)
    if _ready is None:
        _fill_holes()
        _ready = 0
    if ready > _ready:
        touch(ready)
        _ready = ready


def as_by_default() -> None:
    """Ends `keep`, and gives the kept memory back."""
    global _ready
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 65536)
    libc.mallopt(TRIM_THRESHOLD, 128 << 10)
    give_back()
    _ready = None


def give_back() -> None:
    """All that is free."""
    ctypes.CDLL(None).malloc_trim(0)


def touch(size: int) -> None:
    """Writes to `size` bytes and frees them. A virtual machine may give memory that lies free back to its host, and
    getting it again takes seconds per GiB, which would count as time of the variant that happens to take it first."""
    torch.empty(min(size, _unused()), dtype=torch.uint8).zero_()


def _fill_holes() -> None:
    """Writes to all free memory of the process, so that its pages exist: memory that was given back left holes between
    the blocks in use, and the variant that gets them would pay for their pages."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return
    libc.mallinfo2.restype = _Mallinfo2
    blocks = []
    for size in BLOCKS:  # the smaller ones for what the larger ones do not fit in
        free = min(libc.mallinfo2().fordblks, _unused())
        blocks += [torch.empty(size, dtype=torch.uint8).zero_() for _ in range(free // size)]


def _unused() -> int:
    """Three quarters of the machine's unused memory."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


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
