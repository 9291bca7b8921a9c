"""Finds false negatives: borrowed items that the borrower has in its history, or has chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from napo_kernels.checks import describe


def false_negative_triples(
    histories: Sequence[Sequence[int] | np.ndarray],  # B lists of item ids, of any length
    chosen: Sequence[int] | Tensor,  # (B,) item ids
    negatives: Sequence[Sequence[int]] | Tensor,  # (B', N) item ids; negative ids are padding
    *,
    pad_to: int | None = None,
) -> Tensor:  # (E, 3) int64
    """The triples (user, owner, negative) for ``napo_loss(exclude=...)``, sorted and distinct, on the CPU.

    The pool's items are sorted once and every history looks its own up, so memory is that of the inputs and of the
    triples found, never (B, B', history). ``pad_to`` appends rows of -1 up to that number of triples, for static
    shapes. A user's own negatives are checked like borrowed ones.
    """
    pool = _ids("negatives", negatives)  # (B', N)
    if pool.ndim != 2:
        raise ValueError(f"negatives: expected shape (B', N), got {pool.shape}")
    picked = _ids("chosen", chosen)
    if picked.shape != (len(histories),):
        raise ValueError(f"chosen: expected one item per history, shape ({len(histories)},), got {picked.shape}")

    pairs = zip(histories, picked, strict=True)
    known = [np.append(_ids(f"histories[{user}]", history), item) for user, (history, item) in enumerate(pairs)]
    users = np.repeat(np.arange(len(known)), [len(items) for items in known])
    items = np.concatenate(known) if known else np.empty(0, dtype=np.int64)
    users, items = np.unique(np.stack((users, items))[:, items >= 0], axis=1)

    places = np.argsort(pool, axis=None, kind="stable")  # flat (owner, negative), by item
    ordered = pool.reshape(-1)[places]
    first = np.searchsorted(ordered, items, side="left")
    hits = np.searchsorted(ordered, items, side="right") - first
    # Hit j of pair i is places[first[i] + j]: one running index less the start of its pair.
    within = np.arange(hits.sum()) - np.repeat(np.cumsum(hits) - hits, hits)
    place = places[np.repeat(first, hits) + within]
    user = np.repeat(users, hits)
    order = np.lexsort((place, user))
    owner, negative = np.divmod(place[order], max(1, pool.shape[1]))
    triples = np.stack((user[order], owner, negative), axis=1)
    result = torch.from_numpy(triples)
    if pad_to is None:
        return result
    if len(result) > pad_to:
        raise ValueError(f"pad_to: expected room for the {len(result)} triples found, got {pad_to}")
    return torch.cat((result, result.new_full((pad_to - len(result), 3), -1)))


def _ids(name: str, values: Any) -> np.ndarray:
    """Item ids as int64: a number with a fraction would be cut off to another item's."""
    try:
        ids = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{name}: expected a regular array of item ids, got {describe(values)}") from None
    if ids.size and (ids.dtype.kind not in "iu" or ids.max() > np.iinfo(np.int64).max):
        raise ValueError(f"{name}: expected item ids as integers of 64 bits, got {ids.dtype} {ids.reshape(-1)[0]!r}")
    return ids.astype(np.int64, copy=False)
