"""The result in words: which model is best, by how much, and which cannot be told apart.

Every claim rests on a paired difference in HR@1 on the same rows, with an interval that resamples users. Over several
runs (seeds) the hits are averaged first, and a difference counts only if it has the same sign in every run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from napo.evaluation.differences import Judged, Pair

LISTED = 4
"""So many pairs that cannot be told apart are named with their differences; of more, the names alone."""

SIMPLEST = "popularity"


def sentences(
    judged: Judged,
    found: Sequence[Pair],
    *,
    baselines: Collection[str] = (),
    parents: Mapping[str, str | None] | None = None,
) -> list[str]:
    """``found``: the pairs of ``judged``. ``parents``: what each trained model was trained from."""
    parents = parents or {}
    runs, _, rows = judged.values.shape
    basis = f"{rows} rows of {len(np.unique(judged.users))} users" + (f", {runs} runs" if runs > 1 else "")
    if not found:
        return [f"{judged.names[0]} is the only model here, so there is nothing to compare it with ({basis})."]
    best = found[0].model
    value = judged.means.max()
    told = [_best(best, float(value), found, basis, runs)]
    for name, parent in parents.items():
        pair = _between(found, name, parent)
        if parent is not None and pair is not None and pair.apart and {name, parent} != {best, found[0].other}:
            word = "above" if pair.difference > 0 else "below"
            told.append(
                f"{name} is {abs(pair.difference):.3f} {word} {parent}, which it was trained from ({pair.interval})."
            )
    alike = [pair for pair in found if not pair.apart and pair.model != best]
    alike.sort(key=lambda pair: parents.get(pair.model) != pair.other and parents.get(pair.other) != pair.model)
    told += [f"{pair.not_apart}." for pair in alike[:LISTED]]
    if len(alike) > LISTED:
        told.append("Nor can these: " + "; ".join(f"{pair.model} and {pair.other}" for pair in alike[LISTED:]) + ".")
    below = [
        name
        for name in judged.names
        if name not in baselines and (pair := _between(found, SIMPLEST, name)) and pair.apart and pair.difference > 0
    ]
    if below:
        told.append(f"Below {SIMPLEST}, and so no recommender yet: {_listed(below)}.")
    if len(found) > 1:
        told.append(
            f"Each interval is for one comparison. There are {len(found)}: if no model differed, about one in twenty "
            "would still seem to."
        )
    return told


def _best(best: str, value: float, found: Sequence[Pair], basis: str, runs: int) -> str:
    own = [pair for pair in found if pair.model == best]
    unclear = [pair for pair in own if not pair.apart]
    if unclear:
        which = _listed([f"{pair.other} ({pair.difference:+.3f}, {pair.interval})" for pair in unclear])
        return f"{best} has the highest HR@1, {value:.3f}, but cannot be told apart from {which}; {basis}."
    nearest = own[0]
    every = f" in every run, {nearest.difference:.3f} on average" if runs > 1 else ""
    amount = "above" if runs > 1 else f"{nearest.difference:.3f} above"
    return f"{best} is best: HR@1 {value:.3f}, {amount} {nearest.other}{every} ({nearest.interval}; {basis})."


def _between(found: Sequence[Pair], model: str, other: str | None) -> Pair | None:
    for pair in found:
        if (pair.model, pair.other) == (model, other):
            return pair
        if (pair.other, pair.model) == (model, other):
            return pair.reversed
    return None


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
