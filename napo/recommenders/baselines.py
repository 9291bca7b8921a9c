"""Classical recommenders: popularity, item-to-item neighbours, and what followed in sequences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from napo.data.candidates import checked_ids, known_history
from napo.data.prepared import PreparedData
from napo.data.texts import shown
from napo.recommenders.protocol import OWN_SCORE, Histories

MOST_KEPT = 1 << 24  # numbers of rows: 192 MiB
ROW = 32  # numbers that take as much memory as a row does beside its own


class Popularity:
    """The number of training interactions with an item, whoever asks."""

    protocol = OWN_SCORE
    most_items = None

    def __init__(self, counts: NDArray[np.float64]) -> None:
        self.counts = counts  # (items,)

    @classmethod
    def of(cls, data: PreparedData) -> Popularity:
        """Counted in the sequences that models may learn from."""
        return cls(data.training_counts().astype(np.float64))

    @classmethod
    def read(cls, path: Path, num_items: int) -> Popularity:
        """The counts that a run keeps."""
        frame = _kept_table(path, ["item_id", "interactions"])
        counts, items = frame["interactions"], frame["item_id"]
        whole = counts.dtype.kind in "iu" and np.array_equal(items, np.arange(num_items)) and (counts >= 0).all()
        if not whole:
            raise ValueError(
                f"{path}: expected counts of {num_items} items in their order; got {len(counts)} of other kinds or in "
                "another order; delete it and run napo sasrec again"
            )
        return cls(counts.to_numpy(np.float64))

    def scores(self, histories: Histories, item_ids: Any) -> NDArray[np.float64]:
        return self.counts[checked_ids(item_ids, len(histories), len(self.counts))]

    def all_scores(self, histories: Histories) -> NDArray[np.float64]:
        return np.tile(self.counts, (len(histories), 1))


Row = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Item ids, ascending, and a number above 0 for each; every other item has 0."""


class FromHistory(ABC):
    """Scores that are sums over the history: each of its items gives some items of the catalogue something.

    A kind of it says how many of the latest items count and with which weights, and what an item gives. Rows are
    sparse, so that neither memory nor time goes by the square of the catalogue.
    """

    protocol = OWN_SCORE
    most_items = None

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.rows: dict[int, Row] = {}
        self._kept = 0

    @abstractmethod
    def gives(self, item: int) -> Row:
        """What ``item`` in a history gives to the scores of others."""

    def counted(self, history: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The items of a history that count, and their weights."""
        return history, np.ones(len(history))

    def row(self, item: int) -> Row:
        """``gives``, kept once computed; what was computed first goes where there are more than ``MOST_KEPT``
        numbers."""
        if item not in self.rows:
            self.rows[item] = self.gives(item)
            self._kept += ROW + len(self.rows[item][0])
            while self._kept > MOST_KEPT and len(self.rows) > 1:
                self._kept -= ROW + len(self.rows.pop(next(iter(self.rows)))[0])
        return self.rows[item]

    def scores(self, histories: Histories, item_ids: Any) -> NDArray[np.float64]:
        ids = checked_ids(item_ids, len(histories), self.num_items)
        scores = np.zeros(ids.shape)
        for number, history in enumerate(histories):
            for item, weight in self._terms(history):
                known, values = self.row(item)
                if len(known):
                    places = np.searchsorted(known, ids[number]).clip(max=len(known) - 1)
                    scores[number] += np.where(known[places] == ids[number], weight * values[places], 0.0)
        return scores

    def all_scores(self, histories: Histories) -> NDArray[np.float64]:
        scores = np.zeros((len(histories), self.num_items))
        for number, history in enumerate(histories):
            for item, weight in self._terms(history):
                known, values = self.row(item)
                scores[number, known] += weight * values
        return scores

    def _terms(self, history: Sequence[int] | np.ndarray) -> Iterator[tuple[int, float]]:
        items, weights = self.counted(known_history(history, self.num_items))
        return zip(items.tolist(), weights.tolist(), strict=True)


class ItemKNN(FromHistory):
    """Sum over the history of cosine similarities between items, an item being the training users who met it.

    ``neighbours``: only an item's so many most similar items count; None counts all.
    """

    def __init__(self, data: PreparedData, neighbours: int | None = None) -> None:
        super().__init__(data.num_items)
        self.neighbours = neighbours
        self.items_of = [np.unique(sequence) for sequence in data.training_sequences()]
        items = np.concatenate(self.items_of)
        self.counts = np.bincount(items, minlength=self.num_items).astype(np.float64)
        self.places_of = _Places(items, self.num_items)
        self.users = np.repeat(np.arange(len(self.items_of)), list(map(len, self.items_of)))

    def gives(self, item: int) -> Row:
        """Cosines to ``item``; 0 to itself."""
        met = [self.items_of[user] for user in self.users[self.places_of[item]]]
        others, together = _summed(met, [np.ones(len(items)) for items in met], self.num_items)
        cosines = (together / np.sqrt(self.counts[others] * self.counts[item])).astype(np.float32)
        kept = np.flatnonzero(others != item)
        if self.neighbours is not None:
            kept = np.sort(kept[np.argsort(-cosines[kept], kind="stable")[: self.neighbours]])
        return others[kept], cosines[kept]


class SequentialRules(FromHistory):
    """What followed the latest items of the history in training sequences, with weights that fall with the distance.

    An item gives each item that followed it within ``window`` places 1 / distance each time, and counts itself with
    1 / (its place from the end of the history), up to ``window`` places. Sequential rules of Ludewig and Jannach
    (arXiv 1803.09587), over more than the last item. Nothing is learned, and order counts, which ItemKNN is blind to.
    """

    def __init__(self, items: NDArray[np.int64], whose: NDArray[np.int64], num_items: int, *, window: int = 10) -> None:
        """``items`` of all sequences one after the other; ``whose``: the number of the sequence of each, ascending."""
        super().__init__(num_items)
        self.window = window
        self.items = items.astype(np.int32)  # a log of millions is in memory while it serves
        self.ends = np.searchsorted(whose, whose, side="right").astype(np.int32)  # by place: where its sequence ends
        self.places_of = _Places(items, num_items)

    @classmethod
    def of(cls, data: PreparedData, *, window: int = 10) -> SequentialRules:
        """From the sequences that models may learn from."""
        return cls(*data.training_items(), data.num_items, window=window)

    @classmethod
    def read(cls, path: Path, num_items: int) -> SequentialRules:
        """From the sequences that a run keeps."""
        frame = _kept_table(path, ["sequence", "item_id"])
        whole = all(frame[name].dtype.kind in "iu" and not frame[name].isna().any() for name in frame)
        if whole:
            whose, items = (frame[name].to_numpy() for name in ("sequence", "item_id"))
            whole = bool((whose[1:] >= whose[:-1]).all()) and bool(((items >= 0) & (items < num_items)).all())
        if not whole:
            raise ValueError(
                f"{path}: expected sequences of items from 0 to {num_items - 1}, one after the other; got others; "
                "delete it and run napo sasrec again"
            )
        return cls(items.astype(np.int64), whose, num_items)

    def gives(self, item: int) -> Row:
        places, followers, weights = self.places_of[item], [], []
        for distance in range(1, self.window + 1):
            places = places[places + distance < self.ends[places]]
            followers.append(self.items[places + distance])
            weights.append(np.full(len(places), 1.0 / distance))
        return _summed(followers, weights, self.num_items)

    def counted(self, history: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        latest = history[-self.window :]
        return latest, 1.0 / np.arange(len(latest), 0, -1)


def _kept_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A table that the run keeps; one that cannot be read is an error that says what to do."""
    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError) as error:
        reason = shown(str(error).strip().split("\n")[0])
        raise ValueError(f"{path}: cannot be read ({reason}); delete it and run napo sasrec again") from None


class _Places:
    """The places at which each item of the catalogue stands among ``items``, ascending."""

    def __init__(self, items: NDArray[np.int64], num_items: int) -> None:
        self.order = np.argsort(items, kind="stable").astype(np.int32)
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(items, minlength=num_items))])

    def __getitem__(self, item: int) -> NDArray[np.int64]:
        return self.order[self.starts[item] : self.starts[item + 1]].astype(np.int64)


def _summed(ids: Sequence[NDArray[Any]], weights: Sequence[NDArray[np.float64]], num_items: int) -> Row:
    """The sum of each item's weights."""
    flat = np.concatenate(ids) if ids else np.empty(0, np.int64)
    each = np.concatenate(weights) if ids else np.empty(0)
    if len(flat) > num_items // 8:  # to sort them would take longer than to go over the catalogue
        sums = np.bincount(flat, each, num_items)
        known = np.flatnonzero(sums)
        return known, sums[known].astype(np.float32)
    known, which = np.unique(flat, return_inverse=True)
    return known.astype(np.int64), np.bincount(which, each, len(known)).astype(np.float32)
