"""RecBole's atomic files: NAME.inter and NAME.item, tab separated, header ``field:type``."""

from __future__ import annotations

from pathlib import Path

from ..lines import BAD_LINE, Lines
from ..log import Log
from .files import only

TITLE_FIELDS = {
    "movie_title": "Movies",
    "artist_name": "Artists",
    "book_title": "Books",
    "game_title": "Games",
    "title": "Items",
    "item_name": "Items",
    "name": "Items",
}


def read(path: Path, *, max_bad: float) -> Log:
    """``path``: the folder of the two files, or the .inter file."""
    inter = path if path.is_file() else only(path, "*.inter")
    log = Log()
    with Lines(inter, max_bad=max_bad) as lines:
        columns: dict[str, int] = {}
        for number, text in lines:
            fields = text.split("\t")
            if not columns:
                columns = _header(lines, text)
                user, item, time = (_column(lines, columns, name) for name in ("user_id", "item_id", "timestamp"))
                continue
            if len(fields) != len(columns):
                lines.bad(number, f"expected {len(columns)} fields, got {len(fields)}")
                continue
            try:
                log.add(fields[user], fields[item], int(float(fields[time])))
            except BAD_LINE as error:
                lines.bad(number, error)
    log.report["files"].append(lines.report())

    with Lines(inter.with_suffix(".item"), max_bad=max_bad) as lines:
        columns = {}
        for number, text in lines:
            fields = text.split("\t")
            if not columns:
                columns = _header(lines, text)
                item = _column(lines, columns, "item_id")
                named = next((name for name in TITLE_FIELDS if name in columns), None)
                if named is None:
                    raise ValueError(
                        f"{lines.path}: expected a column of titles ({', '.join(TITLE_FIELDS)}), "
                        f"got {', '.join(columns)}"
                    )
                title, year = columns[named], columns.get("release_year")
                log.noun = TITLE_FIELDS[named]
                continue
            if len(fields) != len(columns):
                lines.bad(number, f"expected {len(columns)} fields, got {len(fields)}")
                continue
            log.titles[fields[item]] = fields[title]
            if year is not None:
                log.years[fields[item]] = fields[year]
    log.report["files"].append(lines.report())
    return log


def _header(lines: Lines, text: str) -> dict[str, int]:
    names = [field.partition(":")[0] for field in text.split("\t")]
    if ":" not in text:
        raise ValueError(f"{lines.path}:1: expected a header of field:type, got {text[:80]!r}")
    return {name: index for index, name in enumerate(names)}


def _column(lines: Lines, columns: dict[str, int], name: str) -> int:
    if name not in columns:
        raise ValueError(f"{lines.path}:1: no column {name}; it has {', '.join(columns)}")
    return columns[name]
