"""Rows as parquet: built from the log chunk by chunk, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .candidates import TrainingLists, seeded_list
from .splits import Rows

# Full histories grow with the square of a user's interactions. Beyond this many ids in a file they are left out, and
# PreparedData.load fills them in from interactions.parquet.
MOST_FULL_HISTORY = 20_000_000
CHUNK_IDS = 4_000_000

CandidateLists = Callable[[Rows, slice], np.ndarray]
"""The candidate lists (n, count) of some owners' rows, which are a slice of all; slices come in order."""


class Sequences:
    """All users' sequences end to end: ``log`` (n,) items, user u's from ``starts[u]`` to ``starts[u + 1]``."""

    def __init__(self, log: np.ndarray, starts: np.ndarray, num_items: int) -> None:
        self.log, self.starts, self.num_items = log, starts, num_items

    def evaluation_lists(self, *, count: int, seed: int, shown: int | None = None) -> CandidateLists:
        """The field's rule. Nothing of the history is drawn, or of its last ``shown`` items where that is given."""

        def lists(rows: Rows, _: slice) -> np.ndarray:
            position = rows.position
            target = self.starts[rows.user] + position
            length = position if shown is None else np.minimum(position, shown)
            made = [
                seeded_list(self.log[end - size : end], int(self.log[end]), self.num_items, count, seed)
                for end, size in zip(target, length, strict=True)
            ]
            return np.array(made, np.int64).reshape(-1, count)

        return lists

    def training_lists(self, *, count: int, seed: int) -> CandidateLists:
        """Drawn anew for each row."""
        lists = TrainingLists(self.log, self.starts, self.num_items, count, seed)
        return lambda rows, _: lists.draw(rows)

    def write_rows(
        self, path: Path, rows: Rows, lists: CandidateLists, *, shown: int, users_known: bool = True
    ) -> None:
        """A split's file. Where users are not known, each row is a sequence of its own and ``user_id`` is null."""
        whole = not users_known or int(rows.history_sizes().sum()) <= MOST_FULL_HISTORY
        writer, begin = None, 0
        for owners in _chunks(rows):
            chunk = rows.of(owners)
            user, position = chunk.user, chunk.position
            part = slice(begin, begin + len(user))
            begin = part.stop
            target = self.starts[user] + position
            length = np.minimum(position, shown)
            empty = pa.nulls(len(user), pa.list_(pa.int64()))
            columns = {
                "user_id": pa.array(user) if users_known else pa.nulls(len(user), pa.int64()),
                "history": self._lists(target - length, length),
                "full_history": self._lists(self.starts[user], position) if whole else empty,
                "next": pa.array(self.log[target].astype(np.int64)),
                "candidates": _fixed(lists(chunk, part)),
            }
            if not whole:
                columns["position"] = pa.array(position)
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None
        writer.close()

    def _lists(self, begin: np.ndarray, length: np.ndarray) -> pa.ListArray:
        """list<int64> whose n-th entry is log[begin : begin + length]."""
        offsets = np.append(0, np.cumsum(length))
        index = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], length)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(self.log[index], pa.int64()))


def write_table(path: Path, columns: dict[str, Any]) -> None:
    write_tables(path, [columns])


def write_tables(path: Path, parts: Iterable[dict[str, Any]]) -> None:
    """The parts of one table, at least one, in order."""
    writer = None
    for columns in parts:
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()


def _chunks(rows: Rows) -> Iterator[slice]:
    """Slices of the owners, at least one, empty or not."""
    begin = size = 0
    for place, own in enumerate((rows.history_sizes() + 64 * rows.counts).tolist()):
        size += own
        if size > CHUNK_IDS:
            yield slice(begin, place + 1)
            begin, size = place + 1, 0
    if size or not begin:
        yield slice(begin, len(rows.owner))


def _fixed(lists: np.ndarray) -> pa.ListArray:
    offsets = np.arange(len(lists) + 1) * lists.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(lists.reshape(-1), pa.int64()))
