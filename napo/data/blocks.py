"""Lines by the block: Arrow parses megabytes at a time, and what it does not take is read line by line."""

from __future__ import annotations

import codecs
import functools
import io
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.json as pj

from .lines import LONGEST_LINE, Lines

AHEAD = 2
"""Blocks that are parsed while the next is decompressed; both go on without Python's lock."""

Parse = Callable[[bytes], "pa.Table | None"]


def tables(lines: Lines, parse: Parse) -> Iterator[tuple[bytes, pa.Table | None]]:
    """Every block of ``lines`` (what is left of them, where some were read) as bytes and as ``parse`` has it: a table
    without nulls, one row per line, or None where the block is not plain. The caller accepts the block or takes its
    lines one by one."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[bytes, Future[pa.Table | None]]] = deque()
        for block in lines.blocks():
            waiting.append((block, pool.submit(parse, block)))
            if len(waiting) > AHEAD:
                block, future = waiting.popleft()
                yield block, future.result()
        while waiting:
            block, future = waiting.popleft()
            yield block, future.result()


def csv_parser(width: int, places: list[int], delimiter: str) -> Parse:
    """Blocks of lines of ``width`` fields without any quote -> the fields at ``places``, as text."""
    names = [str(place) for place in range(width)]
    wanted = [str(place) for place in places]

    def parse(block: bytes) -> pa.Table | None:
        num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
        if b'"' in block or b"\0" in block or len(block) > LONGEST_LINE or _has_lone_return(block):
            return None
        try:
            if not block.isascii():
                block.decode()
                if codecs.BOM_UTF8 in block:
                    return None
            table = pc.read_csv(
                io.BytesIO(block),
                read_options=pc.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
                parse_options=pc.ParseOptions(delimiter=delimiter, quote_char=False),
                convert_options=pc.ConvertOptions(
                    include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
                ),
            )
        except (pa.ArrowException, UnicodeDecodeError):
            return None
        return table.combine_chunks() if len(table) == num_lines else None

    return parse


def _has_lone_return(block: bytes) -> bool:
    """Arrow ends a line at a carriage return too; to ``Lines`` it is text where no line feed follows."""
    return b"\r" in block and block.count(b"\r") != block.count(b"\r\n")


# Arrow crashes on a null that stands where an object should. So each line has to begin with one, and behind a brace
# there may only be what goes on within an object, or the end of the line.
_BEHIND_A_BRACE = re.compile(rb"\}[ \t\r]*[^,\]}\s]")


def json_parser(schema: pa.Schema) -> Parse:
    """Blocks of one object per line -> the columns of the schema."""
    return functools.partial(_json_table, schema=schema)


def _json_table(block: bytes, schema: pa.Schema) -> pa.Table | None:
    begun = block.startswith(b"{") + block.count(b"\n{")
    if begun != block.count(b"\n") + (not block.endswith(b"\n")) or b"\0" in block or _BEHIND_A_BRACE.search(block):
        return None
    if _has_lone_return(block):
        return None
    try:
        if not block.isascii():
            block.decode()
        table = pj.read_json(
            io.BytesIO(block),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    # One object per line: Arrow itself would take an object of two lines.
    if len(table) != begun or any(column.null_count for column in table.columns):
        return None
    return table.combine_chunks()
