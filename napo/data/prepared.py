"""A prepared data set: the folder that ``napo prepare`` writes and everything else reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from napo.data.texts import shown
from napo.files import replacing

SPLITS = ("train", "val", "test")
FILES = {"dataset.json", *(f"{name}.parquet" for name in ("interactions", "items", "users", *SPLITS))}
"""All that a prepared data set holds: a folder with anything else in it is not replaced."""
LIST_COLUMNS = ("history", "full_history", "candidates")


class PreparedData:
    """``interactions`` (user_id, item_id, timestamp), by user in time order; ``items`` (item_id, title, source_id).

    Rows of ``train``, ``val``, ``test``: user_id (null where the source does not tell), history (the last 10 item ids
    before ``next``, oldest first, unpadded), full_history, next, candidates (``next`` among 19 others).

    A table is read when it is first asked for: millions of training rows are gigabytes that an evaluation never sees.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta

    @classmethod
    def load(cls, path: str | Path) -> PreparedData:
        path = Path(path)
        if not (path / "dataset.json").is_file():
            raise ValueError(f"{path}: no prepared data set (dataset.json is missing); make one with: napo prepare")
        return cls(path, json.loads((path / "dataset.json").read_text(encoding="utf-8")))

    @cached_property
    def interactions(self) -> pd.DataFrame:
        return _read_table(self.path / "interactions.parquet")

    @cached_property
    def items(self) -> pd.DataFrame:
        return _read_table(self.path / "items.parquet")

    @cached_property
    def train(self) -> pd.DataFrame:
        return self._rows("train")

    @cached_property
    def val(self) -> pd.DataFrame:
        return self._rows("val")

    @cached_property
    def test(self) -> pd.DataFrame:
        return self._rows("test")

    def _rows(self, split: str) -> pd.DataFrame:
        rows = _read_table(self.path / f"{split}.parquet")
        if "position" not in rows:
            return rows
        log = self.interactions
        return _fill_history(rows, log["item_id"].to_numpy(), user_starts(log["user_id"].to_numpy()))

    @property
    def titles(self) -> list[str]:
        return self.items["title"].tolist()

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def noun(self) -> str:
        return self.meta["noun"]

    @property
    def history_length(self) -> int:
        """The most items that the ``history`` of a row has."""
        return self.meta["options"]["history"]

    @property
    def has_users(self) -> bool:
        """Whether the source tells whose each row is."""
        return bool(self.meta["has_users"])

    def training_sequences(self) -> list[np.ndarray]:
        """What models may learn from: by training user, the longest known sequence of items.

        Where the source does not tell users, every row stands for itself, so prefixes of one user overlap.
        """
        train = self.longest_training_rows()
        pairs = zip(train["full_history"], train["next"], strict=True)
        return [np.append(np.asarray(past, np.int64), last) for past, last in pairs]

    def training_counts(self) -> NDArray[np.int64]:
        """How often the training users met each item (items,)."""
        counts = np.zeros(self.num_items, np.int64)
        for sequence in self.training_sequences():
            counts += np.bincount(sequence, minlength=self.num_items)
        return counts

    def longest_training_rows(self) -> pd.DataFrame:
        """The rows that ``training_sequences`` are made from, in the same order."""
        train = self.train
        if not len(train) or train["user_id"].isna().any():
            return train
        length = train["full_history"].map(len).to_numpy()
        order = np.lexsort((length, train["user_id"].to_numpy()))
        users = train["user_id"].to_numpy()[order]
        return train.iloc[np.sort(order[np.append(users[1:] != users[:-1], True)])]

    def validation_sequences(self) -> tuple[list[np.ndarray], list[int]]:
        """Sequences of items, and for each the position of its first target, for early stopping.

        A validation user who is not trained on has all of the sequence up to the last validation target to validate on,
        not only the few rows of ``val``. Otherwise a row's ``next`` is the one target.
        """
        val = self.val
        sequences = [
            np.append(np.asarray(past, np.int64), last)
            for past, last in zip(val["full_history"], val["next"], strict=True)
        ]
        if not self.has_users:
            return sequences, [len(sequence) - 1 for sequence in sequences]
        trained = set(self.train["user_id"])
        longest: dict[int, np.ndarray] = {}
        first: dict[int, int] = {}
        for user, sequence in zip(val["user_id"].tolist(), sequences, strict=True):
            if len(sequence) > len(longest.get(user, ())):
                longest[user] = sequence
            first[user] = 1 if user not in trained else min(len(sequence) - 1, first.get(user, len(sequence)))
        return list(longest.values()), [first[user] for user in longest]


def user_starts(user: np.ndarray) -> np.ndarray:
    """(n,) user numbers from 0, ascending -> (users + 1,): user u owns positions starts[u] to starts[u + 1]."""
    num_users = int(user[-1]) + 1 if len(user) else 0
    return np.searchsorted(user, np.arange(num_users + 1))


@contextmanager
def written_aside(out: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when everything went well, and vanishes when not.

    At no moment is ``out`` half of something, not even for a process that is killed; what such a one leaves beside it
    goes with the next call.
    """
    out = Path(out).absolute()
    if out.exists():
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        others = sorted(names - FILES)
        if not out.is_dir() or others or (names and "dataset.json" not in names):
            found = f"holds {shown(others[0], 60)}" if others else "has no dataset.json" if names else "is a file"
            raise ValueError(f"{out}: {found}, so it is no prepared data set to be replaced; give another --out")
    with replacing(out) as aside:
        aside.mkdir()
        yield aside


def _read_table(path: Path) -> pd.DataFrame:
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); run napo prepare again") from None
    frame = table.select([name for name in table.column_names if name not in LIST_COLUMNS]).to_pandas()
    if "user_id" in frame and len(frame) and frame["user_id"].isna().all():
        frame["user_id"] = pd.array([None] * len(frame), dtype="Int64")
    for name in LIST_COLUMNS:
        if name in table.column_names:
            frame[name] = _lists(table.column(name).combine_chunks())
    return frame


def _lists(column: Any) -> np.ndarray:
    """list<int64> -> object array of views into one int64 array; None where null."""
    values = column.values.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    lists = np.empty(len(column), object)
    for row in range(len(column)):
        lists[row] = values[offsets[row] : offsets[row + 1]] if valid[row] else None
    return lists


def _fill_history(rows: pd.DataFrame, log: np.ndarray, starts: np.ndarray) -> pd.DataFrame:
    """Full histories that the file leaves out, since the log has them: the first ``position`` items of the user."""
    missing = rows["full_history"].isna().to_numpy()
    if missing.any():
        full = rows["full_history"].to_numpy(object, copy=True)
        user, position = rows["user_id"].to_numpy(), rows["position"].to_numpy()
        for row in np.flatnonzero(missing):
            start = starts[user[row]]
            full[row] = log[start : start + position[row]]
        rows["full_history"] = full
    return rows.drop(columns="position")
