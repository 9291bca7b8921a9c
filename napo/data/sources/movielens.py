"""MovieLens as GroupLens ships it: 100k (u.data, u.item), 1m and 10m (ratings.dat, movies.dat), later ones (.csv)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..fields import Fields
from ..interactions import Log
from ..lines import BAD_LINE, Lines
from ..texts import shown
from ..times import TimeReader
from ..titles import split_year
from .files import skip_header

# ratings, movies, what stands between the fields of each, what around those that hold it, the header of each
LAYOUTS = [
    ("u.data", "u.item", "\t", "|", "", ()),
    ("ratings.dat", "movies.dat", "::", "::", "", ()),
    ("ratings.csv", "movies.csv", ",", ",", '"', ("userId,movieId,rating,timestamp", "movieId,title,genres")),
]


@dataclass(kw_only=True)
class Options:
    min_rating: float = 0.0
    """Lower ratings are left out."""


def read(path: Path, options: Options, *, max_bad: float) -> Log:
    """``path``: the folder of the files."""
    found = [layout for layout in LAYOUTS if (path / layout[0]).is_file()]
    if not found:
        names = ", ".join(layout[0] for layout in LAYOUTS)
        raise ValueError(f"{path}: expected a folder with one of {names}")
    if len(found) > 1:
        raise ValueError(
            f"{path}: expected the ratings of one data set, found {', '.join(layout[0] for layout in found)}; move all "
            "but one elsewhere"
        )
    ratings, movies, between_ratings, between_movies, quote, headers = found[0]
    log = Log(noun="Movies")
    time = TimeReader()
    with Lines(path / ratings, max_bad=max_bad) as lines:
        split, entries = Fields(between_ratings, quote).split, iter(lines)
        if headers:
            skip_header(lines, entries, headers[0])
        for number, text in entries:
            try:
                fields = split(text)
                if len(fields) != 4:
                    raise ValueError(f"expected user, item, rating and time, got {shown(text, 60)!r}")
                user, item, rating, when = fields
                if math.isnan(stars := float(rating)):
                    raise ValueError(f"expected a rating, got {shown(rating, 40)!r}")
                if stars < options.min_rating:
                    log.drop(f"rating below {options.min_rating:g}")
                    continue
                log.add(user, item, time(when))
            except BAD_LINE as error:
                lines.bad(number, error)
    lines.tell_cut(time.shorter_last())
    time.settle(path / ratings, "timestamp")
    log.report["files"].append(lines.report())
    with Lines(path / movies, max_bad=max_bad) as lines:
        entries = iter(lines)
        if headers:
            skip_header(lines, entries, headers[1])
        for number, fields in Fields(between_movies, quote).records(lines, entries, 3):
            try:
                if len(fields) < 3 or not fields[1].strip():
                    raise ValueError(f"expected id, title and genres, got {shown(between_movies.join(fields), 60)!r}")
                log.title(fields[0], *split_year(fields[1]))
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())
    return log
