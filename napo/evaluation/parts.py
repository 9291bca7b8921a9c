"""A language model's scores in parts of some hundred rows: shared among ranks, and kept, so that an evaluation that was
killed goes on where it was.

The parts are the same however many ranks there are: how a score rounds depends on what it is computed beside.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from napo import ranks
from napo.files import replacing, text_hash
from napo.recommenders.combination import Combination
from napo.recommenders.language_model import LanguageModel
from napo.recommenders.protocol import Histories, Recommender

logger = logging.getLogger(__name__)

T = TypeVar("T")
PART = 256
"""Rows. A minute or so of a small model on a CPU."""


def shared_parts(
    name: str, count: int, read: Callable[[int], T | None], compute: Callable[[list[int]], dict[int, T]]
) -> list[T]:
    """The parts 0 to ``count`` - 1 of the work on ``name``. What ``read`` finds on the first rank was finished before.
    Ranks share the others: ``compute`` makes those of one rank, and keeps each for ``read``."""
    known = ranks.told(lambda: {part: value for part in range(count) if (value := read(part)) is not None})
    if known:
        logger.info("%s: %d of %d parts were finished before", name, len(known), count)
    own = [part for part in range(count) if part not in known][ranks.rank() :: ranks.size()]
    for found in ranks.gathered(lambda: compute(own)):
        known |= found
    return [known[part] for part in range(count)]


def in_parts(recommender: Recommender, name: str, folder: Path) -> Recommender:
    """The recommender ``name`` with all that is slow in parts, which are kept in ``folder``."""
    if isinstance(recommender, Combination):
        for of, part in recommender.parts.items():
            recommender.parts[of] = in_parts(part, of, folder)
        return recommender
    return InParts(recommender, name, folder) if isinstance(recommender, LanguageModel) else recommender


class InParts:
    """A language model whose answers are those of its parts, one after the other."""

    def __init__(self, inner: LanguageModel, name: str, folder: Path) -> None:
        self.inner, self.name, self.folder = inner, name, folder

    @property
    def protocol(self) -> Mapping[str, str]:
        return self.inner.protocol

    @property
    def most_items(self) -> int | None:
        return self.inner.most_items

    def scores(self, histories: Histories, item_ids: Any) -> NDArray[np.float64]:
        ids = np.asarray(item_ids)
        found = self._all("scores", histories, ids, lambda rows: self.inner.scores(histories[rows], ids[rows]))
        return np.concatenate(found)

    def answers(self, histories: Histories, item_ids: NDArray[np.int64]) -> list[str]:
        found = self._all(
            "answers", histories, item_ids, lambda rows: self.inner.answers(histories[rows], item_ids[rows])
        )
        return [answer for part in found for answer in part]

    def greedy_items(self, histories: Histories) -> NDArray[np.int64] | None:
        if self.inner.greedy_items(()) is None:
            return None
        return np.concatenate(
            self._all("items", histories, None, lambda rows: self.inner.greedy_items(histories[rows]))
        )

    def judge(self, answers: list[str], item_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
        return self.inner.judge(answers, item_ids)

    def _all(self, what: str, histories: Histories, ids: Any, work: Callable[[slice], Any]) -> list[Any]:
        rows = [list(map(int, history)) for history in histories]
        lists = None if ids is None else [list(map(int, row)) for row in ids]  # of any lengths
        asked = text_hash(json.dumps([rows, lists]))[:16]
        paths = [self.folder / f"{self.name}-{what}-{asked}-{part}.json" for part in range(-(-len(rows) // PART))]
        lower = self.inner.options.lower

        def compute(parts: list[int]) -> dict[int, Any]:
            found = {}
            for part in parts:
                if lower is not None:
                    lower.series = f"{asked} {part}"
                value = work(slice(part * PART, (part + 1) * PART))
                found[part] = value.tolist() if isinstance(value, np.ndarray) else value
                with replacing(paths[part]) as aside:
                    aside.write_text(json.dumps(found[part]), encoding="utf-8")
            return found

        return shared_parts(self.name, len(paths), lambda part: _read(paths[part]), compute)


def _read(path: Path) -> Any:
    """None where there is nothing that can be read: it is computed again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
