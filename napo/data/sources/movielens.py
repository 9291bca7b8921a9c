"""MovieLens as GroupLens ships it: 100k (u.data, u.item), 1m and 10m (ratings.dat, movies.dat), later ones (.csv)."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from ..lines import BAD_LINE, Lines
from ..log import Log
from ..titles import split_year


def _csv_fields(text: str) -> list[str]:
    return next(csv.reader([text])) if '"' in text else text.split(",")


# ratings, movies, how a line of each is split, whether there is a header
LAYOUTS: list[tuple[str, str, Callable[[str], list[str]], Callable[[str], list[str]], bool]] = [
    ("u.data", "u.item", lambda text: text.split("\t"), lambda text: text.split("|"), False),
    ("ratings.dat", "movies.dat", lambda text: text.split("::"), lambda text: text.split("::"), False),
    ("ratings.csv", "movies.csv", _csv_fields, _csv_fields, True),
]


def read(path: Path, *, max_bad: float, min_rating: float = 0.0) -> Log:
    """``path``: the folder of the files. ``min_rating``: lower ratings are left out."""
    found = [layout for layout in LAYOUTS if (path / layout[0]).is_file()]
    if not found:
        names = ", ".join(layout[0] for layout in LAYOUTS)
        raise ValueError(f"{path}: expected a folder with one of {names}")
    ratings, movies, split_rating, split_movie, header = found[0]
    log = Log(noun="Movies")
    with Lines(path / ratings, max_bad=max_bad) as lines:
        for number, text in lines:
            if header and number == 1:
                continue
            try:
                fields = split_rating(text)
                if len(fields) != 4:
                    raise ValueError(f"expected user, item, rating and time, got {text[:60]!r}")
                user, item, rating, time = fields
                if float(rating) < min_rating:
                    log.drop(f"rating below {min_rating}")
                    continue
                log.add(user, item, int(time))
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())
    with Lines(path / movies, max_bad=max_bad) as lines:
        for number, text in lines:
            if header and number == 1:
                continue
            try:
                fields = split_movie(text)
                if len(fields) < 3 or not fields[1].strip():
                    raise ValueError(f"expected id, title and genres, got {text[:60]!r}")
            except BAD_LINE as error:
                lines.bad(number, error)
                continue
            log.titles[fields[0]], log.years[fields[0]] = split_year(fields[1])
    log.report["files"].append(lines.report())
    return log
