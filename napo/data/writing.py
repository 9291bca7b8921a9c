"""Rows as parquet: built from the log chunk by chunk, so that memory stays bounded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .candidates import random_lists, seeded_list
from .splits import Rows

# Full histories grow with the square of a user's interactions. Beyond this many ids in a file they are left out, and
# PreparedData.load fills them in from interactions.parquet.
MOST_FULL_HISTORY = 20_000_000
CHUNK_IDS = 4_000_000

CandidateLists = Callable[[slice], np.ndarray]
"""The candidate lists (n, count) of a slice of the rows; slices come in order."""


class Sequences:
    """All users' sequences end to end: ``log`` (n,) items, user u's from ``starts[u]`` to ``starts[u + 1]``."""

    def __init__(self, log: np.ndarray, starts: np.ndarray, num_items: int) -> None:
        self.log, self.starts, self.num_items = log, starts, num_items

    def evaluation_lists(self, rows: Rows, *, count: int, seed: int, shown: int | None = None) -> CandidateLists:
        """The field's rule. Nothing of the history is drawn, or of its last ``shown`` items where that is given."""

        def lists(part: slice) -> np.ndarray:
            target = self.starts[rows.user[part]] + rows.position[part]
            length = rows.position[part] if shown is None else np.minimum(rows.position[part], shown)
            made = [
                seeded_list(self.log[end - size : end], int(self.log[end]), self.num_items, count, seed)
                for end, size in zip(target, length, strict=True)
            ]
            return np.array(made, np.int64).reshape(-1, count)

        return lists

    def training_lists(self, rows: Rows, *, count: int, seed: int) -> CandidateLists:
        """Drawn anew for each row."""
        generator = np.random.default_rng(seed)
        scratch = np.full(self.num_items, np.iinfo(np.int64).max)

        def lists(part: slice) -> np.ndarray:
            made = np.empty((part.stop - part.start, count), np.int64)
            user, position = rows.user[part], rows.position[part]
            for begin, end in _runs(user):
                own = self.log[self.starts[user[begin]] : self.starts[user[begin] + 1]]
                made[begin:end] = random_lists(own, position[begin:end], scratch, count, generator)
            return made

        return lists

    def write_rows(
        self, path: Path, rows: Rows, lists: CandidateLists, *, shown: int, users_known: bool = True
    ) -> None:
        """A split's file. Where users are not known, each row is a sequence of its own and ``user_id`` is null."""
        whole = not users_known or int(rows.position.sum()) <= MOST_FULL_HISTORY
        writer = None
        for part in _chunks(rows):
            user, position = rows.user[part], rows.position[part]
            target = self.starts[user] + position
            length = np.minimum(position, shown)
            empty = pa.nulls(len(user), pa.list_(pa.int64()))
            columns = {
                "user_id": pa.array(user) if users_known else pa.nulls(len(user), pa.int64()),
                "history": self._lists(target - length, length),
                "full_history": self._lists(self.starts[user], position) if whole else empty,
                "next": pa.array(self.log[target]),
                "candidates": _fixed(lists(part)),
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
    pq.write_table(pa.table(columns), path, compression="zstd")


def _chunks(rows: Rows) -> Iterator[slice]:
    """At least one chunk, empty or not; chunks end where a user does."""
    begin = size = 0
    for first, last in _runs(rows.user):
        size += int(rows.position[first:last].sum()) + 64 * (last - first)
        if size > CHUNK_IDS:
            yield slice(begin, last)
            begin, size = last, 0
    if size or not begin:
        yield slice(begin, len(rows))


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)] if len(values) else []
    return itertools.pairwise(bounds)


def _fixed(lists: np.ndarray) -> pa.ListArray:
    offsets = np.arange(len(lists) + 1) * lists.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(lists.reshape(-1), pa.int64()))
