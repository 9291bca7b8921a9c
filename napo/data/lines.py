"""Text files read line by line: gz transparently, memory bounded, hashed, progress by bytes, bad lines counted."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import refuse_special
from ..progress import Bar, progress
from .texts import shown

logger = logging.getLogger(__name__)

SHOWN_BAD_LINES = 5
LONGEST_LINE = 1 << 24
READ_SIZE = 1 << 20
BLOCK_SIZE = 1 << 23
STOP_FROM = 1_000_000
"""Lines after which a file that is all but certain to have too many bad ones is not read to its end."""
WIDE = ("utf-16", "utf-32")
"""Encodings of which a line end is several bytes."""
MARK = "\ufeff"
"""Of the byte order, at the beginning of a file."""
BAD_LINE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error)
"""Errors of parsers for a malformed line; json.loads, say, raises RecursionError for ten thousand brackets."""


class Sightings:
    """How often something was seen, and where first."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""

    def add(self, number: int, text: object) -> None:
        self.first = self.first if self.count else f"line {number}: {shown(text, 60)!r}"
        self.count += 1

    def tell(self, path: Path, text: str) -> None:
        """A warning, if there was any; ``text`` has a %d for the count and a %s for the first."""
        if self.count:
            logger.warning(f"%s: {text}", path, self.count, self.first)


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
        self.last_bad = 0
        self.stopped = False
        self.examples: list[str] = []
        self.remedy: Callable[[], str] = str
        """What a source has to say of the bad ones as a whole."""

    def bad(self, number: int, reason: object) -> None:
        self.num_bad += 1
        self.last_bad = number
        if len(self.examples) < SHOWN_BAD_LINES:
            plain = not isinstance(reason, Exception) or type(reason) in (ValueError, TypeError)
            said = str(reason) if plain else f"{type(reason).__name__}: {reason}"
            self.examples.append(f"{self.noun} {number}: {shown(said, 160)}")
        # Four times the limit, because the number of lines that follow is only an estimate.
        if self.num_lines >= STOP_FROM and self.num_bad > 4 * self.max_bad * self.likely_lines():
            self.stopped = True
            self.settle()

    def likely_lines(self) -> float:
        """An estimate of the number of lines in the file."""
        return float("inf")

    def settle(self) -> None:
        if not self.num_bad:
            return
        read = " read before stopping" if self.stopped else ""
        found = f"{self.num_bad} of {self.num_lines} {self.noun}s{read}"
        first = "; ".join([*self.examples, *filter(None, [self.remedy()])])
        if self.num_bad > self.max_bad * self.num_lines:
            raise ValueError(
                f"{self.path}: {found} are bad, more than max_bad {100 * self.max_bad:.4g}% allows; the first: {first}"
            )
        logger.warning("%s: %s skipped; the first: %s", self.path, found, first)

    def report(self) -> dict[str, Any]:
        """What ``dataset.json`` says of them."""
        return {f"{self.noun}s": self.num_lines, f"bad_{self.noun}s": self.num_bad, "bad_examples": self.examples}


def _text_encoding(name: str) -> str:
    """Its name as Python has it. ValueError for what is none, and for one that writes line ends in another way."""
    try:
        found = codecs.lookup(name).name
        if found.startswith(WIDE) or b"\n".decode(found) == "\n":
            return found
    except (LookupError, UnicodeError):
        pass
    raise ValueError(f"encoding: expected a name like utf-8 or cp1252, got {shown(name, 40)!r}")


class Lines(Tally):
    """``with Lines(path, max_bad=.01) as lines: for number, text in lines: ...``, numbers from 1. Leaving settles.

    ``encoding``: of the file. Where it is not given, a byte order mark tells, and otherwise lines are UTF-8 or, those
    that cannot be, cp1252 as Windows has it, which is said with their number.
    """

    def __init__(
        self, path: str | Path, *, max_bad: float = 0.01, encoding: str | None = None, quiet: bool = False
    ) -> None:
        super().__init__(Path(path), max_bad)
        self.quiet = quiet
        self.cp1252 = Sightings()
        self.marks = Sightings()
        self.returns = Sightings()
        self.num_joined = 0
        self.num_ahead = 0
        """Lines up to the end of the last block that was read, of which a reader may not have seen all."""
        self.unterminated = False
        self.last_text = ""
        """The last line, where nothing ends it."""
        self.options: dict[str, str] = {}
        """By "encoding" and "quote" the option that sets it for this file; not every source or command has them."""
        self.said: dict[str, Any] = {}
        """Facts that a reader found out about the file, for the report."""
        self.encoding = _text_encoding(encoding) if encoding else None

    def __enter__(self) -> Lines:
        refuse_special(self.path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file")
        self._progress = progress(
            f"read {self.path.name}", self.path.stat().st_size / 2**20, unit="MiB", quiet=self.quiet
        )
        self.raw = HashingFile(self.path, self._progress.__enter__())
        buffered = io.BufferedReader(self.raw, READ_SIZE)
        self.stream: io.BufferedIOBase = buffered
        if buffered.peek(2)[:2] == b"\x1f\x8b":
            self.stream = io.BufferedReader(gzip.GzipFile(fileobj=buffered), READ_SIZE)  # type: ignore[arg-type]
        return self

    @property
    def encoding_remedy(self) -> str:
        """What to do about another encoding."""
        option = self.options.get("encoding")
        return f"give it with --set {option}=..." if option else "write it as UTF-8"

    def likely_lines(self) -> float:
        return max(self.num_lines, self.num_ahead) * self.path.stat().st_size / max(self.raw.num_bytes, 1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.raw.close()
        self._progress.__exit__(kind, error, trace)
        if kind is None:
            self.settle()
            self._tell_oddities()

    def tell_cut(self, shorter: tuple[int, int] | None) -> None:
        """Warns of a file that seems to be cut within its last line. ``shorter``: how long what the line ends with is,
        and how long at least it is in all other lines, if it is shorter than that."""
        if shorter is None or not self.unterminated or self.last_bad == self.num_lines:
            return
        logger.warning(
            "%s: line %d, the last one, has no line end, and ends with a time of %d letters where all others have %d "
            "or more: the file seems to be cut; fetch it again",
            self.path,
            self.num_lines,
            *shorter,
        )

    def _tell_oddities(self) -> None:
        self.marks.tell(
            self.path,
            "%d lines begin with a byte order mark, as where files were put together; it is left out; the first: %s",
        )
        self.returns.tell(
            self.path,
            "%d lines hold a carriage return without a line feed, which ends no line here and is text; the first: %s; "
            "write line ends as LF",
        )
        self.cp1252.tell(
            self.path,
            f"%d of {self.num_lines} lines are not UTF-8 and were read as cp1252, as Windows writes; the first: %s; is "
            f"it another encoding, {self.encoding_remedy}",
        )

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self._texts(self._raw_lines())

    def blocks(self) -> Iterator[bytes]:
        """Megabytes of whole lines, for a reader that takes them all at once. It has to call ``accept`` or go through
        ``lines_of`` for each, in order."""
        with self._said_damage():
            self._begin()
            if self.encoding:
                raise ValueError(f"{self.path}: {self.encoding}, expected UTF-8; convert it first")
            self.num_ahead = self.num_lines
            while block := self.stream.read(BLOCK_SIZE):
                block = block if block.endswith(b"\n") else block + self.stream.readline(LONGEST_LINE)
                self.num_ahead += block.count(b"\n")
                yield block

    def accept(self, block: bytes) -> None:
        """All lines of the block are good."""
        self.unterminated = not block.endswith(b"\n")
        if self.unterminated:
            self.last_text = block[block.rfind(b"\n") + 1 :].decode().rstrip("\r\n")
        self.num_lines += block.count(b"\n") + self.unterminated

    def lines_of(self, block: bytes) -> Iterator[tuple[int, str]]:
        """As iteration has them, for a block of which some are not plain."""
        return self._texts(io.BytesIO(block))

    def _texts(self, lines: Iterable[bytes | str]) -> Iterator[tuple[int, str]]:
        for line in lines:
            self.num_lines += 1
            number = self.num_lines
            if len(line) >= LONGEST_LINE and line[-1:] not in (b"\n", "\n"):
                raise ValueError(
                    f"{self.path}:{number}: a line of more than {LONGEST_LINE >> 20} MiB; is it the right file?"
                )
            if (b"\0" if isinstance(line, bytes) else "\0") in line:  # type: ignore[operator]
                self.bad(number, f"holds a NUL byte; is the file UTF-16, {self.encoding_remedy}")
                continue
            self.unterminated = line[-1:] not in (b"\n", "\n")
            if isinstance(line, str):
                text = line
            else:
                try:
                    text = line.decode(self.encoding or "utf-8")
                except UnicodeError as error:
                    if self.encoding:
                        self.bad(number, f"is not {self.encoding} ({getattr(error, 'reason', error)})")
                        continue
                    # Lines decide for themselves: no text of any length with accents is by accident valid UTF-8.
                    text = self._windows_text(number, line)
            text = text.rstrip("\r\n")
            if text.startswith(MARK):  # of the encoding, and no letter
                text = text.lstrip(MARK)
                if number > 1:
                    self.marks.add(number, text)
            if self.unterminated:
                self.last_text = text
            if "\r" in text:
                self.returns.add(number, text)
            if text:
                yield number, text

    def _raw_lines(self) -> Iterator[bytes | str]:
        """Bytes, ended by a newline; text where a newline is not a byte of its own."""
        with self._said_damage():
            self._begin()
            if self.encoding and self.encoding.startswith(WIDE):
                texts = io.TextIOWrapper(self.stream, self.encoding, newline="\n")  # type: ignore[type-var]
                yield from iter(lambda: texts.readline(LONGEST_LINE), "")
            else:
                yield from iter(lambda: self.stream.readline(LONGEST_LINE), b"")

    def _begin(self) -> None:
        """Reads the first bytes: the encoding from its mark, and how lines end."""
        begin = self.stream.peek(READ_SIZE)[:READ_SIZE]  # type: ignore[attr-defined]
        if begin.startswith(codecs.BOM_UTF8):
            self.stream.read(len(codecs.BOM_UTF8))
        elif begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            self.encoding = self.encoding or "utf-16"
        if b"\r" in begin and b"\n" not in begin and len(begin) > 1000:
            raise ValueError(f"{self.path}: lines end with CR alone, as on a Mac of old; write them with LF")

    @contextmanager
    def _said_damage(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self.path}: the compressed file is cut short or damaged, at line {self.num_lines + 1} or later "
                f"({error}); fetch it again"
            ) from None
        except UnicodeError as error:  # of a file without a mark it is no UnicodeDecodeError
            raise ValueError(
                f"{self.path}: not {self.encoding} at line {self.num_lines + 1} or later "
                f"({getattr(error, 'reason', error)}); is it another encoding, {self.encoding_remedy}"
            ) from None

    def _windows_text(self, number: int, line: bytes) -> str:
        try:
            text = line.decode("cp1252")
        except UnicodeDecodeError:  # cp1252 leaves five bytes open
            text = line.decode("latin-1")
        self.cp1252.add(number, text.rstrip("\r\n"))
        return text

    def report(self) -> dict[str, Any]:
        """What ``dataset.json`` says of the file. Complete once every line was read."""
        return {
            "name": shown(self.path.name),
            "bytes": self.raw.num_bytes,
            "sha256": self.raw.sha256.hexdigest(),
            **super().report(),
            "cp1252_lines": self.cp1252.count,
            **({"byte_order_marks": self.marks.count} if self.marks.count else {}),
            **({"lone_carriage_returns": self.returns.count} if self.returns.count else {}),
            "last_line_unterminated": self.unterminated,
            **({"last_line": shown(self.last_text, 60)} if self.unterminated else {}),
            **self.said,
        }
