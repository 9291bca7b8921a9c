"""HetRec 2011 Last.fm, raw. Listens have no time there, so the time is that of a user's first tag of an artist."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..interactions import Log
from ..lines import BAD_LINE, Lines
from ..texts import shown
from .files import only, skip_header

# Last.fm's tags are younger than this; earlier times in the file (back to 1956) are faults of the crawl.
EARLIEST_MS = 1_104_537_600_000  # 2005-01-01


@dataclass(kw_only=True)
class Options:
    """This source has none."""


def read(path: Path, options: Options, *, max_bad: float) -> Log:
    """``path``: the folder with user_taggedartists-timestamps.dat and artists.dat."""
    log = Log(noun="Artists")
    with Lines(only(path, "user_taggedartists-timestamps.dat"), max_bad=max_bad) as lines:
        entries = iter(lines)
        skip_header(lines, entries, "userID\tartistID\ttagID\ttimestamp")
        for number, text in entries:
            fields = text.split("\t")
            if len(fields) != 4:
                lines.bad(number, f"expected user, artist, tag and time, got {shown(text, 60)!r}")
                continue
            user, artist, _, when = fields
            try:
                time = int(when)
                if time < EARLIEST_MS:
                    log.drop("tagged before 2005")
                else:
                    log.add(user, artist, time)
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())
    with Lines(path / "artists.dat", max_bad=max_bad) as lines:
        entries = iter(lines)
        skip_header(lines, entries, "id\tname\turl\tpictureURL")
        for number, text in entries:
            fields = text.split("\t")
            if len(fields) < 2 or not fields[1].strip():
                lines.bad(number, f"expected id and name, got {shown(text, 60)!r}")
                continue
            try:
                log.title(fields[0], fields[1])
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())
    return log
