"""Goodreads (UCSD): goodreads_interactions*.json.gz and goodreads_books*.json.gz, JSON lines, gigabytes."""

from __future__ import annotations

import json
from pathlib import Path

from ..lines import BAD_LINE, Lines
from ..log import Log, key, title_of
from ..texts import shown
from .files import only

MONTHS = {"Jan": 1, "Feb": 2, "Mar": 3, "Apr": 4, "May": 5, "Jun": 6}
MONTHS |= {"Jul": 7, "Aug": 8, "Sep": 9, "Oct": 10, "Nov": 11, "Dec": 12}
# Days before each month of a year that begins in March, so that the leap day comes last.
_MONTH_DAYS = {month: (153 * ((month + 9) % 12) + 2) // 5 for month in range(1, 13)}


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


def read(path: Path, *, max_bad: float, min_rating: float = 0.0, only_read: bool = False) -> Log:
    """``path``: the folder of the two files. ``min_rating``: lower ratings are left out (0: not rated). ``only_read``:
    books that are only on a shelf are left out."""
    log = Log(noun="Books")
    loads, item_ids = json.loads, log.item_ids
    with Lines(only(path, "goodreads_interactions*.json*"), max_bad=max_bad) as lines:
        for number, text in lines:
            try:
                line = loads(text)
                if line["rating"] < min_rating:
                    log.drop(f"rating below {min_rating}")
                elif only_read and not line["is_read"]:
                    log.drop("not read")
                elif not line["date_added"]:
                    log.drop("no date")
                else:
                    log.add(key(line["user_id"]), key(line["book_id"]), seconds(line["date_added"]))
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())
    with Lines(only(path, "goodreads_books*.json*"), max_bad=max_bad) as lines:
        for number, text in lines:
            try:
                line = loads(text)
                book = key(line["book_id"])
                if book in item_ids:
                    log.title(book, title_of(line["title"]), str(line.get("publication_year") or ""))
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())
    return log
