"""Classical recommenders: popularity and item-to-item neighbours."""

from __future__ import annotations

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


class ItemKNN:
    """Sum over the history of cosine similarities between items, an item being the training users who met it.

    ``neighbours``: only an item's so many most similar items count; None counts all.
    """

    protocol = OWN_SCORE
    most_items = None

    def __init__(self, data: PreparedData, neighbours: int | None = None) -> None:
        # Sparse: (users, items) of ones, so that the catalogue's square is never made.
        sequences = [np.unique(sequence) for sequence in data.training_sequences()]
        self.num_items, self.neighbours = data.num_items, neighbours
        items = np.concatenate(sequences) if sequences else np.empty(0, np.int64)
        users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
        self.counts = np.bincount(items, minlength=self.num_items).astype(np.float64)
        order = np.argsort(items, kind="stable")
        self.users_of = np.split(users[order], np.cumsum(self.counts[:-1]).astype(np.int64))
        self.items_of = sequences
        self.rows: dict[int, np.ndarray] = {}

    def similarities(self, item: int) -> np.ndarray:
        """(num_items,) cosine to ``item``; 0 to itself. Kept once computed, up to 256 MiB of them."""
        if item not in self.rows:
            together = np.zeros(self.num_items)
            for user in self.users_of[item]:
                together[self.items_of[user]] += 1
            row = together / np.sqrt(np.maximum(self.counts * self.counts[item], 1.0))
            row[item] = 0.0
            if self.neighbours is not None and self.neighbours < self.num_items:
                row[np.argsort(-row, kind="stable")[self.neighbours :]] = 0.0
            if len(self.rows) >= max(1, MOST_KEPT // self.num_items):
                del self.rows[next(iter(self.rows))]
            self.rows[item] = row.astype(np.float32)
        return self.rows[item]

    def scores(self, histories: Histories, item_ids: Any) -> NDArray[np.float64]:
        ids = checked_ids(item_ids, len(histories), self.num_items)
        scores = np.zeros(ids.shape)
        for row, history in enumerate(histories):
            for item in known_history(history, self.num_items).tolist():
                scores[row] += self.similarities(item)[ids[row]]
        return scores

    def all_scores(self, histories: Histories) -> NDArray[np.float64]:
        scores = np.zeros((len(histories), self.num_items))
        for row, history in enumerate(histories):
            for item in known_history(history, self.num_items).tolist():
                scores[row] += self.similarities(item)
        return scores
