"""Columns of a log in parts: in memory while they are few, in files beside the data set beyond that."""

from __future__ import annotations

import errno
import os
import tempfile
from contextvars import ContextVar
from pathlib import Path

import numpy as np

PART = 1 << 22
"""Interactions of one part. Only a few parts are in memory at any time."""

scratch: ContextVar[Path | None] = ContextVar("scratch", default=None)
"""Where files of parts go: ``prepare`` sets it, since the system's own temporary folder is memory on many machines."""


class Parts:
    """Parts with the same number of columns; a part that has fewer gets zeros (decimals of times)."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.width = 0
        self._kept: list[list[np.ndarray | Path]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def append(self, columns: list[np.ndarray], *, last: bool = False) -> None:
        """``last``: it is the only one, if there is none before it, and stays in memory."""
        self.sizes.append(0)
        self._kept.append([])
        if not last or len(self) > 1:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix=".napo.", dir=scratch.get())
        self.store(len(self) - 1, columns)

    def store(self, part: int, columns: list[np.ndarray]) -> None:
        self.sizes[part] = len(columns[0])
        self.width = max(self.width, len(columns))
        if self._folder is None:
            self._kept[part] = list(columns)
            return
        self._kept[part] = []
        for number, column in enumerate(columns):
            path = Path(self._folder.name) / f"{part}-{number}.npy"
            try:
                np.save(path, column)
            except OSError as error:
                if error.errno is None:  # NumPy tells how much was written, and not why
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
                raise
            self._kept[part].append(path)

    def load(self, part: int, columns: range | None = None) -> list[np.ndarray]:
        """All columns of a part, or some of them."""
        found = []
        for number in columns or range(self.width):
            column = self._kept[part][number] if number < len(self._kept[part]) else None
            if column is None:
                found.append(np.zeros(self.sizes[part], np.int64))
            else:
                found.append(np.load(column) if isinstance(column, Path) else column)
        return found

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
