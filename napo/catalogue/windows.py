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
    prompts, _, targets = beginnings(windows, trie, header=header, first=first)
    if negatives is None:
        return pack_items(prompts, [[target] for target in targets], trie, **options)
    if len(negatives) != len(windows):
        raise ValueError(f"negatives: expected lists for each of {len(windows)} windows, got {len(negatives)}")
    counts = [len(window) - place for window, place in zip(windows, first_targets(windows, first), strict=True)]
    for number, (others, count) in enumerate(zip(negatives, counts, strict=True)):
        if len(others) != count:
            raise ValueError(
                f"negatives: expected a list for each of {count} targets of window {number}, got {len(others)}"
            )
    rivals = [list(group) for others in negatives for group in others]
    return pack_items(
        prompts, [[target, *group] for target, group in zip(targets, rivals, strict=True)], trie, **options
    )


def beginnings(
    windows: Sequence[Sequence[int]], trie: Trie, *, header: Sequence[int], first: int | Sequence[int] = 0
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Window by window and place by place: every target's prompt as token ids, the items in it, and the target."""
    firsts = first_targets(windows, first)
    if not header and 0 in firsts:
        raise ValueError(
            "header: expected a token before the first target, got none; give a header, or first of 1 and two items"
        )
    prompts: list[list[int]] = []
    histories: list[list[int]] = []
    targets: list[int] = []
    for window, place in zip(windows, firsts, strict=True):
        line, ends = list(header), [len(header)]
        for item in window[:-1]:
            line += trie.title(item)
            ends.append(len(line))
        prompts += [line[:end] for end in ends[place:]]
        histories += [list(window[:end]) for end in range(place, len(window))]
        targets += window[place:]
    return prompts, histories, targets


def first_targets(windows: Sequence[Sequence[int]], first: int | Sequence[int]) -> list[int]:
    """The place of the first target of each window; its last title is one in any case."""
    if not all(map(len, windows)):
        raise ValueError(f"windows: expected an item in each, got none in window {list(map(len, windows)).index(0)}")
    firsts = [first] * len(windows) if isinstance(first, int) else list(first)
    if len(firsts) != len(windows):
        raise ValueError(f"first: expected a place for each of {len(windows)} windows, got {len(firsts)}")
    return [min(place, len(window) - 1) for place, window in zip(firsts, windows, strict=True)]
