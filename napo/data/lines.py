"""Text files read line by line: gz transparently, memory bounded, hashed, progress by bytes, bad lines counted."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ..progress import Bar, progress

logger = logging.getLogger(__name__)

SHOWN_BAD_LINES = 5
LONGEST_LINE = 1 << 24
READ_SIZE = 1 << 20

BAD_LINE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error)
"""What parsers raise for a line that is not what it should be: json.loads for ten thousand brackets, say."""


class HashingFile(io.RawIOBase):
    """The bytes of a file as they lie on disk (compressed or not), hashed and counted on their way through."""

    def __init__(self, path: Path, bar: Bar) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close())
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.bar = bar

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.num_bytes += count
        self.bar.advance(count / 2**20)
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


class Tally:
    """How many lines (rows, records) a file has, how many were bad, and the first few of those.

    A reader calls ``bad(number, reason)`` for one that it cannot use and goes on; ``settle()`` raises a ValueError when
    more than the share ``max_bad`` was bad, and warns of fewer.
    """

    def __init__(self, path: Path, max_bad: float, noun: str = "line") -> None:
        self.path, self.max_bad, self.noun = path, max_bad, noun
        self.num_lines = 0
        self.num_bad = 0
        self.examples: list[str] = []

    def bad(self, number: int, reason: object) -> None:
        self.num_bad += 1
        if len(self.examples) < SHOWN_BAD_LINES:
            plain = not isinstance(reason, Exception) or type(reason) is ValueError
            said = str(reason) if plain else f"{type(reason).__name__}: {reason}"
            self.examples.append(f"{self.noun} {number}: {said[:120]}")

    def settle(self) -> None:
        if not self.num_bad:
            return
        found = f"{self.num_bad} of {self.num_lines} {self.noun}s"
        first = "; ".join(self.examples)
        if self.num_bad > self.max_bad * self.num_lines:
            raise ValueError(
                f"{self.path}: {found} are bad, more than max_bad {100 * self.max_bad:.4g}% allows; the first: {first}"
            )
        logger.warning("%s: %s skipped; the first: %s", self.path, found, first)

    def report(self) -> dict[str, Any]:
        """What ``dataset.json`` says of them."""
        return {f"{self.noun}s": self.num_lines, f"bad_{self.noun}s": self.num_bad, "bad_examples": self.examples}


class Lines(Tally):
    """``with Lines(path, max_bad=.01) as lines: for number, text in lines: ...``, numbers from 1. Leaving settles."""

    def __init__(self, path: str | Path, *, max_bad: float = 0.01) -> None:
        super().__init__(Path(path), max_bad)
        self.num_latin1 = 0
        self.unterminated = False

    def __enter__(self) -> Lines:
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file")
        self._progress = progress(f"read {self.path.name}", self.path.stat().st_size / 2**20, unit="MiB")
        self.raw = HashingFile(self.path, self._progress.__enter__())
        buffered = io.BufferedReader(self.raw, READ_SIZE)
        self.stream: io.BufferedIOBase = buffered
        if buffered.peek(2)[:2] == b"\x1f\x8b":
            self.stream = io.BufferedReader(gzip.GzipFile(fileobj=buffered), READ_SIZE)  # type: ignore[arg-type]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.raw.close()
        self._progress.__exit__(kind, error, trace)
        if kind is None:
            self.settle()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        readline = self.stream.readline
        while True:
            try:
                line = readline(LONGEST_LINE)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(
                    f"{self.path}: the compressed file is cut short or damaged, at line {self.num_lines + 1} or later "
                    f"({error}); fetch it again"
                ) from None
            if not line:
                return
            self.num_lines += 1
            number = self.num_lines
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                raise ValueError(
                    f"{self.path}:{number}: a line of more than {LONGEST_LINE >> 20} MiB; is it the right file?"
                )
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if b"\0" in line:
                self.bad(number, "holds a NUL byte")
                continue
            self.unterminated = not line.endswith(b"\n")
            # Lines decide for themselves: no latin-1 text of any length with accents is by accident valid UTF-8.
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                text = line.decode("latin-1")
                self.num_latin1 += 1
            text = text.rstrip("\r\n")
            if text:
                yield number, text

    def report(self) -> dict[str, Any]:
        """What ``dataset.json`` says of the file. Complete once every line was read."""
        return {
            "name": self.path.name,
            "bytes": self.raw.num_bytes,
            "sha256": self.raw.sha256.hexdigest(),
            **super().report(),
            "latin1_lines": self.num_latin1,
            "last_line_unterminated": self.unterminated,
        }
