"""The best of a row of scores."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray


def best(
    scores: NDArray[np.float64], k: int, exclude: Collection[int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ``k`` best of (I,) scores outside ``exclude``, best first, of equal ones the lower number; fewer where there
    are no more. What is excluded is dropped and not marked: any score may be that of an item."""
    wanted = np.ones(len(scores), bool)
    wanted[list(exclude)] = False
    items = np.flatnonzero(wanted)
    found = scores[items]
    if 0 < k < len(items):
        ahead = ~(found < np.partition(found, len(found) - k)[len(found) - k])
        items, found = items[ahead], found[ahead]
    order = np.argsort(-found, kind="stable")[:k]
    return items[order], found[order]
