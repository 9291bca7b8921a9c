"""Your own data: interactions and items as CSV, TSV, JSON lines (also .gz) or Parquet, as the file's name says."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from napo.files import refuse_special
from napo.progress import progress

from ..blocks import csv_parser, json_parser, tables
from ..fields import Fields
from ..interactions import Log, key, title_of
from ..lines import BAD_LINE, READ_SIZE, Lines, Tally
from ..missing import MISSING
from ..texts import shown, without_unseen
from ..times import Moment, TimeReader

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz")
DELIMITERS = (",", ";", "\t", "|")
_SEPARATOR = re.compile('"?sep=(.)"?', re.IGNORECASE)
"""A line before the header that tells spreadsheets the delimiter."""


@dataclass
class Format:
    """How a file of text is written; None is found out."""

    delimiter: str | None = None
    quote: str = '"'
    encoding: str | None = None
    prefix: str = ""
    """Of the names of the options that set these."""

    @property
    def options(self) -> dict[str, str]:
        """As ``Lines.options``."""
        return {name: f"{self.prefix}{name}" for name in ("encoding", "quote")}

    def __post_init__(self) -> None:
        names = {"tab": "\t", "\\t": "\t"}
        self.delimiter = names.get(self.delimiter, self.delimiter) if self.delimiter else None
        if self.delimiter is not None and (len(self.delimiter) > 2 or self.delimiter in ("\n", "\r", '"')):
            raise ValueError(f"delimiter: expected a character or two, or tab, got {self.delimiter!r}")
        self.quote = "" if self.quote == "none" else self.quote
        if len(self.quote) > 1 or self.quote == self.delimiter:
            raise ValueError(f"quote: expected one character other than the delimiter, or none, got {self.quote!r}")


@dataclass(kw_only=True)
class Options:
    """Interactions need a user, an item and a time (a number or a date), items an item and a title."""

    items: str | None = None
    """The file of items, where PATH is that of the interactions."""
    user_column: str = "user_id"
    """The column of users."""
    item_column: str = "item_id"
    """The column of items, in both files."""
    time_column: str = "timestamp"
    """The column of times: numbers or dates."""
    title_column: str = "title"
    """The column of titles, in the file of items."""
    date_format: str | None = None
    """Where dates are not ISO dates, how they are written, in the codes of strptime: %d.%m.%Y %H:%M."""
    delimiter: str | None = None
    """Between fields; null: it is found out."""
    quote: str = '"'
    """Around fields; "none" for none."""
    encoding: str | None = None
    """Of text; null: it is found out."""
    items_item_column: str | None = None
    """The column of items in the file of items, where it has another name there."""
    items_delimiter: str | None = None
    """Of the file of items, where it differs."""
    items_quote: str | None = None
    """Of the file of items, where it differs."""
    items_encoding: str | None = None
    """Of the file of items, where it differs."""
    noun: str = "Items"
    """Kind of the items: Movies, Artists, Books, Games or Items."""

    def interactions_format(self) -> Format:
        return Format(self.delimiter, self.quote, self.encoding)

    def items_format(self) -> Format:
        return Format(
            self.items_delimiter or self.delimiter,
            self.items_quote or self.quote,
            self.items_encoding or self.encoding,
            prefix="items_",
        )


def read(path: Path, options: Options, *, max_bad: float) -> Log:
    """``path``: a folder with interactions.* and items.*, or, with ``options.items``, the file of interactions."""
    log = Log(noun=options.noun)
    interactions = path if _is_file(path) else _named(path, "interactions")
    titles = _named(interactions.parent, "items") if options.items is None else _titles(interactions, options.items)
    user, item, when = options.user_column, options.item_column, options.time_column
    first, second = options.interactions_format(), options.items_format()
    time = TimeReader(options.date_format)
    wanted: Columns = {user: written_key, item: written_key, when: time}
    named = {user: "user_column", item: "item_column", when: "time_column"}
    if len(wanted) < 3:
        raise ValueError(f"columns: expected three, got {user}, {item}, {when}")
    _rows(log, interactions, wanted, named, log.add, max_bad, first, functools.partial(_add_block, log, time))
    time.settle(interactions, when)
    own = options.items_item_column or item
    wanted = {own: written_key} | ({} if own == options.title_column else {options.title_column: title_of})
    named = {own: "items_item_column", options.title_column: "title_column"}
    # Where titles are the ids there is one column for both.
    take = log.title if len(wanted) > 1 else lambda name: log.title(name, name)
    _rows(log, titles, wanted, named, take, max_bad, second)
    return log


def _titles(interactions: Path, items: str) -> Path:
    """The file that ``items`` names, from the folder of the interactions or from where the command runs."""
    places = (interactions.parent / items, Path(items))
    for place in places:
        refuse_special(place)
    there = [place for place in places if _is_file(place)]
    if not there:
        raise ValueError(f"items: no file {items} beside {interactions.name} or here")
    if len(there) > 1 and not there[0].samefile(there[1]):
        raise ValueError(
            f"items: there are two files {items}, {there[0].resolve()} and {there[1].resolve()}; give the one that you "
            "mean by its whole path"
        )
    return there[0]


def written_key(value: Any) -> str:
    """An id of a file that programs have written, who have words for a value that is not there. Text stays as it is
    written: the log spells it, and counts that."""
    if type(value) is str:
        if (value if value.isascii() else without_unseen(value)).strip() in MISSING:
            raise ValueError(f"expected an id, got {shown(value, 40)}")
        return value
    return key(value)


def _is_file(path: Path) -> bool:
    """Parquet may also be a folder of parts."""
    return path.is_file() or (path.is_dir() and path.suffix == ".parquet")


def _named(folder: Path, stem: str) -> Path:
    found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if _is_file(folder / f"{stem}{suffix}")]
    if len(found) != 1:
        raise ValueError(f"{folder}: expected one {stem} file ({', '.join(SUFFIXES)}), found {len(found)}")
    return found[0]


Columns = dict[str, Callable[[Any], Any]]
TakeBlock = Callable[[pa.Table], bool]


def _add_block(log: Log, time: TimeReader, table: pa.Table) -> bool:
    """``log.add`` for the users, items and times of a plain block: ids spelled as the log spells them, whole numbers as
    times. False, and nothing added, where the rows have to be looked at one by one."""
    users, items, times = (column.combine_chunks() for column in table.columns)
    if time.date_format is not None:
        return False
    sizes = None
    if pa.types.is_string(times.type):
        if not pc.all(pc.match_substring_regex(times, "^[0-9]{1,18}$")).as_py():
            return False
        sizes = pc.binary_length(times).to_numpy()
        times = times.cast(pa.int64())
    users, items = users.dictionary_encode(), items.dictionary_encode()
    try:
        for known, column in ((log.user_ids, users), (log.item_ids, items)):
            for name in column.dictionary.to_pylist():
                if name not in known and str(name) != key(written_key(name)):
                    return False
        log.extend(users, items, times.to_numpy())
    except BAD_LINE:
        return False
    if sizes is None:
        time.num_numbers += len(table)
    else:
        time.note_texts(sizes)
    return True


def _rows(
    log: Log,
    path: Path,
    columns: Columns,
    named: Mapping[str, str],
    take: Callable[..., None],
    max_bad: float,
    written: Format,
    take_block: TakeBlock | None = None,
) -> None:
    """``take`` gets the wanted columns of each row, converted; the file's report goes to the log. ``named``: the option
    that names each column. ``take_block`` may take the rows of a text file by the block, where that does the same."""
    if path.suffix == ".parquet":
        for part in _parts(path):
            _parquet_rows(log, part, columns, named, take, max_bad)
        return
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("csv", "tsv", "jsonl"):
        raise ValueError(f"{path}: expected a file that ends with one of {', '.join(SUFFIXES)}")
    with Lines(path, max_bad=max_bad, encoding=written.encoding) as lines:
        lines.remedy, lines.options = _remedy(columns), written.options
        if kind == "jsonl":
            _json_rows(lines, columns, named, take, take_block)
        else:
            tab = "\t" if kind == "tsv" else None
            last = _delimited_rows(lines, columns, named, take, written, tab, take_block)
    if kind != "jsonl" and isinstance(last, TimeReader):
        lines.tell_cut(last.shorter_last())
    log.report["files"].append(lines.report())


def _remedy(columns: Columns) -> Callable[[], str]:
    return next((convert.remedy for convert in columns.values() if isinstance(convert, TimeReader)), str)


def _take(take: Callable[..., None], columns: Columns, values: list[Any]) -> None:
    done = []
    for value, (name, convert) in zip(values, columns.items(), strict=True):
        try:
            done.append(convert(value))
        except BAD_LINE as error:
            raise ValueError(f"{name}: {error}") from None
    take(*done)


def _json_rows(
    lines: Lines,
    columns: Columns,
    named: Mapping[str, str],
    take: Callable[..., None],
    take_block: TakeBlock | None = None,
) -> None:
    names = list(columns)
    seen: set[str] = set()
    loads = functools.partial(json.loads, parse_float=Decimal)

    def take_lines(entries: Iterable[tuple[int, str]]) -> None:
        nonlocal seen
        for number, text in entries:
            try:
                record = loads(text)
                if type(record) is not dict:
                    raise ValueError(f"expected one object a line, got {type(record).__name__}")
                if len(seen) < len(names):
                    seen |= record.keys() & columns.keys()
                _take(take, columns, [record.get(name) for name in names])
            except BAD_LINE as error:
                lines.bad(number, error)

    entries = iter(lines)
    first = list(itertools.islice(entries, 1))
    take_lines(first)
    schema = _schema(first[0][1], names) if first and take_block is not None and lines.encoding is None else None
    if schema is None or take_block is None:
        take_lines(entries)
    else:
        for block, table in tables(lines, json_parser(schema)):
            if table is not None and take_block(table.select(names)):
                lines.accept(block)
            else:
                take_lines(lines.lines_of(block))
    missing = [name for name in names if name not in seen]
    if missing and lines.num_lines > lines.num_bad:
        raise ValueError(f"{lines.path}: no line has {', '.join(missing)}; name yours with {_settings(missing, named)}")


def _schema(text: str, names: list[str]) -> pa.Schema | None:
    """The columns of the first line: text, or whole numbers; None if it has something else."""
    kinds = {str: pa.string(), int: pa.int64()}
    try:
        record = json.loads(text)
        return pa.schema([(name, kinds[type(record[name])]) for name in names])
    except BAD_LINE:
        return None


def _delimited_rows(
    lines: Lines,
    columns: Columns,
    named: Mapping[str, str],
    take: Callable[..., None],
    written: Format,
    delimiter: str | None,
    take_block: TakeBlock | None = None,
) -> Callable[[Any], Any] | None:
    """What converts the last column, where that is a wanted one."""
    entries = iter(lines)
    first = next(entries, None)
    if first is not None and (told := _SEPARATOR.fullmatch(first[1])):
        delimiter, first = told[1], next(entries, None)
    if first is None:
        lines.settle()  # lines there may be, and all bad, as in UTF-16
        raise ValueError(f"{lines.path}: empty, expected a line with the names of the columns")
    fields = Fields(written.delimiter or delimiter or _delimiter(first[1], columns, written.quote), written.quote)
    written_header = fields.split(first[1])
    header = [name.strip() for name in written_header]
    check_columns(lines.path, header, named)
    places = [header.index(name) for name in columns]

    def take_lines(entries: Iterator[tuple[int, str]]) -> None:
        for number, row in fields.records(lines, entries, len(header)):
            if not any(map(str.strip, row)):  # as empty lines; spreadsheets write those of cells once used
                continue
            try:
                if len(row) != len(header):
                    raise ValueError(f"expected {len(header)} fields, got {len(row)}")
                if row == written_header:  # of a file that was put behind another
                    raise ValueError("the header again")
                _take(take, columns, [row[place] for place in places])
            except BAD_LINE as error:
                lines.bad(number, error)

    if take_block is not None and lines.encoding is None and len(fields.delimiter) == 1 and written.quote in ('"', ""):
        blocks = tables(lines, csv_parser(len(header), places, fields.delimiter))
        for block, table in blocks:
            if table is not None and take_block(table):
                lines.accept(block)
            elif b'"' in block:  # a quoted field may go on in the next block
                rest = itertools.chain([block], (following for following, _ in blocks))
                entries = itertools.chain.from_iterable(map(lines.lines_of, rest))
                break
            else:
                take_lines(lines.lines_of(block))
    take_lines(entries)
    return columns.get(header[-1])


def _delimiter(header: str, columns: Columns, quote: str) -> str:
    """The first under which the header has the wanted columns."""
    for delimiter in DELIMITERS:
        if set(columns) <= {name.strip() for name in Fields(delimiter, quote).split(header)}:
            return delimiter
    return max(DELIMITERS, key=header.count)


def _parts(path: Path) -> list[Path]:
    """A file, or the files of a folder in order of their names, without those that Spark and others keep aside."""
    if not path.is_dir():
        return [path]
    named = [
        part for part in path.rglob("*.parquet") if not any(name[0] in "._" for name in part.relative_to(path).parts)
    ]
    for part in named:
        refuse_special(part)
    parts = sorted(part for part in named if part.is_file())
    if not parts:
        raise ValueError(f"{path}: a folder without .parquet files")
    return parts


def _parquet_rows(
    log: Log, path: Path, columns: Columns, named: Mapping[str, str], take: Callable[..., None], max_bad: float
) -> None:
    tally, size = Tally(path, max_bad, "row"), path.stat().st_size
    tally.remedy = _remedy(columns)
    try:
        file = pq.ParquetFile(path)
        check_columns(path, file.schema_arrow.names, named)
        with progress(f"read {path.name}", size / 2**20, unit="MiB") as bar:
            for batch in file.iter_batches(columns=list(columns)):
                for name, convert in columns.items():
                    if isinstance(convert, TimeReader) and pa.types.is_floating(batch.column(name).type):
                        convert.note_floats(batch.column(name).drop_null().to_numpy())
                wanted = {name: _typed(convert, batch.column(name).type) for name, convert in columns.items()}
                for values in zip(*(_values(batch.column(name)) for name in columns), strict=True):
                    tally.num_lines += 1
                    try:
                        _take(take, wanted, list(values))
                    except BAD_LINE as error:
                        tally.bad(tally.num_lines, error)
                bar.advance(size / 2**20 * len(batch) / file.metadata.num_rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cut short or no Parquet file ({shown(str(error).splitlines()[0])})") from None
    tally.settle()
    sha256 = hashlib.sha256()
    with path.open("rb") as raw:
        while block := raw.read(READ_SIZE):
            sha256.update(block)
    log.report["files"].append(
        {"name": shown(path.name), "bytes": size, "sha256": sha256.hexdigest(), **tally.report()}
    )


def _typed(convert: Callable[[Any], Any], kind: pa.DataType) -> Callable[[Any], Any]:
    """Floats with fewer bits hold fewer integers exactly."""
    bits = {pa.float32(): 24, pa.float16(): 11}.get(kind)
    return functools.partial(key, exact_below=2**bits) if bits and convert is written_key else convert


def _values(column: pa.Array) -> list[Any]:
    """Python's values; a time as an exact number of seconds, which its own types would cut to microseconds."""
    kind = column.type
    if not pa.types.is_timestamp(kind):
        return column.to_pylist()
    decimals = {"s": 0, "ms": 3, "us": 6, "ns": 9}[kind.unit]
    return [None if value is None else Moment(value, decimals) for value in column.cast(pa.int64()).to_pylist()]


def check_columns(where: Path | str, found: list[str], named: Mapping[str, str]) -> None:
    """Each column of ``named`` is there, once. All that are not are told at once, with the options that name them."""
    missing = [name for name in named if name not in found]
    twice = [name for name in named if found.count(name) > 1]
    if missing or twice:
        there = f"no column {', '.join(missing)}" if missing else f"{found.count(twice[0])} columns {twice[0]}"
        has = shown(", ".join(found), 300)
        raise ValueError(f"{where}: {there}; it has {has}; name yours with {_settings(missing or twice, named)}")


def _settings(columns: Iterable[str], named: Mapping[str, str]) -> str:
    return " ".join(f"--set {named[name]}=..." for name in columns)
