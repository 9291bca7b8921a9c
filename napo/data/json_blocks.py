"""JSON lines by the block: Arrow parses megabytes at a time, and what it does not take is read line by line."""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import pyarrow.json as pj

from .lines import Lines

AHEAD = 2
"""Blocks that are parsed while the next is decompressed; both go on without Python's lock."""


def tables(lines: Lines, schema: pa.Schema) -> Iterator[tuple[bytes, pa.Table | None]]:
    """Every block of ``lines`` as bytes and as a table of the schema's columns, without nulls, one row a line; None
    where that is not what the block holds. The caller accepts the block or takes its lines one by one."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[bytes, Future[pa.Table | None]]] = deque()
        for block in lines.blocks():
            waiting.append((block, pool.submit(_table, block, schema)))
            if len(waiting) > AHEAD:
                block, future = waiting.popleft()
                yield block, future.result()
        while waiting:
            block, future = waiting.popleft()
            yield block, future.result()


# Arrow crashes on a null that stands where an object should. So each line has to begin with one, and behind a brace
# there may only be what goes on within an object, or the end of the line.
_BEHIND_A_BRACE = re.compile(rb"\}[ \t\r]*[^,\]}\s]")


def _table(block: bytes, schema: pa.Schema) -> pa.Table | None:
    begun = block.startswith(b"{") + block.count(b"\n{")
    if begun != block.count(b"\n") + (not block.endswith(b"\n")) or b"\0" in block or _BEHIND_A_BRACE.search(block):
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
    # One object a line: Arrow itself would take one of two lines.
    if len(table) != begun or any(column.null_count for column in table.columns):
        return None
    return table.combine_chunks()
