"""Records of delimited fields, quoted or not, out of the lines of a file."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from .lines import Lines, Sightings

MOST_JOINED, LONGEST_JOINED = 100, 1 << 16
"""Lines and characters of one quoted field."""
MOST_TRIED = 100
"""Quotes without an end, after which quoted fields no longer go on over lines unless more of them have: the file does
not quote."""


class Parsed(NamedTuple):
    """A line, or several, cut into fields."""

    fields: list[str]
    quoted: int
    """How many of them were quoted."""
    begun: int
    """Where one begins that is quoted and goes on in the next line, or -1."""
    indented: bool
    """Whether one that is not quoted has a quote behind blanks."""


class Fields:
    """How a line is cut into fields: ``delimiter`` between them, and ``quote`` around those that hold one ("": none).

    As RFC 4180 has it: a quote that begins a field goes on, also over lines, to a quote with a delimiter or the end of
    a line behind it. Where there is no such, or other text follows, the quote is a letter, as in titles that were
    written without quoting.
    """

    def __init__(self, delimiter: str, quote: str = '"') -> None:
        self.delimiter, self.quote = delimiter, quote
        self.num_quoted = 0
        self._endless = Sightings()
        """Fields that a quote begins and none ends."""
        self._doubtful = Sightings()
        """Fields over lines of which one reads like a record of its own, so that the quote may be a letter."""
        self._indented = Sightings()
        """Lines with a blank before a quote."""
        mark, end = re.escape(quote or '"'), re.escape(delimiter)
        self._quoted = re.compile(f"{mark}((?:[^{mark}]|{mark}{mark})*){mark}(?={end}|$)", re.S)
        # As Spark and MySQL write a quote within quotes.
        self._escaped = re.compile(rf"{mark}((?:[^{mark}\\]|\\.)*){mark}(?={end}|$)", re.S)
        self._escape = re.compile(rf"\\({mark}|\\)")
        self._begun = re.compile(f"{mark}(?:[^{mark}]|{mark}{mark})*$", re.S)
        self._begun_escaped = re.compile(rf"{mark}(?:[^{mark}\\]|\\.)*$", re.S)

    def split(self, text: str) -> list[str]:
        if not self.quote or self.quote not in text:
            return text.split(self.delimiter)
        parsed = self._parse(text)
        self.num_quoted += parsed.quoted
        return parsed.fields

    def _parse(self, text: str) -> Parsed:
        fields, at, count, indented = [], 0, 0, False
        while True:
            quoted = self._quoted_at(text, at)
            if quoted is not None:
                field, at = quoted
                fields.append(field)
                count += 1
            elif self._goes_on(text, at):
                return Parsed([*fields, *text[at:].split(self.delimiter)], count, at, indented)
            else:
                end = text.find(self.delimiter, at)
                end = len(text) if end < 0 else end
                fields.append(text[at:end])
                indented = indented or (text.startswith(" ", at) and fields[-1].lstrip(" ").startswith(self.quote))
                at = end
            if at >= len(text):
                return Parsed(fields, count, -1, indented)
            at += len(self.delimiter)

    def _quoted_at(self, text: str, at: int) -> tuple[str, int] | None:
        """The field, and where it ends, if it is a quoted one that ends."""
        if not text.startswith(self.quote, at):
            return None
        if quoted := self._quoted.match(text, at):
            return quoted[1].replace(self.quote * 2, self.quote), quoted.end()
        if f"\\{self.quote}" in text and (quoted := self._escaped.match(text, at)):
            return self._escape.sub(r"\1", quoted[1]), quoted.end()
        return None

    def _goes_on(self, text: str, at: int) -> bool:
        """Whether a quoted field begins there that the lines to come may end."""
        if not text.startswith(self.quote, at):
            return False
        if self._begun.match(text, at):
            return True
        return f"\\{self.quote}" in text and self._begun_escaped.match(text, at) is not None

    def records(self, lines: Lines, entries: Iterator[tuple[int, str]], width: int) -> Iterator[tuple[int, list[str]]]:
        """The fields of each of the ``entries`` of ``lines``; a quoted field may go on over lines.

        Lines are joined only if that makes a record of ``width`` fields. What else it may have been is said.
        """
        waiting: deque[tuple[int, str]] = deque()
        while True:
            entry = waiting.popleft() if waiting else next(entries, None)
            if entry is None:
                break
            number, text = entry
            if not self.quote or self.quote not in text:
                fields = text.split(self.delimiter)
            else:
                parsed = self._parse(text)
                if parsed.begun >= 0:
                    tried = self._endless.count < max(MOST_TRIED, lines.num_joined)
                    joined = self._joined(lines, entry, parsed.begun, entries, waiting, width) if tried else None
                    if joined is None:
                        self._endless.add(number, text)
                    parsed = joined or parsed
                fields = parsed.fields
                self.num_quoted += parsed.quoted
                if parsed.indented:
                    self._indented.add(number, text)
            yield number, fields
        lines.said |= {"delimiter": self.delimiter, "quoted_fields": self.num_quoted}
        if lines.num_joined:
            lines.said["joined_lines"] = lines.num_joined
        self._tell_doubts(lines)

    def _joined(
        self,
        lines: Lines,
        entry: tuple[int, str],
        begun: int,
        entries: Iterator[tuple[int, str]],
        waiting: deque[tuple[int, str]],
        width: int,
    ) -> Parsed | None:
        """The record whose first line is ``entry``, its lines taken away; None, and none taken, where there is no such.
        ``begun``: where the field begins that goes on."""
        text, taken = entry[1], 0
        alone, doubtful = self._is_record(text, width), False
        while taken < MOST_JOINED and len(text) < LONGEST_JOINED:
            if taken == len(waiting):
                following = next(entries, None)
                if following is None:
                    return None
                waiting.append(following)
            more = waiting[taken][1]
            taken += 1
            doubtful = doubtful or (alone and self._is_record(more, width))
            text = f"{text}\n{more}"
            if self.quote not in more:
                continue
            if self._quoted_at(text, begun) is None:
                if self._goes_on(text, begun):
                    continue
                return None
            parsed = self._parse(text)
            if parsed.begun >= 0:
                begun = parsed.begun
                continue
            if len(parsed.fields) != width:
                return None
            for _ in range(taken):
                waiting.popleft()
            lines.num_joined += taken
            if doubtful:
                self._doubtful.add(*entry)
            return parsed
        return None

    def _is_record(self, text: str, width: int) -> bool:
        """Whether a line has all the fields of a record, were its quotes letters."""
        return width > 1 and text.count(self.delimiter) == width - 1

    def _tell_doubts(self, lines: Lines) -> None:
        seen = {
            "quotes_without_end": self._endless,
            "blanks_before_quotes": self._indented,
            "doubtful_joins": self._doubtful,
        }
        lines.said |= {name: sightings.count for name, sightings in seen.items() if sightings.count}
        option = lines.options.get("quote")
        remedy = f"; with --set {option}=none all quotes are letters" if option else ""
        self._endless.tell(
            lines.path,
            f"%d fields begin with a quote, and none within {MOST_JOINED} lines ends a record of as many fields as the "
            f"header has: the quote is taken for a letter; the first: %s{remedy}",
        )
        self._indented.tell(
            lines.path,
            "%d lines have a blank between the delimiter and a quote, which makes the quote a letter; the first: %s; "
            "write no blank there",
        )
        self._doubtful.tell(
            lines.path,
            "%d quoted fields go on over lines that could be records of their own, and are read as one field each "
            f"(RFC 4180); the first: %s{remedy}",
        )
