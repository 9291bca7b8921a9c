"""Classical recommenders: popularity, item-to-item neighbours, and what followed in sequences."""

from __future__ import annotations

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

MOST_KEPT = 1 << 26  # similarities


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
        try:
            frame = pd.read_parquet(path, columns=["item_id", "interactions"])
        except (OSError, ValueError) as error:
            reason = shown(str(error).strip().split("\n")[0])
            raise ValueError(f"{path}: cannot be read ({reason}); delete it and run napo sasrec again") from None
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


class FromHistory:
    """Scores that are sums over the history: each of its items gives every item of the catalogue something.

    A kind of it says how many of the latest items count and with which weights, and what an item gives.
    """

    protocol = OWN_SCORE
    most_items = None

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.rows: dict[int, np.ndarray] = {}

    def gives(self, item: int) -> NDArray[np.float64]:
        """(num_items,) what ``item`` in a history gives to the score of every item."""
        raise NotImplementedError

    def counted(self, history: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The items of a history that count, and their weights."""
        return history, np.ones(len(history))

    def row(self, item: int) -> np.ndarray:
        """``gives``, kept once computed, up to 256 MiB of them."""
        if item not in self.rows:
            row = self.gives(item)
            if len(self.rows) >= max(1, MOST_KEPT // self.num_items):
                del self.rows[next(iter(self.rows))]
            self.rows[item] = row.astype(np.float32)
        return self.rows[item]

    def scores(self, histories: Histories, item_ids: Any) -> NDArray[np.float64]:
        ids = checked_ids(item_ids, len(histories), self.num_items)
        scores = np.zeros(ids.shape)
        for row, history in enumerate(histories):
            for item, weight in self._terms(history):
                scores[row] += weight * self.row(item)[ids[row]]
        return scores

    def all_scores(self, histories: Histories) -> NDArray[np.float64]:
        scores = np.zeros((len(histories), self.num_items))
        for row, history in enumerate(histories):
            for item, weight in self._terms(history):
                scores[row] += weight * self.row(item)
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
        # Sparse: (users, items) of ones, so that the catalogue's square is never made.
        sequences = [np.unique(sequence) for sequence in data.training_sequences()]
        self.neighbours = neighbours
        items, users = _flat(sequences)
        self.counts = np.bincount(items, minlength=self.num_items).astype(np.float64)
        self.users_of = _by_item(items, users, self.num_items)
        self.items_of = sequences

    def gives(self, item: int) -> NDArray[np.float64]:
        """Cosines to ``item``; 0 to itself."""
        together = np.zeros(self.num_items)
        for user in self.users_of[item]:
            together[self.items_of[user]] += 1
        row = together / np.sqrt(np.maximum(self.counts * self.counts[item], 1.0))
        row[item] = 0.0
        if self.neighbours is not None and self.neighbours < self.num_items:
            row[np.argsort(-row, kind="stable")[self.neighbours :]] = 0.0
        return row


class SequentialRules(FromHistory):
    """What followed the latest items of the history in training sequences, with weights that fall with the distance.

    An item gives each item that followed it within ``window`` places 1 / distance each time, and counts itself with
    1 / (its place from the end of the history), up to ``window`` places. Sequential rules of Ludewig and Jannach
    (arXiv 1803.09587), over more than the last item. Nothing is learned, and order counts, which ItemKNN is blind to.
    """

    def __init__(self, data: PreparedData, window: int = 10) -> None:
        super().__init__(data.num_items)
        self.window = window
        sequences = data.training_sequences()
        self.items, users = _flat(sequences)
        self.ends = np.cumsum([len(sequence) for sequence in sequences])[users]  # by place: where its sequence ends
        self.places_of = _by_item(self.items, np.arange(len(self.items)), self.num_items)

    def gives(self, item: int) -> NDArray[np.float64]:
        places = self.places_of[item]
        row = np.zeros(self.num_items)
        for distance in range(1, self.window + 1):
            places = places[places + distance < self.ends[places]]
            row += np.bincount(self.items[places + distance], minlength=self.num_items) / distance
        return row

    def counted(self, history: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        latest = history[-self.window :]
        return latest, 1.0 / np.arange(len(latest), 0, -1)


def _flat(sequences: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The items of all sequences one after the other, and the sequence that each is of."""
    items = np.concatenate(sequences) if sequences else np.empty(0, np.int64)
    return items, np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])


def _by_item(items: NDArray[np.int64], values: NDArray[np.int64], num_items: int) -> list[NDArray[np.int64]]:
    """The values of each item of the catalogue, in their order."""
    order = np.argsort(items, kind="stable")
    return np.split(values[order], np.cumsum(np.bincount(items, minlength=num_items))[:-1])
