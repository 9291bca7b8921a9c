"""Goodreads (UCSD): goodreads_interactions*.json.gz and goodreads_books*.json.gz, JSON lines, gigabytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..blocks import json_parser, tables
from ..interactions import Log, key, title_of
from ..lines import BAD_LINE, Lines
from ..texts import shown
from .files import only

MONTHS = {"Jan": 1, "Feb": 2, "Mar": 3, "Apr": 4, "May": 5, "Jun": 6}
MONTHS |= {"Jul": 7, "Aug": 8, "Sep": 9, "Oct": 10, "Nov": 11, "Dec": 12}
# Days before each month of a year that begins in March, so that the leap day comes last.
_MONTH_DAYS = {month: (153 * ((month + 9) % 12) + 2) // 5 for month in range(1, 13)}
_DAYS_BEFORE = np.array([0, *(_MONTH_DAYS[month] for month in range(1, 13))])
# The same for many dates at once: where a date of 30 letters has digits, and where what stands between them.
_DIGITS = [8, 9, 11, 12, 14, 15, 17, 18, 21, 22, 23, 24, 26, 27, 28, 29]
_MARKS, _MARK = [3, 7, 10, 13, 16, 19, 25], np.frombuffer(b"   ::  ", np.uint8)
_MONTH_CODES, _MONTH_NUMBERS = (
    np.array(column)
    for column in zip(*sorted((int.from_bytes(n.encode(), "big"), m) for n, m in MONTHS.items()), strict=True)
)

SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "book_id": pa.string(),
        "is_read": pa.bool_(),
        "rating": pa.float64(),
        "date_added": pa.string(),
    }
)


def seconds(date: str) -> int:
    """ "Tue Aug 15 13:23:18 -0700 2017" -> seconds since 1970. strptime takes ten times as long."""
    parts = date.split(" ")
    if len(parts) != 6:
        raise ValueError(f"expected a date like Tue Aug 15 13:23:18 -0700 2017, got {shown(date, 40)!r}")
    _, name, day, clock, zone, text_year = parts
    month, year = MONTHS[name], int(text_year)
    if month < 3:
        year -= 1
    days = 365 * year + year // 4 - year // 100 + year // 400 + _MONTH_DAYS[month] + int(day) - 719_469
    offset = int(zone[1:3]) * 3600 + int(zone[3:5]) * 60
    hour, minute, second = clock.split(":")
    time = days * 86_400 + int(hour) * 3600 + int(minute) * 60 + int(second)
    return time + offset if zone[0] == "-" else time - offset


def many_seconds(dates: pa.StringArray) -> np.ndarray | None:
    """``seconds`` of every date; None unless all are written in that way to the letter."""
    if not len(dates):
        return np.empty(0, np.int64)
    first = dates.offset
    offsets = np.frombuffer(dates.buffers()[1], np.int32)[first : first + len(dates) + 1]
    if (np.diff(offsets) != len("Tue Aug 15 13:23:18 -0700 2017")).any():
        return None
    letters = np.frombuffer(dates.buffers()[2], np.uint8)[offsets[0] : offsets[-1]].reshape(len(dates), -1)
    digits = letters[:, _DIGITS].astype(np.int64) - ord("0")
    if (digits < 0).any() or (digits > 9).any() or (letters[:, _MARKS] != _MARK).any():
        return None
    sign = letters[:, 20]
    names = letters[:, 4].astype(np.int64) << 16 | letters[:, 5].astype(np.int64) << 8 | letters[:, 6]
    place = np.minimum(np.searchsorted(_MONTH_CODES, names), 11)
    if (_MONTH_CODES[place] != names).any() or ((sign != ord("+")) & (sign != ord("-"))).any():
        return None
    month = _MONTH_NUMBERS[place]
    day, hour, minute, second, zone_hour, zone_minute = (
        digits[:, at] * 10 + digits[:, at + 1] for at in range(0, 12, 2)
    )
    year = digits[:, 12:] @ np.array([1000, 100, 10, 1]) - (month < 3)
    days = 365 * year + year // 4 - year // 100 + year // 400 + _DAYS_BEFORE[month] + day - 719_469
    offset = zone_hour * 3600 + zone_minute * 60
    time = days * 86_400 + hour * 3600 + minute * 60 + second
    return time + np.where(sign == ord("-"), offset, -offset)


@dataclass(kw_only=True)
class Options:
    min_rating: float = 0.0
    """Lower ratings are left out; a book without a rating has 0."""
    only_read: bool = False
    """Leave out books that are only on a shelf."""


def read(path: Path, options: Options, *, max_bad: float) -> Log:
    """``path``: the folder of the two files."""
    log = Log(noun="Books")
    min_rating, only_read = options.min_rating, options.only_read

    def take(line: dict[str, Any]) -> None:
        if line["rating"] != line["rating"]:  # JSON has no NaN, and its readers take it
            raise ValueError(f"expected a rating, got {line['rating']}")
        if line["rating"] < min_rating:
            log.drop(f"rating below {min_rating:g}")
        elif only_read and not line["is_read"]:
            log.drop("not read")
        elif not line["date_added"]:
            log.drop("no date")
        else:
            log.add(key(line["user_id"]), key(line["book_id"]), seconds(line["date_added"]))

    def take_block(table: pa.Table | None) -> bool:
        """Whether the block was plain, and is taken."""
        if table is None:
            return False
        ratings = table["rating"].to_numpy()
        if np.isnan(ratings).any():
            return False
        low = ratings < min_rating
        unread = ~low & ~table["is_read"].to_numpy() if only_read else np.zeros(len(low), bool)
        undated = ~low & ~unread & (pc.binary_length(table["date_added"]).to_numpy() == 0)
        kept = table.filter(pa.array(~(low | unread | undated)))
        users, books, dates = (kept[name].combine_chunks() for name in ("user_id", "book_id", "date_added"))
        times = many_seconds(dates)
        if times is None:
            return False
        try:
            log.extend(users.dictionary_encode(), books.dictionary_encode(), times)
        except BAD_LINE:
            return False
        for mask, reason in ((low, f"rating below {min_rating:g}"), (unread, "not read"), (undated, "no date")):
            log.drop(reason, int(np.count_nonzero(mask)))
        return True

    with Lines(only(path, "goodreads_interactions*.json*"), max_bad=max_bad) as lines:
        for block, table in tables(lines, json_parser(SCHEMA)):
            if take_block(table):
                lines.accept(block)
                continue
            for number, text in lines.lines_of(block):
                try:
                    take(json.loads(text))
                except BAD_LINE as error:
                    lines.bad(number, error)
    log.report["files"].append(lines.report())
    with Lines(only(path, "goodreads_books*.json*"), max_bad=max_bad) as lines:
        for number, text in lines:
            try:
                line = json.loads(text)
                book = key(line["book_id"])
                if book in log.item_ids:
                    log.title(book, title_of(line["title"]), str(line.get("publication_year") or ""))
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())
    return log
