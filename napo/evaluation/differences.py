"""Differences between models on the same rows, and which of them the rows tell apart.

Everything that compares models goes by this: tables, verdicts, reports, ``comparisons.json`` and ``catalogue.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from napo.evaluation import metrics


@dataclass(frozen=True)
class Judged:
    """M models that ranked the same n rows, in R runs."""

    names: Sequence[str]
    values: NDArray[np.float64]  # (R, M, n): what each row was worth, as 1 where the right item was first
    users: NDArray[np.int64]  # (n,)

    @property
    def means(self) -> NDArray[np.float64]:
        """(M,) over all runs."""
        return self.values.mean((0, 2))


@dataclass(frozen=True)
class Pair:
    """How far ``model`` is above ``other``, with the 95% interval over users."""

    model: str
    other: str
    difference: float
    low: float
    high: float
    same_sign: bool = True  # in every run

    @property
    def apart(self) -> bool:
        return self.same_sign and (self.low > 0 or self.high < 0)

    @property
    def reversed(self) -> Pair:
        return Pair(self.other, self.model, -self.difference, -self.high, -self.low, self.same_sign)

    @property
    def interval(self) -> str:
        return f"95% interval {self.low:+.3f} to {self.high:+.3f}"

    @property
    def not_apart(self) -> str:
        """What to say where they are not ``apart``."""
        return f"{self.model} and {self.other} cannot be told apart ({self.difference:+.3f}, {self.interval})"


def pairs(judged: Judged, chosen: Sequence[tuple[int, int]] | None = None) -> list[Pair]:
    """The ``chosen`` pairs of models by number; None: every two once, the better one first, those of the best model
    before the others. Over several runs values are averaged first, and users are drawn with all their rows."""
    if chosen is None:
        order = [int(place) for place in np.argsort(-judged.means, kind="stable")]
        chosen = [(a, b) for number, a in enumerate(order) for b in order[number + 1 :]]
    if not chosen:
        return []
    mean = judged.values.mean(0)  # (M, n)
    values = np.stack([mean[a] - mean[b] for a, b in chosen], 1)  # (n, pairs)
    bounds = metrics.intervals(values, judged.users)
    found = []
    for (a, b), column, (low, high) in zip(chosen, values.T, bounds, strict=True):
        each = judged.values[:, a].mean(1) - judged.values[:, b].mean(1)  # (R,)
        found.append(
            Pair(
                judged.names[a],
                judged.names[b],
                float(column.mean()),
                float(low),
                float(high),
                bool((each > 0).all() or (each < 0).all()),
            )
        )
    return found
