"""A prepared data set: the folder that ``napo prepare`` writes and everything else reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from napo.data.interactions import NOUNS
from napo.data.texts import one_line, shown
from napo.files import read_json, refuse_special, replacing, why_kept

SPLITS = ("train", "val", "test")
FILES = {"dataset.json", *(f"{name}.parquet" for name in ("interactions", "items", "users", *SPLITS))}
"""All that a prepared data set holds: a folder with anything else in it is not replaced."""
LIST_COLUMNS = ("history", "full_history", "candidates")
NUMBER, LIST, TEXT = "whole numbers of 64 bits", "lists of whole numbers of 64 bits", "text"
COLUMNS = {
    "interactions": {"user_id": NUMBER, "item_id": NUMBER, "timestamp": NUMBER},
    "items": {"item_id": NUMBER, "title": TEXT, "source_id": TEXT},
    "users": {"user_id": NUMBER, "source_id": TEXT},
    "rows": {"user_id": NUMBER, "history": LIST, "full_history": LIST, "next": NUMBER, "candidates": LIST},
}
KINDS = {
    NUMBER: (pa.int64(),),
    LIST: (pa.list_(pa.int64()),),
    TEXT: (pa.string(), pa.large_string()),
}


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
        refuse_special(path / "dataset.json")
        if not (path / "dataset.json").is_file():
            raise ValueError(f"{path}: no prepared data set (dataset.json is missing); make one with: napo prepare")
        meta = read_json(path / "dataset.json")
        _check_meta(path / "dataset.json", meta)
        return cls(path, meta)

    @cached_property
    def interactions(self) -> pd.DataFrame:
        path = self.path / "interactions.parquet"
        log = _frame(_read_table(path, "interactions", self.num_items))
        user = log["user_id"].to_numpy()
        wrong = np.flatnonzero(np.diff(user, prepend=0) < 0)
        if len(wrong):
            raise _damaged(path, f"row {wrong[0]}: user_id {user[wrong[0]]} is out of order")
        return log

    @cached_property
    def items(self) -> pd.DataFrame:
        path = self.path / "items.parquet"
        items = _frame(_read_table(path, "items"))
        wrong = np.flatnonzero(items["item_id"].to_numpy() != np.arange(len(items)))
        if len(wrong):
            raise _damaged(path, f"row {wrong[0]}: item_id {items['item_id'][wrong[0]]}, expected {wrong[0]}")
        for row, title in enumerate(items["title"]):
            if not title or title != one_line(title):
                raise _damaged(path, f"row {row}: {shown(title, 60)!r} is no title of one line")
        twice = np.flatnonzero(items["title"].duplicated())
        if len(twice):
            raise _damaged(path, f"row {twice[0]}: {shown(items['title'][twice[0]], 60)!r} is another item's title too")
        return items

    @cached_property
    def users(self) -> pd.DataFrame:
        """user_id and source_id, the user's name in the source; not there where the source tells no users."""
        path = self.path / "users.parquet"
        users = _frame(_read_table(path, "users")).sort_values("user_id", ignore_index=True)
        count = len(user_starts(self.interactions["user_id"].to_numpy())) - 1
        if not np.array_equal(users["user_id"], np.arange(count)):
            raise _damaged(path, f"expected the users 0 to {count - 1} of interactions.parquet, each once")
        twice = np.flatnonzero(users["source_id"].duplicated())
        if len(twice):
            raise _damaged(path, f"user {shown(users['source_id'][twice[0]], 60)!r} is there twice")
        return users

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
        path = self.path / f"{split}.parquet"
        table = _read_table(path, "rows", self.num_items, has_users=self.has_users)
        whole = "position" not in table.column_names
        log = np.empty(0, np.int64) if whole else self.interactions["item_id"].to_numpy()
        ends = None if whole else _ends_in_log(path, table, self.interactions["user_id"].to_numpy())
        _check_rows(path, table, log, ends)
        rows = _frame(table)
        if ends is not None:
            rows["full_history"] = [
                log[end - size : end] if full is None else full
                for full, size, end in zip(rows["full_history"], rows.pop("position"), ends, strict=True)
            ]
        return rows

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
        if not len(train):
            raise ValueError(f"{self.path / 'train.parquet'}: no rows, so there is nothing to learn from; prepare anew")
        pairs = zip(train["full_history"], train["next"], strict=True)
        return [np.append(np.asarray(past, np.int64), last) for past, last in pairs]

    def training_counts(self) -> NDArray[np.int64]:
        """How often the training users met each item (items,)."""
        return np.bincount(self.training_items()[0], minlength=self.num_items)

    def training_items(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The items of all training sequences one after the other, and the number of the sequence that each is of."""
        sequences = self.training_sequences()
        return np.concatenate(sequences), np.repeat(np.arange(len(sequences)), list(map(len, sequences)))

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
    out = Path(out).resolve()  # a link stays, and what it leads to is replaced
    why = _why_kept(out)
    if why is not None:
        raise ValueError(f"{out}: {why}, so it is no prepared data set to be replaced; give another --out")
    if out.exists() and Path.cwd().is_relative_to(out):  # who stands there would be left in a folder that is gone
        raise ValueError(f"{out}: is where you stand, and would be replaced; give another --out, or go elsewhere first")
    with replacing(out) as aside:
        aside.mkdir()
        yield aside


def _why_kept(out: Path) -> str | None:
    """What tells that ``prepare`` did not make ``out``; None where nothing does, as of an empty folder."""
    why = why_kept(out, FILES, "dataset.json")
    if why is not None:
        return shown(why, 80)
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if not names or names >= FILES - {"users.parquet"}:  # which older ones have not
        return None
    try:
        meta = read_json(out / "dataset.json")
    except ValueError:
        meta = None
    own = isinstance(meta, dict) and {"source", "options", "counts"} <= meta.keys()
    return None if own else "holds a dataset.json of another kind"


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: {what}; the file was changed or damaged; run napo prepare again")


def _check_meta(path: Path, meta: Any) -> None:
    """What the commands read of ``dataset.json``."""
    if not isinstance(meta, dict) or not isinstance(meta.get("options"), dict):
        raise _damaged(path, "not what napo prepare writes")
    if meta.get("noun") not in tuple(NOUNS):
        raise _damaged(path, f"noun {shown(meta.get('noun'), 40)!r}, expected one of {', '.join(NOUNS)}")
    if type(meta.get("has_users")) is not bool:
        raise _damaged(path, f"has_users {shown(meta.get('has_users'), 40)!r}, expected true or false")
    for name, least in (("history", 1), ("seed", None)):
        value = meta["options"].get(name)
        if type(value) is not int or (least is not None and value < least):
            raise _damaged(path, f"options.{name} {shown(value, 40)!r}, expected a whole number")


def _ends_in_log(path: Path, table: pa.Table, users: np.ndarray) -> np.ndarray:
    """(n,) where in the log, whose interactions ``users`` (ascending) has, the full history of each row ends."""
    starts = user_starts(users)
    user, position = (table.column(name).to_numpy() for name in ("user_id", "position"))
    known = (user >= 0) & (user < len(starts) - 1)
    user = np.where(known, user, 0)
    sizes = np.diff(starts, append=0)[user]
    wrong = np.flatnonzero(~known | (position < 0) | (position >= sizes))
    if len(wrong):
        row = wrong[0]
        raise _damaged(path, f"row {row}: interactions.parquet has no position {position[row]} of that user")
    return starts[user] + position


def _check_rows(path: Path, table: pa.Table, log: np.ndarray, ends: np.ndarray | None) -> None:
    """Each target is once among its candidates, and each history is the end of its full history, which lies in the
    table or, where it is null there, ends in the log at ``ends``."""
    target = table.column("next").to_numpy()
    candidates, offsets = _flat(table.column("candidates"))
    owner = np.repeat(np.arange(len(target)), np.diff(offsets))
    found = np.bincount(owner[candidates == target[owner]], minlength=len(target))
    wrong = np.flatnonzero(found != 1)
    if len(wrong):
        raise _damaged(path, f"row {wrong[0]}: expected next, {target[wrong[0]]}, exactly once among its candidates")
    history, offsets = _flat(table.column("history"))
    full, full_offsets = _flat(table.column("full_history"))
    here = table.column("full_history").is_valid().to_numpy()
    sizes = np.diff(offsets)
    wrong = np.flatnonzero(here & (sizes > np.diff(full_offsets)))
    if ends is not None:
        wrong = np.append(wrong, np.flatnonzero(~here & (sizes > table.column("position").to_numpy())))
    if not len(wrong):
        last = full_offsets[1:] if ends is None else np.where(here, full_offsets[1:], ends)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(len(history)) - np.repeat(offsets[1:], sizes) + last[owner]
        inside = here[owner]
        expected = np.empty_like(history)
        expected[inside] = full[place[inside]]
        expected[~inside] = log[place[~inside]]
        wrong = owner[history != expected]
    if len(wrong):
        raise _damaged(path, f"row {wrong[0]}: history is not the end of full_history")


def _read_table(path: Path, kind: str, num_items: int | None = None, *, has_users: bool = True) -> pa.Table:
    """A table of the columns ``COLUMNS[kind]``; of rows also ``position``, where full histories may be null. Ids of
    items are from 0 to ``num_items`` - 1."""
    refuse_special(path)
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); run napo prepare again") from None
    columns = dict(COLUMNS[kind])
    if kind == "rows" and "position" in table.column_names:
        columns["position"] = NUMBER
    null = {"user_id"} if not has_users else {"full_history"} if "position" in columns else set()
    for name, expected in columns.items():
        if table.column_names.count(name) != 1:
            raise _damaged(path, f"{table.column_names.count(name)} columns {name}, expected one")
        column = table.column(name)
        if column.type not in KINDS[expected]:
            raise _damaged(path, f"column {name}: expected {expected}, got {shown(column.type, 40)}")
        if column.null_count and name not in null:
            raise _damaged(path, f"column {name}: {column.null_count} values are missing")
        if num_items is not None and name in ("item_id", "next", *LIST_COLUMNS):
            ids = pc.list_flatten(column) if expected == LIST else column
            if ids.null_count:
                raise _damaged(path, f"column {name}: {ids.null_count} ids are missing")
            ids = ids.to_numpy()
            wrong = ids[(ids < 0) | (ids >= num_items)]
            if len(wrong):
                raise _damaged(path, f"column {name}: expected ids from 0 to {num_items - 1}, got {wrong[0]}")
    if not has_users and kind == "rows" and table.column("user_id").null_count != len(table):
        raise _damaged(path, "column user_id: expected no users, as dataset.json says")
    return table.select(list(columns))


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Lists of numbers as one array, and (n + 1,) where each begins in it."""
    sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return pc.list_flatten(column).to_numpy(), np.append(0, np.cumsum(sizes, dtype=np.int64))


def _frame(table: pa.Table) -> pd.DataFrame:
    frame = table.select([name for name in table.column_names if name not in LIST_COLUMNS]).to_pandas()
    if "user_id" in frame and len(table) and table.column("user_id").null_count == len(table):
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
