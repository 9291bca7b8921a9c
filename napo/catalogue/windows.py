"""Whole-sequence windows: every title of a window is a target given those before it.

The prompts of a window are the beginnings of one another, so ``pack`` lays the window out once; negatives are branches
at the places of their targets. A title inside a window stands whole, because it is history for the titles behind it,
the last one only as far as its last choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from napo.catalogue.packing import CatalogueBatch, pack_items
from napo.catalogue.trie import Trie


def pack_windows(
    windows: Sequence[Sequence[int]],
    trie: Trie,
    *,
    header: Sequence[int],
    first: int | Sequence[int] = 0,
    negatives: Sequence[Sequence[Sequence[int]]] | None = None,
    **options: Any,
) -> CatalogueBatch:
    """Windows of item ids, each behind ``header``; sequences are the targets, window by window and place by place, each
    followed by its negatives.

    ``first``: the titles from this place on are targets (a window that has no more is left with its last one); one
    number for all windows, or one for each.
    ``negatives``: for each window and each of its targets a list of items. ``options`` are those of ``pack``.
    """
    if not all(map(len, windows)):
        raise ValueError(f"windows: expected an item in each, got none in window {list(map(len, windows)).index(0)}")
    firsts = [first] * len(windows) if isinstance(first, int) else list(first)
    if len(firsts) != len(windows):
        raise ValueError(f"first: expected a place for each of {len(windows)} windows, got {len(firsts)}")
    if not header and not all(firsts):
        raise ValueError("header: expected a token before the first target, got none; give a header, or first of 1")
    prompts, items = [], []
    for number, window in enumerate(windows):
        places = range(min(firsts[number], len(window) - 1), len(window))
        others = [()] * len(places) if negatives is None else negatives[number]
        if len(others) != len(places):
            raise ValueError(
                f"negatives: expected a list for each of {len(places)} targets of window {number}, got {len(others)}"
            )
        line, ends = list(header), [len(header)]
        for item in window[:-1]:
            line += trie.title(item)
            ends.append(len(line))
        prompts += [line[: ends[place]] for place in places]
        items += [[window[place], *rivals] for place, rivals in zip(places, others, strict=True)]
    return pack_items(prompts, items, trie, **options)
