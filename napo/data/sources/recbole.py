"""RecBole's atomic files: NAME.inter and NAME.item, tab separated, header ``field:type``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from napo.files import refuse_special

from ..fields import Fields
from ..interactions import Log
from ..lines import BAD_LINE, Lines
from ..texts import shown
from ..times import TimeReader
from .files import only
from .tables import Format, check_columns, written_key

logger = logging.getLogger(__name__)

TITLE_FIELDS = {
    "movie_title": "Movies",
    "artist_name": "Artists",
    "book_title": "Books",
    "game_title": "Games",
    "app_name": "Games",
    "title": "Items",
    "item_name": "Items",
    "prod_name": "Items",
    "product_name": "Items",
    "name": "Items",
}
PARTS = ("train", "valid", "test")
DEFAULT_FIELDS = ("user_id", "item_id", "timestamp")
NO_TIMES = ("rating", "ratings", "label", "score", "weight", "price")
"""Fields of type float that are no times, whatever else a file has."""


@dataclass(kw_only=True)
class Options:
    """A column that is not given is user_id, item_id or timestamp, or is found by the types of the fields."""

    user_column: str | None = None
    """The column of users; null: user_id, or the only other one of type token."""
    item_column: str | None = None
    """The column of items, in both files; null: item_id, or the only other one that both have."""
    time_column: str | None = None
    """The column of times; null: timestamp, or the only one of type float (a rating is none)."""
    title_column: str | None = None
    """The column of titles; null: found by its name."""
    quote: str = '"'
    """Around fields; "none" for none."""
    encoding: str | None = None
    """Of text; null: it is found out."""


def read(path: Path, options: Options, *, max_bad: float) -> Log:
    """``path``: the folder of the two files, or the .inter file."""
    inters, items = _files(path)
    written = Format("\t", options.quote, options.encoding)
    log = Log()
    # The items' file first, for its header: the column that both files have is the item's.
    with Lines(items, max_bad=1.0, encoding=options.encoding) as lines:
        lines.options = written.options
        described = _header(lines, next(iter(lines), (1, ""))[1])
    time = TimeReader()
    for inter in inters:
        with Lines(inter, max_bad=max_bad, encoding=options.encoding) as lines:
            lines.options = written.options
            entries = iter(lines)
            header = _header(lines, next(entries, (1, ""))[1])
            item = options.item_column or _shared(header, described)
            user = options.user_column or _user(header, item)
            when = options.time_column or _time(header)
            names = list(header)
            check_columns(f"{inter}:1", names, {user: "user_column", item: "item_column", when: "time_column"})
            places = [names.index(name) for name in (user, item, when)]
            given = (options.user_column, options.item_column, options.time_column)
            guessed = {name for name in (user, item, when) if name not in (*DEFAULT_FIELDS, *given)}
            if guessed and inter == inters[0]:
                logger.warning(
                    "%s: taken by their types: %s as user, %s as item, %s as time; if that is wrong, give --set "
                    "user_column=..., item_column=... or time_column=...",
                    *(inter, *(shown(name, 40) for name in (user, item, when))),
                )
            for number, fields in Fields("\t", written.quote).records(lines, entries, len(header)):
                try:
                    if len(fields) != len(header):
                        raise ValueError(f"expected {len(header)} fields, got {len(fields)}")
                    users, chosen, moment = (fields[place] for place in places)
                    log.add(written_key(users), written_key(chosen), time(moment))
                except BAD_LINE as error:
                    lines.bad(number, error)
        if when == names[-1]:
            lines.tell_cut(time.shorter_last())
        lines.said["columns"] = [user, item, when]
        log.report["files"].append(lines.report())
        time.settle(inter, when)

    with Lines(items, max_bad=max_bad, encoding=options.encoding) as lines:
        lines.options = written.options
        entries = iter(lines)
        header = _header(lines, next(entries, (1, ""))[1])
        names = list(header)
        check_columns(f"{items}:1", names, {item: "item_column"})
        title = _title_column(items, header, options.title_column)
        log.noun = TITLE_FIELDS.get(title, "Items")
        place, named = names.index(item), names.index(title)
        year = names.index("release_year") if "release_year" in header else None
        for number, fields in Fields("\t", written.quote).records(lines, entries, len(header)):
            try:
                if len(fields) != len(header):
                    raise ValueError(f"expected {len(header)} fields, got {len(fields)}")
                log.title(written_key(fields[place]), fields[named], fields[year] if year is not None else "")
            except BAD_LINE as error:
                lines.bad(number, error)
    lines.said["columns"] = [item, title]
    log.report["files"].append(lines.report())
    return log


def _files(path: Path) -> tuple[list[Path], Path]:
    """The files of interactions, several where they come split, and the file of items."""
    inters = [path] if path.is_file() else _inters(path)
    stems = dict.fromkeys((inters[0].name.removesuffix(".inter"), _stem(inters[0])))
    items = [inters[0].with_name(f"{stem}.item") for stem in stems]
    for file in items:
        refuse_special(file)
    there = [file for file in items if file.is_file()]
    if not there:
        raise ValueError(f"{items[-1]}: no such file; titles are in the .item file beside the .inter file")
    if len(there) > 1:
        logger.warning(
            "%s: titles are read from %s, and %s beside it is left out; if that is wrong, move the first one elsewhere",
            path,
            *(file.name for file in there),
        )
    return inters, there[0]


def _inters(folder: Path) -> list[Path]:
    """Those of one data set: the whole file, or else its parts. Parts beside the whole are the same rows again."""
    parts = [file for part in PARTS for file in sorted(folder.glob(f"*.{part}.inter"))]
    whole = [file for file in sorted(folder.glob("*.inter")) if file not in parts]
    if not whole and not parts:
        return [only(folder, "*.inter")]
    if len(whole) > 1 or len({_stem(file) for file in (*whole, *parts)}) > 1:
        names = ", ".join(file.name for file in (*whole, *parts))
        raise ValueError(
            f"{folder}: expected the .inter files of one data set, found {shown(names, 200)}; give the file that you "
            "mean as PATH"
        )
    if not whole:
        names = ", ".join(file.name for file in parts)
        logger.warning("%s: %s are read as one log, which is split anew (option split)", folder, names)
    elif parts:
        logger.warning(
            "%s: %s is read, and %s beside it %s left out, as parts of the same log; if that is wrong, move the file "
            "that you do not mean elsewhere, or give the one that you mean as PATH",
            folder,
            whole[0].name,
            ", ".join(file.name for file in parts),
            "is" if len(parts) == 1 else "are",
        )
    return whole or parts


def _stem(inter: Path) -> str:
    """The name of the data set."""
    name = inter.name.removesuffix(".inter")
    stem, _, part = name.rpartition(".")
    return stem if stem and part in PARTS else name


def _header(lines: Lines, text: str) -> dict[str, str]:
    """Names and types of the fields."""
    if ":" not in text:
        raise ValueError(f"{lines.path}:1: expected a header of field:type, got {shown(text, 80)!r}")
    fields = [field.strip().partition(":") for field in text.split("\t")]
    header = {name: kind for name, _, kind in fields}
    if len(header) < len(fields):
        names = [name for name, _, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{lines.path}:1: two columns are called {shown(twice, 40)}")
    return header


def _shared(header: dict[str, str], described: dict[str, str]) -> str:
    shared = [name for name in header if name in described and header[name].startswith("token")]
    return shared[0] if "item_id" not in header and len(shared) == 1 else "item_id"


def _user(header: dict[str, str], item: str) -> str:
    others = [name for name, kind in header.items() if kind == "token" and name != item]
    return others[0] if "user_id" not in header and len(others) == 1 else "user_id"


def _time(header: dict[str, str]) -> str:
    floats = [name for name, kind in header.items() if kind == "float" and name not in NO_TIMES]
    return floats[0] if "timestamp" not in header and len(floats) == 1 else "timestamp"


def _title_column(path: Path, header: dict[str, str], named: str | None) -> str:
    known = (name for name in TITLE_FIELDS if name in header)
    title = named or next(known, None)
    if title not in header:
        first, *others = TITLE_FIELDS
        missing = named or f"{first} (nor {', '.join(others)})"
        has = shown(", ".join(header), 300)
        raise ValueError(f"{path}:1: no column {missing}; it has {has}; name yours with --set title_column=...")
    return title
